"""Killing consumers at work, for a demo that must stay exact: SIGKILL, and only to one that holds a window at that moment."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from durable_cluster.database import connect
from durable_cluster.embedded import pauses
from durable_cluster.ops import lookups
from durable_cluster.shards.supervisor import Supervisor

KILLS_MIN = 20
KILLS = 25
# The kills are spread over this part of the run: at its end there is too little work to be caught at.
SHARE_OF_RUN = 0.85
KILLS_AT_ONCE_MAX = 2
KILL_S = 4.0
STOP_S_MAX = 1.0


class Chaos:
    """Strikes by progress, ``KILLS`` times over the run, and in a long run by the clock, so that no stretch of it is spared."""

    def __init__(self, supervisor: Supervisor, dsn: str) -> None:
        self.kills = 0
        self._supervisor = supervisor
        self._connection = connect(dsn, name="durable-cluster chaos")

    def strike(self, share: float, elapsed_s: float) -> None:
        """Kill as many as are due when ``share`` (0 to 1) of the work is done; what finds nobody at work is due next time."""
        due = max(min(KILLS, int(share / SHARE_OF_RUN * KILLS) + 1), int(elapsed_s / KILL_S))
        for _ in range(min(KILLS_AT_ONCE_MAX, due - self.kills)):
            self._kill_one()

    def told(self) -> str:
        """What was done, for people."""
        few = f"; the run was too short for {KILLS_MIN}, try --times 200" if self.kills < KILLS_MIN else ""
        return f"killed {self.kills} consumers while they held a window (SIGKILL){few}"

    def close(self) -> None:
        """Close the connection; safe twice."""
        self._connection.close()

    def _kill_one(self) -> None:
        """Stop a consumer first: then what the database says it holds is what it dies with."""
        consumers = list(self._supervisor.owners.items())
        random.shuffle(consumers)
        for pid, owners in consumers:
            try:
                os.kill(pid, signal.SIGSTOP)
                is_hit = is_stopped(pid) and lookups.holds_window(self._connection, owners)
                os.kill(pid, signal.SIGKILL if is_hit else signal.SIGCONT)
            except ProcessLookupError:
                continue  # it has ended since, and was reaped
            if is_hit:
                self.kills += 1
                return


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
