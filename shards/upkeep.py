"""One Python function for each SQL function that only maintenance and those who look after it call."""

from __future__ import annotations

import logging
from typing import Any

import psycopg

from durable_cluster import timeline_statements
from durable_cluster.errors import translated

logger = logging.getLogger("durable_cluster.maintenance")

Connection = psycopg.Connection[Any]

TABLE_LOCK_MS = 500
"""Who waits for a table's strongest lock lets nobody else pass meanwhile: starts and ends would stand still for so long."""


def needs_partitions(connection: Connection) -> bool:
    """Whether day partitions are running out."""
    return _is_true(connection, "select durable.needs_partitions()")


def add_partitions(connection: Connection) -> int:
    """Make them; how many. Raises LockNotAvailable when a reader holds on."""
    return _briefly(
        connection, "select case when durable.try_maintenance('partitions') then durable.add_partitions() else 0 end"
    )


def needs_upkeep(connection: Connection) -> bool:
    """Whether a log is due for rotation, or half rotated, or has ticks to trim."""
    return _is_true(connection, "select durable.needs_upkeep()")


def keep_up(connection: Connection, *, lag_s: float = 300.0) -> int:
    """Rotation in its two steps, each in its own transaction, and trimming; what the engine counts.

    ``lag_s``: readers of the timeline that are farther behind lose their place first.
    """
    rotated = _count(connection, "select durable.keep_up(%s::float8)", lag_s)
    return rotated + _count(connection, "select durable.finish_rotation()")


def needs_timer_rotation(connection: Connection) -> bool:
    """Whether so many timers have fired that it is worth it."""
    return _is_true(connection, "select durable.needs_timer_rotation()")


def rotate_timers(connection: Connection) -> int:
    """Empty one of the timer tables; how many timers were carried over, -1 when somebody holds a lock."""
    return _count(connection, "select durable.rotate_timers()")


def needs_spill_rotation(connection: Connection) -> bool:
    """Whether so much of what memos have spilled is garbage that it is worth it."""
    return _is_true(connection, "select durable.needs_spill_rotation()")


def rotate_spill(connection: Connection) -> int:
    """Empty one of the spill tables; how many rows were carried over, -1 when somebody holds a lock."""
    with connection.transaction():  # as much as lives is copied: that may take longer than a statement of a step
        connection.execute("set local statement_timeout = 0")
        return _count(connection, "select durable.rotate_spill()")


def has_dead_members(connection: Connection) -> bool:
    """Whether the engine knows readers whose process is gone."""
    return _is_true(connection, "select exists (select 1 from durable.dead_members())")


def sweep_members(connection: Connection) -> int:
    """Unregister them; how many went."""
    return _count(connection, "select durable.sweep_members()")


def has_ended_cancels(connection: Connection) -> bool:
    """Whether a cancel met a workflow that was just ending."""
    return _is_true(connection, "select durable.has_ended_cancels()")


def sweep_cancels(connection: Connection) -> int:
    """Forget them; how many went."""
    return _count(connection, "select durable.sweep_cancels()")


def has_unused_limits(connection: Connection) -> bool:
    """Whether counts are kept of a limit's keys that nobody uses."""
    return _is_true(connection, "select durable.has_unused_limits()")


def sweep_limits(connection: Connection) -> int:
    """Delete them; how many went."""
    return _count(connection, "select durable.sweep_limits()")


def needs_expiry(connection: Connection, *, days: int) -> bool:
    """Whether anything has been finished for more than so many days."""
    return _is_true(connection, "select durable.needs_expiry(%s::int)", days)


def expire(connection: Connection, *, days: int) -> int:
    """Let the oldest day go, or a part of what outlived its day; days dropped: 0 or 1.

    Raises LockNotAvailable when a reader or a long transaction holds on; nothing has changed then.
    """
    return _briefly(connection, "select durable.expire(%s::int)", days)


def needs_audit_upkeep(connection: Connection, *, days: int) -> bool:
    """Whether the audit needs days ahead, or has some that are older than so many days."""
    return _is_true(connection, "select durable.needs_audit_upkeep(%s::int)", days)


def keep_audit(connection: Connection, *, days: int) -> int:
    """Make and drop days of the audit; how many. Raises LockNotAvailable when somebody holds on."""
    return _briefly(connection, "select durable.keep_audit(%s::int)", days)


def needs_timeline_upkeep(connection: Connection, *, days: int) -> bool:
    """Whether readers of the timeline are missing, or needless, or days of it are."""
    return _is_true(connection, "select durable.needs_timeline_upkeep(%s::int)", days)


def keep_timeline(connection: Connection, *, days: int) -> int:
    """Register or unregister readers, make and drop days; how many. Raises LockNotAvailable when somebody holds on."""
    return _briefly(connection, "select durable.keep_timeline(%s::int)", days)


def is_timeline_late(connection: Connection, *, lag_s: float) -> bool:
    """Whether a reader of the timeline is farther behind than that."""
    return (timeline_statements.history_lag(connection) or 0.0) > lag_s


def skip_timelines(connection: Connection, *, lag_s: float) -> int:
    """Have such readers pass over what they have not read, and say so; how many."""
    skips = timeline_statements.skip_timelines(connection, lag_s=lag_s)
    for skip in skips:
        many = "some" if skip.records is None else f"{skip.records:,}"
        told = (skip.shard, skip.since.isoformat(), skip.until.isoformat(), many, lag_s)
        logger.warning("shard %d: from %s to %s the timeline lacks %s records: it was over %g s behind", *told)
    return len(skips)


def _briefly(connection: Connection, query: str, *arguments: float) -> int:
    """As ``_count``, in a transaction that waits for no lock for long."""
    with connection.transaction():
        connection.execute("select set_config('lock_timeout', %s, true)", (str(TABLE_LOCK_MS),))
        return _count(connection, query, *arguments)


def _is_true(connection: Connection, query: str, *arguments: float) -> bool:
    with translated():
        row = connection.execute(query.encode(), arguments or None).fetchone()
    return bool(row and row[0])


def _count(connection: Connection, query: str, *arguments: float) -> int:
    with translated():
        row = connection.execute(query.encode(), arguments or None).fetchone()
    return int(row[0]) if row and row[0] is not None else 0
