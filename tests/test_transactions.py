"""An event that was committed is delivered exactly once, however late, across ticks and rotations; and no transaction is
open while user code runs."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest
from psycopg import IsolationLevel

from durable_cluster import App, Context, Continuation, Machine, statements
from durable_cluster.settings import Settings

RUNS: Counter[int] = Counter()
REPEATED = (10, 20, 30, 40)
"""Inputs that a test may start more than once."""


@pytest.fixture(autouse=True)
def runs() -> Iterator[None]:
    RUNS.clear()
    yield


def counting(dsn: str) -> Machine:
    """A workflow of two steps that counts how often each input's first step ran."""
    machine = App("counting", dsn=dsn).machine("count", state=int)

    @machine.step(start=True)
    def first(ctx: Context, n: int) -> Continuation:
        RUNS[n] += 1
        return ctx.goto(second, n)

    @machine.step()
    def second(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return machine


def drain(machine: Machine) -> int:
    """Run until nothing is ready; a run that finds the same again and again is ended."""
    steps = machine.app.run(until_idle=True, timeout=10)
    assert all(count == 1 for n, count in RUNS.items() if n not in REPEATED), "an event came twice"
    return steps


def rotate(conn: psycopg.Connection) -> int:
    """Both steps of a rotation of every shard that is due; how many tables were switched."""
    conn.execute(
        "update pgque.queue set queue_rotation_period = '0', queue_switch_time = queue_switch_time - interval '1 s'"
    )
    switched = conn.execute("select sum(pgque.maint_rotate_tables_step1(queue)) from durable.shard").fetchone()
    conn.execute("select pgque.maint_rotate_tables_step2()")
    assert switched is not None
    return switched[0]


def has_rotated_twice(machine: Machine, conn: psycopg.Connection) -> bool:
    """Work and rotate; whether every shard has been rotated twice by now."""
    machine.start_many(REPEATED, tx=conn)
    drain(machine)
    rotate(conn)
    return conn.execute("select min(queue_rotations) >= 2 from pgque.queue").fetchone() == (True,)


def test_a_start_that_is_rolled_back_leaves_nothing(dsn: str, conn: psycopg.Connection) -> None:
    machine = counting(dsn)
    with psycopg.connect(dsn) as tx:
        handle = machine.start(1, key="a", tx=tx)
        machine.start_many([2, 3], keys=["b", "c"], tx=tx)
        tx.rollback()
    drain(machine)
    assert not RUNS
    assert statements.state_of(conn, handle.id) is None
    for table in ("started", "finished", "key"):
        assert conn.execute(f"select count(*) from durable.{table}".encode()).fetchone() == (0,)
    assert [row for shard in (0, 1) for row in conn.execute("select * from durable.log(%s)", (shard,))] == []


def test_a_start_that_commits_after_several_ticks_is_delivered_once(dsn: str, conn: psycopg.Connection) -> None:
    machine = counting(dsn)
    with psycopg.connect(dsn) as early, psycopg.connect(dsn) as late:
        machine.start_many(list(range(10)), tx=early)
        machine.start_many(list(range(10, 20)), tx=late)
        for n in range(100, 105):
            machine.start_many([n, n + 100], tx=conn)
            drain(machine)
            if n == 102:
                early.commit()
        late.commit()
    drain(machine)
    expected = [*range(20), *range(100, 105), *range(200, 205)]
    assert Counter(expected) == RUNS
    assert conn.execute("select count(*) from durable.finished").fetchone() == (len(expected),)


@pytest.mark.parametrize("seed", range(5))
def test_starts_of_interleaved_transactions_are_delivered_exactly_once_or_rolled_back(
    dsn: str, conn: psycopg.Connection, seed: int
) -> None:
    """Several open at once, some with savepoints, committed and rolled back in any order between runs and rotations."""
    print(f"seed {seed}")
    dice = random.Random(seed)
    machine = counting(dsn)
    numbers = iter(range(10_000))
    kept: list[int] = []
    with ExitStack() as stack:
        sessions = [stack.enter_context(psycopg.connect(dsn)) for _ in range(5)]
        pending: dict[int, list[int]] = {n: [] for n in range(5)}
        for _ in range(120):
            who = dice.randrange(5)
            act = dice.choice(["start", "start", "savepoint", "commit", "rollback", "run", "rotate"])
            if act == "start":
                inputs = [next(numbers) for _ in range(dice.choice([1, 1, 4]))]
                machine.start_many(inputs, tx=sessions[who])
                pending[who] += inputs
            elif act == "savepoint":
                with sessions[who].transaction() as inner:
                    machine.start(next(numbers), tx=sessions[who])
                    raise psycopg.Rollback(inner)
            elif act == "commit":
                sessions[who].commit()
                kept += pending[who]
                pending[who] = []
            elif act == "rollback":
                sessions[who].rollback()
                pending[who] = []
            elif act == "run":
                drain(machine)
            else:
                rotate(conn)
    # Leaving a connection's block commits.
    kept += [n for left in pending.values() for n in left]
    drain(machine)
    assert Counter(kept) == RUNS
    assert conn.execute("select count(*) from durable.finished").fetchone() == (len(kept),)


def test_rotation_under_running_workflows_loses_nothing(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    app = App("long", dsn=dsn)
    machine = app.machine("long", state=int)
    is_enough = threading.Event()
    rotations: list[int] = []

    @machine.step(start=True)
    def again(ctx: Context, n: int) -> Continuation:
        return ctx.done("end") if is_enough.is_set() else ctx.goto(again, n + 1)

    def have_all_tables_been_emptied() -> bool:
        rotations.append(rotate(conn))
        return sum(rotations) >= 8  # three tables of two shards, and more

    handles = machine.start_many([0] * 40)
    thread = threading.Thread(target=app.run, kwargs={"until_idle": True})
    thread.start()
    try:
        eventually(have_all_tables_been_emptied, seconds=30, what="that every table has been emptied")
    finally:
        is_enough.set()
        thread.join(20)
    assert {handle.result(timeout=5) for handle in handles} == {"end"}
    assert app.run(until_idle=True) == 0


def test_an_open_transaction_that_has_started_a_workflow_holds_rotation_back(
    dsn: str, conn: psycopg.Connection
) -> None:
    machine = counting(dsn)
    with psycopg.connect(dsn) as tx:
        handle = machine.start(1, tx=tx)
        for n in range(2, 6):
            machine.start(n, tx=conn)
            drain(machine)
            rotate(conn)
    drain(machine)
    assert handle.result(timeout=5) == 1
    assert set(RUNS.values()) == {1}


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_a_start_from_a_snapshot_older_than_a_rotation_is_refused_and_never_lost(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None], level: IsolationLevel
) -> None:
    machine = counting(dsn)
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        tx.execute("select 1")  # takes the snapshot, and no transaction id
        # Transactions of other databases hold rotation back as well: as often as it takes.
        eventually(lambda: has_rotated_twice(machine, conn), seconds=30, what="two rotations of each shard")
        with pytest.raises(psycopg.errors.SerializationFailure):
            machine.start(1, tx=tx)
        tx.rollback()
        handle = machine.start(1, tx=tx)
    drain(machine)
    assert handle.result(timeout=5) == 1


def test_an_append_that_stalls_after_it_found_its_table_is_not_lost_to_two_rotations(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    """A lock on the table it found stops the writer there; whoever holds that lock has no transaction id himself."""
    machine = counting(dsn)
    line = "durable.line(durable.new_id(), 1, 'count', 'first', 1, '1')"
    append = f"select pgque.insert_event('durable_0', 'steps', {line}, '1', null, null, null)"
    current = "select queue_data_pfx || '_' || queue_cur_table from pgque.queue where queue_name = 'durable_0'"
    stopped = "select 1 from pg_locks where pid = %s and not granted"
    (table,) = conn.execute(current).fetchone() or ("",)
    # The sequence writes ahead now and then, which takes a transaction id: here, and not in the writer.
    conn.execute("select nextval(queue_event_seq::regclass) from pgque.queue")
    with psycopg.connect(dsn) as holder, psycopg.connect(dsn, autocommit=True) as writer:
        holder.execute(f"lock table {table} in share mode")
        thread = threading.Thread(target=writer.execute, args=(append,))
        thread.start()
        eventually(lambda: conn.execute(stopped, (writer.info.backend_pid,)).fetchone())
        for _ in range(5):
            conn.execute("select durable.tick_idle(0)")
            drain(machine)
            rotate(conn)
        holder.rollback()
        thread.join(20)
    drain(machine)
    assert RUNS[1] == 1


def test_no_transaction_is_open_while_a_step_runs_unless_it_is_transactional(
    dsn: str, conn: psycopg.Connection
) -> None:
    never_detached = Settings(page_window_ms=60_000)  # however slow the machine is
    app = App("watched", dsn=dsn, settings=never_detached)
    machine = app.machine("watched")
    seen: dict[str, set[str]] = {}
    query = (
        "select state from pg_stat_activity"
        " where datname = current_database() and application_name like 'durable-cluster shard%'"
    )

    def look(step: str) -> None:
        seen.setdefault(step, set()).update(state for (state,) in conn.execute(query))

    @machine.step(start=True)
    def plain(ctx: Context, n: int) -> Continuation:
        look("plain")
        return ctx.goto(awaited, n)

    @machine.step()
    async def awaited(ctx: Context, n: int) -> Continuation:
        look("awaited")
        return ctx.goto(transactional, n)

    @machine.step(transactional=True)
    def transactional(ctx: Context, n: int) -> Continuation:
        look("transactional")
        return ctx.done(n) if n == 3 else ctx.goto(plain, n + 1)

    # Pages that mix kinds of steps, too: a plain step shares its page with a transactional one.
    machine.start_many([0, 1, 2, 3])
    app.run(until_idle=True)
    machine.start_many([0, 1, 2, 3])
    app.run(until_idle=True)
    assert seen == {"plain": {"idle"}, "awaited": {"idle"}, "transactional": {"idle in transaction"}}


def test_no_snapshot_is_held_while_a_step_runs(dsn: str, conn: psycopg.Connection) -> None:
    app = App("watched", dsn=dsn)
    machine = app.machine("watched")
    held: list[object] = []

    @machine.step(start=True)
    def plain(ctx: Context, n: int) -> Continuation:
        query = (
            "select backend_xmin, backend_xid from pg_stat_activity"
            " where datname = current_database() and application_name like 'durable-cluster shard%'"
        )
        held.extend(conn.execute(query).fetchall())
        return ctx.done(n)

    machine.start(1)
    app.run(until_idle=True)
    assert held == [(None, None)]
