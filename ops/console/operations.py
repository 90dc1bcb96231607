"""What the REST API can do: one function an operation, from what a call says to what it is answered."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

import msgspec

from durable_cluster import coordination, replay_statements, search, side_statements
from durable_cluster.context import short_id
from durable_cluster.errors import InputError, UnknownWorkflow
from durable_cluster.ops import letters, show
from durable_cluster.ops.console import actions, shapes
from durable_cluster.ops.console.access import Access, Connection, may
from durable_cluster.ops.console.security import Visitor
from durable_cluster.ops.letters import Filter
from durable_cluster.ops.values import attribute
from durable_cluster.replays import KEPT, Recorded, recorded
from durable_cluster.search import Which


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``id``: of its address, truncated; ``whole_id``: of its header; ``asked``, ``body``: as the operation says."""

    access: Access
    visitor: Visitor
    id: str = ""
    whole_id: str | None = None
    asked: Any = None
    body: Any = None

    @property
    def actor(self) -> str:
        """On whose behalf."""
        return self.body.actor or self.visitor.actor

    @property
    def may_see_values(self) -> bool:
        """An operator, and whoever holds the whole id: it is a capability."""
        return self.visitor.may_see_payloads or self.whole_id is not None

    def workflow_id(self, connection: Connection) -> str:
        """The id, whole. Raises UnknownWorkflow, InvalidState."""
        if self.whole_id is None:
            return show.whole_id(connection, self.id)
        if short_id(self.whole_id) != self.id:
            raise UnknownWorkflow(f"there is no workflow {self.id}…")
        return self.whole_id


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is not simply 200."""

    status: int
    value: Any
    headers: dict[str, str] = {}


def start(call: Call) -> Answer:
    """Start a workflow; with a key that is known, find it."""
    body: shapes.Start = call.body
    with call.access.acting(call.actor) as connection:
        workflow_id, is_new = actions.start(
            call.access, connection, body.workflow, body.input, key=body.key, attributes=body.attributes
        )
    if is_new:
        return _new(workflow_id)
    started = shapes.Started(id=short_id(workflow_id), is_new=False, whole_id=workflow_id)
    return Answer(status=200, value=started, headers=_location(workflow_id))


def list_(call: Call) -> shapes.Workflows:
    """Workflows, newest first."""
    asked: shapes.Filters = call.asked
    which = Which(
        workflow=asked.workflow,
        status=asked.status,
        attributes=_attributes(asked.attribute),
        started_from=asked.started_from,
        started_to=asked.started_to,
        parent=asked.parent,
        key=asked.key,
        origin=asked.origin,
    )
    with call.access.connection() as connection:
        found = search.listed(connection, which, limit=asked.limit, after=asked.after)
    return shapes.Workflows(workflows=found, next=found[-1].cursor if len(found) >= asked.limit else None)


def get(call: Call) -> shapes.Workflow:
    """What is known of a workflow: where it stands, or what it came to."""
    with call.access.connection() as connection:
        workflow_id = call.workflow_id(connection)
        may_locate = may(connection, "durable.locate(uuid)")
        found = show.read(connection, workflow_id, may_locate=may_locate)
    shown = show.told(found, call.access.app)
    has_values = call.may_see_values
    return shapes.Workflow(
        id=shown.id,
        workflow=shown.workflow,
        version=shown.version,
        status=shown.status,  # type: ignore[arg-type]
        started_at=shown.started_at,
        finished_at=shown.finished_at,
        attributes=shown.attributes,
        places=shown.places,
        has_values=has_values,
        progress=shown.progress if has_values else None,
        output=shown.output if has_values else None,
        failure=shown.failure if has_values else None,
    )


def history(call: Call) -> shapes.History:
    """What a linear workflow has recorded: the points from which it can be forked."""
    limit: int = call.asked.limit
    with call.access.connection() as connection:
        workflow_id = call.workflow_id(connection)
        has_values = call.may_see_values and replay_statements.may_see_values(connection)
        if has_values:
            rows = replay_statements.history(connection, workflow_id, limit=limit)
            return shapes.History(awaits=[recorded(*row) for row in rows], has_values=True)
        paths = replay_statements.paths(connection, workflow_id, limit=limit)
    awaits = [Recorded(number=number, path=path, status=status) for number, path, status, _ in paths]
    return shapes.History(awaits=awaits, has_values=False)


def signal(call: Call) -> shapes.Done:
    """Send a signal to a workflow, which waits for it now or later."""
    body: shapes.Signal = call.body
    with call.access.acting(call.actor) as connection:
        workflow_id = call.workflow_id(connection)
        actions.signal(
            call.access,
            connection,
            workflow_id,
            body.name,
            body.payload,
            key=body.key,
            token=body.token,
            actor=call.actor,
        )
    return shapes.Done(has_changed=True)


def cancel(call: Call) -> shapes.Done:
    """Ask a workflow to end; its cleanup runs in place of its next step."""
    body: shapes.Cancel = call.body
    with call.access.acting(call.actor) as connection:
        workflow_id = call.workflow_id(connection)
        has_lived = side_statements.cancel(
            connection, workflow_id, reason=body.reason, actor=call.actor, cascade=body.cascade
        )
    return shapes.Done(has_changed=has_lived)


def retry(call: Call) -> shapes.Done:
    """Take a stuck workflow up again where it stopped."""
    body: shapes.Retry = call.body
    with call.access.acting(call.actor) as connection:
        actions.retry(call.access, connection, call.workflow_id(connection), _given(body.state))
    return shapes.Done(has_changed=True)


def replay(call: Call) -> Answer:
    """Start over: a stuck workflow itself; of one that has ended a new one."""
    with call.access.acting(call.actor) as connection:
        workflow_id, is_new = replay_statements.replay(connection, call.workflow_id(connection), actor=None)
    if is_new:
        return _new(workflow_id)
    return Answer(status=200, value=shapes.Started(id=short_id(workflow_id), is_new=False, whole_id=call.whole_id))


def fork(call: Call) -> Answer:
    """Start a new workflow from a point of another."""
    body: shapes.Fork = call.body
    with call.access.acting(call.actor) as connection:
        workflow_id = call.workflow_id(connection)
        forked = actions.fork(call.access, connection, workflow_id, body.at, _given(body.input))
    return _new(forked)


def pause(call: Call) -> shapes.Done:
    """From its next step on a workflow stands still."""
    with call.access.acting(call.actor) as connection:
        is_new = coordination.pause(connection, "workflow", call.workflow_id(connection), actor=call.actor)
    return shapes.Done(has_changed=is_new)


def resume(call: Call) -> shapes.Done:
    """A paused workflow goes on."""
    with call.access.acting(call.actor) as connection:
        held = coordination.resume(connection, "workflow", call.workflow_id(connection), actor=call.actor)
    return shapes.Done(has_changed=held is not None)


def dead_letters(call: Call) -> shapes.Letters:
    """The steps that cannot go on by themselves, newest first."""
    asked: shapes.LetterFilters = call.asked
    which = Filter(workflow=asked.workflow, step=asked.step, reason=asked.reason)
    with call.access.connection() as connection:
        found = letters.listed(connection, which, limit=asked.limit, before=asked.after)
    return shapes.Letters(dead_letters=found, next=found[-1].at if len(found) >= asked.limit else None)


def _new(workflow_id: str) -> Answer:
    started = shapes.Started(id=short_id(workflow_id), is_new=True, whole_id=workflow_id)
    return Answer(status=201, value=started, headers=_location(workflow_id))


def _location(workflow_id: str) -> dict[str, str]:
    return {"location": f"/api/workflows/{short_id(workflow_id)}"}


def _attributes(words: list[str]) -> dict[str, Any] | None:
    try:
        return dict(map(attribute, words)) or None
    except ArgumentTypeError as error:
        raise InputError(str(error)) from error


def _given(value: Any) -> Any:
    return KEPT if value is msgspec.UNSET else value
