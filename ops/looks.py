"""What the console looks at, as SQL: what has happened since the last look, and one workflow. Ids come truncated."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.errors import translated

Connection = psycopg.Connection[Any]


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """One look. ``appended``: step events since the one before; None: nobody knows. ``started``, ``ended``: workflows so far.

    ``due_s``: until the next timer; None: there is none.
    """

    snapshot: str
    at: datetime
    appended: int | None
    started: int
    ended: int
    due_s: float | None


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow that failed or was cancelled. ``reason``: the beginning of it; None where a codec has made it."""

    id: str
    workflow: str
    status: str
    reason: str | None
    started_at: datetime
    ended_at: datetime


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow but for its payloads; ``parent`` and ``origin`` truncated. ``since``: of where it stands, where that is known.

    ``paused``: what of it is: workflow, type or shard. ``is_linear``: None where no code has said.
    """

    workflow: str
    version: int
    status: str
    key: str | None
    started_at: datetime
    finished_at: datetime | None
    since: datetime | None
    parent: str | None
    origin: str | None
    weight: float
    paused: str | None
    attributes: dict[str, Any]
    is_linear: bool | None

    @property
    def is_live(self) -> bool:
        """Whether it has not ended: it runs, or a dead letter stands for it."""
        return self.finished_at is None


def beat(connection: Connection, *, since: str | None) -> Beat:
    """``since``: the snapshot of the look before."""
    with translated(), connection.cursor(row_factory=kwargs_row(Beat)) as cursor:
        found = cursor.execute(
            "select snapshot::text, at, appended, coalesce(started, 0) started, coalesce(ended, 0) ended, due_s"
            " from durable.pulse(%s::pg_snapshot)",
            (since,),
        ).fetchone()
    assert found is not None
    return found


def recent_ends(connection: Connection, *, limit: int) -> list[Ended]:
    """The newest first."""
    with translated(), connection.cursor(row_factory=kwargs_row(Ended)) as cursor:
        return cursor.execute(
            "select id, workflow, status, reason, started_at, ended_at from durable.recent_ends(%s::int)", (limit,)
        ).fetchall()


def known(connection: Connection, workflow_id: str) -> Known | None:
    """One, by its whole id."""
    with translated(), connection.cursor(row_factory=kwargs_row(Known)) as cursor:
        return cursor.execute(
            "select workflow, version, status, key, started_at, finished_at, since, parent, origin, weight, paused, attributes,"
            " is_linear from durable.known(%s)",
            (workflow_id,),
        ).fetchone()


def input_of(connection: Connection, workflow_id: str) -> str | None:
    """What it was started with, as JSON: a payload."""
    with translated():
        row = connection.execute("select durable.input_of(%s)", (workflow_id,)).fetchone()
    return row[0] if row else None


class Descendant(msgspec.Struct, frozen=True, kw_only=True):
    """A child, or a child's child (``depth`` 2). ``children``, ``ended``: of its own last group; None: it never had any."""

    depth: int
    id: str
    workflow: str
    status: str
    started_at: datetime
    finished_at: datetime | None
    children: int | None
    ended: int | None


def family(connection: Connection, workflow_id: str, *, depth: int, each: int) -> list[Descendant]:
    """A child followed by its own, ``each`` of one at the most, 200 in all."""
    with translated(), connection.cursor(row_factory=kwargs_row(Descendant)) as cursor:
        return cursor.execute(
            "select depth, id, workflow, status, started_at, finished_at, children, ended"
            " from durable.family(%s, %s::int, %s::int)",
            (workflow_id, depth, each),
        ).fetchall()
