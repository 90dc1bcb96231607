"""Cancel: it reaches a workflow wherever it stands, once, and its cleanup runs in place of the next step."""

from __future__ import annotations

import asyncio
import threading
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
    Retry,
    Settings,
    UnknownWorkflow,
    WorkflowCancelled,
    side_statements,
)
from durable_cluster.envelope import Envelope
from durable_cluster.signals import CANCEL, Cancel, Waiting

Connection = psycopg.Connection[Any]

CLEANED: list[tuple[str, str | None]] = []
RUNNING = threading.Event()
ENDED: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    CLEANED.clear()
    ENDED.clear()
    RUNNING.clear()


def application(dsn: str, *, has_cleanup: bool = True) -> App:
    """A workflow whose input says where it stops: ``wait``, ``sleep``, ``retry``, ``run``, ``die`` or ``pass``."""
    app = App("cancelling", dsn=dsn, settings=Settings(page_window_ms=20))
    machine = app.machine("flow", state=str)

    @machine.step(start=True, retry=Retry(attempts=3, backoff="200s", jitter=0))
    def begin(ctx: Context, where: str) -> Continuation:
        if where == "wait":
            return ctx.wait_for("go", then=end, state=where)
        if where == "sleep":
            return ctx.sleep("1d", then=end, state=where)
        if where == "retry":
            raise RuntimeError("not yet")
        if where == "die":
            raise InputError("never")
        return ctx.goto(run if where == "run" else end, where)

    @machine.step()
    async def run(ctx: Context, where: str) -> Continuation:
        try:
            RUNNING.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ENDED.append(where)
            raise
        return ctx.done("ran")

    @machine.step()
    def end(ctx: Context, where: str) -> Continuation:
        return ctx.done(where)

    if has_cleanup:

        @machine.step(on_cancel=True)
        def clean(ctx: Context, where: str) -> Continuation:
            CLEANED.append((where, ctx.cancelled))
            return ctx.goto(cleaned, where)

        @machine.step()
        def cleaned(ctx: Context, where: str) -> Continuation:
            assert ctx.cancelled == "no more"
            return ctx.done(f"cleaned {where}")

    return app


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    app = application(dsn)
    yield app
    app.close()


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    return row and row[0]


def rows_aside(conn: Connection) -> int:
    return sum(
        one(conn, f"select count(*) from durable.{table}") for table in ("wait", "detached", "dead_letter", "cancelled")
    )


def demand_cancelled(handle: Handle, reason: str = "no more") -> None:
    assert handle.status() == "cancelled"
    with pytest.raises(WorkflowCancelled, match=reason) as told:
        handle.result(timeout=5)
    assert told.value.reason == reason


@pytest.mark.parametrize("where", ["wait", "sleep", "retry", "die", "queued"])
def test_a_cancel_reaches_a_workflow_wherever_it_stands_and_its_cleanup_runs_once(
    app: App, conn: Connection, where: str
) -> None:
    handle = app.named("flow").start(where)
    if where != "queued":
        app.run(until_idle=True)
        assert handle.status() == ("stuck" if where == "die" else "running")
    assert handle.cancel("no more", actor="ada")
    assert handle.cancel("no, really")
    app.run(until_idle=True)
    assert [(where, "no more")] == CLEANED
    demand_cancelled(handle)
    assert rows_aside(conn) == 0


def test_a_workflow_without_a_cleanup_just_ends(dsn: str, conn: Connection) -> None:
    app = application(dsn, has_cleanup=False)
    handle = app.named("flow").start("wait")
    app.run(until_idle=True)
    assert handle.cancel()
    app.run(until_idle=True)
    demand_cancelled(handle, "cancelled")
    assert rows_aside(conn) == 0
    app.close()


def test_a_step_that_runs_beside_the_pages_is_interrupted(
    app: App, conn: Connection, eventually: Callable[..., None]
) -> None:
    handle = app.named("flow").start("run")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(app.run, until_idle=True)
        assert RUNNING.wait(10)
        eventually(lambda: one(conn, "select count(*) from durable.detached") == 1)
        assert handle.cancel("no more")
        eventually(lambda: ENDED == ["run"])
        eventually(lambda: handle.status() == "cancelled")
        running.result(timeout=10)
    assert CLEANED == [("run", "no more")]
    assert rows_aside(conn) == 0


def test_who_has_ended_cannot_be_cancelled_and_who_is_unknown_is_told(app: App, conn: Connection) -> None:
    handle = app.named("flow").start("pass")
    app.run(until_idle=True)
    assert not handle.cancel()
    assert handle.result(timeout=5) == "pass"
    with pytest.raises(UnknownWorkflow, match="no workflow with the id 000000000000…"):
        Handle(app.client, "flow", "0" * 32).cancel()
    for reason in ("", "x" * 1001, "a\nb"):
        with pytest.raises(InputError, match="the reason has 1 to 1000 characters"):
            handle.cancel(reason)
    assert rows_aside(conn) == 0


def test_a_cancel_is_sent_with_the_transaction_or_not_at_all(app: App, dsn: str) -> None:
    handle = app.named("flow").start("wait")
    app.run(until_idle=True)
    with psycopg.connect(dsn) as tx:
        assert handle.cancel("no more", tx=tx)
        tx.rollback()
        app.run(until_idle=True)
        assert handle.status() == "running"
        assert handle.cancel("no more", tx=tx)
        tx.commit()
    app.run(until_idle=True)
    demand_cancelled(handle)


def test_only_one_step_cleans_up(app: App) -> None:
    with pytest.raises(AppError, match="cleans up at 'clean' already"):

        @app.named("flow").step(on_cancel=True)
        def again(ctx: Context, where: str) -> Continuation:
            return ctx.done()


@pytest.mark.parametrize("is_cancel_first", [True, False])
@pytest.mark.parametrize("what", ["wait", "sleep"])
def test_a_cancel_and_the_beginning_of_a_wait_do_not_miss_each_other(
    app: App, dsn: str, conn: Connection, eventually: Callable[..., None], is_cancel_first: bool, what: str
) -> None:
    handle = app.named("flow").start("wait")
    app.run(until_idle=True)
    conn.execute("delete from durable.wait")
    then = Envelope(handle.id, 2, "flow", "end", 1, msgspec.Raw(b'"wait"'))

    def stand_aside(tx: Connection) -> None:
        if what == "wait":
            side_statements.await_signals(tx, [Waiting(then, then, ("go",), None, None)])
        else:
            side_statements.schedule(tx, [then], [3600.0])

    def cancel(tx: Connection) -> None:
        side_statements.deliver_cancels(
            tx, [Cancel(Envelope(handle.id, 1, CANCEL, "cancel", 0, msgspec.Raw()), "no more", "")]
        )

    begin, follow = (cancel, stand_aside) if is_cancel_first else (stand_aside, cancel)
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        begin(first)
        acting = pool.submit(follow, second)
        eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", second.info.backend_pid))
        first.commit()
        acting.result(timeout=10)
        second.commit()
    app.run(until_idle=True)
    demand_cancelled(handle)
    assert CLEANED == [("wait", "no more")]
    assert rows_aside(conn) == 0
