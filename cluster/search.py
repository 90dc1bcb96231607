"""Finding workflows: what ``app.list`` and ``durable-cluster list`` ask. Ids come truncated."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.errors import InputError, translated
from durable_cluster.notes import Attributes, encoded_attributes

STATUSES = ("running", "stuck", "completed", "failed", "cancelled")
LIMIT_MAX = 10_000

Connection = psycopg.Connection[Any]


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow of a list; ``id`` and ``parent`` are truncated, and ``origin``: what it was replayed or forked from.

    ``cursor``: to be passed on for what comes after it.
    """

    id: str
    workflow: str
    version: int
    status: str
    key: str | None
    started_at: datetime
    finished_at: datetime | None
    attributes: dict[str, Any]
    parent: str | None
    cursor: str
    origin: str | None = None


class Which(msgspec.Struct, frozen=True, kw_only=True):
    """Which workflows; None is any. ``attributes``: those that have all of these.

    ``parent``, ``origin``: the first digits of an id.
    """

    workflow: str | None = None
    status: str | None = None
    attributes: Attributes | None = None
    started_from: datetime | None = None
    started_to: datetime | None = None
    parent: str | None = None
    key: str | None = None
    origin: str | None = None


def listed(connection: Connection, which: Which, *, limit: int, after: str | None = None) -> list[Listed]:
    """Newest first; more than ``limit`` only where several share the last one's moment and digits. Raises InputError."""
    _demand_times(which)
    attributes = None if which.attributes is None else encoded_attributes(which.attributes)
    with translated(), connection.cursor(row_factory=kwargs_row(Listed)) as cursor:
        return cursor.execute(
            "select id, workflow, version, status, key, started_at, finished_at, attributes, parent, cursor, origin"
            " from durable.list(%s, %s, %s::int, %s, %s, %s, %s, %s, %s, %s)",
            (
                which.workflow,
                which.status,
                limit,
                after,
                attributes,
                which.started_from,
                which.started_to,
                which.parent,
                which.key,
                which.origin,
            ),
        ).fetchall()


def total(connection: Connection, which: Which) -> tuple[int, datetime | None]:
    """How many match, and when the newest started. Raises InputError."""
    _demand_times(which)
    attributes = None if which.attributes is None else encoded_attributes(which.attributes)
    with translated():
        row = connection.execute(
            "select workflows, newest from durable.list_total(%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                *(which.workflow, which.status, attributes, which.started_from, which.started_to),
                *(which.parent, which.key, which.origin),
            ),
        ).fetchone()
    assert row is not None
    return row[0], row[1]


def _demand_times(which: Which) -> None:
    for at in (which.started_from, which.started_to):
        if at is not None and (not isinstance(at, datetime) or at.utcoffset() is None):
            raise InputError(f"{at!r} is no time with a time zone; give one such as datetime(2030, 1, 1, tzinfo=UTC)")
