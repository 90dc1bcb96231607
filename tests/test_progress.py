"""Progress: what a workflow publishes while it runs, by pages and by steps beside them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, InputError, Settings, side_statements

Connection = psycopg.Connection[Any]

GO_ON = threading.Event()


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    GO_ON.clear()
    app = App("progressing", dsn=dsn, settings=Settings(page_window_ms=20))
    machine = app.machine("flow", state=int)

    @machine.step(start=True)
    def count(ctx: Context, n: int) -> Continuation:
        ctx.set_progress({"left": n})
        return ctx.goto(count, n - 1) if n else ctx.wait_for("go", then=count, state=0)

    slow = app.machine("slow", state=int)

    @slow.step(start=True)
    async def work(ctx: Context, n: int) -> Continuation:
        ctx.set_progress("begun")
        while not GO_ON.is_set():
            await asyncio.sleep(0.005)
        ctx.set_progress("ended")
        return ctx.done(n)

    yield app
    GO_ON.set()
    app.close()


def test_the_last_word_is_read_while_the_workflow_runs(app: App, conn: Connection) -> None:
    handle, silent = app.named("flow").start(3), app.named("slow").start(1)
    assert handle.progress() is None and silent.progress() is None
    GO_ON.set()
    app.run(until_idle=True)
    assert handle.status() == "running"
    assert handle.progress() == {"left": 0}
    row = conn.execute("select progress, at <= durable.now() from durable.progress_of(%s)", (handle.id,)).fetchone()
    assert row == ('{"left":0}', True)
    count = conn.execute("select count(*) from durable.progress").fetchone()
    assert count == (2,), "one row a workflow"


def test_a_step_beside_the_pages_publishes_while_it_runs(app: App, eventually: Callable[..., None]) -> None:
    handle = app.named("slow").start(1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(app.run, until_idle=True)
        eventually(lambda: handle.progress() == "begun")
        assert handle.status() == "running"
        GO_ON.set()
        running.result(timeout=10)
    assert handle.result(timeout=5) == 1
    assert handle.progress() == "ended"


def test_who_lost_a_step_publishes_nothing_more_for_it(app: App, conn: Connection) -> None:
    handle = app.named("flow").start(1)
    conn.execute(
        "insert into durable.detached (id, seq, shard, owner, line, since) values (%s, 1, 0, 7, '{}', now())",
        (handle.id,),
    )
    side_statements.publish_detached(conn, 8, {f"{handle.id}:1": '"a stranger"'})
    assert handle.progress() is None
    side_statements.publish_detached(conn, 7, {f"{handle.id}:1": '"mine"'})
    assert handle.progress() == "mine"


def test_progress_is_small_json_and_no_other(app: App, dsn: str) -> None:
    refused: list[str] = []
    machine = app.machine("limits")

    @machine.step(start=True)
    def begin(ctx: Context, _: Any) -> Continuation:
        for progress in (object(), "x" * 8_191, {1: object()}):
            with pytest.raises(InputError, match="publishes") as error:
                ctx.set_progress(progress)
            refused.append(str(error.value))
        ctx.set_progress("x" * 8_190)
        return ctx.done()

    handle = machine.start(None)
    app.run(until_idle=True)
    assert handle.status() == "completed"
    assert [("the limit is 8,192" in one) for one in refused] == [False, True, False]
    assert len(handle.progress()) == 8_190


def test_what_a_step_publishes_is_not_what_its_next_attempt_is_told(app: App) -> None:
    told: list[Any] = []
    machine = app.machine("apart")

    @machine.step(start=True)
    def begin(ctx: Context, _: Any) -> Continuation:
        told.append(ctx.progress)
        ctx.set_progress("for onlookers")
        ctx.heartbeat("for the next attempt")
        return ctx.goto(end, None)

    @machine.step()
    def end(ctx: Context, _: Any) -> Continuation:
        told.append(ctx.progress)
        return ctx.done()

    handle = machine.start(None)
    app.run(until_idle=True)
    assert told == [None, None]
    assert handle.progress() == "for onlookers"
