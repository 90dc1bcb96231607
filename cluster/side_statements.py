"""One Python function for each SQL function about what is not in the log: timers, waits, detached steps, dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, LiteralString

from durable_cluster.envelope import Envelope, encode_line
from durable_cluster.errors import UnknownWorkflow, translated
from durable_cluster.signals import Cancel, Delivery, Waiting
from durable_cluster.statements import Connection, plain_cursor


def schedule(tx: Connection, envelopes: Sequence[Envelope], delays_s: Sequence[float]) -> None:
    """Step events to be appended after so many seconds each, in the transaction of ``tx``."""
    columns = (
        [encode_line(one) for one in envelopes],
        [f"{delay * 1000:.3f}" for delay in delays_s],
        [mark(one) for one in envelopes],
    )
    call_with_columns(tx, "schedule", columns)


def sweep(connection: Connection) -> int:
    """Fire the timers that are due; how many. Writes nothing when there are none."""
    with translated():
        row = plain_cursor(connection).execute("select durable.sweep()").fetchone()
    return int(row[0]) if row else 0


def next_due(connection: Connection) -> float | None:
    """In how many seconds the next timer is due; None without any. Reads only."""
    with translated():
        row = plain_cursor(connection).execute("select durable.next_due()").fetchone()
    return None if row is None or row[0] is None else float(row[0])


def timers_due(
    connection: Connection, within_s: float, *, after: tuple[datetime, int] | None, limit: int
) -> list[tuple[datetime, int, str | None]]:
    """The next timers due in so many seconds: when, number, step event if it holds one. ``after``: the last one so far."""
    with translated():
        return (
            plain_cursor(connection)
            .execute(
                "select due, id, line from durable.timers_due(%s, %s, %s, %s)",
                (within_s, *(after or (None, None)), limit),
            )
            .fetchall()
        )


def signal(
    tx: Connection, workflow_id: str, name: str, payload: str, *, key: str | None, token: str | None, actor: str | None
) -> None:
    """Send a signal (``payload``: JSON), in the transaction of ``tx``. Raises UnknownWorkflow, InputError.

    A refusal leaves the transaction as good as it was, and with it, if the audit is on, its row there.
    """
    with translated():
        row = (
            plain_cursor(tx)
            .execute(
                "select durable.send_signal(%s::uuid, %s, %s, %s, %s, %s)",
                (workflow_id, name, payload, key, token, actor),
            )
            .fetchone()
        )
    if row and row[0] is not None:
        raise UnknownWorkflow(row[0])


def secret(connection: Connection) -> bytes:
    """What tokens are made with. For worker processes."""
    with translated():
        row = plain_cursor(connection).execute("select durable.secret()").fetchone()
    assert row is not None
    return bytes(row[0])


def has_orphans(connection: Connection) -> bool:
    """Whether a process that has no session any more holds windows or detached steps; others take them up after a while."""
    with translated():
        row = plain_cursor(connection).execute("select durable.has_orphans()").fetchone()
    return bool(row and row[0])


def now(connection: Connection) -> float:
    """``durable.now()``, as seconds since 1970."""
    with translated():
        row = plain_cursor(connection).execute("select extract(epoch from durable.now())::float8").fetchone()
    assert row is not None
    return float(row[0])


def lock_stripes(tx: Connection, workflow_ids: Sequence[str]) -> None:
    """Exclude everybody else's waits and signals of these workflows until ``tx`` ends."""
    with translated():
        plain_cursor(tx).execute("select durable.lock_stripes(%s::uuid[])", (list(workflow_ids),))


def await_signals(tx: Connection, waiting: Sequence[Waiting]) -> None:
    """Workflows that wait from now on, or go on with a signal that is there already. In the transaction of their page."""
    columns = (
        [one.envelope.workflow_id for one in waiting],
        [one.envelope.seq for one in waiting],
        [",".join(one.names) for one in waiting],
        [encode_line(one.envelope) for one in waiting],
        [encode_line(one.late) for one in waiting],
        ["" if one.timeout_s is None else f"{one.timeout_s * 1000:.3f}" for one in waiting],
        ["" if one.token_seq is None else one.token_seq for one in waiting],
        [mark(one.envelope) for one in waiting],
    )
    call_with_columns(tx, "await_signals", columns)


def deliver(tx: Connection, deliveries: Sequence[Delivery]) -> int:
    """Signals that have reached the page of their workflows' shard; how many were dropped."""
    columns = (
        [one.envelope.workflow_id for one in deliveries],
        [one.envelope.step for one in deliveries],
        [one.event for one in deliveries],
        [one.key for one in deliveries],
        ["" if one.token_seq is None else one.token_seq for one in deliveries],
    )
    return int(call_with_columns(tx, "deliver", columns))


def deliver_cancels(tx: Connection, cancels: Sequence[Cancel]) -> None:
    """Cancels that have reached the page of their workflows' shard."""
    columns = (
        [one.envelope.workflow_id for one in cancels],
        [one.reason for one in cancels],
        [one.actor for one in cancels],
        ["1" if one.cascades else "" for one in cancels],
    )
    call_with_columns(tx, "deliver_cancels", columns)


def cancel(tx: Connection, workflow_id: str, *, reason: str, actor: str | None, cascade: bool) -> bool:
    """Ask a workflow to end, in the transaction of ``tx``; whether it lived. Raises UnknownWorkflow, InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute("select durable.cancel(%s::uuid, %s, %s, %s)", (workflow_id, reason, actor, cascade))
            .fetchone()
        )
    return bool(row and row[0])


def merge_attributes(tx: Connection, changes: Mapping[str, str]) -> set[str]:
    """Changes of a page's workflows (JSON by id), in its transaction; the ids that would have too many, and keep what they have."""
    found = call_with_columns(tx, "merge_attributes", (list(changes), list(changes.values())))
    return set(found.split("\n")) - {""}


def set_attributes(tx: Connection, workflow_id: str, attributes: str, *, actor: str | None) -> None:
    """Change a workflow's attributes (JSON), in the transaction of ``tx``. Raises UnknownWorkflow, InputError."""
    with translated():
        plain_cursor(tx).execute("select durable.set_attributes(%s::uuid, %s, %s)", (workflow_id, attributes, actor))


def attributes_of(connection: Connection, workflow_id: str) -> str:
    """A workflow's attributes, as JSON."""
    with translated():
        row = (
            plain_cursor(connection).execute("select durable.attributes_of(%s::uuid)::text", (workflow_id,)).fetchone()
        )
    assert row is not None
    return str(row[0])


def chunks_of(connection: Connection, workflow_id: str, ref: int) -> list[tuple[int, str]]:
    """Ref and text of the chunks of a workflow's memo up to the one with this ref, in order; nothing if it is not there."""
    with translated():
        return (
            plain_cursor(connection)
            .execute("select ref, body from durable.chunks_of(%s, %s::bigint)", (workflow_id, ref))
            .fetchall()
        )


def publish(tx: Connection, progress: Mapping[str, str]) -> None:
    """Progress of a page's workflows (JSON by id), in its transaction."""
    call_with_columns(tx, "publish", (list(progress), list(progress.values())))


def publish_detached(connection: Connection, owner: int, progress: Mapping[str, str]) -> None:
    """Progress of detached steps that run (JSON by key), as far as they are still ``owner``'s."""
    with translated():
        plain_cursor(connection).execute(
            "select durable.publish_detached(%s::bigint, %s, %s)",
            (owner, "\n".join(progress), "\n".join(progress.values())),
        )


def progress_of(connection: Connection, workflow_id: str) -> str | None:
    """What a workflow last published, as JSON; None if it never did."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute("select progress from durable.progress_of(%s::uuid)", (workflow_id,))
            .fetchone()
        )
    return row[0] if row else None


def taken_away(connection: Connection, owner: int, keys: Sequence[str]) -> set[str]:
    """Of these detached steps, those that are no longer ``owner``'s: cancelled, or given to another."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute("select durable.taken_away(%s::bigint, %s)", (owner, "\n".join(keys)))
            .fetchone()
        )
    return set(row[0].split("\n")) - {""} if row else set()


def mark(envelope: Envelope) -> str:
    """What says that a step belongs to the cleanup after a cancel."""
    return "1" if envelope.cancelled else ""


def call_with_columns(tx: Connection, function: LiteralString, columns: Sequence[Sequence[object]]) -> Any:
    """A function that takes columns as texts, a value a line."""
    texts = ["\n".join(map(str, column)) for column in columns]
    with translated():
        row = plain_cursor(tx).execute(f"select durable.{function}({', '.join(['%s'] * len(texts))})", texts).fetchone()
    return row[0] if row else None


def detach(
    tx: Connection, *, shard: int, owners: Sequence[int], envelopes: Sequence[Envelope], crashes: Sequence[int]
) -> None:
    """Steps that outlast their page, in the page's transaction. ``owners``: who runs each; 0 for nobody yet."""
    columns = (owners, [one.key for one in envelopes], map(encode_line, envelopes), crashes)
    texts = ["\n".join(map(str, column)) for column in columns]
    with translated():
        plain_cursor(tx).execute("select durable.detach(%s, %s, %s, %s, %s)", (shard, *texts))


def complete_detached(tx: Connection, *, owner: int, keys: Sequence[str]) -> set[str]:
    """Delete the rows of steps that have ended, in the transaction that hands them on; those that were still ``owner``'s."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute("select durable.complete_detached(%s::bigint, %s)", (owner, "\n".join(keys)))
            .fetchone()
        )
    return set(row[0].split("\n")) if row else set()


def disown(connection: Connection, owner: int, *, running: Sequence[str]) -> int:
    """After a lost connection: rows of this owner that it does not run may be taken by others; how many."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute("select durable.disown(%s::bigint, %s)", (owner, "\n".join(running)))
            .fetchone()
        )
    return row[0] if row else 0


def single_out(connection: Connection, owner: int, key: str) -> None:
    """This detached step is at fault for the end of its process that follows."""
    with translated():
        plain_cursor(connection).execute("select durable.single_out(%s::bigint, %s)", (owner, key))


def take_detached(
    connection: Connection, owner: int, *, limit: int, with_suspect: bool
) -> list[tuple[int, str, int, str | None]]:
    """Detached steps that nobody ran, this owner's now: shard, envelope, crashes, progress (JSON)."""
    with translated():
        return (
            plain_cursor(connection)
            .execute(
                "select shard, line, crashes, progress from durable.take_detached(%s::bigint, %s, %s)",
                (owner, limit, with_suspect),
            )
            .fetchall()
        )


def report_progress(connection: Connection, owner: int, progress: Mapping[str, str]) -> set[str]:
    """Write what detached steps said (JSON by key); the keys that are no longer ``owner``'s."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute(
                "select durable.report_progress(%s::bigint, %s, %s)",
                (owner, "\n".join(progress), "\n".join(progress.values())),
            )
            .fetchone()
        )
    return set(row[0].split("\n")) - {""} if row else set()


def bury(tx: Connection, lines: Sequence[str], reasons: Sequence[str], details: Sequence[str]) -> None:
    """Dead letters: envelopes with why each cannot go on and its details (JSON). In the transaction of their page."""
    with translated():
        plain_cursor(tx).execute(
            "select durable.bury(%s, %s, %s)", ("\n".join(lines), "\n".join(reasons), "\n".join(details))
        )


def retry_dead_letter(
    connection: Connection, workflow_id: str, *, state: str | None = None, seq: int | None = None
) -> None:
    """Take a stuck workflow up again, with another state (JSON) if one is given; ``seq``: the dead letter that is meant.

    Raises UnknownWorkflow when there is none (any more), InputError.
    """
    with translated():
        plain_cursor(connection).execute("select durable.retry_dead_letter(%s, %s, %s::int)", (workflow_id, state, seq))


def fall_asleep(connection: Connection, shards: Sequence[int]) -> list[int]:
    """Ask appenders to these shards to notify, for as long as this session lasts. Those where no sibling had asked before."""
    with translated():
        rows = plain_cursor(connection).execute("select durable.fall_asleep(%s::int[])", (list(shards),)).fetchall()
    return [int(row[0]) for row in rows]


def wake_up(connection: Connection, shards: Sequence[int]) -> None:
    """Take that back."""
    with translated():
        plain_cursor(connection).execute("select durable.wake_up(%s::int[])", (list(shards),))


def channel(shard: int) -> str:
    """What a shard's notifications come by."""
    return f"durable_{int(shard)}"


def listen(connection: Connection, shard: int) -> None:
    """Hear the notifications of a shard on this connection."""
    plain_cursor(connection).execute(f"listen {channel(shard)}")


def unlisten(connection: Connection, shard: int) -> None:
    """Hear them no more."""
    plain_cursor(connection).execute(f"unlisten {channel(shard)}")
