"""Pause and resume: of a workflow, a type and a shard; nothing is lost, and nothing runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    Context,
    Continuation,
    Handle,
    InputError,
    UnknownWorkflow,
    coordination,
)
from durable_cluster.envelope import Envelope

Connection = psycopg.Connection[Any]


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    """Two types of one making: wait for a signal if told to, then end."""
    app = App("pausing", dsn=dsn)
    for name in ("flow", "other"):
        machine = app.machine(name, state=str)

        @machine.step(start=True)
        def begin(ctx: Context, what: str) -> Continuation:
            if what == "wait":
                return ctx.wait_for("go", then="end", state=what)
            return ctx.sleep("1h", then="end", state=what) if what == "sleep" else ctx.goto("end", what)

        @machine.step()
        def end(ctx: Context, what: str) -> Continuation:
            return ctx.done(what)

        @machine.step(on_cancel=True)
        def clean(ctx: Context, what: str) -> Continuation:
            return ctx.done("cleaned")

    yield app
    app.close()


def started(app: App, what: str = "x", *, name: str = "flow") -> Handle:
    return app.named(name).start(what)


def count(conn: Connection, table: str) -> int:
    row = conn.execute(f"select count(*) from durable.{table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def test_a_paused_workflow_stands_still_until_it_is_resumed(app: App, conn: Connection) -> None:
    held, other = started(app), started(app)
    assert held.pause(actor="ada")
    assert not held.pause()
    app.run(until_idle=True)
    assert (held.status(), other.result(timeout=5)) == ("running", "x")
    assert [place[0] for place in conn.execute("select place from durable.locate(%s)", (held.id,))] == ["paused"]
    assert held.resume()
    assert not held.resume()
    app.run(until_idle=True)
    assert held.result(timeout=5) == "x"
    assert (count(conn, "parked"), count(conn, "pause")) == (0, 0)


def test_a_paused_type_takes_starts_and_runs_them_after_the_pause(app: App, conn: Connection) -> None:
    flow, other = app.named("flow"), app.named("other")
    assert flow.pause(actor="ada")
    held = [flow.start(str(n)) for n in range(20)]
    others = [other.start(str(n)) for n in range(20)]
    app.run(until_idle=True)
    assert {one.status() for one in held} == {"running"}
    assert [one.result(timeout=5) for one in others] == [str(n) for n in range(20)]
    assert conn.execute("select scope, name, actor, parked from durable.pauses()").fetchall() == [
        ("type", "flow", "ada", 20)
    ]
    assert flow.resume()
    app.run(until_idle=True)
    assert [one.result(timeout=5) for one in held] == [str(n) for n in range(20)]


def test_of_two_pauses_the_one_that_is_left_still_holds(app: App) -> None:
    held = started(app)
    held.pause()
    app.named("flow").pause()
    app.run(until_idle=True)
    app.named("flow").resume()
    app.run(until_idle=True)
    assert held.status() == "running"
    held.resume()
    app.run(until_idle=True)
    assert held.result(timeout=5) == "x"


def test_signals_and_timers_reach_a_paused_workflow_and_it_goes_on_after_the_pause(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    waiting, sleeping = started(app, "wait"), started(app, "sleep")
    app.run(until_idle=True)
    waiting.pause()
    sleeping.pause()
    waiting.signal("go")
    clock(3700)
    app.run(until_idle=True)
    assert count(conn, "parked") == 2
    waiting.resume()
    sleeping.resume()
    app.run(until_idle=True)
    assert (waiting.result(timeout=5), sleeping.result(timeout=5)) == ("wait", "sleep")


def test_a_cancel_reaches_what_is_paused(app: App, conn: Connection) -> None:
    held, waiting = started(app), started(app, "wait")
    app.run(until_idle=True)
    again = started(app)
    for one in (waiting, again):
        one.pause()
    app.run(until_idle=True)
    assert waiting.cancel() and again.cancel()
    app.run(until_idle=True)
    assert (held.status(), waiting.status(), again.status()) == ("completed", "cancelled", "cancelled")
    assert count(conn, "parked") == 0
    assert conn.execute("select durable.sweep_cancels()").fetchone() == (2,)
    assert count(conn, "pause") == 0


def test_a_paused_shard_is_not_read(app: App, conn: Connection) -> None:
    handles = [started(app, str(n)) for n in range(40)]
    shards = [
        conn.execute("select shard from durable.slot where slot = durable.slot_of(%s)", (h.id,)).fetchone()
        for h in handles
    ]
    assert coordination.pause(conn, "shard", "1", actor=None)
    app.run(until_idle=True)
    assert {
        shard[0] for shard, handle in zip(shards, handles, strict=True) if shard and handle.status() == "running"
    } == {1}
    assert {
        shard[0] for shard, handle in zip(shards, handles, strict=True) if shard and handle.status() == "completed"
    } == {0}
    assert coordination.resume(conn, "shard", "1") == 0
    assert coordination.resume(conn, "shard", "1") is None
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"completed"}


def test_a_shard_that_is_paused_within_a_window_stops_after_the_page(app: App, conn: Connection, dsn: str) -> None:
    from durable_cluster.consumer import Consumer

    conn.execute("update durable.slot set shard = 0")
    for n in range(10):
        started(app, str(n))
    settings = msgspec.structs.replace(app.settings, page_lines_max=1)
    consumer = Consumer(dsn, 0, app.machines, settings)
    try:
        consumer.work(lambda: True, lambda: None)
        assert consumer.steps == 1
        coordination.pause(conn, "shard", "0", actor=None)
        assert not consumer.work(lambda: False, lambda: None)
        assert consumer.steps == 1
        coordination.resume(conn, "shard", "0")
        while consumer.work(lambda: False, lambda: None):
            pass
        assert consumer.steps == 20
    finally:
        consumer.close()


@pytest.mark.parametrize("is_resume_first", [True, False])
@pytest.mark.parametrize("scope", ["workflow", "type"])
def test_a_page_that_puts_aside_and_a_resume_do_not_miss_each_other(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None], scope: str, is_resume_first: bool
) -> None:
    handle = started(app, "wait")
    app.run(until_idle=True)
    conn.execute("delete from durable.wait")
    name = handle.id if scope == "workflow" else "flow"
    coordination.pause(conn, scope, name, actor=None)
    line = Envelope(handle.id, 2, "flow", "end", 1, msgspec.Raw(b'"x"'))
    acts: list[Callable[[Connection], object]] = [
        lambda tx: coordination.resume(tx, scope, name),
        lambda tx: coordination.park(tx, [line]),
    ]
    begin, follow = acts if is_resume_first else reversed(acts)
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        begin(first)
        acting = pool.submit(follow, second)
        eventually(lambda: conn.execute("select pg_blocking_pids(%s)", (second.info.backend_pid,)).fetchone() != ([],))
        first.commit()
        acting.result(timeout=10)
        second.commit()
    app.run(until_idle=True)
    assert handle.result(timeout=5) == "x"
    assert count(conn, "parked") == 0


def test_what_cannot_be_paused_is_told(app: App, conn: Connection) -> None:
    ended = started(app)
    app.run(until_idle=True)
    with pytest.raises(UnknownWorkflow, match="no live workflow with the id"):
        ended.pause()
    for scope, name, words in (
        ("shard", "7", "shard 7 does not exist; this database has shards 0 to 1"),
        ("type", "No Type", "workflow name 'No Type' is not of"),
        ("world", "x", "a 'world' cannot be paused; a workflow, a type or a shard can"),
    ):
        with pytest.raises((InputError, UnknownWorkflow), match=words):
            coordination.pause(conn, scope, name, actor=None)
    with pytest.raises(UnknownWorkflow):
        coordination.pause(conn, "workflow", "nonsense", actor=None)


def test_the_audit_tells_who_paused_and_resumed_what(app: App, conn: Connection) -> None:
    handle = started(app)
    conn.execute("select durable.set_audit(true)")
    handle.pause(actor="ada")
    handle.pause(actor="eve")
    handle.resume(actor="bob")
    coordination.pause(conn, "shard", "1", actor="ada")
    app.named("flow").pause(actor="ada")
    handle.set_priority(4)
    coordination.set_limit(conn, "stripe", concurrency=3, rate=None, period_s=None)
    rows = conn.execute(
        "select what, id, actor, details from durable.audit where what <> 'audit_on' order by number"
    ).fetchall()
    short = handle.id[:12]
    assert [row[:3] for row in rows] == [
        ("pause", short, "ada"), ("resume_pause", short, "bob"), ("pause", None, "ada"), ("pause", None, "ada"),
        ("set_priority", short, None), ("set_limit", None, None),
    ]  # fmt: skip
    assert [row[3] for row in rows][2:5] == [{"shard": "1"}, {"type": "flow"}, {"weight": 4}]
