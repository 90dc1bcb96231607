"""One workflow as the database has it: each look by itself, so that one that is refused or takes long leaves the others.

Nothing is made of what was read while a connection is lent: what a user's codec does with a payload may take its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import msgspec
import psycopg

from durable_cluster import coordination, replay_statements, side_statements, statements, timeline_statements
from durable_cluster.context import short_id
from durable_cluster.errors import DurableError, UnknownWorkflow
from durable_cluster.ops import letters, looks
from durable_cluster.ops.console.access import PAGE_MS, STATEMENT_MS, Connection, may
from durable_cluster.ops.letters import WholeLetter
from durable_cluster.ops.looks import Descendant, Known
from durable_cluster.statements import Place
from durable_cluster.timeline_statements import Timeline

POINTS_MAX = 50
DEPTH_MAX = 3
CHILDREN_EACH = 20
LOOKS_S_MAX = (PAGE_MS - STATEMENT_MS) / 1000 - 1
"""Then no further look begins: the last one may still take as long as a statement may, and the page has its transaction's time."""

Kind = TypeVar("Kind")
Path = tuple[int, str, str, str | None]
"""Number, path, status and value (JSON) of a recorded await."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What was read; None: there is none, it is not for the role, or took too long. Payloads are JSON, some of it coded.

    ``id``: whole; ``outcome``: the output of a workflow that has completed, what is said of one that has not;
    ``paths``: the recorded awaits, with their values if ``has_values``; else ``paths_told`` says why there are none.
    """

    id: str
    at: datetime
    known: Known
    places: list[Place]
    timeline: Timeline | None
    outcome: str | None
    letter: WholeLetter | None
    input: str | None
    progress: str | None
    family: list[Descendant] | None
    group: tuple[int, int, int] | None
    paths: list[Path] = []
    has_values: bool = False
    paths_told: str = ""


def read(connection: Connection, workflow_id: str, *, with_values: bool) -> Reading:
    """All of it; ``with_values``: whether payloads are for who asks. Raises UnknownWorkflow."""
    known = looks.known(connection, workflow_id)
    if known is None:
        raise UnknownWorkflow(f"there is no workflow {short_id(workflow_id)}…")
    row = connection.execute("select durable.now()").fetchone()
    assert row is not None
    look = _Looks(connection, workflow_id)
    state = look("durable.state_of(uuid)", statements.state_of)
    places = look("durable.locate(uuid)", statements.locate) if known.is_live else None
    family = partial(looks.family, depth=DEPTH_MAX, each=CHILDREN_EACH)
    found = Reading(
        id=workflow_id,
        at=row[0],
        known=known,
        places=places or [],
        timeline=look("durable.timeline_of(uuid)", timeline_statements.timeline),
        outcome=None if state is None else state.output,
        letter=look("durable.dead_letter_of(uuid)", letters.whole) if known.status == "stuck" else None,
        input=look("durable.input_of(uuid)", looks.input_of) if with_values else None,
        progress=look("durable.progress_of(uuid)", side_statements.progress_of),
        family=look("durable.family(uuid, int, int)", family),
        group=look("durable.group_of(uuid)", coordination.group_of),
    )
    if not known.is_linear:
        return found
    has_values = with_values and replay_statements.may_see_values(connection)
    return msgspec.structs.replace(found, has_values=has_values, **_paths(look, has_values=has_values))


class _Looks:
    """At one workflow, each in a savepoint, all of them within the time that the page has."""

    def __init__(self, connection: Connection, workflow_id: str) -> None:
        self._connection = connection
        self._id = workflow_id
        self._until = time.monotonic() + LOOKS_S_MAX

    def __call__(self, function: str, ask: Callable[[Connection, str], Kind]) -> Kind | None:
        """What ``ask`` gives; None where the role may not call the function, or the answer takes too long."""
        if time.monotonic() > self._until or not may(self._connection, function):
            return None
        try:
            with self._connection.transaction():
                return ask(self._connection, self._id)
        except (psycopg.errors.QueryCanceled, psycopg.errors.InsufficientPrivilege):
            return None


def _paths(look: _Looks, *, has_values: bool) -> dict[str, Any]:
    """The recorded awaits of a linear workflow, as fields of a Reading; or why there are none."""
    try:
        if has_values:
            rows = look("durable.history(uuid, int)", partial(replay_statements.history, limit=POINTS_MAX))
        else:
            rows = look("durable.paths(uuid, int)", _paths_alone)
    except DurableError as error:  # its memo was not kept
        return {"paths_told": str(error)}
    if rows is None:
        told = "What is recorded is not for the console's database role, or took the database too long to read."
        return {"paths_told": told}
    return {"paths": rows}


def _paths_alone(connection: Connection, workflow_id: str) -> list[Path]:
    rows = replay_statements.paths(connection, workflow_id, limit=POINTS_MAX)
    return [(number, path, status, None) for number, path, status, _ in rows]
