"""Violence for a demo that must stay exact: consumers killed at work, or stopped until others have their work; Postgres killed.

A consumer is only hit while it holds a window; the server only if it is the demo's alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from durable_cluster.embedded import pauses
from durable_cluster.errors import ConnectionFailed
from durable_cluster.ops import lookups
from durable_cluster.ops.lasting import Lasting
from durable_cluster.shards.supervisor import Supervisor

KILLS_MIN = 20
KILLS = 25
# The kills are spread over this part of the run: at its end there is too little work to be caught at.
SHARE_OF_RUN = 0.85
KILLS_AT_ONCE_MAX = 2
KILL_S = 4.0
STOP_S_MAX = 1.0
STOPS_AT = (0.02, 0.4, 0.7)
WAKE_S_MAX = 30.0
SERVER_KILLS_AT = (0.2, 0.6)
NOTICE_S = 5.0

Connection = psycopg.Connection[Any]


class Havoc(msgspec.Struct, frozen=True, kw_only=True):
    """What was done.

    ``kills``: consumers ended (SIGKILL) while they held a window. ``stops``: consumers stopped (SIGSTOP) so; ``stops_woken``: those
    of them that were woken after a sibling had taken all their work over; ``windows_lost``: those of them that noticed and came
    back as somebody else. ``server_kills``: of Postgres (SIGKILL to the postmaster); ``why_server_lives``: why there are none.
    """

    kills: int
    stops: int
    stops_woken: int
    windows_lost: int
    server_kills: int
    why_server_lives: str | None

    def told(self) -> str:
        """For people."""
        few = f" (the run was too short for {KILLS_MIN}, try --times 20)" if self.kills < KILLS_MIN else ""
        server = f"killed Postgres {self.server_kills} times"
        if not self.server_kills:
            server = f"Postgres was not killed: {self.why_server_lives or 'the run was too short'}"
        return (
            f"killed {self.kills} consumers while they held a window{few}; stopped {self.stops} and woke {self.stops_woken} when"
            f" others had their work, {self.windows_lost} of which found their window lost; {server}"
        )


class Stopped(msgspec.Struct, frozen=True):
    """A consumer that was stopped, under which owners it held its work, and since when it has been stopped, or awake again."""

    pid: int
    owners: list[int]
    at: float


class Chaos:
    """Strikes by progress, and in a long run also by the clock, so that no stretch of it is spared.

    ``postmaster``: the process id of the local server now, or why it may not be killed.
    """

    def __init__(self, supervisor: Supervisor, dsn: str, postmaster: Callable[[], int | str | None]) -> None:
        self._supervisor = supervisor
        self._postmaster = postmaster
        self._database = Lasting(dsn, name="durable-cluster chaos")
        self._kills = self._stops = self._server_kills = 0
        self._why_server_lives: str | None = None
        self._stopped: Stopped | None = None
        self._woken: list[Stopped] = []
        self._lost: set[int] = set()

    def strike(self, share: float, elapsed_s: float) -> None:
        """Do as much as is due when ``share`` (0 to 1) of the work is done; what finds nobody at work is due next time."""
        self._wake()
        self._notice()
        if self._stopped is None and not self._unnoticed():
            if self._server_kills < sum(share >= at for at in SERVER_KILLS_AT) and self._kill_server():
                return
            if self._stops < sum(share >= at for at in STOPS_AT):
                self._stop_one()
        due = max(min(KILLS, int(share / SHARE_OF_RUN * KILLS) + 1), int(elapsed_s / KILL_S))
        for _ in range(min(KILLS_AT_ONCE_MAX, due - self._kills)):
            self._kill_one()

    def finish(self) -> Havoc:
        """Wake whoever is stopped, see whether all who were woken notice, and say what was done."""
        for _ in pauses(time.monotonic() + WAKE_S_MAX):
            self._wake()
            if self._stopped is None:
                break
        for _ in pauses(time.monotonic() + NOTICE_S):
            self._notice()
            if not self._unnoticed():
                break
        if not self._server_kills and isinstance(reason := self._postmaster(), str):
            self._why_server_lives = reason
        return Havoc(
            kills=self._kills,
            stops=self._stops,
            stops_woken=len(self._woken),
            windows_lost=len(self._lost),
            server_kills=self._server_kills,
            why_server_lives=self._why_server_lives,
        )

    def close(self) -> None:
        """Leave nobody stopped, and close the connection; safe twice."""
        if self._stopped is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._stopped.pid, signal.SIGCONT)
            self._stopped = None
        self._database.close()

    def _kill_one(self) -> None:
        """Stop a consumer first: then what the database says it holds is what it dies with."""
        victim = self._frozen()
        if victim is not None:
            os.kill(victim.pid, signal.SIGKILL)
            self._kills += 1

    def _stop_one(self) -> None:
        self._stopped = self._frozen()
        self._stops += self._stopped is not None

    def _frozen(self) -> Stopped | None:
        """A consumer that was stopped with a window in its hands, if one could be had."""
        spared = self._unnoticed() | ({self._stopped.pid} if self._stopped is not None else set())
        consumers = list(self._supervisor.owners.items())
        random.shuffle(consumers)
        for pid, owners in consumers:
            if pid in spared:
                continue
            try:
                os.kill(pid, signal.SIGSTOP)
                if is_stopped(pid) and self._database.ask(partial(lookups.holds_window, owners=owners)):
                    return Stopped(pid, owners, time.monotonic())
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue  # it has ended since, and was reaped
        return None

    def _wake(self) -> None:
        """Wake the stopped one if others have taken over all it held; or after a while, so that it is not stopped for ever."""
        one = self._stopped
        if one is None:
            return
        is_free = not self._database.ask(lambda connection: holds_work(connection, one.owners))
        if is_free or time.monotonic() > one.at + WAKE_S_MAX:
            self._stopped = None
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGCONT)
                if is_free:
                    self._woken.append(Stopped(one.pid, one.owners, time.monotonic()))

    def _notice(self) -> None:
        """Who was woken and has lost its window comes back under new owner's bits."""
        owners = self._supervisor.owners
        self._lost |= {one.pid for one in self._woken if set(owners.get(one.pid, one.owners)) - set(one.owners)}

    def _unnoticed(self) -> set[int]:
        """Who was woken a moment ago and has not noticed yet."""
        since = time.monotonic() - NOTICE_S
        return {one.pid for one in self._woken if one.at > since} - self._lost

    def _kill_server(self) -> bool:
        """Whether it was killed."""
        if self._why_server_lives is not None:
            return False
        try:
            postmaster = self._postmaster()
        except ConnectionFailed:
            return False
        if not isinstance(postmaster, int):
            self._why_server_lives = postmaster
            return False
        os.kill(postmaster, signal.SIGKILL)
        self._server_kills += 1
        return True


def holds_work(connection: Connection, owners: list[int]) -> bool:
    """Whether any of these incarnations of a consumer holds a window or runs a step beside its pages."""
    row = connection.execute(
        "select exists (select from durable.win where owner = any (%s))"
        " or exists (select from durable.detached where owner = any (%s))",
        (owners, owners),
    ).fetchone()
    return bool(row and row[0])


def is_stopped(pid: int) -> bool:
    """Whether the process has stopped, waiting until it has; False for one that has ended, reaped or not."""
    for _ in pauses(time.monotonic() + STOP_S_MAX):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "TZX":
            return state == "T"
    return False
