"""One Python function for each SQL function about starting over, starting from a point, and what is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from durable_cluster.errors import translated
from durable_cluster.notes import encoded_attributes
from durable_cluster.search import Which
from durable_cluster.side_statements import call_with_columns
from durable_cluster.statements import Connection, plain_cursor


class Declared(msgspec.Struct, frozen=True):
    """What code says of a kind of workflows: where it begins. ``steps``: all of a machine; none of a linear workflow.

    ``history``: which part of them is recorded, from 0 to 1.
    """

    name: str
    version: int
    step: str
    steps: Sequence[str]
    is_limited: bool
    history: float = 0.0


class Again(msgspec.Struct, frozen=True):
    """What became of some: how many were done, how many refused, and why the first of them. ``after``: where to go on."""

    done: int
    refused: int
    refusal: str | None
    after: str | None


def declare_types(connection: Connection, declared: Sequence[Declared]) -> None:
    """Tell the database of these kinds of workflows. Writes on change only."""
    columns = (
        [one.name for one in declared],
        [one.version for one in declared],
        [one.step for one in declared],
        [",".join(one.steps) for one in declared],
        ["1" if one.is_limited else "" for one in declared],
        [one.history for one in declared],
    )
    call_with_columns(connection, "declare_types", columns)


def start_by_name(
    tx: Connection, workflow: str, payload: str, *, key: str | None, attributes: str | None
) -> tuple[str, bool]:
    """Start a workflow that code has declared here; its id, and whether it is new. Raises InvalidState, InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute(
                "select durable.hex(id), is_new from durable.start_by_name(%s, %s, %s, null, %s)",
                (workflow, payload, key, attributes),
            )
            .fetchone()
        )
    assert row is not None
    return row[0], row[1]


def replay(tx: Connection, workflow_id: str, *, actor: str | None) -> tuple[str, bool]:
    """Start over; the id, and whether it is a new workflow's. Raises UnknownWorkflow, InvalidState, InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute("select durable.hex(id), is_new from durable.replay(%s::uuid, %s)", (workflow_id, actor))
            .fetchone()
        )
    assert row is not None
    return row[0], row[1]


def fork(tx: Connection, workflow_id: str, *, at: str | None, input: str | None, actor: str | None) -> str:
    """The id of a new workflow from a point of this one (``input``: JSON). Raises UnknownWorkflow, InvalidState, InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute("select durable.hex(durable.fork(%s::uuid, %s, %s, %s))", (workflow_id, at, input, actor))
            .fetchone()
        )
    assert row is not None
    return str(row[0])


def replay_some(
    connection: Connection, which: Which, *, limit: int, after: str | None, before: datetime, actor: str | None
) -> Again:
    """Some of those that match and were started before that time, newest first."""
    return _some(connection, "replay_many", (), _filters(which, limit, after, before), actor)


def fork_some(
    connection: Connection,
    which: Which,
    *,
    at: str | None,
    input: str | None,
    limit: int,
    after: str | None,
    before: datetime,
    actor: str | None,
) -> Again:
    """Likewise."""
    return _some(connection, "fork_many", (at, input), _filters(which, limit, after, before), actor)


def _filters(which: Which, limit: int, after: str | None, before: datetime) -> tuple[object, ...]:
    attributes = None if which.attributes is None else encoded_attributes(which.attributes)
    asked = (which.workflow, which.status, limit, after, attributes, which.started_from, before)
    return (*asked, which.parent, which.key, which.origin)


def _some(
    connection: Connection, function: str, point: tuple[object, ...], filters: tuple[object, ...], actor: str | None
) -> Again:
    arguments = (*point, *filters, actor)
    query = f"select done, refused, refusal, cursor from durable.{function}({', '.join(['%s'] * len(arguments))})"
    with translated():
        row = plain_cursor(connection).execute(query.encode(), arguments).fetchone()
    assert row is not None
    return Again(*row)


def history(connection: Connection, workflow_id: str, *, limit: int) -> list[tuple[int, str, str, str | None]]:
    """Number, path, status and value (JSON) of the newest recorded awaits. Raises UnknownWorkflow, InvalidState."""
    with translated():
        return (
            plain_cursor(connection)
            .execute("select number, path, status, value from durable.history(%s::uuid, %s::int)", (workflow_id, limit))
            .fetchall()
        )


def paths(connection: Connection, workflow_id: str, *, limit: int) -> list[tuple[int, str, str, int | None]]:
    """Number, path, status and bytes of the same. Raises UnknownWorkflow, InvalidState."""
    with translated():
        return (
            plain_cursor(connection)
            .execute("select number, path, status, bytes from durable.paths(%s::uuid, %s::int)", (workflow_id, limit))
            .fetchall()
        )


def may_see_values(connection: Connection) -> bool:
    """Whether this role is shown payloads."""
    query = "select has_function_privilege('durable.history(uuid, int)', 'execute')"
    row = plain_cursor(connection).execute(query).fetchone()
    return bool(row and row[0])
