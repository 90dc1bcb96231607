"""Priority: a weight is a share of the turns while there is more to do than can be done, and nothing starves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, InputError, Limit, Settings
from durable_cluster.consumer import Consumer

Connection = psycopg.Connection[Any]

RAN: list[str] = []


@pytest.fixture
def app(dsn: str, conn: Connection) -> Iterator[App]:
    RAN.clear()
    conn.execute("update durable.slot set shard = 0")
    app = App("weights", dsn=dsn, settings=Settings(page_window_ms=60_000, page_lines_max=100))
    machine = app.machine("flow", state=list)
    limited = app.machine("limited", state=str, limit=Limit("one", concurrency=1))

    @machine.step(start=True)
    def go(ctx: Context, state: list[Any]) -> Continuation:
        name, left = state
        RAN.append(name)
        return ctx.goto(go, [name, left - 1]) if left else ctx.done()

    @limited.step(start=True)
    def begin(ctx: Context, name: str) -> Continuation:
        RAN.append(name)
        return ctx.wait_for("go", then=end, state=name)

    @limited.step()
    def end(ctx: Context, name: str) -> Continuation:
        return ctx.done()

    yield app
    app.close()


def run_pages(app: App, dsn: str, pages: int) -> None:
    consumer = Consumer(dsn, 0, app.machines, app.settings)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1

    try:
        while done < pages and consumer.work(lambda: done >= pages, count):
            pass
    finally:
        consumer.close()


def weights(conn: Connection) -> list[float]:
    return [weight for (weight,) in conn.execute("select weight from durable.priority order by 1")]


def test_steps_get_turns_as_their_weights_say_and_all_end(app: App, dsn: str, conn: Connection) -> None:
    machine = app.named("flow")
    heavy = machine.start_many([["heavy", 40]] * 50, priority=4)
    light = machine.start_many([["light", 40]] * 50)
    run_pages(app, dsn, 30)
    shares = RAN.count("heavy") / RAN.count("light")
    assert 2.5 < shares < 6.5, shares
    app.run(until_idle=True)
    assert {handle.status() for handle in heavy + light} == {"completed"}
    assert (RAN.count("heavy"), RAN.count("light")) == (50 * 41, 50 * 41)
    assert weights(conn) == []


def test_a_heavy_workflow_overtakes_a_backlog_of_many_pages(app: App, dsn: str) -> None:
    machine = app.named("flow")
    machine.start_many([["light", 0]] * 5_000)
    urgent = machine.start(["urgent", 0], priority=10)
    app.run(until_idle=True)
    assert urgent.status() == "completed"
    assert RAN.index("urgent") < 2_000, "beside it every tenth of those before it ran"


def test_equals_run_in_their_order_without_another_turn(app: App, dsn: str) -> None:
    app.named("flow").start_many([[str(n), 0] for n in range(300)], priority=3)
    app.run(until_idle=True)
    assert [str(n) for n in range(300)] == RAN


def test_a_priority_is_changed_while_the_workflow_lives(app: App, conn: Connection) -> None:
    handle = app.named("flow").start(["x", 1], priority=0.5)
    assert handle.set_priority(7)
    assert weights(conn) == [7]
    assert handle.set_priority(1)
    assert weights(conn) == []
    handle.set_priority(2)
    app.run(until_idle=True)
    assert weights(conn) == []
    assert not handle.set_priority(2)
    for edge in (0.1, 10):
        assert app.named("flow").start(["x", 0], priority=edge).set_priority(edge)
    for wrong in (0, 0.09, 10.01, -1):
        with pytest.raises(InputError, match=r"a weight from 0\.1 to 10"):
            handle.set_priority(wrong)
        with pytest.raises(InputError, match=r"a weight from 0\.1 to 10"):
            app.named("flow").start(["x", 1], priority=wrong)
    row = conn.execute("select count(*) from durable.started").fetchone()
    assert row == (3,), "what was refused was not started"


def test_who_waits_for_a_permit_is_let_pass_by_weight_also_by_one_given_later(app: App, conn: Connection) -> None:
    machine = app.named("limited")
    first = machine.start("first")
    app.run(until_idle=True)
    handles = [machine.start("light"), machine.start("heavy", priority=5), machine.start("late")]
    app.run(until_idle=True)
    handles[2].set_priority(8)
    for handle in (first, handles[2], handles[1], handles[0]):
        handle.signal("go")
        app.run(until_idle=True)
    assert RAN == ["first", "late", "heavy", "light"]


def test_children_have_their_parents_priority(dsn: str, conn: Connection) -> None:
    app = App("weights", dsn=dsn)
    child, parent = app.machine("child", state=int), app.machine("parent", state=int)

    @child.step(start=True)
    def wait(ctx: Context, n: int) -> Continuation:
        return ctx.wait_for("go", then="wait", state=n)

    @parent.step(start=True)
    def fan(ctx: Context, n: int) -> Continuation:
        return ctx.gather([child.child(1), child.child(2)], then="fan", state=n)

    parent.start(1, priority=6)
    app.run(until_idle=True)
    assert weights(conn) == [6, 6, 6]
    app.close()
