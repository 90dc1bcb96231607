"""Limits: so many at once, so many a period, by name and key, whoever runs them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    AppError,
    Context,
    Continuation,
    Handle,
    InputError,
    Limit,
    Retry,
    Settings,
    coordination,
)
from durable_cluster.consumer import Consumer
from durable_cluster.envelope import Envelope
from durable_cluster.limits import OF_STEP, Queued, parsed_rate
from durable_cluster.shards import maintenance, upkeep

Connection = psycopg.Connection[Any]


class Busy:
    """How many steps run at the moment, by key, and the most that ever did."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.go = threading.Event()

    def __call__(self, key: str) -> Busy:
        with self.lock:
            self.now[key] += 1
            self.most[key] = max(self.most[key], self.now[key])
        return self

    def leave(self, key: str) -> None:
        with self.lock:
            self.now[key] -= 1


BUSY = Busy()
RAN: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    BUSY.__init__()  # type: ignore[misc]
    RAN.clear()


def application(dsn: str) -> App:
    app = App("limited", dsn=dsn, settings=Settings(page_window_ms=5))
    flow = app.machine("flow", state=str)
    alive = app.machine("alive", state=str, limit=Limit("alive", concurrency=2, key=lambda state: state[0]))

    @flow.step(
        start=True,
        limit=Limit("slow", concurrency=3, key=lambda state: state[0]),
        retry=Retry(attempts=2, backoff="5m", jitter=0),
    )
    async def slow(ctx: Context, key: str) -> Continuation:
        BUSY(key[0])
        try:
            for _ in range(300 if key.endswith("fails") else 20):
                await asyncio.sleep(0.001)
            if key.endswith("fails"):
                raise RuntimeError("as told")
        finally:
            BUSY.leave(key[0])
        return ctx.goto(rated if key.endswith("rated") else end, key)

    @flow.step(limit=Limit("rated", rate="10/1h"))
    def rated(ctx: Context, key: str) -> Continuation:
        return ctx.done(key)

    @flow.step()
    def end(ctx: Context, key: str) -> Continuation:
        RAN.append(key)
        return ctx.done(key)

    @alive.step(start=True)
    def live(ctx: Context, key: str) -> Continuation:
        RAN.append(key)
        return ctx.wait_for("go", then=after, state=key)

    @alive.step()
    def after(ctx: Context, key: str) -> Continuation:
        return ctx.fail("as told") if key.endswith("fails") else ctx.done(key)

    @alive.step(on_cancel=True)
    def clean(ctx: Context, key: str) -> Continuation:
        return ctx.done()

    return app


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    app = application(dsn)
    yield app
    app.close()


def used(conn: Connection) -> dict[tuple[str, str], int]:
    return {(name, key): n for name, key, n in conn.execute("select name, key, used from durable.limit_use")}


def queued(conn: Connection) -> int:
    row = conn.execute("select count(*) from durable.queued").fetchone()
    assert row is not None
    return int(row[0])


def test_no_more_steps_of_a_key_run_at_once_than_the_limit_says(app: App, conn: Connection) -> None:
    handles = [app.named("flow").start(f"{key}{n}") for key in "ab" for n in range(12)]
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"completed"}
    assert BUSY.most == {"a": 3, "b": 3}
    assert used(conn) == {("slow", "a"): 0, ("slow", "b"): 0}
    row = conn.execute("select count(*) from durable.permit").fetchone()
    assert (row, queued(conn)) == ((0,), 0)


def test_a_limit_holds_across_consumers(app: App, dsn: str, conn: Connection) -> None:
    handles = [app.named("flow").start(f"a{n}") for n in range(30)]
    stop = threading.Event()

    def consume(shard: int) -> None:
        consumer = Consumer(dsn, shard, app.machines, app.settings)
        try:
            while not stop.is_set():
                if not consumer.work(stop.is_set, lambda: None):
                    consumer.wait(0.1)
        finally:
            consumer.close()

    with ThreadPoolExecutor(2) as pool:
        consuming = [pool.submit(consume, shard) for shard in (0, 1)]
        try:
            for handle in handles:
                handle.result(timeout=30)
        finally:
            stop.set()
        for one in consuming:
            one.result(10)
    assert BUSY.most == {"a": 3}
    assert used(conn) == {("slow", "a"): 0}


def test_a_step_that_fails_gives_its_permit_back_and_needs_one_for_the_next_attempt(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handles = [app.named("flow").start(f"a{n}fails") for n in range(5)]
    app.run(until_idle=True)
    assert used(conn) == {("slow", "a"): 0}
    clock(7200)
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"stuck"}
    assert used(conn) == {("slow", "a"): 0}
    for line in conn.execute("select line from durable.dead_letter"):
        assert not msgspec.json.decode(line[0]).get("l", 0) & OF_STEP
    assert BUSY.most["a"] == 3


def test_a_rate_lets_so_many_begin_and_then_one_by_one(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handles = [app.named("flow").start(f"{n}rated") for n in range(25)]

    def ended() -> int:
        return sum(handle.status() == "completed" for handle in handles)

    app.run(until_idle=True)
    assert ended() == 10
    for seconds, expected in ((250, 10), (370, 11), (740, 12), (3650, 20), (7400, 25)):
        clock(seconds)
        app.run(until_idle=True)
        app.run(until_idle=True)
        assert ended() == expected, seconds
    assert queued(conn) == 0


def test_a_limit_of_a_machine_counts_its_live_workflows(app: App, conn: Connection) -> None:
    machine = app.named("alive")
    handles = [machine.start(f"a{n}{'fails' if n == 0 else ''}") for n in range(4)]
    app.run(until_idle=True)
    assert (len(RAN), queued(conn), used(conn)) == (2, 2, {("alive", "a"): 2})
    assert sorted(place for (place,) in conn.execute("select place from durable.started s, durable.locate(s.id)")) == [
        "limited", "limited", "waiting", "waiting",
    ]  # fmt: skip
    live = [handle for handle in handles if _place(conn, handle) == "waiting"]
    live[0].signal("go")
    live[1].cancel()
    app.run(until_idle=True)
    assert (len(RAN), queued(conn), used(conn)) == (4, 0, {("alive", "a"): 2})
    for handle in handles:
        if handle.status() == "running":
            handle.signal("go")
    app.run(until_idle=True)
    assert used(conn) == {("alive", "a"): 0}


def _place(conn: Connection, handle: Handle) -> str:
    row = conn.execute("select place from durable.locate(%s)", (handle.id,)).fetchone()
    assert row is not None
    return str(row[0])


def test_a_cancel_reaches_who_waits_for_a_permit(app: App, conn: Connection) -> None:
    handles = [app.named("alive").start("a") for _ in range(5)]
    app.run(until_idle=True)
    waiting = [handle for handle in handles if _place(conn, handle) == "limited"]
    assert len(waiting) == 3
    for handle in waiting:
        handle.cancel()
    app.run(until_idle=True)
    assert {handle.status() for handle in waiting} == {"cancelled"}
    assert (queued(conn), used(conn)) == (0, {("alive", "a"): 2})


def test_numbers_that_are_set_win_over_the_code_at_once_until_they_are_reset(app: App, conn: Connection) -> None:
    coordination.set_limit(conn, "alive", concurrency=1, rate=None, period_s=None)
    handles = [app.named("alive").start("a") for _ in range(6)]
    app.run(until_idle=True)
    assert used(conn) == {("alive", "a"): 1}
    coordination.set_limit(conn, "alive", concurrency=4, rate=None, period_s=None)
    app.run(until_idle=True)
    assert (used(conn), queued(conn)) == ({("alive", "a"): 4}, 2)
    assert coordination.reset_limit(conn, "alive")
    assert not coordination.reset_limit(conn, "alive")
    for handle in handles:
        if _place(conn, handle) == "waiting":
            handle.signal("go")
            app.run(until_idle=True)
            assert used(conn)["alive", "a"] <= 3
    assert conn.execute("select concurrency, is_set from durable.limits() where name = 'alive'").fetchone() == (
        2,
        False,
    )


def test_a_permit_survives_its_process(app: App, conn: Connection, dsn: str) -> None:
    """A process takes permits, and is gone before their steps ran: another runs them, and gives back what they hold."""
    handles = [app.named("flow").start(f"a{n}") for n in range(6)]
    for shard in (0, 1):
        gone = Consumer(dsn, shard, app.machines, app.settings)
        gone.work(lambda: True, lambda: None)
        gone.connection.close()
    assert sum(used(conn).values()) == 3
    conn.execute("update durable.win set active = '-infinity'")
    conn.execute("update durable.lease set active = '-infinity'")
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"completed"}
    assert used(conn) == {("slow", "a"): 0}


def test_two_pages_that_take_the_last_permit_at_once_share_it_fairly(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None]
) -> None:
    limit = Limit("only", concurrency=1)
    lines = []
    for _ in range(3):
        handle = app.named("flow").start("a")
        lines.append(
            Queued(Envelope(handle.id, 2, "flow", "end", 1, msgspec.Raw(b'"a"'), permit=OF_STEP), limit, "", 2)
        )
    with psycopg.connect(dsn) as session:
        known = lines.pop()
        coordination.take_permits(session, [known])
        coordination.give_back(session, [known.envelope])
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        coordination.take_permits(first, lines[:1])
        taking = pool.submit(coordination.take_permits, second, lines[1:])
        eventually(lambda: conn.execute("select pg_blocking_pids(%s)", (second.info.backend_pid,)).fetchone() != ([],))
        first.commit()
        taking.result(10)
        second.commit()
    assert (used(conn)["only", ""], queued(conn)) == (1, 1)
    with psycopg.connect(dsn) as session:
        coordination.give_back(session, [lines[0].envelope])
    assert (used(conn)["only", ""], queued(conn)) == (1, 0)


def test_maintenance_forgets_keys_that_nobody_uses_and_only_those(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    finished = [app.named("flow").start(f"{key}{n}") for key in "abc" for n in range(4)]
    holding = [app.named("alive").start("h") for _ in range(3)]
    rated = [app.named("flow").start(f"{n}rated") for n in range(12)]
    app.run(until_idle=True)
    assert {handle.status() for handle in finished} == {"completed"}
    maintenance.run_once(conn)
    assert set(used(conn)) == {("alive", "h"), ("rated", "")}, (
        "those that hold a permit, wait for one, or have used up a rate"
    )
    for handle in holding:
        handle.cancel()
    clock(3600)
    app.run(until_idle=True)
    assert {handle.status() for handle in rated} == {"completed"}
    maintenance.run_once(conn)
    assert set(used(conn)) == {("rated", "")}, "two of the last hour's are not paid for yet"
    clock(2 * 3600)
    assert conn.execute("select forgotten from durable.maintain()").fetchone() == (1,)
    assert used(conn) == {}
    assert not upkeep.has_unused_limits(conn)
    again = app.named("flow").start("a")
    app.run(until_idle=True)
    assert again.status() == "completed"


def test_who_takes_a_permit_while_its_count_is_deleted_gets_one(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None]
) -> None:
    app.named("flow").start("a")
    app.run(until_idle=True)
    handle = app.named("flow").start("a")
    step = Envelope(handle.id, 2, "flow", "end", 1, msgspec.Raw(b'"a"'), permit=OF_STEP)
    limit = Limit("slow", concurrency=3)
    with psycopg.connect(dsn) as sweeping, psycopg.connect(dsn) as taking, ThreadPoolExecutor(1) as pool:
        assert upkeep.sweep_limits(sweeping) == 1
        taken = pool.submit(coordination.take_permits, taking, [Queued(step, limit, "a", 2)])
        eventually(lambda: conn.execute("select pg_blocking_pids(%s)", (taking.info.backend_pid,)).fetchone() != ([],))
        sweeping.commit()
        taken.result(10)
        assert upkeep.sweep_limits(sweeping) == 0, "its new count is locked, and not waited for"
        taking.commit()
    assert (used(conn), queued(conn)) == ({("slow", "a"): 1}, 0)
    assert not upkeep.has_unused_limits(conn)


def test_what_is_no_limit_is_told(app: App, conn: Connection) -> None:
    for arguments, words in (
        ({}, "limits nothing; give it concurrency"),
        ({"concurrency": -1}, "concurrency of -1; it is 0 or more"),
        ({"rate": "often"}, "rate 'often' is none; write it as '100/1s'"),
        ({"rate": "0/1s"}, "rate '0/1s' is none"),
        ({"rate": "5/0s"}, "rate '5/0s' is none"),
    ):
        with pytest.raises(InputError, match=words):
            Limit("x", **arguments)  # type: ignore[arg-type]
    assert parsed_rate("x", "100/1s") == (100, 1.0)
    assert parsed_rate("x", "5/m") == (5, 60.0)
    with pytest.raises(InputError, match="so many at once are 0 or more"):
        coordination.set_limit(conn, "x", concurrency=-1, rate=None, period_s=None)


def test_a_key_function_that_fails_is_a_dead_letter_that_says_so(dsn: str) -> None:
    app = App("wrong", dsn=dsn)
    machine = app.machine("wrong", state=dict, limit=Limit("wrong", concurrency=1, key=lambda state: state["customer"]))

    @machine.step(start=True)
    def begin(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done()

    handle = machine.start({})
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    assert "the key of its limit 'wrong' failed: KeyError: 'customer'" in str(handle.state().output)
    app.close()


def test_a_key_has_255_characters_at_the_most_and_a_limit_is_one(dsn: str) -> None:
    limit = Limit("x", concurrency=1, key=str)
    assert limit.key_of("k" * 255) == "k" * 255
    for wrong in ("k" * 256, "a\nb"):
        with pytest.raises(InputError, match="at most 255 characters and no control characters"):
            limit.key_of(wrong)
    app = App("wrong", dsn=dsn)
    with pytest.raises(AppError, match=r"limit of machine 'm': 'stripe' is no Limit\(…\)"):
        app.machine("m", limit="stripe")  # type: ignore[arg-type]
    with pytest.raises(AppError, match=r"limit of step 'begin': 5 is no Limit\(…\)"):
        app.machine("n").step(limit=5, name="begin")(lambda state: state)  # type: ignore[arg-type]


def test_a_cancel_of_a_step_that_runs_gives_its_permit_back(app: App, conn: Connection, dsn: str) -> None:
    conn.execute("update durable.slot set shard = 0")
    handle = app.named("flow").start("a")
    consumer = Consumer(dsn, 0, app.machines, msgspec.structs.replace(app.settings, page_window_ms=1))
    try:
        while not conn.execute("select from durable.detached").fetchall():
            assert consumer.work(lambda: False, lambda: None)
    finally:
        consumer.close()
    assert used(conn) == {("slow", "a"): 1}
    handle.cancel()
    app.run(until_idle=True)
    assert handle.status() == "cancelled"
    assert used(conn) == {("slow", "a"): 0}
