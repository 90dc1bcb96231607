"""``status``: the cluster at a glance, shard by shard, and its workflows by type."""

from __future__ import annotations

import msgspec

from durable_cluster import schema, timeline_statements
from durable_cluster.ops import lookups
from durable_cluster.ops.lookups import Asides, Pause, ShardStatus, Total
from durable_cluster.ops.running import running_pid
from durable_cluster.ops.show import moment
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import Terminal, elapsed, table

COUNTED_MAX = 100_000


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``status``. ``pid``: the supervisor that runs from this data directory, if one does.

    ``history_lag_s``: how far timelines are behind; None: no type of workflow is recorded.
    """

    database: str
    server_version: str
    pid: int | None
    shards: list[ShardStatus]
    asides: Asides
    pauses: list[Pause]
    workflows: list[Total]
    history_lag_s: float | None = None


def status(terminal: Terminal, target: Target) -> int:
    """Read it once."""
    with target.opened() as database, database.connect("status") as connection:
        schema.demand_installed(connection)
        found = Status(
            database=database.name,
            server_version=lookups.setting(connection, "server_version"),
            pid=running_pid(target.data),
            shards=lookups.shard_statuses(connection),
            asides=lookups.asides(connection),
            pauses=lookups.pauses(connection),
            workflows=lookups.totals(connection),
            history_lag_s=timeline_statements.history_lag(connection),
        )
    terminal.answer(found, _lines(found))
    return 0


def _lines(found: Status) -> list[str]:
    here = f"runs here (pid {found.pid})" if found.pid else "is not run from this directory"
    shards = [
        (
            one.shard,
            "waiting" if one.has_work else "empty",
            one.windows,
            one.silent_windows,
            one.consumers,
            elapsed(one.tick_age_s),
        )
        for one in found.shards
    ]
    return [
        f"{found.database}, PostgreSQL {found.server_version}; the cluster {here}",
        "",
        *table(("shard", "log", "windows", "silent", "consumers", "last tick"), shards),
        "",
        _aside(found.asides),
        *map(_paused, found.pauses),
        *([] if found.history_lag_s is None else [f"timelines are recorded, {elapsed(found.history_lag_s)} behind"]),
        "",
        *(
            table(
                ("workflow", "status", "workflows"),
                [(one.workflow, one.status, one.workflows) for one in found.workflows],
            )
            if found.workflows
            else ["no workflows yet"]
        ),
    ]


def _aside(of: Asides) -> str:
    """What is not in the log, in a line."""
    due = "" if of.due_s is None else f", the next timer {'is due' if of.due_s <= 0 else f'in {elapsed(of.due_s)}'}"
    waiting = f" and {_upto(of.waiting)} waiting for room" if of.waiting else ""
    letters = "dead letter" if of.dead_letters == 1 else "dead letters"
    dead = f"{_upto(of.dead_letters)} {letters}" + (
        "; see 'durable-cluster dead-letters list'" if of.dead_letters else ""
    )
    signals = f"; {_upto(of.awaiting)} waiting for a signal" if of.awaiting else ""
    children = f"; {_upto(of.joining)} waiting for children" if of.joining else ""
    return (
        f"{_upto(of.sleeping)} asleep{due}{signals}{children}; {_upto(of.running)} slow steps running{waiting}; {dead}"
    )


def _paused(of: Pause) -> str:
    called = {"workflow": f"workflow {of.name}…", "type": f"workflow type '{of.name}'", "shard": f"shard {of.name}"}[
        of.scope
    ]
    since = "" if of.at is None else f" since {moment(of.at)}"
    by = "" if of.actor is None else f" by {of.actor}"
    held = f"; {_upto(of.parked)} steps wait" if of.parked else ""
    return f"paused{since}{by}: {called}{held}"


def _upto(count: int) -> str:
    return f"{count:,}" if count <= COUNTED_MAX else f"over {COUNTED_MAX:,}"
