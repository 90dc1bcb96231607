"""One Python function for each SQL function of schema ``durable``: the only module that calls SQL on the path of a step."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, LiteralString, TypeAlias

import msgspec
import psycopg
from psycopg.rows import tuple_row

from durable_cluster.errors import translated
from durable_cluster.memo import Spilled, rows_of
from durable_cluster.transactions import AwaitedCursor, Joined

Connection: TypeAlias = "psycopg.Connection[Any] | Joined"
"""One of our own, or a caller's whose transaction is joined."""


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """A terminal record: ``status`` is completed, failed or cancelled, ``output`` is JSON. ``memo``: see ``memo``; ``""``: none."""

    workflow_id: str
    status: str
    output: str
    memo: str = ""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a workflow; times are ISO 8601."""

    workflow: str
    version: int
    status: str
    output: str | None
    started_at: str
    finished_at: str | None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a live workflow stands: queued, claimed, sleeping, waiting, joining, detached, limited, paused or stuck.

    ``due`` (ISO 8601): until when it sleeps, or waits at the latest.
    """

    shard: int
    place: str
    step: str
    seq: int
    owner_is_silent: bool
    due: str | None = None


def plain_cursor(connection: Connection) -> psycopg.Cursor[tuple[Any, ...]] | AwaitedCursor:
    """A cursor that gives tuples, whatever rows and cursors the connection's owner prefers."""
    if isinstance(connection, psycopg.Connection):
        return psycopg.Cursor(connection, row_factory=tuple_row)
    return connection.cursor()


def start(
    tx: Connection,
    workflow: str,
    *,
    version: int,
    step: str,
    payload: str,
    key: str | None,
    begin: timedelta | datetime | None = None,
    attributes: str | None = None,
    traceparent: str | None = None,
    priority: float = 1,
) -> tuple[str, bool]:
    """The workflow's id (32 hex digits) and whether it is new. In the transaction of ``tx``, by one statement.

    ``begin``: when its first step is delivered: after how long, or at what time of the database's clock. ``attributes``: JSON.
    """
    call = f"select durable.hex(id), is_new from durable.start(%s, %s, %s, %s, %s, {_after(begin)}, %s, %s)"
    values = (workflow, version, step, payload, key, begin, attributes, traceparent)
    with translated():
        row = _started(tx, call, values, priority).fetchone()
    assert row is not None
    return row[0], row[1]


def start_many(
    tx: Connection,
    workflow: str,
    *,
    version: int,
    step: str,
    payloads: Sequence[str],
    keys: Sequence[str] | None,
    begin: timedelta | datetime | None = None,
    attributes: Sequence[str] | None = None,
    traceparent: str | None = None,
    priority: float = 1,
) -> list[tuple[str, bool]]:
    """As ``start`` for many payloads, in their order. ``attributes``: one for each, or one for all."""
    call = f"select durable.hex(id), is_new from durable.start_many(%s, %s, %s, %s, %s, {_after(begin)}, %s, %s)"
    values = (workflow, version, step, "\n".join(payloads), _lines(keys), begin, _lines(attributes), traceparent)
    with translated():
        return [(row[0], row[1]) for row in _started(tx, call, values, priority).fetchall()]


def _started(
    tx: Connection, call: LiteralString, values: tuple[object, ...], priority: float
) -> psycopg.Cursor[tuple[Any, ...]] | AwaitedCursor:
    """Start, and give what is new its priority, in one statement: psycopg's ``transaction()`` would commit one that it begins."""
    if priority == 1:
        return plain_cursor(tx).execute(call, values)
    return plain_cursor(tx).execute(
        f"with s(id, is_new) as materialized ({call}) select id, is_new,"
        " (select durable.set_priority(string_agg(id, E'\n') filter (where is_new), %s) from s) from s",
        (*values, priority),
    )


def _lines(values: Sequence[str] | None) -> str | None:
    return None if values is None else "\n".join(values)


def _after(begin: timedelta | datetime | None) -> LiteralString:
    """The placeholder of a beginning, as an interval; a time that is past is now."""
    return "greatest(%s::timestamptz - durable.now(), '0')" if isinstance(begin, datetime) else "%s::interval"


def find(connection: Connection, workflow: str, key: str) -> str | None:
    """The id that ``key`` stands for."""
    with translated():
        row = plain_cursor(connection).execute("select durable.hex(durable.find(%s, %s))", (workflow, key)).fetchone()
    return row[0] if row else None


def state_of(connection: Connection, workflow_id: str) -> State | None:
    """What is known of a workflow, or None."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute(
                "select workflow, version, status, output, to_json(started_at) #>> '{}', to_json(finished_at) #>> '{}'"
                " from durable.state_of(%s)",
                (workflow_id,),
            )
            .fetchone()
        )
    if row is None:
        return None
    workflow, version, status, output, started_at, finished_at = row
    return State(
        workflow=workflow, version=version, status=status, output=output, started_at=started_at, finished_at=finished_at
    )


def outcome(connection: Connection, workflow_id: str) -> tuple[str, str] | None:
    """Status and output (JSON) of a finished workflow, 'stuck' and the details of one with a dead letter, or None."""
    with translated():
        return (
            plain_cursor(connection)
            .execute("select status, output from durable.outcome(%s)", (workflow_id,))
            .fetchone()
        )


def locate(connection: Connection, workflow_id: str) -> list[Place]:
    """The live step events of a workflow; more than one would be a broken invariant."""
    with translated():
        rows = (
            plain_cursor(connection)
            .execute(
                "select shard, place, step, seq, owner_is_silent, to_json(due) #>> '{}' from durable.locate(%s)",
                (workflow_id,),
            )
            .fetchall()
        )
    return [Place(shard=s, place=p, step=t, seq=n, owner_is_silent=o, due=d) for s, p, t, n, o, d in rows]


def probe(connection: Connection, shard: int, *, dead_interval: timedelta | None = None) -> bool:
    """Whether a claim would find work (with ``dead_interval`` also silent windows); reads only."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute("select durable.probe(%s::int, %s::interval)", (shard, dead_interval))
            .fetchone()
        )
    return bool(row and row[0])


def claim(
    connection: Connection,
    shard: int,
    *,
    member: str,
    owner: int,
    lines_max: int,
    bytes_max: int,
    dead_interval: timedelta | None = None,
    is_expected: bool = False,
) -> str | None:
    """The text of a page (see ``envelope.decode_page``), or None when there is nothing. Raises BatchLost."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute(
                "select durable.claim(%s::int, %s, %s::bigint, %s::int, %s::int, %s::interval, %s)",
                (shard, member, owner, lines_max, bytes_max, dead_interval, is_expected),
            )
            .fetchone()
        )
    return row[0] if row else None


def rescue(
    connection: Connection, shard: int, *, owner: int, lines_max: int, bytes_max: int, dead_interval: timedelta
) -> str | None:
    """The text of a page of a silent owner's window, now this owner's, or None. For whoever has a window of the shard open."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute(
                "select durable.rescue(%s::int, %s::bigint, %s::int, %s::int, %s::interval)",
                (shard, owner, lines_max, bytes_max, dead_interval),
            )
            .fetchone()
        )
    return row[0] if row else None


def page(connection: Connection, *, batch: int, owner: int, lines_max: int, bytes_max: int) -> str | None:
    """The next page of an open window; None while its shard is paused. Raises BatchLost."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute(
                "select durable.page(%s::bigint, %s::bigint, %s::int, %s::int)", (batch, owner, lines_max, bytes_max)
            )
            .fetchone()
        )
    return row[0] if row else None


def fence(tx: Connection, *, batch: int, owner: int, done: str) -> None:
    """Phase 2's first statement. Raises BatchLost."""
    with translated():
        plain_cursor(tx).execute(
            "select durable.fence(%s::bigint, %s::bigint, %s::durable.cursor)", (batch, owner, done)
        )


def commit_page(
    tx: Connection,
    *,
    is_fenced: bool,
    shard: int,
    batch: int,
    owner: int,
    done: str,
    next_cursor: str,
    is_last: bool,
    steps: str,
    counts: Sequence[int],
    outcomes: Sequence[Outcome],
    spilled: Sequence[Spilled] = (),
) -> None:
    """Phase 2's last statement; without ``is_fenced`` its only one. ``steps``, ``counts``: see ``envelope.encode_chunks``;
    ``spilled``: what they do not carry any more. Raises BatchLost.
    """
    where = shard, batch, owner, done, next_cursor, is_last
    function = "durable.commit_page" if is_fenced else "durable.commit_plain_page"
    with translated():
        plain_cursor(tx).execute(
            f"select {function}(%s::int, %s::bigint, %s::bigint, %s::durable.cursor, %s::durable.cursor, %s,"
            " %s, %s::int[], %s, %s, %s, %s, %s)",
            (*where, steps, list(counts), *_columns(outcomes), rows_of(spilled)),
        )


def _columns(outcomes: Sequence[Outcome]) -> tuple[str | None, str | None, str | None, str | None]:
    """Terminal records as four texts, one a line each; nothing for none."""
    if not outcomes:
        return None, None, None, None
    ids, statuses = [one.workflow_id for one in outcomes], [one.status for one in outcomes]
    outputs, memos = [one.output for one in outcomes], [one.memo for one in outcomes]
    return "\n".join(ids), "\n".join(statuses), "\n".join(outputs), "\n".join(memos) if any(memos) else None


def join_shard(connection: Connection, shard: int, member: str) -> None:
    """Register a consumer's name with the engine."""
    with translated():
        plain_cursor(connection).execute("select durable.join_shard(%s, %s)", (shard, member))


def leave_shard(connection: Connection, shard: int, member: str) -> None:
    """Take the name back; the engine refuses while it holds a window."""
    with translated():
        plain_cursor(connection).execute("select durable.leave_shard(%s, %s)", (shard, member))


def heartbeat(connection: Connection, owners: Sequence[int]) -> int:
    """Say that these owners live; how many windows that concerned."""
    with translated():
        row = plain_cursor(connection).execute("select durable.heartbeat(%s::bigint[])", (list(owners),)).fetchone()
    return row[0] if row else 0


def abandon(connection: Connection, owner: int, *, suspects: int = 0) -> list[int]:
    """Say that this owner is gone; the shards whose windows are free now.

    ``suspects``: the lines of a page, if the process died of itself; 0 if it was ended from outside.
    """
    with translated():
        row = plain_cursor(connection).execute("select durable.abandon(%s::bigint, %s)", (owner, suspects)).fetchone()
    return list(row[0]) if row else []


def holdings(connection: Connection, owner: int) -> list[tuple[int, int]]:
    """Shard and batch of this owner's open windows; waits for commits that were on their way when a connection was lost."""
    query = "select shard, batch from durable.holdings(%s::bigint)"
    with translated():
        return plain_cursor(connection).execute(query, (owner,)).fetchall()


def mark_suspect(connection: Connection, *, batch: int, owner: int, done: str) -> int:
    """Before a suspect runs: how many processes will have died with it if this one does. Raises BatchLost."""
    with translated():
        row = (
            plain_cursor(connection)
            .execute("select durable.mark_suspect(%s::bigint, %s::bigint, %s::durable.cursor)", (batch, owner, done))
            .fetchone()
        )
    assert row is not None
    return int(row[0])


def reincarnate(connection: Connection, old: int, new: int) -> None:
    """From now on ``old`` is ``new``: its windows are free, its detached steps stay its own."""
    with translated():
        plain_cursor(connection).execute("select durable.reincarnate(%s::bigint, %s::bigint)", (old, new))


def hand_on(
    tx: Connection,
    *,
    shard: int,
    steps: str,
    counts: Sequence[int],
    outcomes: Sequence[Outcome],
    spilled: Sequence[Spilled] = (),
) -> None:
    """Successors and terminal records of detached steps; ``steps``, ``counts``, ``spilled``: as for ``commit_page``."""
    with translated():
        plain_cursor(tx).execute(
            "select durable.hand_on(%s::int, %s, %s::int[], %s, %s, %s, %s, %s)",
            (shard, steps, list(counts), *_columns(outcomes), rows_of(spilled)),
        )


def look(
    connection: Connection,
    shards: Sequence[int],
    *,
    dead_interval: timedelta | None,
    may_take: bool,
    with_suspect: bool,
) -> tuple[bool, float | None]:
    """Whether a consumer of ``shards`` has anything to do, and in how many seconds the next timer is due; reads only.

    With ``dead_interval`` silent processes count; ``may_take``: so do detached steps that nobody runs.
    """
    with translated():
        row = (
            plain_cursor(connection)
            .execute(
                "select has_work, due_s from durable.look(%s::int[], %s::interval, %s, %s)",
                (list(shards), dead_interval, may_take, with_suspect),
            )
            .fetchone()
        )
    assert row is not None
    return row[0], row[1]
