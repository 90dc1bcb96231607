"""What people ask and do about dead letters, as SQL. Ids come truncated; a whole one is only passed back."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.errors import translated

Connection = psycopg.Connection[Any]

REASONS = ("attempts", "given_up", "crashes", "unroutable")
AT_ONCE = 200  # a transaction: each may hold a payload


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter of a list; ``id`` is truncated, ``message`` is short."""

    id: str
    workflow: str
    step: str
    seq: int
    attempt: int
    reason: str
    message: str | None
    at: datetime


class WholeLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter but for its state. ``details``: what its step said, with a traceback."""

    workflow: str
    step: str
    seq: int
    attempt: int
    reason: str
    details: dict[str, Any]
    at: datetime


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters; None is any."""

    workflow: str | None = None
    step: str | None = None
    reason: str | None = None

    @property
    def is_empty(self) -> bool:
        return self == Filter()


def listed(connection: Connection, which: Filter, *, limit: int, before: datetime | None = None) -> list[Letter]:
    """Newest first; more than ``limit`` only where several share the last one's moment. ``before``: of the last row so far."""
    with translated(), connection.cursor(row_factory=kwargs_row(Letter)) as cursor:
        return cursor.execute(
            "select id, workflow, step, seq, attempt, reason, message, at"
            " from durable.dead_letters(%s, %s, %s, %s::int, coalesce(%s::timestamptz, 'infinity'))",
            (which.workflow, which.step, which.reason, limit, before),
        ).fetchall()


def total(connection: Connection, which: Filter, *, most: int | None = None) -> tuple[int, datetime | None]:
    """How many, and the moment of the newest. ``most``: so many are counted and no more."""
    with translated():
        row = connection.execute(
            "select letters, newest from durable.dead_letter_total(%s, %s, %s, %s::bigint)",
            (which.workflow, which.step, which.reason, most),
        ).fetchone()
    assert row is not None
    return row[0], row[1]


def by_prefix(connection: Connection, digits: str) -> list[str]:
    """Whole ids of stuck workflows that begin with ``digits``, ``lookups.PREFIXED_MAX`` at the most."""
    with translated():
        rows = connection.execute("select durable.hex(i) from durable.dead_letters_by_prefix(%s) i", (digits,))
        return [row[0] for row in rows]


def whole(connection: Connection, workflow_id: str) -> WholeLetter | None:
    """All but the state."""
    with translated():
        row = connection.execute(
            "select workflow, step, seq, attempt, reason, details, at from durable.dead_letter_of(%s)", (workflow_id,)
        ).fetchone()
    if row is None:
        return None
    workflow, step, seq, attempt, reason, details, at = row
    return WholeLetter(
        workflow=workflow,
        step=step,
        seq=seq,
        attempt=attempt,
        reason=reason,
        details=msgspec.json.decode(details),
        at=at,
    )


def may_see_states(connection: Connection) -> bool:
    """Whether this role is shown payloads."""
    row = connection.execute("select has_function_privilege('durable.dead_letter_state(uuid)', 'execute')").fetchone()
    return bool(row and row[0])


def state(connection: Connection, workflow_id: str) -> str | None:
    """The state its step ran with, as JSON; None if it cannot be read."""
    with translated():
        row = connection.execute("select durable.dead_letter_state(%s)", (workflow_id,)).fetchone()
    return row[0] if row else None


def retry_some(connection: Connection, which: Filter, *, newest: datetime) -> int:
    """Take some up again, none that came after ``newest``; how many. None are left when there are fewer than ``AT_ONCE``."""
    return _some(connection, "durable.retry_dead_letters", which, newest)


def purge_some(connection: Connection, which: Filter, *, newest: datetime) -> int:
    """End some; likewise."""
    return _some(connection, "durable.purge_dead_letters", which, newest)


def purge(connection: Connection, workflow_id: str) -> None:
    """End a stuck workflow. Raises UnknownWorkflow."""
    with translated():
        connection.execute("select durable.purge_dead_letter(%s)", (workflow_id,))


def _some(connection: Connection, function: str, which: Filter, newest: datetime) -> int:
    with translated():
        row = connection.execute(
            f"select {function}(%s, %s, %s, %s::int, %s)".encode(),
            (which.workflow, which.step, which.reason, AT_ONCE, newest + timedelta(microseconds=1)),
        ).fetchone()
    return int(row[0]) if row else 0
