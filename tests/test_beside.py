"""Slow steps: they leave their page, go on beside the others, come back once, and are never two."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Retry, Settings, WorkflowStuck, patience, statements
from durable_cluster.consumer import Consumer

Eventually = Callable[..., None]
GATE = threading.Event()
RUNS: Counter[str] = Counter()
SEEN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def gate() -> Iterator[threading.Event]:
    GATE.clear()
    RUNS.clear()
    SEEN.clear()
    yield GATE
    GATE.set()


def gated(dsn: str, **settings: Any) -> App:
    """Machines whose steps wait for the gate: async, blocking; and a fast one."""
    app = App("beside", dsn=dsn, settings=Settings(**{"page_window_ms": 30, "takeover_probe_s": 0.01, **settings}))
    slow, fast = app.machine("slow", state=str), app.machine("fast", state=int)
    blocked = app.machine("blocked", state=str)

    @slow.step(start=True)
    async def waits(ctx: Context, what: str) -> Continuation:
        RUNS[what] += 1
        SEEN[what] = ctx.progress
        ctx.heartbeat({"was": what})
        while not GATE.is_set():
            await asyncio.sleep(0.002)
        return ctx.done(what)

    @blocked.step(start=True, blocking=True)
    def blocks(ctx: Context, what: str) -> Continuation:
        RUNS[what] += 1
        GATE.wait(30)
        return ctx.done(what)

    @fast.step(start=True)
    def hurries(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return app


@pytest.fixture
def consume(dsn: str) -> Iterator[Callable[[App], Consumer]]:
    made: list[Consumer] = []

    def make(app: App) -> Consumer:
        consumer = Consumer(dsn, 0, app.machines, app.settings)
        consumer.shards = [0, 1]
        made.append(consumer)
        return consumer

    yield make
    for one in made:
        one.close()


def turn(consumer: Consumer) -> bool:
    """What a consumer's loop does once."""
    return consumer.work(lambda: False, lambda: None) or consumer.wait(0)


def detached(conn: psycopg.Connection) -> int:
    return conn.execute("select count(*) from durable.detached").fetchone()[0]


def inserted(conn: psycopg.Connection) -> int:
    conn.execute("select pg_stat_clear_snapshot()")
    return conn.execute(
        "select n_tup_ins from pg_stat_user_tables where relid = 'durable.detached'::regclass"
    ).fetchone()[0]


def until(consumer: Consumer, condition: Callable[[], object], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        turn(consumer)


@pytest.mark.parametrize("machine", ["slow", "blocked"])
def test_a_slow_step_leaves_its_page_and_its_neighbours_do_not_wait(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer], machine: str
) -> None:
    app = gated(dsn)
    consumer = consume(app)
    slow = app.named(machine).start("a")
    fast = app.named("fast").start_many(list(range(200)))
    until(consumer, lambda: all(handle.status() == "completed" for handle in fast))
    assert slow.status() == "running"
    assert [place.place for place in statements.locate(conn, slow.id)] == ["detached"]
    GATE.set()
    until(consumer, lambda: slow.status() == "completed")
    assert slow.result(timeout=1) == "a"
    assert (RUNS["a"], detached(conn)) == (1, 0)


def test_a_fast_async_step_stays_in_its_page(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    consumer = consume(app)
    GATE.set()
    handle = app.named("slow").start("a")
    consumer.work(lambda: False, lambda: None)
    assert handle.result(timeout=1) == "a"
    assert conn.execute("select count(*) from durable.lease").fetchone() == (0,)


def test_a_page_begins_no_more_steps_than_ended_in_time_before(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer], eventually: Eventually
) -> None:
    app = App("crowded", dsn=dsn, settings=Settings(page_window_ms=1_000))
    machine = app.machine("crowd", state=int)

    @machine.step(start=True)
    async def gets_through(ctx: Context, n: int) -> Continuation:
        RUNS["begun"] += 1
        while RUNS["through"] == 100 and not GATE.is_set():
            await asyncio.sleep(0.002)
        RUNS["through"] += 1
        return ctx.done(n)

    begun: list[int] = []

    def on_page() -> None:
        begun.append(RUNS["begun"])
        if begun[-1]:
            GATE.set()

    handles = machine.start_many(range(600))
    consumer = consume(app)

    def has_begun_all() -> bool:
        consumer.work(lambda: False, on_page)
        return RUNS["begun"] == 600

    eventually(has_begun_all, seconds=30)
    until(consumer, lambda: all(handle.status() == "completed" for handle in handles))
    assert begun[1:3] == [128, 228], "of the first 128 only a hundred ended while their page waited"
    consumer.close()
    eventually(lambda: inserted(conn) == 28, what="the others left it, and nobody after them")


@pytest.mark.parametrize("is_awaited", [True, False])
def test_steps_of_a_slow_kind_are_waited_for_again_after_a_while(
    dsn: str,
    conn: psycopg.Connection,
    consume: Callable[[App], Consumer],
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    is_awaited: bool,
) -> None:
    window_ms = 2_000
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0 if is_awaited else 3_600.0)
    app = gated(dsn, page_window_ms=window_ms)
    consumer = consume(app)
    slow = app.named("slow").start("a")
    until(consumer, lambda: detached(conn) == 1)
    GATE.set()
    until(consumer, lambda: slow.status() == "completed")
    if not is_awaited:
        GATE.clear()
    another = app.named("slow").start("b")
    began = time.monotonic()
    until(consumer, lambda: another.status() == "completed" if is_awaited else detached(conn) == 1)
    if not is_awaited:
        assert time.monotonic() - began < window_ms / 2_000, "nobody waited for the page's window"
        GATE.set()
        until(consumer, lambda: another.status() == "completed")
    consumer.close()
    eventually(lambda: inserted(conn) == (1 if is_awaited else 2), what="a step that is not waited for costs a row")


def test_the_steps_of_a_dead_process_are_run_by_another_with_the_progress_of_the_first(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    first, second = consume(app), consume(app)
    handle = app.named("slow").start("a")
    until(first, lambda: detached(conn) == 1)
    until(first, lambda: conn.execute("select progress from durable.detached").fetchone() != (None,))
    statements.abandon(conn, first.owner)
    until(second, lambda: RUNS["a"] == 2)
    assert SEEN["a"] == {"was": "a"}
    GATE.set()
    until(second, lambda: handle.status() == "completed")
    turn(first)
    assert handle.result(timeout=1) == "a"


def test_an_answer_that_comes_after_the_step_was_given_to_another_is_dropped(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    first = consume(app)
    handle = app.named("slow").start("a")
    until(first, lambda: detached(conn) == 1)
    statements.abandon(conn, first.owner)
    GATE.set()
    until(first, lambda: not first._aside.is_busy)
    assert handle.status() == "running", "nobody but the owner of the row hands it on"
    until(consume(app), lambda: handle.status() == "completed")
    assert conn.execute("select count(*) from durable.finished").fetchone() == (1,)


def test_completion_and_redelivery_in_two_sessions_hand_on_once(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    first = consume(app)
    app.named("slow").start("a")
    until(first, lambda: detached(conn) == 1)
    key = conn.execute("select durable.hex(id) || ':' || seq from durable.detached").fetchone()[0]
    with psycopg.connect(dsn) as completing:
        assert completing.execute("select durable.complete_detached(%s, %s)", (first.owner, key)).fetchone() == (key,)
        outcome: list[Any] = []
        other = threading.Thread(target=lambda: outcome.append(statements.abandon(conn, first.owner)))
        other.start()
        completing.commit()
        other.join(10)
    assert detached(conn) == 0, "the redelivery waited for the completion and found nothing to redeliver"
    with psycopg.connect(dsn, autocommit=True) as late:
        assert late.execute("select durable.complete_detached(%s, %s)", (first.owner, key)).fetchone() == ("",)


def test_steps_beyond_the_limit_wait_for_room_and_hold_nobody_up(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn, detached_max=3)
    consumer = consume(app)
    slow = app.named("slow").start_many([f"s{n}" for n in range(10)])
    fast = app.named("fast").start_many(list(range(50)))
    until(consumer, lambda: all(handle.status() == "completed" for handle in fast))
    assert len(RUNS) <= 3
    assert detached(conn) == 10
    GATE.set()
    until(consumer, lambda: all(handle.status() == "completed" for handle in slow))
    assert set(RUNS.values()) == {1}


def test_the_steps_of_a_host_that_falls_silent_are_taken_after_the_dead_interval(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    first = consume(app)
    app.named("slow").start("a")
    until(first, lambda: detached(conn) == 1)
    second = consume(app)
    for _ in range(3):
        turn(second)
    assert RUNS["a"] == 1, "a lease that is kept is respected"
    conn.execute("update durable.lease set active = active - interval '1 hour'")
    until(second, lambda: RUNS["a"] == 2)


def test_a_consumer_that_closes_waits_for_its_steps_and_hands_the_rest_back(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    consumer = consume(app)
    handle = app.named("slow").start("a")
    until(consumer, lambda: detached(conn) == 1)
    consumer.close(grace_s=0.05)
    assert conn.execute("select owner, crashes from durable.detached").fetchall() == [(0, 0)]
    second = consume(app)
    until(second, lambda: RUNS["a"] == 2)
    GATE.set()
    second.close(grace_s=10)
    assert handle.result(timeout=1) == "a"


def test_a_consumer_that_reconnects_keeps_its_steps_running(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    consumer = consume(app)
    handle = app.named("slow").start("a")
    until(consumer, lambda: detached(conn) == 1)
    pid = consumer.connection.info.backend_pid
    conn.execute("select pg_terminate_backend(%s, 10000)", (pid,))
    with pytest.raises(psycopg.OperationalError):
        turn(consumer)
    consumer.reconnect()
    GATE.set()
    until(consumer, lambda: handle.status() == "completed")
    assert RUNS["a"] == 1


def test_a_row_whose_commit_was_never_heard_of_is_run_by_whoever_comes(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn)
    consumer = consume(app)
    handle = app.named("slow").start("a")
    until(consumer, lambda: detached(conn) == 1)
    line = f'{{"w":"{"0" * 32}","n":1,"f":"slow","s":"waits","v":1,"d":"b"}}'
    conn.execute("select durable.detach(0, %s, %s, %s, '0')", (str(consumer.owner), f"{'0' * 32}:1", line))
    consumer.reconnect()
    assert conn.execute("select owner = 0 from durable.detached order by line like '%%\"b\"}'").fetchall() == [
        (False,),
        (True,),
    ]
    GATE.set()
    until(consumer, lambda: handle.status() == "completed")


@pytest.mark.parametrize("is_blocking", [False, True])
def test_a_step_beyond_its_timeout_is_ended_and_tried_again(
    dsn: str, consume: Callable[[App], Consumer], is_blocking: bool
) -> None:
    app = App("late", dsn=dsn)
    machine = app.machine("late", state=int)
    once = Retry(attempts=2, backoff=0)

    if is_blocking:

        @machine.step(start=True, blocking=True, timeout="100ms", retry=once)
        def lingers(ctx: Context, n: int) -> Continuation:
            RUNS["late"] += 1
            while ctx.attempt == 1:
                GATE.wait(0.005)
            return ctx.done(ctx.attempt)
    else:

        @machine.step(start=True, timeout="100ms", retry=once)
        async def lingers(ctx: Context, n: int) -> Continuation:
            RUNS["late"] += 1
            while ctx.attempt == 1:
                await asyncio.sleep(0.005)
            return ctx.done(ctx.attempt)

    consumer = consume(app)
    handle = machine.start(1)
    until(consumer, lambda: handle.status() == "completed")
    assert (handle.result(timeout=1), RUNS["late"]) == (2, 2)


def test_a_step_that_never_ends_within_its_timeout_is_a_dead_letter_that_says_so(
    dsn: str, consume: Callable[[App], Consumer]
) -> None:
    app = App("late", dsn=dsn)
    machine = app.machine("late", state=int)

    @machine.step(start=True, timeout="20ms", retry=Retry(attempts=2, backoff=0))
    async def lingers(ctx: Context, n: int) -> Continuation:
        await asyncio.sleep(60)
        return ctx.done(n)

    consumer = consume(app)
    handle = machine.start(1)
    until(consumer, lambda: handle.status() == "stuck")
    with pytest.raises(WorkflowStuck, match=r"'lingers' after 2 attempts: .*did not end within its timeout of 0\.02 s"):
        handle.result(timeout=1)


def test_detached_steps_are_inserted_and_deleted_once_and_never_updated(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = gated(dsn, heartbeat_s=0.01)
    consumer = consume(app)
    handles = app.named("blocked").start_many([f"b{n}" for n in range(10)])
    until(consumer, lambda: detached(conn) == 10)
    GATE.set()
    until(consumer, lambda: all(handle.status() == "completed" for handle in handles))
    consumer.close()

    def changes() -> tuple[int, int]:
        conn.execute("select pg_stat_clear_snapshot()")
        return conn.execute(
            "select n_tup_upd, n_tup_del from pg_stat_user_tables where relid = 'durable.detached'::regclass"
        ).fetchone()

    deadline = time.monotonic() + 10
    while changes()[1] < 10:
        assert time.monotonic() < deadline
    assert changes() == (0, 10)


def test_a_page_is_read_about_as_long_as_it_runs(dsn: str, consume: Callable[[App], Consumer]) -> None:
    reader = consume(gated(dsn))

    def lines_after(begun: int, read: int) -> int:
        reader._fit_pages(begun, read)
        return reader._limits["lines_max"]

    assert [lines_after(500, 1_000), lines_after(200, 1_000), lines_after(1, 400)] == [1_000, 800, 16]
    assert [lines_after(15, 15), lines_after(16, 16), lines_after(32, 32)] == [16, 32, 64]
    assert [lines_after(64, 64)] + [lines_after(n, n) for n in (128, 256, 512, 1_000)] == [128, 256, 512, 1_000, 1_000]


def test_a_run_until_idle_ends_what_was_too_much_to_run_at_once(dsn: str) -> None:
    app = App("crowded", dsn=dsn, settings=Settings(detached_max=2))
    machine = app.machine("crowded", state=int)

    @machine.step(start=True)
    async def again(ctx: Context, n: int) -> Continuation:
        return ctx.goto(again, n - 1) if n else ctx.done()

    handles = machine.start_many([2] * 60)
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"completed"}
    app.close()
