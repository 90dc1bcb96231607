"""How a consumer waits for work without asking for it: it marks its shards, and is notified of what is appended to them.

A mark is a lock of the session (see ``claim.sql``). One consumer a shard has it; its siblings hear the same notifications.
Commits that notify wait for each other, all over the server. So who is woken too soon for what that costs stays awake for longer
the next time: under a steady load nobody sleeps, and nobody notifies.
"""

from __future__ import annotations

import select
import time
from collections.abc import Collection, Iterable, Sequence, Set
from typing import Any

import psycopg

from durable_cluster import side_statements
from durable_cluster.settings import Settings

POLL_S_MIN = 0.001
POLL_S_MAX = 0.01
NOTIFYING_MAX = 0.5  # of all time, for commits that notify, were each shard woken as often as it may be
AWAKE_OF_SHORT_SLEEP = 4
AWAKE_S_MAX = 1.0


class Listener:
    """What one consumer has marked, what it was notified of, how long it pauses. ``awake_s``: idle so long, it marks nothing."""

    def __init__(self, connection: psycopg.Connection[Any], settings: Settings, *, shards: int) -> None:
        self._shards = shards
        self._busy_s = self.awake_s = settings.busy_poll_s
        self._pause_s_max = settings.idle_poll_s_max
        self.use(connection)

    def use(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection: the marks ended with the old one."""
        self._connection = connection
        self._listening: set[int] = set()
        self.marked: set[int] = set()
        self._marked_at = 0.0
        self._notified: set[str] = set()
        connection.add_notify_handler(lambda note: self._notified.add(note.channel))

    def mark(self, shards: Sequence[int]) -> bool:
        """Ask to be notified of what is appended to ``shards``. Whether any mark is new: of what came before it nobody has told."""
        for shard in shards:
            if shard not in self._listening:
                side_statements.listen(self._connection, shard)
                self._listening.add(shard)
        missing = [shard for shard in shards if shard not in self.marked]
        new = side_statements.fall_asleep(self._connection, missing) if missing else []
        if new:
            self.marked.update(new)
            self._marked_at = time.monotonic()
        return bool(new)

    def unmark(self, shards: Iterable[int] | None = None) -> None:
        """Take that back, for all or for some."""
        gone = self.marked.copy() if shards is None else self.marked.intersection(shards)
        if gone:
            side_statements.wake_up(self._connection, sorted(gone))
            self.marked -= gone

    def leave(self, shards: Collection[int]) -> None:
        """Hear no more of ``shards``."""
        self.unmark(shards)
        for shard in self._listening.intersection(shards):
            side_statements.unlisten(self._connection, shard)
            self._listening.discard(shard)

    def pause_s(self, idle_s: float) -> float:
        """How long to pause after ``idle_s`` seconds without work: 1 to 10 ms while awake, then ever more since the newest mark."""
        if idle_s <= self.awake_s:
            return min(POLL_S_MAX, max(POLL_S_MIN, idle_s / 8))
        asleep_s = min(idle_s - self.awake_s, time.monotonic() - self._marked_at)
        return min(self._pause_s_max, asleep_s / 2 + POLL_S_MAX)

    def pause(self, pause_s: float, descriptors: Sequence[int]) -> Set[int]:
        """Until notified, one of ``descriptors`` is ready, or the pause is over. The shards that there is news of.

        A notification may also have come along with a statement's answer.
        """
        if not self._notified:
            poll = select.poll()
            for descriptor in (self._connection.fileno(), *descriptors):
                poll.register(descriptor, select.POLLIN)
            poll.poll(pause_s * 1000)
            self._connection.pgconn.consume_input()
            while note := self._connection.pgconn.notifies():
                self._notified.add(note.relname.decode())
        told = {shard for shard in self._listening if side_statements.channel(shard) in self._notified}
        self._notified.clear()
        return told

    def woken(self, commit_s: float) -> None:
        """There was news of a marked shard; a commit takes ``commit_s``. Sets how long it stays awake from now on."""
        slept_s = time.monotonic() - self._marked_at
        is_short = slept_s < self._shards * commit_s / NOTIFYING_MAX
        self.awake_s = max(self._busy_s, min(AWAKE_S_MAX, AWAKE_OF_SHORT_SLEEP * slept_s) if is_short else 0.0)
