"""User code at its worst, and what was on its way when something was lost: one answer each, nobody is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Retry, Settings, beside, side_statements, statements
from durable_cluster.consumer import Consumer

ONCE = Retry(attempts=1)
Drive = Callable[..., Consumer]


class Worse(BaseException):
    pass


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


def until(consumer: Consumer, condition: Callable[[], object], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        consumer.work(lambda: False, lambda: None) or consumer.wait(0)


def app_of(dsn: str, **settings: Any) -> App:
    return App("worst", dsn=dsn, settings=Settings(**{"page_window_ms": 5, "takeover_probe_s": 0.01, **settings}))


@pytest.mark.parametrize("is_blocking", [False, True])
@pytest.mark.parametrize("worst", [KeyboardInterrupt, GeneratorExit, SystemExit, Worse, asyncio.CancelledError])
def test_whatever_a_step_beside_the_pages_raises_fails_that_step_alone(
    dsn: str, consume: Callable[[App], Consumer], worst: type[BaseException], is_blocking: bool
) -> None:
    app = app_of(dsn, blocking_threads_max=1)
    machine = app.machine("m", state=bool)

    if is_blocking:

        @machine.step(start=True, blocking=True, retry=ONCE)
        def does(ctx: Context, is_bad: bool) -> Continuation:
            if is_bad:
                raise worst
            return ctx.done(ctx.attempt)
    else:

        @machine.step(start=True, retry=ONCE)
        async def does(ctx: Context, is_bad: bool) -> Continuation:
            await asyncio.sleep(0.02)
            if is_bad:
                raise worst
            await asyncio.sleep(0.02)
            return ctx.done(ctx.attempt)

    consumer = consume(app)
    handles = machine.start_many([False, True, False])
    until(consumer, lambda: [handle.status() for handle in handles] == ["completed", "stuck", "completed"])
    after = machine.start(False)
    until(consumer, lambda: after.status() == "completed")


@pytest.mark.parametrize("worst", [SystemExit, KeyboardInterrupt, None])
def test_a_task_that_a_step_leaves_behind_does_not_end_the_event_loop(
    dsn: str, consume: Callable[[App], Consumer], worst: type[BaseException] | None
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=bool)

    async def exits() -> None:
        assert worst is not None
        raise worst

    @machine.step(start=True, retry=ONCE)
    async def does(ctx: Context, is_bad: bool) -> Continuation:
        if is_bad and worst is None:
            asyncio.get_running_loop().stop()
        elif is_bad:
            ctx_task = asyncio.create_task(exits())
            assert ctx_task
        await asyncio.sleep(0.02)
        return ctx.done(ctx.attempt)

    consumer = consume(app)
    handles = machine.start_many([True, False, False])
    until(consumer, lambda: all(handle.status() == "completed" for handle in handles))


def test_two_answers_for_one_detached_step_hand_it_on_once(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=int)
    gate, runs, ends = threading.Event(), [], []

    @machine.step(start=True)
    async def does(ctx: Context, n: int) -> Continuation:
        runs.append(n)
        while not gate.is_set():
            await asyncio.sleep(0.001)
        return ctx.goto(last, n)

    @machine.step()
    def last(ctx: Context, n: int) -> Continuation:
        ends.append(n)
        return ctx.done(n)

    handle = machine.start(1)
    consumer = consume(app)
    until(consumer, lambda: runs)
    until(consumer, lambda: conn.execute("select count(*) from durable.detached").fetchone() == (1,))
    conn.execute("update durable.detached set owner = 0")  # as if it had been silent for long
    until(
        consumer,
        lambda: conn.execute("select owner from durable.detached").fetchone() == (consumer.owner,),
    )
    gate.set()
    time.sleep(0.05)
    until(consumer, lambda: handle.status() == "completed")
    for _ in range(5):
        consumer.work(lambda: False, lambda: None)
    assert ends == [1]
    assert runs == [1], "what runs here already is not run a second time beside itself"


def test_a_thread_that_goes_as_a_step_comes_leaves_nobody_waiting(
    dsn: str, consume: Callable[[App], Consumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "THREAD_IDLE_S", 0.0005)
    app = app_of(dsn)
    machine = app.machine("m", state=int)

    @machine.step(start=True, blocking=True)
    def does(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    from durable_cluster import executor
    from durable_cluster.envelope import Envelope

    one = beside.Beside(app.settings)
    for n in range(3000):
        task = executor.Task(machine, machine.steps["does"], Envelope("0" * 32, 1, "m", "does", 1, msgspec.Raw(b"1")))
        run = beside.Run(task, 0)
        one.begin([run])
        one.wait([run], until=time.monotonic() + 5)
        assert run.result is not None, f"run {n} waits for a thread that nobody starts"
        stop = time.perf_counter() + 0.0005
        while time.perf_counter() < stop:
            pass
    one.close()


def test_an_interruption_that_comes_as_a_step_ends_loses_neither_its_answer_nor_its_thread(dsn: str) -> None:
    from durable_cluster import executor
    from durable_cluster.envelope import Envelope

    app = app_of(dsn, blocking_threads_max=2)
    machine = app.machine("m", state=int)

    @machine.step(start=True, blocking=True, timeout=0.001)
    def does(ctx: Context, n: int) -> Continuation:
        stop = time.perf_counter() + 0.0011
        while time.perf_counter() < stop:
            pass
        return ctx.done(n)

    one = beside.Beside(app.settings)
    for n in range(1500):
        task = executor.Task(machine, machine.steps["does"], Envelope("0" * 32, 1, "m", "does", 1, msgspec.Raw(b"1")))
        run = beside.Run(task, 0)
        one.begin([run])
        one.detach([run])
        stop_at = time.monotonic() + 5
        while one.known() and not one.ended(10):
            one.overdue()
            assert time.monotonic() < stop_at, f"run {n} is lost"
        assert not one.known()
    one.close()


@pytest.mark.parametrize("how", ["with", "close"])
def test_a_step_that_closes_its_transactions_connection_fails_alone(
    dsn: str, consume: Callable[[App], Consumer], how: str
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=bool)

    @machine.step(start=True, transactional=True, retry=ONCE)
    def does(ctx: Context, is_bad: bool) -> Continuation:
        if is_bad and how == "close":
            ctx.tx.close()
        elif is_bad:
            with ctx.tx:
                raise ValueError("no")
        return ctx.done(1)

    handles = machine.start_many([False, True, False])
    until(consume(app), lambda: [handle.status() for handle in handles] == ["completed", "stuck", "completed"])


def test_a_line_that_is_nested_too_deeply_stops_nobody(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=Any)

    @machine.step(start=True)
    def does(ctx: Context, state: Any) -> Continuation:
        return ctx.done(1)

    for depth in (1_500, 5_000):
        conn.execute("select durable.start('m', 1, 'does', %s)", ("[" * depth + "]" * depth,))
    handle = machine.start(1)
    until(consume(app), lambda: handle.status() == "completed")


@pytest.mark.parametrize("raw", [b"1e999", b"1" * 40, b"[" * 400 + b"]" * 400])
def test_progress_that_cannot_be_read_again_loses_no_workflow(
    dsn: str, consume: Callable[[App], Consumer], raw: bytes
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=int)

    @machine.step(start=True, retry=Retry(attempts=4, backoff=0))
    def does(ctx: Context, n: int) -> Continuation:
        if ctx.attempt == 1:
            ctx.heartbeat(msgspec.Raw(raw))
        if ctx.attempt < 4:
            raise ValueError(n)
        return ctx.done(ctx.attempt)

    handle = machine.start(1)
    until(consume(app), lambda: handle.status() in ("completed", "stuck"))


def test_numbers_that_nobody_can_count_with_stop_nobody(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=int)

    @machine.step(start=True, retry=Retry(attempts=5, backoff=0))
    def does(ctx: Context, n: int) -> Continuation:
        if n:
            raise ValueError(n)
        return ctx.done(1)

    huge = 10**400
    for field in (f'"a":1,"g":-{huge}', f'"a":999999999,"g":{10**9}'):
        conn.execute(
            "select durable.append(0, %s, 1)", (f'{{"w":"{"0" * 32}","n":1,"f":"m","s":"does","v":1,"d":1,{field}}}',)
        )
    for n, step in ((999_999_999, "does"), (1, "unknown")):
        conn.execute(
            "select durable.append(0, %s, 1)",
            (
                f'{{"w":"{"1" * 32}","n":{n},"f":"m","s":"{step}","v":{10**30 if n == 1 else 1},"d":1,"u":{huge if n > 1 else 0}}}',
            ),
        )
        conn.execute(
            "select durable.append(0, %s, 1)", (f'{{"w":"{"2" * 32}","n":{n},"f":"m","s":"{step}","v":1,"d":1}}',)
        )
    handle = machine.start(0)
    until(consume(app), lambda: handle.status() == "completed")


def test_a_reincarnation_whose_answer_never_came_leaves_nothing_behind(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = app_of(dsn)
    machine = app.machine("m", state=int)

    @machine.step(start=True)
    async def does(ctx: Context, n: int) -> Continuation:
        await asyncio.sleep(0.05)
        return ctx.done(n)

    consumer = consume(app)
    conn.execute("select pg_terminate_backend(%s, 10000)", (consumer.connection.info.backend_pid,))
    with pytest.raises(psycopg.OperationalError):
        consumer.reincarnate()
    consumer.reconnect()
    handle = machine.start(1)
    until(consumer, lambda: handle.status() == "completed")


def test_what_a_lost_connection_is_still_taking_is_set_free_too(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    line = f'{{"w":"{"0" * 32}","n":1,"f":"m","s":"does","v":1,"d":1}}'
    for what, had_lease in (("disown", False), ("disown", True), ("abandon", True)):
        conn.execute("delete from durable.detached")
        conn.execute("delete from durable.lease")
        if had_lease:
            conn.execute("insert into durable.lease values (7, durable.now())")
        conn.execute("select durable.detach(0, '0', %s, %s, '0')", (f"{'0' * 32}:1", line))
        with psycopg.connect(dsn) as lost, psycopg.connect(dsn, autocommit=True) as again:
            assert len(side_statements.take_detached(lost, 7, limit=1, with_suspect=True)) == 1
            asking = threading.Thread(
                target=(lambda: side_statements.disown(again, 7, running=[]))
                if what == "disown"
                else (lambda: statements.abandon(again, 7))
            )
            asking.start()
            asking.join(0.2)
            lost.commit()
            asking.join(10)
        assert conn.execute("select owner from durable.detached").fetchone() == (0,), (what, had_lease)


def test_a_suspect_whose_commit_is_held_up_is_not_counted_as_crashed_again(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = app_of(dsn, lock_timeout_ms=20, max_crashes=1, takeover_probe_s=0.0)
    machine = app.machine("m", state=int)

    @machine.step(start=True)
    def does(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    handle = machine.start(1)
    first = Consumer(dsn, 0, app.machines, app.settings)
    for shard in (0, 1):
        statements.join_shard(first.connection, shard, f"m{shard}")
        statements.claim(first.connection, shard, member=f"m{shard}", owner=first.owner, lines_max=9, bytes_max=1 << 20)
    statements.abandon(conn, first.owner, suspects=5)
    first.close()
    consumer = consume(app)
    with psycopg.connect(dsn) as holding:
        holding.execute("lock table durable.finished in exclusive mode")
        for _ in range(4):
            consumer.work(lambda: False, lambda: None)
        assert conn.execute("select max(crashes) from durable.win").fetchone() == (1,)
    until(consumer, lambda: handle.status() in ("completed", "stuck"))
    assert handle.status() == "completed"


def test_suspects_leave_room_for_what_else_is_to_be_done(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = app_of(dsn, takeover_probe_s=0.0)
    machine = app.machine("m", state=int)
    pages: list[int] = []

    @machine.step(start=True)
    def does(ctx: Context, n: int) -> Continuation:
        time.sleep(0.01)
        return ctx.done(n)

    handles = machine.start_many([1] * 20)
    first = Consumer(dsn, 0, app.machines, app.settings)
    for shard in (0, 1):
        statements.join_shard(first.connection, shard, f"m{shard}")
        statements.claim(
            first.connection, shard, member=f"m{shard}", owner=first.owner, lines_max=99, bytes_max=1 << 20
        )
    statements.abandon(conn, first.owner, suspects=100)
    first.close()
    consumer = consume(app)
    deadline = time.monotonic() + 10
    while not all(handle.status() == "completed" for handle in handles):
        assert time.monotonic() < deadline
        consumer.work(lambda: False, lambda: pages.append(1)) or consumer.wait(0)
    assert len(pages) >= 15


def test_the_step_that_holds_the_event_loop_is_the_one_that_hangs(dsn: str) -> None:
    from durable_cluster import executor
    from durable_cluster.envelope import Envelope

    app = app_of(dsn, hang_grace_s=0.05)
    machine = app.machine("m", state=bool)
    gate = threading.Event()

    @machine.step(start=True, timeout="50ms")
    async def does(ctx: Context, is_bad: bool) -> Continuation:
        await asyncio.sleep(0.01)
        if is_bad:
            gate.wait(10)
        await asyncio.sleep(0.01)
        return ctx.done(1)

    one = beside.Beside(app.settings)
    runs = [
        beside.Run(
            executor.Task(
                machine,
                machine.steps["does"],
                Envelope("0" * 32, n + 1, "m", "does", 1, msgspec.Raw(b"true" if n == 3 else b"false")),
            ),
            0,
        )
        for n in range(6)
    ]
    one.begin(runs)
    one.detach(runs)
    seen: list[beside.Run] = []
    stop_at = time.monotonic() + 5
    while not seen and time.monotonic() < stop_at:
        seen = one.overdue()
        time.sleep(0.01)
    time.sleep(0.1)
    seen += one.overdue()
    gate.set()
    one.close()
    assert {run.task.envelope.seq for run in seen} == {4}


class Looking:
    inline: Any = None


def test_a_process_that_was_stopped_for_long_is_not_taken_for_a_hang(dsn: str) -> None:
    from durable_cluster import executor
    from durable_cluster.envelope import Envelope

    app = app_of(dsn, hang_grace_s=0.3)
    machine = app.machine("m", state=int)

    @machine.step(start=True, blocking=True, timeout="100ms")
    def does(ctx: Context, n: int) -> Continuation:
        while True:
            time.sleep(0.005)

    one = beside.Beside(app.settings)
    run = beside.Run(
        executor.Task(machine, machine.steps["does"], Envelope("0" * 32, 1, "m", "does", 1, msgspec.Raw(b"1"))), 0
    )
    one.begin([run])
    one.detach([run])
    stop_at = time.monotonic() + 5
    while run.begun_at is None:
        assert time.monotonic() < stop_at
    run.begun_at -= 100  # what a stop looks like to a clock that goes on
    assert one.overdue() == [], "it has not been told to end yet"
    one.close()
