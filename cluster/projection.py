"""Projecting the records of workflows' steps from the log into the timeline: the log's second reader, off the path of every step.

Whoever runs maintenance reads, without a leader: each shard's reader is had by one transaction at a time.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import psycopg

from durable_cluster import timeline_statements
from durable_cluster.errors import DatabaseError

logger = logging.getLogger("durable_cluster.projection")

LOOK_S = 1.0
LOOK_S_OFF = 5.0
TURN_S = 0.5
AGAIN_S_MAX = 60.0
DOUBLINGS_MAX = 10


class Projection:
    """When to look again."""

    def __init__(self) -> None:
        self._look_at = 0.0
        self._failures = 0

    @property
    def rest_s(self) -> float:
        """How long until the next look."""
        return max(0.0, self._look_at - time.monotonic())

    def tend(self, connection: psycopg.Connection[Any], *, is_asked: bool = False) -> int:
        """Project what there is, for half a second at the most, if it is time to look, or ``is_asked``. How many records.

        What cannot be projected is tried again, less and less often, until its reader passes over it: nothing else waits for it.
        """
        if self.rest_s and not is_asked:
            return 0
        self._look_at = time.monotonic() + LOOK_S
        try:
            projected = self._project(connection)
        except (psycopg.Error, DatabaseError) as error:
            if connection.broken or connection.closed:
                raise
            self._failures += 1
            pause_s = min(AGAIN_S_MAX, LOOK_S * 2.0 ** min(self._failures, DOUBLINGS_MAX))
            self._look_at = time.monotonic() + pause_s
            said = next(iter(str(error).splitlines()), type(error).__name__)
            logger.warning("the timeline cannot be written: %s; again in %.0f s", said, pause_s)
            return 0
        self._failures = 0
        return projected

    def _project(self, connection: psycopg.Connection[Any]) -> int:
        shards = timeline_statements.unread_timelines(connection)
        if shards is None:
            self._look_at = time.monotonic() + LOOK_S_OFF
            return 0
        stop_at = time.monotonic() + TURN_S
        projected = 0
        while shards and time.monotonic() < stop_at:
            records = {shard: timeline_statements.project_timeline(connection, shard) for shard in shards}
            projected += sum(count or 0 for count in records.values())
            shards = [shard for shard in shards if records[shard] is not None]
        if shards:
            self._look_at = 0.0
        return projected
