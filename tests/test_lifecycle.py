"""From a start to an answer: transactions, keys, handles, and where a workflow stands meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from durable_cluster import (
    App,
    Context,
    Continuation,
    Handle,
    InputError,
    Machine,
    ResultTimeout,
    Settings,
    UnknownWorkflow,
    WorkflowFailed,
    statements,
)
from durable_cluster.consumer import Consumer


@pytest.fixture
def machine(dsn: str) -> Machine:
    app = App("life", dsn=dsn, settings=Settings(takeover_probe_s=0, dead_interval_s=3600))
    machine = app.machine("life", state=int)

    @machine.step(start=True)
    def first(ctx: Context, n: int) -> Continuation:
        return ctx.goto(second, n)

    @machine.step()
    def second(ctx: Context, n: int) -> Continuation:
        return ctx.done(n * 2) if n >= 0 else ctx.fail("negative")

    return machine


def count(conn: psycopg.Connection, table: str) -> int:
    (rows,) = conn.execute(f"select count(*) from durable.{table}".encode()).fetchone() or (0,)
    return rows


# Starting in the caller's transaction.


def test_a_start_is_seen_by_nobody_until_its_transaction_commits(machine: Machine, dsn: str) -> None:
    with psycopg.connect(dsn) as tx:
        handle = machine.start(1, tx=tx)
        assert machine.app.run(until_idle=True) == 0
        with pytest.raises(UnknownWorkflow):
            handle.status()
    assert handle.status() == "running"
    assert machine.app.run(until_idle=True) == 2
    assert handle.result(timeout=5) == 2


def test_a_start_in_a_callers_transaction_leaves_that_transaction_open_and_usable(machine: Machine, dsn: str) -> None:
    with psycopg.connect(dsn) as tx:
        machine.start(1, tx=tx)
        assert tx.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        assert tx.execute("select 1").fetchone() == (1,)


def test_a_refused_input_leaves_the_callers_transaction_as_it_was(machine: Machine, dsn: str) -> None:
    with psycopg.connect(dsn) as tx:
        kept = machine.start(1, tx=tx)
        with pytest.raises(InputError):
            machine.start("one", tx=tx)
        with pytest.raises(InputError):
            machine.start_many([2, "three"], tx=tx)
    machine.app.run(until_idle=True)
    assert kept.result(timeout=5) == 2


# Keys.


def test_the_same_key_gives_the_same_workflow(machine: Machine, conn: psycopg.Connection) -> None:
    first, again = machine.start(1, key="order-7"), machine.start(2, key="order-7")
    assert first.id == again.id
    assert count(conn, "started") == 1
    machine.app.run(until_idle=True)
    assert again.result(timeout=5) == 2
    assert machine.start(3, key="order-7").result(timeout=5) == 2, "also once it has ended"


def test_a_key_belongs_to_one_kind_of_workflow(machine: Machine) -> None:
    other = machine.app.machine("other", state=int)

    @other.step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    assert machine.start(1, key="same").id != other.start(1, key="same").id


def test_a_key_whose_start_was_rolled_back_is_free(machine: Machine, dsn: str) -> None:
    with psycopg.connect(dsn) as tx:
        lost = machine.start(1, key="k", tx=tx)
        tx.rollback()
    kept = machine.start(2, key="k")
    assert kept.id != lost.id
    machine.app.run(until_idle=True)
    assert kept.result(timeout=5) == 4


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("many", [False, True], ids=["start", "start_many"])
def test_a_second_client_with_the_same_key_waits_for_the_first(
    machine: Machine,
    dsn: str,
    conn: psycopg.Connection,
    eventually: Callable[..., None],
    is_committed: bool,
    many: bool,
) -> None:
    def start(n: int, tx: psycopg.Connection) -> Handle:
        return machine.start_many([n], keys=["k"], tx=tx)[0] if many else machine.start(n, key="k", tx=tx)

    waits = "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    with psycopg.connect(dsn) as one, psycopg.connect(dsn, autocommit=True) as two, ThreadPoolExecutor() as pool:
        first = start(1, one)
        late = pool.submit(start, 2, two)
        eventually(lambda: conn.execute(waits, (two.info.backend_pid,)).fetchone())
        one.commit() if is_committed else one.rollback()
        second = late.result(20)
    assert (second.id == first.id) is is_committed
    assert count(conn, "started") == 1
    machine.app.run(until_idle=True)
    assert second.result(timeout=5) == (2 if is_committed else 4)


def test_clients_that_start_the_same_keys_in_other_orders_do_not_deadlock(machine: Machine, dsn: str) -> None:
    keys = [f"key {n}" for n in range(200)]

    def start(order: list[str]) -> dict[str, str]:
        with psycopg.connect(dsn) as tx:
            handles = machine.start_many(list(range(200)), keys=order, tx=tx)
        return {key: handle.id for key, handle in zip(order, handles, strict=True)}

    with ThreadPoolExecutor() as pool:
        for _ in range(5):
            one, other = pool.submit(start, keys), pool.submit(start, keys[::-1])
            assert one.result(20) == other.result(20)
            keys = [f"{key}'" for key in keys]


# Many.


def test_many_are_started_in_order_and_each_gets_its_own_input(machine: Machine) -> None:
    handles = machine.start_many(list(range(2500)))
    assert len({handle.id for handle in handles}) == 2500
    machine.app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles[::50]] == list(range(0, 5000, 100))


def test_many_with_keys_of_which_some_are_known_give_known_and_new_in_order(
    machine: Machine, conn: psycopg.Connection
) -> None:
    known = machine.start(100, key="b")
    handles = machine.start_many([1, 2, 3], keys=["a", "b", "c"])
    assert handles[1].id == known.id
    assert count(conn, "started") == 3
    machine.app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles] == [2, 200, 6]


def test_a_key_twice_in_one_call_is_one_workflow_with_the_first_input(
    machine: Machine, conn: psycopg.Connection
) -> None:
    keys = [f"key {n % 50}" for n in range(200)]
    handles = machine.start_many(list(range(200)), keys=keys)
    assert [handles[n].id for n in range(50)] * 4 == [handle.id for handle in handles]
    assert count(conn, "started") == 50
    machine.app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles] == [2 * (n % 50) for n in range(200)]


def test_starting_none_starts_none(machine: Machine, conn: psycopg.Connection) -> None:
    assert machine.start_many([]) == []
    assert count(conn, "started") == 0


def test_large_inputs_in_one_call_become_entries_of_about_a_page(machine: Machine, conn: psycopg.Connection) -> None:
    texts = machine.app.machine("texts", state=str)

    @texts.step(start=True)
    def only(ctx: Context, text: str) -> Continuation:
        return ctx.done(len(text))

    handles = texts.start_many(["x" * 200_000] * 40)
    (largest,) = conn.execute(
        "select max(octet_length(ev_data)) from (select ev_data from pgque.event_1 union all select ev_data from pgque.event_2) e"
    ).fetchone() or (0,)
    assert largest < 2 * (1 << 20)
    machine.app.run(until_idle=True)
    assert {handle.result(timeout=5) for handle in handles} == {200_000}


# Handles.


def test_a_workflow_is_found_again_by_its_id_and_by_its_key(machine: Machine, dsn: str) -> None:
    handle = machine.start(3, key="k")
    elsewhere = App("elsewhere", dsn=dsn)
    assert elsewhere.get(handle.id).workflow == "life"
    assert machine.get(key="k").id == handle.id
    machine.app.run(until_idle=True)
    assert elsewhere.get(handle.id).result(timeout=5) == 6


def test_a_workflow_is_found_again_from_another_process(machine: Machine, dsn: str) -> None:
    handle = machine.start(3)
    machine.app.run(until_idle=True)
    script = "import sys; from durable_cluster import App; print(App('x', dsn=sys.argv[1]).get(sys.argv[2]).result(timeout=5))"
    told = subprocess.run([sys.executable, "-c", script, dsn, handle.id], capture_output=True, text=True, check=True)
    assert told.stdout == "6\n"


@pytest.mark.parametrize(
    "wrong",
    [
        "0" * 32,
        "f" * 32,
        "",
        "x",
        "0" * 31,
        "0" * 33,
        "0" * 32 + "\n",
        "zz" * 16,
        "'; drop table x; --",
        "\x00",
        "ü" * 32,
    ],
)
def test_an_unknown_and_a_malformed_id_are_the_same_error(machine: Machine, wrong: str) -> None:
    machine.start(1)
    with pytest.raises(UnknownWorkflow) as caught:
        machine.app.get(wrong)
    assert type(caught.value) is UnknownWorkflow


@pytest.mark.parametrize("wrong", ["nobody", "", "x" * 1000, "line\nbreak", "\x00"])
def test_an_unknown_and_a_malformed_key_are_the_same_error(machine: Machine, wrong: str) -> None:
    with pytest.raises(UnknownWorkflow):
        machine.get(key=wrong)


def test_a_result_that_does_not_come_in_time_is_a_timeout_and_the_workflow_goes_on(machine: Machine) -> None:
    handle = machine.start(1)
    for timeout in (0, 0.05):
        with pytest.raises(ResultTimeout, match="it goes on"):
            handle.result(timeout=timeout)
    with pytest.raises(TimeoutError):
        handle.result(timeout=0)
    machine.app.run(until_idle=True)
    assert handle.result(timeout=0) == 2


def test_a_result_is_waited_for_while_the_workflow_runs_elsewhere(machine: Machine) -> None:
    handle = machine.start(1)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(handle.result, 20)
        machine.app.run(until_idle=True)
        assert waiting.result(20) == 2


def test_a_handle_can_be_awaited(machine: Machine) -> None:
    handles = machine.start_many([1, 2, -3])

    async def all_of_them() -> list[object]:
        running = asyncio.to_thread(machine.app.run, until_idle=True)
        return await asyncio.gather(running, *handles, return_exceptions=True)

    steps, one, two, failed = asyncio.run(all_of_them())
    assert (steps, one, two) == (6, 2, 4)
    assert isinstance(failed, WorkflowFailed)
    assert failed.reason == "negative"


def test_awaiting_gives_up_in_time(machine: Machine) -> None:
    with pytest.raises(ResultTimeout):
        asyncio.run(machine.start(1).wait(timeout=0.05))


def test_a_failed_workflow_says_where_and_why(machine: Machine) -> None:
    handle = machine.start(-1)
    machine.app.run(until_idle=True)
    assert handle.status() == "failed"
    with pytest.raises(WorkflowFailed, match="failed in step 'second': negative"):
        handle.result(timeout=5)


def test_the_state_of_a_workflow_tells_its_times(machine: Machine) -> None:
    handle = machine.start(1)
    before = handle.state()
    machine.app.run(until_idle=True)
    after = handle.state()
    assert (before.status, before.output, before.finished_at) == ("running", None, None)
    assert (after.status, after.output, after.workflow, after.version) == ("completed", "2", "life", 1)
    assert after.finished_at is not None
    assert after.finished_at >= after.started_at == before.started_at


def test_threads_that_come_and_go_leave_no_connections_behind(machine: Machine, conn: psycopg.Connection) -> None:
    for n in range(40):
        thread = threading.Thread(target=machine.start, args=(n,))
        thread.start()
        thread.join()
    query = (
        "select count(*) from pg_stat_activity where datname = current_database() and application_name like '%client%'"
    )
    (connections,) = conn.execute(query).fetchone() or (0,)
    machine.app.close()
    assert connections <= 10


def test_a_forked_child_that_closes_its_app_leaves_the_parents_connection_alone(dsn: str) -> None:
    script = """
import os, sys
from durable_cluster import App, Context
app = App("forked", dsn=sys.argv[1])
machine = app.machine("one", state=int)
@machine.step(start=True)
def only(ctx: Context, n: int):
    return ctx.done(n)
machine.start(1)
before = app.client.connection()
if (pid := os.fork()) == 0:
    machine.start(2)
    app.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
before.execute("select 1")
print("alive")
"""
    told = subprocess.run([sys.executable, "-c", script, dsn], capture_output=True, text=True, check=False)
    assert told.stdout == "alive\n", told.stderr


def test_a_client_connects_again_after_its_connection_was_cut(machine: Machine, conn: psycopg.Connection) -> None:
    handle = machine.start(1)
    conn.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and application_name = 'durable-cluster client'"
    )
    with pytest.raises(psycopg.OperationalError):
        handle.status()
    assert handle.status() == "running"


# Where a workflow stands.


def places(conn: psycopg.Connection, handle: Handle) -> list[tuple[str, str, int, bool]]:
    return [(p.place, p.step, p.seq, p.owner_is_silent) for p in statements.locate(conn, handle.id)]


def test_a_workflow_is_found_in_each_place_and_nowhere_after_its_end(
    machine: Machine, dsn: str, conn: psycopg.Connection
) -> None:
    handle = machine.start(1)
    assert places(conn, handle) == [("queued", "first", 1, False)]
    (place,) = statements.locate(conn, handle.id)
    consumer = Consumer(dsn, place.shard, machine.app.machines, machine.app.settings)
    seen: list[object] = []

    def look() -> None:
        seen.append(places(conn, handle))
        statements.abandon(conn, consumer.owner)
        seen.append(places(conn, handle))

    consumer.work(lambda: True, look)
    assert seen == [[("claimed", "first", 1, False)], [("claimed", "first", 1, True)]]
    assert places(conn, handle) == [("queued", "second", 2, False)]
    consumer.close()
    machine.app.run(until_idle=True)
    assert places(conn, handle) == []


def test_each_workflow_of_a_half_done_window_stands_in_exactly_one_place(
    machine: Machine, dsn: str, conn: psycopg.Connection
) -> None:
    handles = machine.start_many(list(range(60)))
    consumer = Consumer(dsn, 0, machine.app.machines, Settings(page_window_ms=0))
    consumer.shards = [0, 1]
    for _ in range(5):
        consumer.wait(0)
        consumer.work(lambda: True, lambda: None)
        handles += machine.start_many(list(range(10)))
        for handle in handles:
            assert len(places(conn, handle)) == (handle.status() == "running")
    consumer.close()


def test_a_payload_that_mentions_another_workflow_is_not_that_workflow(dsn: str, conn: psycopg.Connection) -> None:
    app = App("links", dsn=dsn)
    machine = app.machine("links")

    @machine.step(start=True)
    def only(ctx: Context, state: object) -> Continuation:
        return ctx.done(state)

    handle = machine.start(None)
    app.run(until_idle=True)
    for _ in range(20):
        machine.start({"w": handle.id})
    assert places(conn, handle) == []


def test_a_payload_with_a_nul_character_hides_nobody(dsn: str, conn: psycopg.Connection) -> None:
    app = App("nul", dsn=dsn)
    machine = app.machine("nul", state=str)

    @machine.step(start=True)
    def only(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    handle = machine.start("a\x00b")
    assert len(places(conn, handle)) == 1
    (place,) = statements.locate(conn, handle.id)
    assert len(conn.execute("select * from durable.log(%s)", (place.shard,)).fetchall()) == 1
    app.run(until_idle=True)
    assert handle.result(timeout=5) == "a\x00b"


def test_the_list_pages_through_all_workflows_once(machine: Machine, conn: psycopg.Connection) -> None:
    handles = machine.start_many(list(range(100)))
    listed: list[str] = []
    query = "select id, cursor from durable.list('life', 'running', 7, %s)"
    rows = conn.execute(query, (None,)).fetchall()
    while rows and len(listed) < 200:
        listed += [short for short, _ in rows]
        rows = conn.execute(query, (rows[-1][1],)).fetchall()
    assert sorted(listed) == sorted(handle.id[:12] for handle in handles)
