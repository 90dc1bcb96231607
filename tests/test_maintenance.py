"""Maintenance: rotation under work, an idle log emptied and then left alone, names of the dead."""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from durable_cluster import App, Context, Continuation, Handle, statements
from durable_cluster.shards import maintenance, upkeep


def hopping(dsn: str) -> App:
    app = App("hopping", dsn=dsn)
    machine = app.machine("hop", state=int)

    @machine.step(start=True)
    def hop(ctx: Context, left: int) -> Continuation:
        return ctx.goto(hop, left - 1) if left else ctx.done("there")

    return app


def log_bytes(conn: psycopg.Connection) -> int:
    row = conn.execute(
        "select sum(pg_relation_size((q.queue_data_pfx || '_' || n)::regclass)) from pgque.queue q, generate_series(0, 2) n"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_rotation_between_pages_loses_nothing_and_keeps_the_log_small(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    conn.execute("update pgque.queue set queue_rotation_period = '0'")
    app = hopping(dsn)
    handles: list[Handle] = []
    largest = 0

    def has_rotated_often() -> bool:
        nonlocal largest
        handles.extend(app.named("hop").start_many(list(range(20))))
        app.run(timeout=0.02 + len(handles) / 10_000)  # longer each time: it catches up on a slow machine, too
        maintenance.run_once(conn)
        largest = max(largest, log_bytes(conn))
        row = conn.execute("select min(queue_rotations) from pgque.queue").fetchone()
        return row is not None and row[0] > 3

    eventually(has_rotated_often, seconds=60, what="four rotations of each queue")
    app.run(until_idle=True)
    assert {handle.result(timeout=1) for handle in handles} == {"there"}
    assert largest < 4 << 20


def test_an_idle_log_is_emptied_and_then_left_alone(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    app = hopping(dsn)
    app.named("hop").start(5)
    app.run(until_idle=True)
    conn.execute("update pgque.queue set queue_rotation_period = '0'")

    def is_empty() -> bool:
        maintenance.run_once(conn)
        app.run(until_idle=True)  # the empty window that maintenance opened on an idle shard
        return log_bytes(conn) == 0

    eventually(is_empty, seconds=60, what="the log emptied by rotation")
    maintenance.run_once(conn)
    assert not upkeep.needs_upkeep(conn)


def test_a_reader_whose_process_is_gone_loses_its_name(dsn: str, conn: psycopg.Connection) -> None:
    statements.join_shard(conn, 0, "cdead")
    assert not upkeep.has_dead_members(conn)
    conn.execute("update pgque.subscription set sub_active = now() - interval '1 hour' where sub_role = 'coop_member'")
    maintenance.run_once(conn)
    assert conn.execute("select from pgque.consumer where co_name = 'durable_0.cdead'").fetchone() is None


def test_partitions_are_made_ahead_and_a_second_round_finds_nothing_to_do(dsn: str, conn: psycopg.Connection) -> None:
    assert not upkeep.needs_partitions(conn)
    conn.execute("do $$ begin execute format('drop table durable.finished_%s', durable.today() + 7); end $$")
    assert upkeep.needs_partitions(conn)
    maintenance.run_once(conn)
    assert not upkeep.needs_partitions(conn)
