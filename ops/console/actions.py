"""What can be done to workflows from here, by pages and by the API alike: each in the transaction that it is given."""

from __future__ import annotations

from typing import Any

from durable_cluster import replay_statements, side_statements, statements
from durable_cluster.codec import Where
from durable_cluster.context import short_id
from durable_cluster.envelope import encode
from durable_cluster.errors import InputError, InvalidState
from durable_cluster.notes import Attributes, encoded_attributes
from durable_cluster.ops import letters
from durable_cluster.ops.console.access import Access, Connection
from durable_cluster.ops.dead_letters import edited_state
from durable_cluster.replays import KEPT
from durable_cluster.settings import checked_name
from durable_cluster.types import checked_key


def start(
    access: Access,
    connection: Connection,
    workflow: str,
    value: Any,
    *,
    key: str | None = None,
    attributes: Attributes | None = None,
) -> tuple[str, bool]:
    """Start a workflow by its name; its id, whole, and whether it is new. Raises InputError, InvalidState, CodecError.

    What the console's App has is checked and coded by it; anything else begins as the code says that ran here last.
    """
    key = None if key is None else checked_key(key)
    found_by = None if attributes is None else encoded_attributes(attributes)
    app = access.app
    if app is None or workflow not in app.machines:
        return replay_statements.start_by_name(connection, workflow, _json(value), key=key, attributes=found_by)
    machine = app.named(workflow)
    step, payload = machine.opening(value)
    return statements.start(
        connection,
        workflow,
        version=machine.version,
        step=step,
        payload=machine.coded(payload),
        key=key,
        attributes=found_by,
    )


def retry(access: Access, connection: Connection, workflow_id: str, state: Any = KEPT) -> None:
    """Take a stuck workflow up again; ``state``: an edited one. Raises UnknownWorkflow without a dead letter, InputError."""
    letter = letters.whole(connection, workflow_id)
    if letter is None:
        raise InvalidState(f"workflow {short_id(workflow_id)}… is not stuck: it has no dead letter to retry")
    if state is KEPT:
        side_statements.retry_dead_letter(connection, workflow_id, seq=letter.seq)
        return
    payload = edited_state(connection, access.app, workflow_id, letter, state)
    side_statements.retry_dead_letter(connection, workflow_id, state=payload, seq=letter.seq)


def signal(
    access: Access,
    connection: Connection,
    workflow_id: str,
    name: str,
    payload: Any,
    *,
    key: str | None = None,
    token: str | None = None,
    actor: str | None = None,
) -> None:
    """Send a signal. Raises UnknownWorkflow for one that has ended, and for a wrong or used token; InputError, CodecError."""
    checked_name("signal", name)
    encoded = _json(payload)
    if access.app is not None:
        state = statements.state_of(connection, workflow_id)
        where = Where("" if state is None else state.workflow, "signal", workflow_id)
        encoded = access.app.payloads.coded(encoded.encode(), where).decode()
    side_statements.signal(connection, workflow_id, name, encoded, key=key, token=token, actor=actor)


def fork(access: Access, connection: Connection, workflow_id: str, at: str | None, value: Any = KEPT) -> str:
    """Start a new workflow from a point of one; its id, whole. Raises UnknownWorkflow, InvalidState, InputError, AppError."""
    payload = None
    if value is not KEPT and access.app is None:
        payload = _json(value)
    elif value is not KEPT and access.app is not None:
        state = statements.state_of(connection, workflow_id)
        payload = access.app.encoded_fork("" if state is None else state.workflow, at, value)
    return replay_statements.fork(connection, workflow_id, at=at, input=payload, actor=None)


def _json(value: Any) -> str:
    try:
        return encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"that is not JSON: {error}") from error
