"""Histories of linear workflows, kept in files, and whether the code of today still comes the same way.

A history is what a workflow's next step event carries: its input, and what its awaits came to. It holds neither the workflow's id
nor its key; its payloads are in it as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from durable_cluster.app import App
from durable_cluster.chunks import Chunks
from durable_cluster.client import Client
from durable_cluster.context import Context
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import HandlerError, InputError, NonDeterminismError, TerminalError, UnknownWorkflow
from durable_cluster.execution import ContinueAsNew, Execution
from durable_cluster.joins import ChildResult
from durable_cluster.linear import OWN, RESUME, Workflow
from durable_cluster.memo import Carried, carried_decoder
from durable_cluster.testing import statements
from durable_cluster.testing.statements import Standing

NOBODY = "0" * 32
CHILDREN_MAX = 10_000
ENDS = (TerminalError, ContinueAsNew)
"""What a function may raise to say how it ends."""


class History(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow's. ``place``: where it stood ('waits', 'is stuck', 'has ended' …). ``state``: as its step event carries it;
    ``children``: what had become of them.
    """

    workflow: str
    version: int
    place: str
    state: msgspec.Raw
    children: tuple[ChildResult, ...] = ()

    def __repr__(self) -> str:
        return f"<History of a '{self.workflow}' that {self.place}>"

    def save(self, path: Path | str) -> None:
        """Write it into a file, as JSON that a diff can show."""
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path | str) -> History:
        """Read a file that ``save`` wrote. Raises InputError."""
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise InputError(f"{path} holds no history: {error}; write one with history.save(path)") from error


def check_replay(app: App, history: History | Path | str) -> None:
    """Run the workflow's function over what is recorded, as a process does that takes it up: no step runs, no database is asked.

    Raises NonDeterminismError, which says what is recorded and what the code now asks for; also for recorded values that no longer
    fit their types. Raises what the function's own lines raise, UnknownWorkflow for a workflow that the app does not have, and
    InputError for a file that is no history.
    """
    known = history if isinstance(history, History) else History.load(history)
    workflow = _code_for(app, known.workflow, known.version)
    carried = carried_decoder.decode(known.state)
    ctx = Context(workflow, Envelope(NOBODY, 1, workflow.name, RESUME, known.version, known.state))
    with patch.object(app, "client", _Recorded(app, known.children)):
        try:
            execution = workflow.execution(ctx, carried)
            _demand_fitting(workflow, execution, carried)
        except HandlerError as error:
            raise NonDeterminismError(str(error)) from error
        execution.close()


def record(app: App, *, limit: int = 100) -> list[History]:
    """The histories of at most ``limit`` of the app's linear workflows that wait, sleep or are stuck now, in the app's database.

    They hold payloads: treat the files as you treat those. The database role has to own the schema.
    """
    connection = app.client.connection()
    names = sorted({workflow.name for workflow in workflows_of(app)})
    return [_of(app, one) for one in statements.standing(connection, names, limit=limit)]


def standing(app: App, workflow_id: str) -> History | None:
    """That of a workflow that has not ended."""
    found = statements.standing_at(app.client.connection(), workflow_id)
    return None if found is None else _of(app, found)


class Ended(msgspec.Struct, frozen=True):
    """A workflow that ended here: what it carried then, which is in no table, and how many children it had."""

    workflow: Workflow[Any, Any]
    state: bytes
    spawned: int


def of_ended(app: App, workflow_id: str, ended: Ended) -> History:
    """Its history."""
    return History(
        workflow=ended.workflow.name,
        version=ended.workflow.version,
        place="has ended",
        state=msgspec.Raw(ended.state),
        children=_children(app, workflow_id, ended.spawned),
    )


@contextmanager
def recorded(app: App, ended: dict[str, Ended]) -> Iterator[None]:
    """Meanwhile what the app's workflows carry when they end is put into ``ended``, by id."""
    workflows = workflows_of(app)

    def around(workflow: Workflow[Any, Any], inner: Callable[[Context, Execution], Any]) -> Callable[..., Any]:
        def handed_on(ctx: Context, execution: Execution) -> Any:
            result = inner(ctx, execution)
            if execution.is_done:
                ended[ctx.workflow_id] = Ended(workflow, execution.history(), execution.spawned)
            return result

        return handed_on

    for workflow in workflows:
        workflow.handed_on = around(workflow, workflow.handed_on)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for workflow in workflows:
            del workflow.handed_on


def workflows_of(app: App) -> list[Workflow[Any, Any]]:
    """Its linear workflows, in all versions."""
    machines = [machine for newest in app.machines.values() for machine in newest.versions.values()]
    return [machine for machine in machines if isinstance(machine, Workflow)]


def _code_for(app: App, name: str, version: int) -> Workflow[Any, Any]:
    """What takes such a workflow up. Raises UnknownWorkflow, InputError."""
    newest = app.named(name)
    try:
        workflow = newest.of_version(version)
    except KeyError:
        raise UnknownWorkflow(
            f"the history is of version {version} of workflow '{name}'; this code has come to {newest.version}"
        ) from None
    if not isinstance(workflow, Workflow):
        raise InputError(f"'{name}' is a machine and has no history: its step events carry its state, and nothing else")
    return workflow


def _demand_fitting(workflow: Workflow[Any, Any], execution: Execution, carried: Carried) -> None:
    """Whether the function has come to where the history ends. Raises NonDeterminismError, HandlerError."""
    execution.demand_right()
    error = execution.main.exception() if execution.is_done and not execution.main.cancelled() else None
    if error is not None and not execution.is_failure_uncaught and not isinstance(error, ENDS):
        raise error
    if carried.asked is None:
        return
    execution.demand_waiting(carried.asked.key)
    step = carried.asked.key.partition(" ")[2]
    if step in workflow.app.steps:
        workflow.app.steps[step].bound(carried.asked.args)


def _of(app: App, found: Standing) -> History:
    envelope = app.payloads.event(found.envelope)
    workflow = _code_for(app, envelope.workflow, envelope.version)
    state = workflow.cleanup_state(envelope) if envelope.step in OWN else envelope.state
    carried = Chunks(app, workflow.name, envelope.workflow_id).whole(carried_decoder.decode(state))
    return History(
        workflow=workflow.name,
        version=envelope.version,
        place=found.place,
        state=msgspec.Raw(encode(carried)),
        children=_children(app, envelope.workflow_id, carried.spawned),
    )


def _children(app: App, workflow_id: str, spawned: int) -> tuple[ChildResult, ...]:
    """What became of its children, without their ids."""
    found = app.client.children(workflow_id, 0, CHILDREN_MAX) if spawned else []
    return tuple(msgspec.structs.replace(child, id=NOBODY) for child in found)


class _Recorded(Client):
    """In place of a database: the children of a history."""

    def __init__(self, app: App, children: Sequence[ChildResult]) -> None:
        super().__init__(
            dsn=None,
            data=None,
            encode_state=app.encoded_state,
            encode_fork=app.encoded_fork,
            payloads=app.payloads,
        )
        self._children = children

    def children(self, parent_id: str, first: int, limit: int) -> list[ChildResult]:
        """So many of them, from number ``first`` on."""
        return [child for child in self._children if child.number >= first][:limit]
