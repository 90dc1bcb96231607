"""One Python function for each SQL function about who waits for whom: children, permits, pauses, priorities."""

from __future__ import annotations

from collections.abc import Sequence

from durable_cluster.envelope import Envelope, encode_line
from durable_cluster.errors import translated
from durable_cluster.joins import RESULTS_AT_ONCE, ChildResult, Joining, Spawning, result_of
from durable_cluster.limits import Pump, Queued
from durable_cluster.side_statements import call_with_columns, mark
from durable_cluster.statements import Connection, plain_cursor


def lock_groups(tx: Connection, parent_ids: Sequence[str], ended_ids: Sequence[str]) -> None:
    """Exclude everybody else's counts of these parents' children, and of the parents of what ends in ``tx``, until it ends."""
    call_with_columns(tx, "lock_groups", (parent_ids, ended_ids))


def spawn(tx: Connection, spawning: Sequence[Spawning | Joining]) -> None:
    """Start the children of these steps, in the transaction of their page."""
    children = [child for one in spawning for child in one.children]
    columns = (
        [one.envelope.workflow_id for one in spawning],
        [one.seq for one in spawning],
        [len(one.children) for one in spawning],
        [mark(one.envelope) for one in spawning],
        [child.workflow for child in children],
        [child.version for child in children],
        [child.step for child in children],
        [child.input for child in children],
        [f"{child.delay_s * 1000:.3f}" for child in children],
        [child.attributes for child in children],
        ["1" if one.keeps_group else "" for one in spawning],
    )
    call_with_columns(tx, "spawn", columns)


def await_children(tx: Connection, joining: Sequence[Joining]) -> None:
    """Parents that wait for their children from now on, or go on at once where enough have ended. In their page's transaction."""
    columns = (
        [one.envelope.workflow_id for one in joining],
        [one.envelope.seq for one in joining],
        [encode_line(one.envelope) for one in joining],
        [encode_line(one.late) for one in joining],
        ["" if one.timeout_s is None else f"{one.timeout_s * 1000:.3f}" for one in joining],
        ["" if one.needed is None else one.needed for one in joining],
        ["" if one.tolerance is None else one.tolerance for one in joining],
        ["1" if one.cancels_rest else "" for one in joining],
        [mark(one.envelope) for one in joining],
        [",".join(one.names) for one in joining],
        ["" if one.token_seq is None else one.token_seq for one in joining],
    )
    call_with_columns(tx, "await_children", columns)


def children_of(
    connection: Connection, parent_ids: Sequence[str], *, first: int = 0, limit: int = RESULTS_AT_ONCE
) -> dict[str, list[ChildResult]]:
    """So many of the last group of each workflow's children, from number ``first`` on."""
    found: dict[str, list[ChildResult]] = {parent_id: [] for parent_id in parent_ids}
    with translated():
        rows = plain_cursor(connection).execute(
            "select durable.hex(parent), number, durable.hex(id), workflow, status, output from durable.children_of(%s, %s, %s)",
            ("\n".join(parent_ids), first, limit),
        )
        for parent_id, *row in rows:
            found[parent_id].append(result_of(*row))
    return found


def group_of(connection: Connection, parent_id: str) -> tuple[int, int, int] | None:
    """How many children the last group of a workflow has, and how many completed and failed; None if it never spawned any."""
    with translated():
        return (
            plain_cursor(connection)
            .execute("select total, completed, failed from durable.group_of(%s::uuid)", (parent_id,))
            .fetchone()
        )


def lock_ahead(tx: Connection, queued: Sequence[Queued | Pump], giving_ids: Sequence[str]) -> None:
    """Exclude everybody else's counts for these, and for the permits of these workflows, until ``tx`` ends."""
    names = [one.limit.name if isinstance(one, Queued) else one.name for one in queued]
    call_with_columns(tx, "lock_ahead", (names, [one.key for one in queued], giving_ids))


def take_permits(tx: Connection, queued: Sequence[Queued]) -> None:
    """Steps that need a permit, in the transaction of their page: they come back through the log with it."""
    columns = (
        [one.envelope.workflow_id for one in queued],
        [one.envelope.seq for one in queued],
        [encode_line(one.envelope) for one in queued],
        [one.permit_seq for one in queued],
        [one.limit.name for one in queued],
        [one.key for one in queued],
        ["" if one.limit.concurrency is None else one.limit.concurrency for one in queued],
        ["" if one.limit.rate is None else one.limit.rate for one in queued],
        ["" if one.limit.period_s is None else one.limit.period_s * 1000 for one in queued],
    )
    call_with_columns(tx, "take_permits", columns)


def give_back(tx: Connection, envelopes: Sequence[Envelope]) -> None:
    """The permits of steps that are handed on in ``tx``."""
    call_with_columns(tx, "give_back", ([one.workflow_id for one in envelopes], [one.seq for one in envelopes]))


def pump(tx: Connection, pumps: Sequence[Pump]) -> None:
    """Rates that let somebody pass now."""
    call_with_columns(tx, "pump", ([one.name for one in pumps], [one.key for one in pumps]))


def set_limit(
    connection: Connection, name: str, *, concurrency: int | None, rate: int | None, period_s: float | None
) -> None:
    """These numbers in place of what the code declares. Raises InputError."""
    with translated():
        plain_cursor(connection).execute(
            "select durable.set_limit(%s, %s::int, %s::int, make_interval(secs => coalesce(%s::float8, 1)))",
            (name, concurrency, rate, period_s),
        )


def reset_limit(connection: Connection, name: str) -> bool:
    """What the code declares counts again; whether something else did."""
    with translated():
        row = plain_cursor(connection).execute("select durable.reset_limit(%s)", (name,)).fetchone()
    return bool(row and row[0])


def park(tx: Connection, envelopes: Sequence[Envelope]) -> None:
    """Step events that met a pause, in the transaction of their page; those whose pause is over by now go back to the log."""
    columns = (
        [one.workflow_id for one in envelopes],
        [one.seq for one in envelopes],
        [one.workflow for one in envelopes],
        [encode_line(one) for one in envelopes],
    )
    call_with_columns(tx, "park", columns)


def pause(connection: Connection, scope: str, name: str, *, actor: str | None) -> bool:
    """Let no step of a 'workflow', a 'type' or a 'shard' begin; whether that is new. Raises UnknownWorkflow, InputError."""
    with translated():
        row = plain_cursor(connection).execute("select durable.pause(%s, %s, %s)", (scope, name, actor)).fetchone()
    return bool(row and row[0])


def resume(connection: Connection, scope: str, name: str, *, actor: str | None = None) -> int | None:
    """Take a pause back; how many step events it held, None if there was none. Raises UnknownWorkflow, InputError."""
    with translated():
        row = plain_cursor(connection).execute("select durable.resume(%s, %s, %s)", (scope, name, actor)).fetchone()
    return None if row is None else row[0]


def set_priority(tx: Connection, workflow_ids: Sequence[str], weight: float) -> int:
    """The weight of these workflows from their next steps on, in the transaction of ``tx``; how many live. Raises InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute("select durable.set_priority(%s, %s)", ("\n".join(workflow_ids), weight))
            .fetchone()
        )
    return int(row[0]) if row else 0
