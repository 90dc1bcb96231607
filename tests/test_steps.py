"""Steps, from a start to a result, on one consumer."""

from __future__ import annotations

import msgspec
import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Retry, TerminalError, WorkflowFailed, WorkflowStuck


class Count(msgspec.Struct):
    n: int


def counting(dsn: str) -> App:
    app = App("counting", dsn=dsn)
    count = app.machine("count", state=Count)

    @count.step(start=True)
    def plain(ctx: Context, at: Count) -> Continuation:
        return ctx.done(at.n) if at.n >= 9 else ctx.goto(awaited, Count(at.n + 1))

    @count.step()
    async def awaited(ctx: Context, at: Count) -> Continuation:
        return ctx.goto(transactional, Count(at.n + 1))

    @count.step(transactional=True)
    def transactional(ctx: Context, at: Count) -> Continuation:
        ctx.tx.execute("insert into effect values (%s, %s)", (ctx.short_id, at.n))
        return ctx.goto(plain, Count(at.n + 1))

    return app


@pytest.fixture
def app(dsn: str, conn: psycopg.Connection) -> App:
    conn.execute("create table effect (id text, n int)")
    return counting(dsn)


def test_a_workflow_goes_through_plain_awaited_and_transactional_steps_to_its_result(
    app: App, conn: psycopg.Connection
) -> None:
    handle = app.named("count").start(Count(0))
    assert handle.status() == "running"
    assert app.run(until_idle=True) == 10
    assert handle.result(timeout=5) == 9
    assert [n for (n,) in conn.execute("select n from effect order by n")] == [2, 5, 8]


def test_a_thousand_workflows_started_at_once_all_complete(app: App) -> None:
    handles = app.named("count").start_many([Count(n % 3) for n in range(1000)])
    app.run(until_idle=True)
    assert {handle.result(timeout=5) for handle in handles} <= {9, 10, 11}


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (ValueError, WorkflowStuck, "is stuck in step 'only_even' after 3 attempts: ValueError: 1 is odd"),
        (TerminalError, WorkflowFailed, "failed in step 'only_even': 1 is odd"),
    ],
)
def test_a_step_that_raises_stops_its_workflow_alone(
    dsn: str, error: type[Exception], raised: type[Exception], says: str
) -> None:
    app = App("picky", dsn=dsn)
    machine = app.machine("pick", state=Count)

    @machine.step(start=True, retry=Retry(attempts=3, backoff=0))
    def only_even(ctx: Context, at: Count) -> Continuation:
        if at.n % 2:
            raise error(f"{at.n} is odd")
        return ctx.done(at.n)

    odd, even = machine.start_many([Count(1), Count(2)])
    app.run(until_idle=True)
    assert even.result(timeout=5) == 2
    with pytest.raises(raised, match=says):
        odd.result(timeout=5)
