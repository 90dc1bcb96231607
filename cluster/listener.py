"""How a consumer waits for work without asking for it: it marks its shards, and is notified of what is appended to them.

A mark is a lock of the session (see ``claim.sql``). One consumer a shard has it; its siblings hear the same notifications.
"""

from __future__ import annotations

import select
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from durable_cluster import statements


class Listener:
    """What one consumer has marked, and whether it was told since."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.use(connection)

    def use(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection: the marks ended with the old one."""
        self._connection = connection
        self._listening: set[int] = set()
        self._marked: set[int] = set()
        self._is_notified = False
        connection.add_notify_handler(self._note)

    def mark(self, shards: Iterable[int]) -> bool:
        """Ask to be notified of what is appended to ``shards``. Whether any mark is new: of what came before it nobody has told."""
        new: set[int] = set()
        for shard in shards:
            if shard not in self._listening:
                statements.listen(self._connection, shard)
                self._listening.add(shard)
            if shard not in self._marked and statements.fall_asleep(self._connection, shard):
                new.add(shard)
        self._marked |= new
        return bool(new)

    def unmark(self, shards: Iterable[int]) -> None:
        """Take that back, where it was asked."""
        for shard in self._marked.intersection(shards):
            statements.wake_up(self._connection, shard)
            self._marked.discard(shard)

    def pause(self, pause_s: float, wakeups: Sequence[int]) -> bool:
        """Until notified, one of ``wakeups`` is ready, or the pause is over. Whether a marked shard has news.

        A notification may also have come along with a statement's answer.
        """
        if not self._is_notified:
            poll = select.poll()
            for descriptor in (self._connection.fileno(), *wakeups):
                poll.register(descriptor, select.POLLIN)
            poll.poll(pause_s * 1000)
            self._connection.pgconn.consume_input()
            while self._connection.pgconn.notifies():
                self._is_notified = True
        is_notified, self._is_notified = self._is_notified, False
        return is_notified and bool(self._marked)

    def _note(self, notify: psycopg.Notify) -> None:
        self._is_notified = True
