"""Windows of the gone: found by silence or by word, taken once, gone on with from where they stand, never forgotten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Settings, statements
from durable_cluster.consumer import Consumer
from durable_cluster.shards import upkeep

RUNS: Counter[tuple[str, int]] = Counter()


@pytest.fixture(autouse=True)
def runs() -> Iterator[Counter[tuple[str, int]]]:
    RUNS.clear()
    yield RUNS


def counting(dsn: str, **settings: Any) -> App:
    """A machine of one step that counts its runs. Pages are cut after a line or two."""
    given = {"page_window_ms": 0, "takeover_probe_s": 0, "dead_interval_s": 3600, **settings}
    app = App("counting", dsn=dsn, settings=Settings(**given))

    @app.machine("count", state=int).step(start=True)
    def count(ctx: Context, n: int) -> Continuation:
        RUNS[ctx.short_id, ctx.seq] += 1
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


def one_page(consumer: Consumer) -> bool:
    """One page of each shard, and no more of their windows."""
    return consumer.work(lambda: True, lambda: None)


def until_idle(consumer: Consumer) -> None:
    while consumer.work(lambda: False, lambda: None) or consumer.wait(0):
        pass


def test_a_window_is_gone_on_with_from_its_cursor_and_not_from_its_start(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    handles = app.named("count").start_many(list(range(300)))
    first, second = consume(app), consume(app)
    one_page(first)
    done = sum(RUNS.values())
    assert 0 < done < 300
    assert sorted(statements.abandon(conn, first.owner)) == [0, 1]
    until_idle(second)
    assert {handle.status() for handle in handles} == {"completed"}
    assert set(RUNS.values()) == {1}


def test_a_window_is_its_owners_while_it_is_heard_of(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn, dead_interval_s=30)
    app.named("count").start_many(list(range(100)))
    first, second = consume(app), consume(app)
    one_page(first)
    conn.execute("update durable.win set active = active - interval '1 hour'")
    assert statements.heartbeat(conn, [first.owner]) == 2
    assert not second.work(lambda: False, lambda: None)
    assert not second.wait(0)
    conn.execute("update durable.win set active = active - interval '1 hour'")
    assert statements.heartbeat(conn, [second.owner]) == 0
    assert second.wait(0)
    assert second.work(lambda: False, lambda: None)


def test_a_heartbeat_does_not_bring_an_abandoned_window_back(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(100)))
    first, second = consume(app), consume(app)
    one_page(first)
    statements.abandon(conn, first.owner)
    assert statements.heartbeat(conn, [first.owner]) == 0
    until_idle(second)
    assert len(RUNS) == 100


def test_each_takeover_is_counted_and_shown_to_the_reader(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(300)))
    for number in range(3):
        assert {taken for (taken,) in conn.execute("select takeovers from durable.win")} <= {number - 1, number}
        consumer = consume(app)
        one_page(consumer)
        statements.abandon(conn, consumer.owner)
    assert conn.execute("select takeovers from durable.win").fetchall() == [(2,), (2,)]


def test_the_longest_silent_window_is_taken_first(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    for _ in range(2):
        app.named("count").start_many(list(range(100)))
        one_page(consume(app))
    conn.execute("update durable.win set active = durable.now() - make_interval(hours => 10 + batch::int)")
    expected = conn.execute("select max(batch) from durable.win where shard = 0").fetchone()
    assert conn.execute("select durable.take_over(0, 7, '1 hour')").fetchone() == expected


def test_a_consumer_that_stopped_in_the_middle_of_its_window_goes_on_with_it(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(300)))
    consumer = consume(app)
    one_page(consumer)
    until_idle(consumer)
    assert len(RUNS) == 300
    assert set(RUNS.values()) == {1}
    assert conn.execute("select count(*) from durable.win").fetchone() == (0,)


def test_a_consumer_that_stopped_in_the_middle_of_a_window_it_took_over_goes_on_with_it(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(300)))
    first, second = consume(app), consume(app)
    one_page(first)
    statements.abandon(conn, first.owner)
    one_page(second)
    until_idle(second)
    assert len(RUNS) == 300
    assert set(RUNS.values()) == {1}
    assert conn.execute("select count(*) from durable.win").fetchone() == (0,)


def test_the_window_of_a_consumer_that_was_closed_is_free_at_once(dsn: str, consume: Callable[[App], Consumer]) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(300)))
    first = consume(app)
    one_page(first)
    first.close()
    until_idle(consume(app))
    assert len(RUNS) == 300


def test_a_run_that_ran_out_of_time_is_gone_on_with_by_the_next_run(dsn: str) -> None:
    app = App("slow", dsn=dsn, settings=Settings(page_window_ms=0))
    machine = app.machine("count", state=int)
    is_slow = [True]

    @machine.step(start=True)
    def slow_once(ctx: Context, n: int) -> Continuation:
        if is_slow:
            is_slow.pop()
            threading.Event().wait(0.3)
        return ctx.done(n)

    handles = machine.start_many(list(range(300)))
    app.run(timeout=0.2)
    assert {handle.status() for handle in handles} == {"running", "completed"}
    app.run(until_idle=True, timeout=20)
    assert {handle.status() for handle in handles} == {"completed"}


def test_a_run_that_an_error_ended_is_gone_on_with_by_the_next_run(dsn: str) -> None:
    app = App("interrupted", dsn=dsn)
    machine = app.machine("count", state=int)
    is_interrupted = [True]

    @machine.step(start=True)
    def interrupted_once(ctx: Context, n: int) -> Continuation:
        if is_interrupted:
            is_interrupted.pop()
            raise KeyboardInterrupt
        return ctx.done(n)

    handle = machine.start(1)
    with pytest.raises(KeyboardInterrupt):
        app.run(until_idle=True)
    app.run(until_idle=True, timeout=20)
    assert handle.status() == "completed"


def test_what_a_holder_of_a_window_ticked_meanwhile_is_read_by_a_sibling(
    dsn: str, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(300)))
    first, second = consume(app), consume(app)
    one_page(first)
    later = app.named("count").start_many(list(range(300)))
    first.wait(0)
    one_page(first)  # its claim gives it its own window again
    for shard in (0, 1):
        assert statements.probe(second.connection, shard), "a sibling's probe sees that something waits"
    until_idle(second)
    assert {handle.status() for handle in later} == {"completed"}


def test_members_of_the_dead_are_swept_once_they_hold_no_window(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(100)))
    statements.join_shard(conn, 0, "dead")
    statements.join_shard(conn, 1, "gone")
    assert statements.claim(conn, 0, member="dead", owner=5, lines_max=1000, bytes_max=1 << 20)
    conn.execute("update pgque.subscription set sub_active = sub_active - interval '3 hours'")
    conn.execute("update pgque.batch set batch_opened = batch_opened - interval '3 hours'")
    living = consume(app)
    one_page(living)
    upkeep.sweep_members(conn)
    members = (
        "select split_part(co_name, '.', 2) from pgque.consumer where co_name like '%.%' and co_name not like '%.c0%'"
    )
    assert "gone" not in [name for (name,) in conn.execute(members)]
    assert "dead" in [name for (name,) in conn.execute(members)]
    statements.abandon(conn, 5)
    until_idle(living)
    upkeep.sweep_members(conn)
    assert "dead" not in [name for (name,) in conn.execute(members)]
    until_idle(living)
    assert len(RUNS) == 100


def test_a_silent_window_is_taken_over_while_the_taker_has_one_of_its_own_open(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    machine = app.named("count")
    first, second = consume(app), consume(app)
    left = machine.start_many(list(range(50)))
    one_page(first)
    mine = machine.start_many(list(range(400)))
    one_page(second)
    statements.abandon(conn, first.owner)
    deadline = time.monotonic() + 20
    while not all(handle.status() == "completed" for handle in left):
        assert time.monotonic() < deadline
        one_page(second)
    assert not all(handle.status() == "completed" for handle in mine), "its own windows are still open"
    until_idle(second)
    assert {handle.status() for handle in [*left, *mine]} == {"completed"}
    assert set(RUNS.values()) == {1}


KILLED = """
import os, signal, sys, time
from durable_cluster import App, Settings

app = App("mortal", settings=Settings(dead_interval_s=1.0, takeover_probe_s=0.05))

@app.step
async def beside(n: int) -> int:
    if sys.argv[1:] == ["die beside"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return n

@app.step
def inside(n: int) -> int:
    if sys.argv[1:] == ["die inside"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return n + 1

@app.workflow
async def mortal(n: int) -> int:
    return await inside(await beside(n))

if __name__ == "__main__":
    handle = mortal.start(1, key="one")
    app.run(until_idle=True)
    print(handle.status())
"""


@pytest.mark.parametrize("fate", ["die beside", "die inside"])
def test_a_run_until_idle_waits_for_what_a_killed_run_left(dsn: str, tmp_path: Path, fate: str) -> None:
    (tmp_path / "mortal.py").write_text(KILLED)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DURABLE_DSN": dsn}
        command = [sys.executable, "mortal.py", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    assert run(fate).returncode == -signal.SIGKILL
    done = run()
    assert (done.stdout, done.stderr) == ("completed\n", "")


def test_what_the_living_hold_is_no_orphan(
    dsn: str, conn: psycopg.Connection, consume: Callable[[App], Consumer]
) -> None:
    app = counting(dsn)
    app.named("count").start_many(list(range(300)))
    living, other = consume(app), consume(app)
    one_page(living)
    assert conn.execute("select count(*) from durable.win").fetchone() == (2,)
    assert not other.expects_work(0)
    conn.execute("update durable.win set owner = 7")
    assert other.expects_work(0)
    conn.execute("update durable.shard set is_paused = true")
    assert not other.expects_work(0)
