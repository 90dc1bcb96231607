"""One Python function for each SQL function about the timeline: what records it, projects it, and reads it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, LiteralString

import msgspec
import psycopg
from psycopg.rows import class_row

from durable_cluster.errors import UnknownWorkflow, translated
from durable_cluster.statements import Connection, plain_cursor


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A row of a timeline: a step event; a step that ran within one (``part`` from 1 on); without a ``step``, the start or the end.

    ``outcome``: see ``durable.timeline_of``. ``enqueued_at``: when it was ready to run; ``began_at``, ``ended_at``: of its handler,
    None if it did not run, or goes on. ``error``: at most 200 characters. ``waits_for``, ``until``: what its workflow waits for
    then, and how long at the most. ``process``: the host and process id where it ran.
    """

    seq: int | None
    part: int
    step: str | None
    attempt: int | None
    enqueued_at: datetime | None
    began_at: datetime | None
    ended_at: datetime | None
    outcome: str
    error: str | None = None
    waits_for: str | None = None
    until: datetime | None = None
    shard: int | None = None
    process: str | None = None


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow's timeline: its ``moments``, in order. ``id``: the first 12 digits of it.

    ``has_history``: whether its steps are recorded; without that there are its start, where it stands, and its end. ``lag_s``: what
    happened in the last so many seconds may be missing; None: nothing is recorded in this database. ``skips``: how often something
    was left out of the records while it lived: there may be gaps.
    """

    id: str
    workflow: str
    version: int
    status: str
    started_at: datetime
    finished_at: datetime | None
    has_history: bool
    lag_s: float | None
    skips: int
    moments: list[Moment] = []


class Skip(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader that was too far behind left out: so many ``records`` (None: more than were counted)."""

    shard: int
    since: datetime
    until: datetime
    records: int | None


def record_steps(tx: Connection, *, shard: int, body: str, count: int) -> None:
    """Records of step events, in the transaction that hands their workflows on; see ``timeline.encoded``."""
    with translated():
        plain_cursor(tx).execute("select durable.record_steps(%s::int, %s, %s::int)", (shard, body, count))


def unread_timelines(connection: psycopg.Connection[Any]) -> list[int] | None:
    """The shards of which something is not projected yet; None where nothing is recorded. Reads only."""
    with translated():
        row = plain_cursor(connection).execute("select durable.unread_timelines()").fetchone()
    return row[0] if row else None


def project_timeline(connection: psycopg.Connection[Any], shard: int) -> int | None:
    """Project one window of a shard's log; how many records, None when there was nothing, or somebody else does it."""
    with translated():
        row = plain_cursor(connection).execute("select durable.project_timeline(%s::int)", (shard,)).fetchone()
    return row[0] if row else None


def history_lag(connection: psycopg.Connection[Any]) -> float | None:
    """How many seconds the timeline is behind; None where nothing is recorded."""
    with translated():
        row = plain_cursor(connection).execute("select durable.history_lag()").fetchone()
    return row[0] if row else None


def skip_timelines(connection: psycopg.Connection[Any], *, lag_s: float) -> list[Skip]:
    """Pass over what readers have not read that are more than so many seconds behind."""
    with translated(), psycopg.Cursor(connection, row_factory=class_row(Skip)) as cursor:
        query = "select shard, since, until, records from durable.skip_timelines(%s::float8)"
        return cursor.execute(query, (lag_s,)).fetchall()


def timeline(connection: psycopg.Connection[Any], workflow_id: str) -> Timeline:
    """The timeline of a workflow, by its whole id. Raises UnknownWorkflow."""
    return _timeline(connection, "durable.timeline_head(%s::uuid)", "durable.timeline_of(%s::uuid)", workflow_id)


def timeline_by_digits(connection: psycopg.Connection[Any], digits: str) -> Timeline:
    """The timeline of the workflow whose id begins with these digits, of which 12 count. Raises UnknownWorkflow, InputError."""
    return _timeline(connection, "durable.timeline_head_by_digits(%s)", "durable.timeline_by_digits(%s)", digits)


def _timeline(connection: psycopg.Connection[Any], head: LiteralString, rows: LiteralString, of: str) -> Timeline:
    with translated():
        with psycopg.Cursor(connection, row_factory=class_row(Timeline)) as cursor:
            found = cursor.execute(
                f"select id, workflow, version, status, started_at, finished_at, has_history, lag_s, skips from {head}",
                (of,),
            ).fetchone()
        if found is None:
            raise UnknownWorkflow(f"no workflow with the id {of[:12]}…")
        with psycopg.Cursor(connection, row_factory=class_row(Moment)) as cursor:
            moments = cursor.execute(
                "select seq, part, step, attempt, enqueued_at, began_at, ended_at, outcome, error, waits_for,"
                f" until, shard, process from {rows}",
                (of,),
            ).fetchall()
    return msgspec.structs.replace(found, moments=moments)
