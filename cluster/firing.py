"""Firing schedules: whoever looks works out what is due and starts it; the database lets one of them do so.

A look is one read, every second at the most often and at the next due time. What cannot be fired, because its transaction fails
or this host does not know its time zone, stays due: it is tried again, less and less often, and nothing else waits for it.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime, timedelta
from typing import Any

import psycopg

from durable_cluster import schedule_statements
from durable_cluster.cron import Cron
from durable_cluster.errors import DurableError
from durable_cluster.schedule_statements import Due

logger = logging.getLogger("durable_cluster.firing")

LOOK_S = 1.0
AT_ONCE_MAX = 100
AGAIN_S_MAX = 60.0
JUST_BEFORE = timedelta(seconds=1)


class Firing:
    """When to look again, and what could not be fired."""

    def __init__(self) -> None:
        self._look_at = 0.0
        self._failed: dict[str, tuple[float, float]] = {}

    @property
    def rest_s(self) -> float:
        """How long until the next look."""
        return max(0.0, self._look_at - time.monotonic())

    def tend(self, connection: psycopg.Connection[Any], *, is_asked: bool = False) -> bool:
        """Fire what is due, if it is time to look, or ``is_asked``. Whether anything was."""
        if self.rest_s and not is_asked:
            return False
        self._look_at = time.monotonic() + LOOK_S
        due_s = schedule_statements.next_schedule(connection)
        if due_s is not None and due_s > 0:
            self._look_at = time.monotonic() + min(LOOK_S, due_s)
        if due_s is None or due_s > 0:
            return False
        has_fired = self._fire_all(connection)
        if has_fired:
            self._look_at = 0.0
        return has_fired

    def _fire_all(self, connection: psycopg.Connection[Any]) -> bool:
        now = time.monotonic()
        waiting = [name for name, (again_at, _) in self._failed.items() if again_at > now]
        has_started = schedule_statements.start_queued(connection) > 0
        due = schedule_statements.due(connection, limit=AT_ONCE_MAX, without=waiting)
        return any([has_started, *(self._fire(connection, one) for one in due)])

    def _fire(self, connection: psycopg.Connection[Any], due: Due) -> bool:
        """Fire one schedule; whether it was this process that did."""
        try:
            dues, next_due = worked_out(due)
            missed = missed_of(due, dues, next_due)
            started = schedule_statements.fire(connection, due, dues=dues, next_due=next_due, missed=missed)
        except (psycopg.Error, DurableError) as error:
            if connection.broken or connection.closed:
                raise
            self._note_failure(due, error)
            return False
        self._failed.pop(due.name, None)
        if started is None:
            return False
        if missed is not None:
            logger.warning("schedule '%s': what was due from %s to before %s was missed", due.name, *missed)
        logger.info("schedule '%s': %d of %d due times started a workflow", due.name, started, len(dues))
        return True

    def _note_failure(self, due: Due, error: Exception) -> None:
        _, last_s = self._failed.get(due.name, (0.0, LOOK_S / 2))
        pause_s = min(AGAIN_S_MAX, last_s * 2)
        self._failed[due.name] = (time.monotonic() + pause_s, pause_s)
        said = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("schedule '%s' is due and could not be fired: %s; again in %.0f s", due.name, said, pause_s)


def worked_out(due: Due) -> tuple[list[datetime], datetime | None]:
    """The due times that fire now, and the first one after now."""
    cron = Cron(due.cron, due.zone)
    after = _after(due)
    if due.catch_up_s is not None:
        # A due time that is hit exactly counts.
        after = max(after, due.now - timedelta(seconds=due.catch_up_s) - timedelta(microseconds=1))
    return cron.newest(due.catch_up_max, after=after, until=due.now), cron.after(due.now)


def missed_of(due: Due, dues: list[datetime], next_due: datetime | None) -> tuple[datetime, datetime] | None:
    """From the first due time that does not fire any more to before the first that does; None: none is missed."""
    first = Cron(due.cron, due.zone).after(_after(due))
    fires = dues[0] if dues else next_due
    return None if first is None or first > due.now or fires is None or first >= fires else (first, fires)


def _after(due: Due) -> datetime:
    """Later than this, due times count."""
    return max(due.since, due.next_due - JUST_BEFORE)
