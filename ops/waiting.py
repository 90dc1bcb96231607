"""What stands still and what the clock does next, as SQL, for people. Ids come truncated."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.errors import translated

PLACES = ("waiting", "joining", "sleeping")
COUNTED_MAX = 10_000
"""How many waits are counted by their types: see ``durable.waiting_types``."""

Connection = psycopg.Connection[Any]


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow that stands still at a ``place``: see ``PLACES``. ``step``: with which it goes on.

    ``due``: then without what it waits for. ``signals``: any of them resumes it. ``children``, ``ended``: of the group that it
    waits for. ``cursor``: for what comes after it.
    """

    id: str
    place: str
    workflow: str
    step: str
    seq: int
    signals: list[str] | None
    needs_token: bool
    children: int | None
    ended: int | None
    since: datetime
    due: datetime | None
    cursor: str


class WaitingType(msgspec.Struct, frozen=True, kw_only=True):
    """So many workflows of a type stand still at a place."""

    workflow: str
    place: str
    workflows: int


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """What a timer does: see ``durable.due_next``. ``id`` and ``workflow`` are None where it is nobody's."""

    id: str | None
    what: str
    workflow: str | None
    step: str
    seq: int
    attempt: int
    due: datetime
    cursor: str


def waiting(
    connection: Connection,
    *,
    place: str | None = None,
    workflow: str | None = None,
    signal: str | None = None,
    limit: int,
    after: str | None = None,
) -> list[Waiting]:
    """The longest first; more than ``limit`` only where several share the last one's moment and digits. Raises InputError."""
    with translated(), connection.cursor(row_factory=kwargs_row(Waiting)) as cursor:
        return cursor.execute(
            "select id, place, workflow, step, seq, signals, needs_token, children, ended, since, due, cursor"
            " from durable.waiting(%s, %s, %s, %s::int, %s)",
            (place, workflow, signal, limit, after),
        ).fetchall()


def types(connection: Connection) -> list[WaitingType]:
    """By type and place, the most first, of the first ``COUNTED_MAX`` that are found."""
    with translated(), connection.cursor(row_factory=kwargs_row(WaitingType)) as cursor:
        return cursor.execute("select workflow, place, workflows from durable.waiting_types()").fetchall()


def due_next(
    connection: Connection, *, workflow: str | None = None, limit: int, after: str | None = None
) -> tuple[list[Due], str | None]:
    """What is due next, and the cursor for what comes after it; None where that is all. Raises InputError."""
    with translated():
        rows = connection.execute(
            "select id, what, workflow, step, seq, attempt, due, cursor from durable.due_next(%s, %s::int, %s)",
            (workflow, limit, after),
        ).fetchall()
    fields = Due.__struct_fields__
    found = [Due(**dict(zip(fields, row, strict=True))) for row in rows if row[1] is not None]
    has_more = len(found) >= limit or len(found) < len(rows)
    return found, rows[-1][-1] if has_more else None
