"""Effects, successors, terminal records and the cursor of a page stand or fall together, whatever breaks its commit."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from durable_cluster import (
    App,
    Context,
    Continuation,
    DatabaseError,
    Handle,
    Machine,
    Retry,
    Settings,
    WorkflowStuck,
    statements,
)
from durable_cluster.consumer import Consumer

Body = Callable[[Context, int], object]
CUT_WORKFLOWS = 100


class Boom(Exception):
    """What these steps raise."""


@pytest.fixture(autouse=True)
def effect(conn: psycopg.Connection) -> None:
    """The table that transactional steps write: one row a workflow and step."""
    conn.execute("create table effect (id text, n int)")


def machine_with(dsn: str, body: Body, **settings: Any) -> Machine:
    """Two transactional steps a workflow: ``first`` writes its effect, then runs ``body``; ``second`` writes again."""
    app = App("handoff", dsn=dsn, settings=Settings(takeover_probe_s=0, **settings))
    machine = app.machine("pair", state=int)

    @machine.step(start=True, transactional=True, retry=Retry(attempts=2, backoff=0))
    def first(ctx: Context, n: int) -> Continuation:
        write(ctx, n)
        body(ctx, n)
        return ctx.goto(second, n)

    @machine.step(transactional=True)
    def second(ctx: Context, n: int) -> Continuation:
        write(ctx, n)
        return ctx.done(n)

    return machine


def start_in_shard(dsn: str, machine: Machine, shard: int) -> Handle:
    """A workflow that lives in ``shard``, with that number as its input; others are rolled back."""
    query = "select s.shard from durable.slot s where s.slot = durable.slot_of(%s)"
    while True:
        with psycopg.connect(dsn) as tx:
            handle = machine.start(shard, tx=tx)
            if tx.execute(query, (handle.id,)).fetchone() == (shard,):
                return handle
            tx.rollback()


def write(ctx: Context, n: int) -> None:
    ctx.tx.execute("insert into effect values (%s, %s)", (ctx.short_id, n))


def on(bad: int, act: Callable[[Context], object]) -> Body:
    """A body that acts for one workflow alone."""
    return lambda ctx, n: act(ctx) if n == bad else None


def effects(conn: psycopg.Connection) -> list[int]:
    return [n for (n,) in conn.execute("select n from effect order by n")]


def whole_state(conn: psycopg.Connection) -> list[Any]:
    """All that a page may change: effects, log, terminal records, what is set aside, windows with their cursors, ended batches."""
    queries = (
        "select * from effect",
        "select s.shard, l.txid, l.event_id, l.line from durable.shard s, durable.log(s.shard) l",
        "select * from durable.finished",
        "select * from durable.timer",
        "select * from durable.wait",
        "select * from durable.detached",
        "select * from durable.dead_letter",
        "select batch, owner, done, active from durable.win",
        "select batch_id from pgque.batch_end",
    )
    return [sorted(map(str, conn.execute(query))) for query in queries]


def raise_boom(_: Context) -> None:
    raise Boom("no")


def fail_a_statement(ctx: Context) -> None:
    ctx.tx.execute("select 1 / 0")


def swallow_a_failed_statement(ctx: Context) -> None:
    try:
        ctx.tx.execute("select 1 / 0")
    except psycopg.Error:
        return


def run_sql(*statements: str) -> Callable[[Context], object]:
    return lambda ctx: [ctx.tx.execute(statement) for statement in statements]


@pytest.mark.parametrize(
    "act",
    [
        raise_boom,
        fail_a_statement,
        swallow_a_failed_statement,
        lambda ctx: ctx.tx.commit(),
        lambda ctx: ctx.tx.rollback(),
    ],
    ids=["raises", "fails a statement", "swallows a failed statement", "calls commit", "calls rollback"],
)
def test_a_failing_transactional_step_takes_its_effect_and_nothing_else_with_it(
    dsn: str, conn: psycopg.Connection, act: Callable[[Context], object]
) -> None:
    machine = machine_with(dsn, on(2, act))
    handles = machine.start_many([1, 2, 3, 4])
    machine.app.run(until_idle=True, timeout=20)
    assert [handle.status() for handle in handles] == ["completed", "stuck", "completed", "completed"]
    assert effects(conn) == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "act",
    [run_sql("commit"), run_sql("rollback"), run_sql("commit", "begin"), run_sql("rollback", "begin")],
    ids=["commit", "rollback", "commit and begin", "rollback and begin"],
)
def test_a_step_whose_sql_ends_the_transaction_fails_alone_and_repeats_nobodys_effects(
    dsn: str, conn: psycopg.Connection, act: Callable[[Context], object]
) -> None:
    machine = machine_with(dsn, on(2, act), dead_interval_s=1)
    handles = machine.start_many([1, 2, 3, 4])
    machine.app.run(until_idle=True, timeout=20)
    assert [handle.status() for handle in handles] == ["completed", "stuck", "completed", "completed"]
    assert [n for n in effects(conn) if n != 2] == [1, 1, 3, 3, 4, 4]


def test_a_step_may_roll_back_its_own_savepoint(dsn: str, conn: psycopg.Connection) -> None:
    def undo_a_part(ctx: Context) -> None:
        with ctx.tx.transaction() as inner:
            ctx.tx.execute("insert into effect values ('inner', 99)")
            raise psycopg.Rollback(inner)

    machine = machine_with(dsn, on(2, undo_a_part))
    handles = machine.start_many([1, 2])
    machine.app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles] == [1, 2]
    assert effects(conn) == [1, 1, 2, 2]


def test_what_a_step_does_to_its_connection_object_does_not_fall_on_its_neighbours(dsn: str) -> None:
    def change_rows(ctx: Context) -> None:
        ctx.tx.row_factory = psycopg.rows.dict_row

    machine = machine_with(dsn, on(2, change_rows))
    handles = machine.start_many([1, 2, 3])
    machine.app.run(until_idle=True, timeout=20)
    assert [handle.result(timeout=5) for handle in handles] == [1, 2, 3]


def test_a_deferred_constraint_that_speaks_at_commit_stops_one_workflow_alone(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("create table seat (n int unique deferrable initially deferred)")
    machine = machine_with(dsn, lambda ctx, n: ctx.tx.execute("insert into seat values (%s)", (n % 10,)))
    handles = machine.start_many([1, 2, 3, 12, 5])
    machine.app.run(until_idle=True, timeout=20)
    statuses = dict(zip([1, 2, 3, 12, 5], [handle.status() for handle in handles], strict=True))
    assert sorted([statuses.pop(2), statuses.pop(12)]) == ["completed", "stuck"]
    assert set(statuses.values()) == {"completed"}
    sitting = [n for n in effects(conn) if n in (2, 12)]
    assert len(sitting) == 2
    assert sitting[0] == sitting[1]
    assert [n for n in effects(conn) if n not in (2, 12)] == [1, 1, 3, 3, 5, 5]


BREAK_THE_COMMIT = {
    "the log refuses": (
        "update pgque.queue set queue_disable_insert = true",
        "update pgque.queue set queue_disable_insert = false",
    ),
    "a terminal record is refused": (
        "create function no() returns trigger language plpgsql as $$ begin raise 'no terminal records today'; end $$;"
        "create trigger no before insert on durable.finished for each row execute function no()",
        "drop trigger no on durable.finished",
    ),
    "the cursor cannot move": (
        "create function no() returns trigger language plpgsql as $$ begin raise 'the window stays'; end $$;"
        "create trigger no before update or delete on durable.win for each row execute function no()",
        "drop trigger no on durable.win",
    ),
    "a deferred trigger refuses at commit": (
        "create function no() returns trigger language plpgsql as $$ begin raise 'not today'; end $$;"
        "create constraint trigger no after insert on pgque.batch_end initially deferred for each row execute function no()",
        "drop trigger no on pgque.batch_end",
    ),
}


@pytest.mark.parametrize("kind", ["plain", "transactional", "with steps set aside"])
@pytest.mark.parametrize("how", BREAK_THE_COMMIT)
def test_a_page_whose_commit_is_refused_changes_nothing_and_is_whole_the_next_time(
    dsn: str, conn: psycopg.Connection, how: str, kind: str
) -> None:
    break_it, mend_it = BREAK_THE_COMMIT[how]
    is_transactional = kind == "transactional"
    app = App("pages", dsn=dsn, settings=Settings(takeover_probe_s=0))
    machine = app.machine("page", state=int)

    @machine.step(start=True, transactional=is_transactional)
    def first(ctx: Context, n: int) -> Continuation:
        if is_transactional:
            write(ctx, n)
        return ctx.goto(first, n - 1) if n % 2 == 0 else ctx.done(n)

    @machine.step(retry=Retry(attempts=1))
    def aside(ctx: Context, how: str) -> Continuation:
        if how == "bury":
            raise Boom("no")
        return ctx.sleep(0 if how == "nap" else 61, first, 1)

    handles = machine.start_many([1, 2, 3, 4, 11, 12, 13, 14])
    set_aside = start_aside(conn) if kind == "with steps set aside" else []
    consumer = Consumer(dsn, 0, app.machines, app.settings)
    consumer.shards = [0, 1]
    conn.execute(break_it.encode())
    before: list[Any] = []

    def look() -> None:
        before[:] = whole_state(conn)

    # Each page that cannot be committed ends in an error, not in a workflow's failure: nobody's step is at fault.
    with pytest.raises(psycopg.Error):
        consumer.work(lambda: False, look)
    assert whole_state(conn) == before
    conn.execute(mend_it.encode())
    statements.abandon(conn, consumer.owner)
    consumer.close()
    app.run(until_idle=True, timeout=20)
    assert [handle.result(timeout=5) for handle in handles] == [1, 1, 3, 3, 11, 11, 13, 13]
    assert [app.get(one).status() for one in set_aside] == ["completed", "running", "stuck"] * (len(set_aside) // 3)
    assert conn.execute("select count(*) from durable.wait").fetchone() == (len(set_aside) // 3,)


def start_aside(conn: psycopg.Connection) -> list[str]:
    """Workflows that begin where they leave the log: four naps, long sleeps and dead letters."""
    hows = ["nap", "sleep", "bury"] * 4
    payloads = [f'"{how}"' for how in hows]
    found = statements.start_many(conn, "page", version=1, step="aside", payloads=payloads, keys=None, begin=None)
    return [workflow_id for workflow_id, _ in found]


def test_a_connection_cut_in_the_middle_of_phase_2_leaves_nothing_behind(dsn: str, conn: psycopg.Connection) -> None:
    def cut(ctx: Context) -> None:
        conn.execute("select pg_terminate_backend(%s, 5000)", (ctx.tx.info.backend_pid,))

    is_cutting = [True]
    machine = machine_with(dsn, on(2, lambda ctx: cut(ctx) if is_cutting.pop() else is_cutting.append(False)))
    is_cutting[:] = [False, True]
    handles = machine.start_many([1, 2, 3])
    before: list[Any] = []

    def look() -> None:
        before[:] = whole_state(conn)

    consumer = Consumer(dsn, 0, machine.app.machines, machine.app.settings)
    consumer.shards = [0, 1]
    with pytest.raises(psycopg.OperationalError):
        while consumer.work(lambda: False, look):
            pass
    assert whole_state(conn) == before
    statements.abandon(conn, consumer.owner)
    consumer.close()
    machine.app.run(until_idle=True, timeout=20)
    assert [handle.result(timeout=5) for handle in handles] == [1, 2, 3]
    assert effects(conn) == [1, 1, 2, 2, 3, 3]


def test_a_connection_cut_while_the_commit_is_under_way_leaves_nothing_behind(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    conn.execute(
        "create function wait() returns trigger language plpgsql as"
        " $$ begin perform pg_advisory_xact_lock(1); return null; end $$"
    )
    conn.execute(
        "create constraint trigger wait after insert on effect initially deferred for each row execute function wait()"
    )
    machine = machine_with(dsn, lambda ctx, n: None)
    handle = machine.start(1)
    consumer = Consumer(dsn, 0, machine.app.machines, machine.app.settings)
    consumer.shards = [0, 1]
    pid = consumer.connection.info.backend_pid
    before: list[Any] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            while consumer.work(lambda: False, lambda: before.__setitem__(slice(None), whole_state(conn))):
                pass
        except psycopg.OperationalError as error:
            failed.append(error)

    def waits_in_commit() -> bool:
        query = "select 1 from pg_locks where pid = %s and locktype = 'advisory' and not granted"
        return conn.execute(query, (pid,)).fetchone() is not None

    with psycopg.connect(dsn) as holder:
        holder.execute("select pg_advisory_xact_lock(1)")
        thread = threading.Thread(target=work)
        thread.start()
        eventually(waits_in_commit)
        conn.execute("select pg_terminate_backend(%s, 5000)", (pid,))
        thread.join(20)
    assert failed
    assert whole_state(conn) == before
    statements.abandon(conn, consumer.owner)
    consumer.close()
    machine.app.run(until_idle=True, timeout=20)
    assert handle.result(timeout=5) == 1
    assert effects(conn) == [1, 1]


def test_two_pages_that_deadlock_both_make_progress(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("create table account (n int primary key, balance int default 0)")
    conn.execute("insert into account select g from generate_series(0, 1) g")
    has_first = [threading.Event(), threading.Event()]

    def lock_both(ctx: Context, n: int) -> None:
        mine = n % 2
        ctx.tx.execute("set local deadlock_timeout = '20ms'")
        ctx.tx.execute("update account set balance = balance + 1 where n = %s", (mine,))
        has_first[mine].set()
        has_first[1 - mine].wait(10)
        ctx.tx.execute("update account set balance = balance + 1 where n = %s", (1 - mine,))

    machine = machine_with(dsn, lock_both)
    handles = [start_in_shard(dsn, machine, shard) for shard in (0, 1)]
    consumers = [Consumer(dsn, shard, machine.app.machines, machine.app.settings) for shard in (0, 1)]

    def work(consumer: Consumer) -> None:
        while consumer.work(lambda: False, lambda: None):
            pass

    threads = [threading.Thread(target=work, args=(consumer,)) for consumer in consumers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [handle.result(timeout=5) for handle in handles] == [0, 1]
    assert len(effects(conn)) == 4
    assert conn.execute("select balance from account").fetchall() == [(2,), (2,)]
    for consumer in consumers:
        consumer.close()


def test_a_conflict_shrinks_the_group_and_repeats_no_effect(dsn: str, conn: psycopg.Connection) -> None:
    tries: list[int] = []

    def conflict_at_first(ctx: Context, n: int) -> None:
        tries.append(n)
        if n == 5 and tries.count(5) <= 3:
            ctx.tx.execute("do $$ begin raise 'busy' using errcode = 'lock_not_available'; end $$")

    machine = machine_with(dsn, conflict_at_first, transactional_steps_max=8)
    handles = machine.start_many(list(range(10)))
    machine.app.run(until_idle=True, timeout=30)
    assert [handle.result(timeout=5) for handle in handles] == list(range(10))
    assert effects(conn) == sorted(list(range(10)) * 2)
    assert tries.count(5) == 4


def test_a_step_that_always_conflicts_is_put_back_and_lets_its_neighbours_go_on(dsn: str) -> None:
    def always(ctx: Context) -> None:
        raise psycopg.errors.SerializationFailure("for ever")

    machine = machine_with(dsn, on(2, always))
    handles = machine.start_many([1, 2, 3])
    thread = threading.Thread(target=machine.app.run, kwargs={"until_idle": True, "timeout": 3}, daemon=True)
    thread.start()
    thread.join(15)
    assert not thread.is_alive(), "the conflict is tried again without a limit"
    assert [handle.status() for handle in handles] == ["completed", "running", "completed"]
    assert len(statements.locate(machine.app.client.connection(), handles[1].id)) == 1


def test_a_conflict_that_a_step_has_handled_is_not_taken_for_nobodys_fault(dsn: str) -> None:
    def handle_it_and_fail(ctx: Context) -> None:
        try:
            with ctx.tx.transaction():
                ctx.tx.execute("do $$ begin raise 'busy' using errcode = 'lock_not_available'; end $$")
        except psycopg.errors.LockNotAvailable:
            raise Boom("the seat is taken") from None

    machine = machine_with(dsn, on(2, handle_it_and_fail))
    _, bad = machine.start_many([1, 2])
    thread = threading.Thread(target=machine.app.run, kwargs={"until_idle": True}, daemon=True)
    thread.start()
    thread.join(15)
    with pytest.raises(WorkflowStuck, match="the seat is taken"):
        bad.result(timeout=1)


def test_a_transactional_step_may_start_a_workflow_that_stands_or_falls_with_it(
    dsn: str, conn: psycopg.Connection
) -> None:
    def spawn(ctx: Context, n: int) -> None:
        if n < 10:
            machine.start(n + 10, key=f"child of {n}", tx=ctx.tx)
        if n == 2:
            raise Boom("and takes its child with it")

    machine = machine_with(dsn, spawn)
    machine.start_many([1, 2, 3])
    machine.app.run(until_idle=True, timeout=20)
    assert effects(conn) == [1, 1, 3, 3, 11, 11, 13, 13]
    keys = [key for (key,) in conn.execute("select key from durable.key order by key")]
    assert keys == ["child of 1", "child of 3"]


@pytest.mark.parametrize("seed", range(3))
def test_effects_happen_once_however_often_connections_are_cut(dsn: str, conn: psycopg.Connection, seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    machine = machine_with(dsn, lambda ctx, n: None, transactional_steps_max=1, page_window_ms=0)
    handles = machine.start_many(list(range(CUT_WORKFLOWS)))
    is_over = threading.Event()

    def work_until_cut(shard: int) -> None:
        consumer = Consumer(dsn, shard, machine.app.machines, machine.app.settings)
        try:
            while not is_over.is_set():
                if not consumer.work(is_over.is_set, lambda: None):
                    consumer.wait(0)
        finally:
            statements.abandon(conn, consumer.owner)
            consumer.close()

    def keep_working(shard: int) -> None:
        while not is_over.is_set():
            with contextlib.suppress(psycopg.OperationalError, DatabaseError):
                work_until_cut(shard)

    threads = [threading.Thread(target=keep_working, args=(n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    cuts = 0
    deadline = time.monotonic() + 60
    try:
        while (
            conn.execute("select count(*) from durable.finished").fetchone() != (CUT_WORKFLOWS,)
            and time.monotonic() < deadline
        ):
            cuts += 1
            conn.execute("select pg_sleep(%s)", (dice.uniform(0, 0.05),))
            conn.execute(
                "select pg_terminate_backend(pid) from (select pid from pg_stat_activity where datname = current_database()"
                " and application_name like 'durable-cluster shard %%' order by random() limit 1) one"
            )
        assert [handle.result(timeout=30) for handle in handles] == list(range(CUT_WORKFLOWS))
    finally:
        is_over.set()
        for thread in threads:
            thread.join(20)
    assert cuts > 3
    assert effects(conn) == sorted(list(range(CUT_WORKFLOWS)) * 2)
    log = conn.execute("select count(*), count(distinct (l.id, l.seq)) from durable.shard s, durable.log(s.shard) l")
    assert log.fetchone() == (2 * CUT_WORKFLOWS, 2 * CUT_WORKFLOWS)
