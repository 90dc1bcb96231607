"""``priority``: how large a share of the turns a live workflow gets."""

from __future__ import annotations

import msgspec

from durable_cluster import coordination, schema
from durable_cluster.context import short_id
from durable_cluster.ops.show import checked_prefix, whole_id
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import Terminal


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``priority``; ``id`` is truncated. ``lived``: whether there was something to change."""

    id: str
    weight: float
    lived: bool


def priority(terminal: Terminal, target: Target, *, prefix: str, weight: float) -> int:
    """Set the weight of one workflow, named by the first digits of its id."""
    digits = checked_prefix(prefix)
    with target.opened() as database, database.connect("priority") as connection:
        schema.demand_installed(connection)
        workflow_id = whole_id(connection, digits)
        has_lived = coordination.set_priority(connection, [workflow_id], weight) > 0
    short = short_id(workflow_id)
    told = f"has priority {weight:g} from its next step on" if has_lived else "has ended already"
    terminal.answer(Changed(id=short, weight=weight, lived=has_lived), [f"workflow {short}… {told}"])
    return 0
