"""``signal``: answer a workflow that waits, or will."""

from __future__ import annotations

import re

import msgspec

from durable_cluster import schema, side_statements, statements
from durable_cluster.codec import Where
from durable_cluster.context import short_id
from durable_cluster.envelope import encode
from durable_cluster.ops.coded import app_of
from durable_cluster.ops.run import parsed
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import BadUsage, Terminal
from durable_cluster.settings import checked_name


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A signal that is on its way; ``id`` is truncated."""

    id: str
    signal: str


def signal(
    terminal: Terminal,
    target: Target,
    *,
    workflow_id: str,
    name: str,
    text: str,
    key: str | None,
    token: str | None,
    actor: str | None,
    app_address: str | None,
) -> int:
    """Send a signal to one workflow. ``app_address``: whose codec the payload goes through."""
    payload = encode(parsed(text, option="--payload"))
    if not re.fullmatch("[0-9a-f]{32}", workflow_id):
        raise BadUsage("ID is the whole id, 32 hex digits, as 'run' printed it: who may signal holds it")
    checked_name("signal", name)
    app = app_of(app_address)
    with target.opened(app=app) as database, database.connect("signal") as connection:
        schema.demand_installed(connection)
        if app is not None:
            state = statements.state_of(connection, workflow_id)
            where = Where("" if state is None else state.workflow, "signal", workflow_id)
            payload = app.payloads.coded(payload, where)
        side_statements.signal(connection, workflow_id, name, payload.decode(), key=key, token=token, actor=actor)
    short = short_id(workflow_id)
    terminal.answer(Sent(id=short, signal=name), [f"signal '{name}' sent to workflow {short}…"])
    return 0
