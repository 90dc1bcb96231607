"""``cancel``: ask workflows to end."""

from __future__ import annotations

import msgspec

from durable_cluster import schema, side_statements
from durable_cluster.context import short_id
from durable_cluster.ops.show import checked_prefix, whole_id
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, Terminal


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """What a cancel met; ``id`` is truncated. ``lived``: whether there was something to cancel."""

    id: str
    lived: bool


def cancel(terminal: Terminal, target: Target, *, prefix: str, reason: str, actor: str | None, cascade: bool) -> int:
    """Cancel one workflow, named by the first digits of its id."""
    digits = checked_prefix(prefix)
    with target.opened() as database, database.connect("cancel") as connection:
        schema.demand_installed(connection)
        workflow_id = whole_id(connection, digits)
        has_lived = side_statements.cancel(connection, workflow_id, reason=reason, actor=actor, cascade=cascade)
    short = short_id(workflow_id)
    told = (
        f"workflow {short}… is asked to end; see '{PROGRAM} show {short}'"
        if has_lived
        else f"workflow {short}… has ended already"
    )
    terminal.answer(Cancelled(id=short, lived=has_lived), [told])
    return 0
