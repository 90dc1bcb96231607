"""The timeline of a workflow: what is recorded of its steps, exactly; and what there is without any records."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege

from durable_cluster import (
    App,
    ConfigurationError,
    Context,
    Continuation,
    Limit,
    Retry,
    Settings,
    UnknownWorkflow,
    gather,
    sleep,
    timeline_statements,
    wait_for,
)
from durable_cluster.timeline_statements import Moment, Timeline

Connection = psycopg.Connection[Any]
START = (None, None, "started")
ONCE = Retry(attempts=1)
TWICE = Retry(attempts=2, backoff="1ms")


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters or None).fetchone()
    return row and row[0]


def told(timeline: Timeline) -> list[tuple[int | None, str | None, str]]:
    """What happened, without when: number, step (what ran within another is set in), outcome."""
    return [(m.seq, f"  {m.step}" if m.part else m.step, m.outcome) for m in timeline.moments]


def of(timeline: Timeline, step: str, outcome: str) -> Moment:
    """The one moment of this step and outcome."""
    (found,) = [moment for moment in timeline.moments if (moment.step, moment.outcome) == (step, outcome)]
    return found


def demand_in_order(timeline: Timeline) -> None:
    """Whatever was recorded became ready, began and ended in this order, between the workflow's start and its end."""
    assert timeline.moments[0].outcome == "started"
    for moment in timeline.moments[1:]:
        times = [at for at in (moment.enqueued_at, moment.began_at, moment.ended_at) if at is not None]
        assert times == sorted(times), moment
        assert all(at >= timeline.started_at for at in times), moment
        assert all(at <= (timeline.finished_at or at) for at in times), moment
        if moment.step is not None and moment.part == 0 and moment.ended_at is not None:
            assert moment.enqueued_at is not None and moment.process is not None and moment.shard is not None, moment


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    """A program of its own database."""
    made = App("told", dsn=dsn)
    yield made
    made.close()


def run(app: App, how: str, name: str = "flow") -> Timeline:
    """One of them, as far as it gets by itself."""
    handle = app.named(name).start(how)
    app.run(until_idle=True)
    timeline = handle.timeline()
    demand_in_order(timeline)
    return timeline


def two_steps(app: App, *, name: str = "flow", history: bool = True, retry: Retry = TWICE) -> None:
    """A machine whose second step fails as its input says."""
    machine = app.machine(name, state=str, history=history)

    @machine.step(start=True)
    def begin(ctx: Context, how: str) -> Continuation:
        return ctx.goto(work, how)

    @machine.step(retry=retry)
    def work(ctx: Context, how: str) -> Continuation:
        if how == "once" and ctx.attempt == 1:
            raise ValueError("not yet: \x00 \ud800\n'; drop table durable.timeline --")
        if how == "always":
            raise ValueError("never " + "x" * 500)
        return ctx.fail("refused") if how == "refused" else ctx.done(how)


def test_a_machine_is_told_step_by_step(app: App) -> None:
    two_steps(app)
    timeline = run(app, "well")
    assert told(timeline) == [START, (1, "begin", "continued"), (2, "work", "completed"), (None, None, "completed")]
    assert (timeline.has_history, timeline.status, timeline.skips) == (True, "completed", 0)


def test_a_retry_has_a_row_an_attempt_and_says_why(app: App) -> None:
    two_steps(app)
    timeline = run(app, "once")
    assert told(timeline)[2:4] == [(2, "work", "retrying"), (3, "work", "completed")]
    failed, again = of(timeline, "work", "retrying"), of(timeline, "work", "completed")
    assert (failed.attempt, again.attempt) == (1, 2)
    assert failed.error == "ValueError: not yet: \\x00 \\ud800\n'; drop table durable.timeline --"
    assert failed.until is not None and again.enqueued_at is not None and failed.ended_at is not None
    assert again.enqueued_at >= failed.ended_at


def test_a_dead_letter_is_told_with_a_short_error_and_what_came_of_its_retry(app: App) -> None:
    two_steps(app)
    handle = app.named("flow").start("always")
    app.run(until_idle=True)
    timeline = handle.timeline()
    demand_in_order(timeline)
    assert told(timeline) == [START, (1, "begin", "continued"), (2, "work", "retrying"), (3, "work", "stuck")]
    assert of(timeline, "work", "stuck").error == "ValueError: never " + "x" * (200 - len("ValueError: never "))
    handle.retry("well")
    app.run(until_idle=True)
    timeline = handle.timeline()
    assert told(timeline)[3:] == [(3, "work", "stuck"), (4, "work", "completed"), (None, None, "completed")]
    assert of(timeline, "work", "completed").attempt == 3


def test_a_failure_says_its_reason(app: App) -> None:
    two_steps(app)
    timeline = run(app, "refused")
    assert told(timeline)[2:] == [(2, "work", "failed"), (None, None, "failed")]
    assert of(timeline, "work", "failed").error == "refused"


def test_a_replay_has_a_timeline_of_its_own(app: App) -> None:
    two_steps(app)
    handle = app.named("flow").start("well")
    app.run(until_idle=True)
    again = handle.replay()
    app.run(until_idle=True)
    assert told(again.timeline()) == told(handle.timeline())
    assert again.timeline().id != handle.timeline().id


def test_sleeps_waits_and_cancels_are_told(app: App) -> None:
    machine = app.machine("flow", state=str, history=True)

    @machine.step(start=True)
    def begin(ctx: Context, how: str) -> Continuation:
        return ctx.sleep("20ms", ask, how)

    @machine.step()
    def ask(ctx: Context, how: str) -> Continuation:
        return ctx.wait_for("yes", then=end, state=how, timeout="1h")

    @machine.step()
    def end(ctx: Context, how: str) -> Continuation:
        return ctx.done(how)

    handle, other = (machine.start(how) for how in ("signal", "cancel"))
    app.run(until_idle=True)
    waiting = handle.timeline()
    assert told(waiting) == [START, (1, "begin", "sleeping"), (2, "ask", "waiting"), (3, "end", "waiting")]
    slept, asked = of(waiting, "begin", "sleeping"), of(waiting, "ask", "waiting")
    assert slept.until is not None and slept.ended_at is not None and slept.ended_at < slept.until
    assert asked.enqueued_at is not None and asked.enqueued_at > slept.ended_at
    assert asked.waits_for == waiting.moments[-1].waits_for == "signal yes"
    assert asked.until is not None and waiting.moments[-1].ended_at is None
    handle.signal("yes")
    other.cancel("enough")
    app.run(until_idle=True)
    assert told(handle.timeline())[2:] == [(2, "ask", "waiting"), (3, "end", "completed"), (None, None, "completed")]
    cancelled = other.timeline()
    assert told(cancelled)[2:] == [(2, "ask", "waiting"), (3, "end", "cancelled"), (None, None, "cancelled")]
    assert of(cancelled, "end", "cancelled").began_at is None
    assert of(cancelled, "end", "cancelled").error == "enough"
    demand_in_order(handle.timeline())
    demand_in_order(cancelled)


def test_children_and_the_wait_for_them_are_told(app: App) -> None:
    machine = app.machine("flow", state=str, history=True)
    child = app.machine("child", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, how: str) -> Continuation:
        return ctx.gather([child.child(n) for n in range(3)], then=end, state=how)

    @machine.step()
    def end(ctx: Context, how: str) -> Continuation:
        return ctx.done(len(ctx.results.values()))

    @child.step(start=True)
    def count(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    timeline = run(app, "")
    assert told(timeline)[1:] == [(1, "begin", "joining"), (2, "end", "completed"), (None, None, "completed")]
    assert of(timeline, "begin", "joining").waits_for == "3 children"


def test_a_step_that_outlasts_its_page_is_told_once_when_it_has_ended(dsn: str) -> None:
    app = App("slow", dsn=dsn, settings=Settings(page_window_ms=1))
    machine = app.machine("flow", state=str, history=True)

    @machine.step(start=True)
    async def begin(ctx: Context, how: str) -> Continuation:
        await asyncio.sleep(0.1)
        return ctx.done(how)

    timeline = run(app, "")
    assert told(timeline) == [START, (1, "begin", "completed"), (None, None, "completed")]
    moment = of(timeline, "begin", "completed")
    assert moment.began_at is not None and moment.ended_at is not None
    assert (moment.ended_at - moment.began_at).total_seconds() >= 0.1
    app.close()


def test_a_step_that_runs_beside_the_pages_is_seen_to_run(dsn: str, conn: Connection) -> None:
    app = App("slow", dsn=dsn, settings=Settings(page_window_ms=200))  # in which its thread begins
    machine = app.machine("flow", state=str, history=True)
    seen: list[Timeline] = []

    @machine.step(start=True, blocking=True)
    def begin(ctx: Context, how: str) -> Continuation:
        with psycopg.connect(dsn, autocommit=True) as other:
            while not one(other, "select exists (select from durable.detached)"):
                pass
            while one(other, "select not exists (select from durable.timeline)"):
                other.execute("select durable.project_timeline(s.shard) from durable.shard s")
            seen.append(timeline_statements.timeline(other, ctx.workflow_id))
        return ctx.done(how)

    run(app, "")
    (moment,) = seen[0].moments[1:]
    assert (moment.step, moment.outcome, moment.ended_at) == ("begin", "detached", None)
    assert moment.began_at is not None and moment.enqueued_at is not None
    app.close()


def test_transactional_steps_are_told_also_when_they_fail(app: App) -> None:
    machine = app.machine("flow", state=str, history=True)

    @machine.step(start=True, transactional=True, retry=TWICE)
    def begin(ctx: Context, how: str) -> Continuation:
        ctx.tx.execute("select 1" if ctx.attempt == 2 else "select 1/0")
        return ctx.done(how)

    timeline = run(app, "")
    assert told(timeline)[1:3] == [(1, "begin", "retrying"), (2, "begin", "completed")]
    assert of(timeline, "begin", "retrying").error == "DivisionByZero: division by zero"
    assert of(timeline, "begin", "retrying").began_at is not None


def test_a_limit_and_a_pause_are_told(app: App) -> None:
    machine = app.machine("flow", state=str, history=True)

    @machine.step(start=True, limit=Limit("few", concurrency=1))
    def begin(ctx: Context, how: str) -> Continuation:
        return ctx.goto(end, how)

    @machine.step()
    def end(ctx: Context, how: str) -> Continuation:
        return ctx.done(how)

    timeline = run(app, "")
    assert told(timeline)[1:] == [
        (1, "begin", "limited"),
        (1, "begin", "continued"),
        (2, "end", "completed"),
        (None, None, "completed"),
    ]
    assert of(timeline, "begin", "limited").waits_for == "limit few"
    handle = machine.start("")
    handle.pause()
    app.run(until_idle=True)
    assert told(handle.timeline())[1:] == [(1, "begin", "paused")]
    handle.resume()
    app.run(until_idle=True)
    assert [outcome for _, _, outcome in told(handle.timeline())[1:4]] == ["paused", "limited", "continued"]


def test_a_linear_workflow_is_told_with_the_steps_that_ran_ahead_and_at_once(app: App) -> None:
    @app.step(retry=TWICE)
    def quick(n: int) -> int:
        return n

    failures: list[int] = []

    @app.step(retry=TWICE)
    async def slow(n: int) -> int:
        if n == 2 and not failures:
            failures.append(n)
            raise ValueError("two")
        return n

    @app.workflow(name="flow", history=True)
    async def flow(how: str) -> int:
        total = await quick(1) + await quick(2)
        await sleep("10ms")
        total += sum(await gather(slow(1), slow(2)))
        await wait_for("go", timeout="1ms")
        return total

    timeline = run(app, "")
    lines = told(timeline)
    assert lines[:5] == [
        START,
        (1, "workflow.start", "sleeping"),
        (1, "  quick", "continued"),
        (1, "  quick", "continued"),
        (2, "workflow.resume", "continued"),
    ]
    assert lines[5] == (3, "workflow.gather", "waiting")
    assert sorted(lines[6:9]) == [(3, "  slow", "continued"), (3, "  slow", "continued"), (3, "  slow", "retrying")]
    assert lines[9:] == [(4, "workflow.resume", "completed"), (None, None, "completed")]
    again = of(timeline, "slow", "retrying")
    assert (again.attempt, again.error) == (1, "ValueError: two")


def test_a_quick_step_that_fails_ahead_is_told_and_retried(app: App) -> None:
    tries: list[int] = []

    @app.step(retry=TWICE)
    def quick(n: int) -> int:
        tries.append(n)
        if len(tries) == 1:
            raise ValueError("first")
        return n

    @app.workflow(name="flow", history=True)
    async def flow(how: str) -> int:
        return await quick(1)

    timeline = run(app, "")
    assert told(timeline)[1:4] == [
        (1, "workflow.start", "retrying"),
        (1, "  quick", "failed"),
        (3, "quick", "completed"),
    ]
    assert (
        of(timeline, "quick", "failed").error == of(timeline, "workflow.start", "retrying").error == "ValueError: first"
    )


def test_what_a_codec_keeps_secret_is_not_in_the_timeline(dsn: str, conn: Connection) -> None:
    class Rot:
        def encode(self, data: bytes, where: object) -> bytes:
            return bytes(255 - byte for byte in data)

        def decode(self, data: bytes, where: object) -> bytes:
            return bytes(255 - byte for byte in data)

    app = App("coded", dsn=dsn, codec=Rot())
    machine = app.machine("flow", state=str, history=True)

    @machine.step(start=True, retry=TWICE)
    def begin(ctx: Context, how: str) -> Continuation:
        raise ValueError(f"secret {how}")

    run(app, "payload")
    rows = one(conn, "select string_agg(t::text, '') from durable.timeline t")
    assert "ValueError" in rows and "secret" not in rows and "payload" not in rows
    app.close()


def test_without_history_there_are_the_start_where_it_stands_and_the_end(app: App, conn: Connection) -> None:
    two_steps(app, history=False, retry=ONCE)
    timeline = run(app, "well")
    assert told(timeline) == [START, (None, None, "completed")]
    assert not timeline.has_history and timeline.lag_s is None
    stuck = run(app, "always")
    assert told(stuck) == [START, (2, "work", "stuck")]
    assert str(stuck.moments[1].error).startswith("ValueError: never") and stuck.moments[1].enqueued_at is not None
    handle = app.named("flow").start("well")
    assert told(handle.timeline()) == [START, (1, "begin", "queued")]
    assert one(conn, "select count(*) from durable.timeline") == 0


@pytest.mark.parametrize("is_newest", [True, False])
def test_the_newest_version_of_a_type_says_for_all_of_them_whether_they_are_recorded(dsn: str, is_newest: bool) -> None:
    """Half of the steps run in their page at once, and half beside it."""

    def declare(app: App, version: int, *, history: bool) -> None:
        machine = app.machine("flow", state=str, version=version, history=history)

        @machine.step(start=True)
        def ask(ctx: Context, how: str) -> Continuation:
            return ctx.wait_for("go", then=pack, state=how)

        @machine.step()
        def pack(ctx: Context, how: str) -> Continuation:
            return ctx.goto(ship, how)

        @machine.step(blocking=True)
        def ship(ctx: Context, how: str) -> Continuation:
            return ctx.done(f"{how} by version {version}")

    old = App("told", dsn=dsn)
    declare(old, 1, history=not is_newest)
    handle = old.named("flow").start("sent")
    old.run(until_idle=True)
    old.close()
    new = App("told", dsn=dsn)
    declare(new, 1, history=not is_newest)
    declare(new, 2, history=is_newest)
    two_steps(new, name="other", history=False)
    handle.signal("go")
    new.named("other").start("well")
    new.run(until_idle=True)
    assert handle.result(timeout=5) == "sent by version 1"
    steps = [(moment.step, moment.outcome) for moment in handle.timeline().moments if moment.step]
    expected = [("pack", "continued"), ("ship", "completed")] if is_newest else [("ask", "waiting")]
    assert steps == expected
    new.close()


def test_only_the_types_that_ask_for_it_are_recorded(app: App, conn: Connection) -> None:
    two_steps(app)
    two_steps(app, name="other", history=False)
    mine, other = app.named("flow").start("well"), app.named("other").start("well")
    app.run(until_idle=True)
    assert len(mine.timeline().moments) == 4 and len(other.timeline().moments) == 2
    assert other.timeline().has_history is False
    assert one(conn, "select array_agg(distinct durable.hex(id)) from durable.timeline") == [mine.id]


def test_a_sample_records_the_workflows_that_the_database_says(dsn: str, conn: Connection) -> None:
    app = App("sampled", dsn=dsn, settings=Settings(history_sample=0.5))
    two_steps(app, history=False)
    handles = app.named("flow").start_many(["well"] * 40)
    app.run(until_idle=True)
    recorded = {row[0] for row in conn.execute("select distinct durable.hex(id) from durable.timeline")}
    expected = {h.id for h in handles if one(conn, "select durable.is_recorded(%s::uuid, 0.5)", h.id)}
    assert recorded == expected and 0 < len(recorded) < 40
    assert {h.id for h in handles if h.timeline().has_history} == expected
    app.close()


def test_all_of_them_are_recorded_with_a_sample_of_one(dsn: str, conn: Connection) -> None:
    app = App("sampled", dsn=dsn, settings=Settings(history_sample=1))
    two_steps(app, history=False)
    app.named("flow").start_many(["well"] * 20)
    app.run(until_idle=True)
    assert one(conn, "select count(distinct id) from durable.timeline") == 20
    app.close()


@pytest.mark.parametrize("sample", [-0.1, 1.1, float("nan")])
def test_a_sample_is_a_part_of_all(sample: float) -> None:
    with pytest.raises(ConfigurationError, match="history_sample"):
        Settings(history_sample=sample)


def test_an_unknown_workflow_has_no_timeline(app: App, conn: Connection) -> None:
    two_steps(app)
    handle = app.named("flow").start("well")
    handle.id = "0" * 32
    with pytest.raises(UnknownWorkflow, match="000000000000…"):
        handle.timeline()
    with pytest.raises(UnknownWorkflow, match="begins with ffff"):
        timeline_statements.timeline_by_digits(conn, "ffff")


def test_a_long_timeline_takes_its_length_and_not_the_square_of_it(app: App, conn: Connection) -> None:
    machine = app.machine("long", state=int)

    @machine.step(start=True)
    def step(ctx: Context, n: int) -> Continuation:
        return ctx.wait_for("never", then=step, state=n)

    handle = machine.start(1)
    app.run(until_idle=True)
    conn.execute(
        "insert into durable.timeline (day, id, seq, part, step, attempt, enqueued_at, began_at, ended_at, outcome, shard)"
        " select durable.day_at(now()), %s::uuid, n / 2, 0, 'step', 1, case when n %% 2 = 0 then now() end, now(),"
        "  case when n %% 2 = 1 then now() end, case n %% 2 when 0 then 'detached' else 'continued' end, 0"
        " from generate_series(20, 40019) n",
        (handle.id,),
    )
    conn.execute("set statement_timeout = '3s'")
    moments = timeline_statements.timeline(conn, handle.id).moments
    assert [m.outcome for m in moments] == ["started", *["continued"] * 20_000, "waiting"]
    assert all(m.enqueued_at is not None for m in moments)


def test_a_viewer_asks_by_the_digits_that_it_sees_and_a_client_by_the_id_that_it_holds(
    app: App, dsn: str, conn: Connection
) -> None:
    two_steps(app)
    handle = app.named("flow").start("well")
    app.run(until_idle=True)
    whole = told(handle.timeline())
    for role, may in (("durable_viewer", True), ("durable_operator", True), ("durable_client", False)):
        with psycopg.connect(make_conninfo(dsn, options=f"-c role={role}"), autocommit=True) as other:
            assert told(timeline_statements.timeline(other, handle.id)) == whole
            if may:
                assert told(timeline_statements.timeline_by_digits(other, handle.id[:12])) == whole
                # No more than 12 digits are compared: nobody finds an id by asking for more and more of it.
                wrong = handle.id[:12] + ("0" * 20 if handle.id[12] != "0" else "1" * 20)
                assert told(timeline_statements.timeline_by_digits(other, wrong)) == whole
            else:
                with pytest.raises(InsufficientPrivilege):
                    timeline_statements.timeline_by_digits(other, handle.id[:12])
            with pytest.raises(InsufficientPrivilege):
                other.execute("select * from durable.timeline")
            with pytest.raises(InsufficientPrivilege):
                other.execute("select durable.project_timeline(0)")


def test_the_async_twin_tells_the_same(app: App) -> None:
    two_steps(app)
    handle = app.named("flow").start("well")
    app.run(until_idle=True)
    assert asyncio.run(handle.timeline_async()).moments == handle.timeline().moments


def test_the_readers_of_steps_and_of_the_log_pass_by_the_records(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    two_steps(app)
    handle = app.named("flow").start("well")
    app.run(until_idle=True)
    assert handle.status() == "completed" and not caplog.records
    shard = handle.timeline().moments[1].shard
    lines = conn.execute("select step from durable.log(%s)", (shard,)).fetchall()
    assert lines == [("begin",), ("work",)]
