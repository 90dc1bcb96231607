"""What a process counts: each step event once, when what became of it is committed, under the name that its code has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.errors import DeadlockDetected

from durable_cluster import App, Context, Continuation, Retry, sleep
from durable_cluster.errors import TerminalError
from durable_cluster.meters import SECONDS, STEPS, UNKNOWN, Histogram, OfShard, OfWorkflow, Totals, summed
from durable_cluster.runner import Runner

ONCE = Retry(attempts=1)
AGAIN = Retry(attempts=3, backoff=0.001)


@pytest.fixture
def app(dsn: str) -> App:
    return App("counted", dsn=dsn)


@pytest.fixture
def run(app: App) -> Iterator[Callable[[], dict[str, OfWorkflow]]]:
    """Run until nothing is left; the totals by workflow, of all shards."""
    runners: list[Runner] = []

    def running() -> dict[str, OfWorkflow]:
        if not runners:
            runners.append(Runner(app))
        runners[0].run(until_idle=True)
        return by_workflow(runners[0].consumer.meters.totals)

    yield running
    for runner in runners:
        runner.close()


def by_workflow(totals: Totals) -> dict[str, OfWorkflow]:
    return summed({0: of} for of in totals.values())[0].workflows if totals else {}


def test_a_step_event_counts_when_it_hands_its_workflow_on_or_ends_it(app: App, run: Callable[..., Any]) -> None:
    chain = app.machine("chain", state=int)

    @chain.step(start=True)
    def link(ctx: Context, left: int) -> Continuation:
        return ctx.goto(link, left - 1) if left else ctx.done()

    chain.start_many([2] * 10)
    chain.start(0)
    assert run() == {"chain": OfWorkflow(steps=31, completed=11)}


def test_an_attempt_that_fails_is_a_retry_or_a_dead_letter_and_no_step(app: App, run: Callable[..., Any]) -> None:
    flaky = app.machine("flaky", state=int)

    @flaky.step(start=True, retry=AGAIN)
    def fail_so_often(ctx: Context, times: int) -> Continuation:
        if ctx.attempt <= times:
            raise RuntimeError("again")
        return ctx.done()

    flaky.start(0)
    flaky.start(2)
    flaky.start(9)
    assert run() == {"flaky": OfWorkflow(steps=2, retries=2 + 2, dead_letters=1, completed=2)}


def test_ends_are_counted_by_their_status(app: App, run: Callable[..., Any]) -> None:
    ending = app.machine("ending", state=str)

    @ending.step(start=True)
    def end(ctx: Context, how: str) -> Continuation:
        if how == "raise":
            raise TerminalError("for good")
        if how == "wait":
            return ctx.wait_for("never", then=end, state="done")
        return ctx.fail("so") if how == "fail" else ctx.done()

    waiting = ending.start("wait")
    for how in ("done", "fail", "raise"):
        ending.start(how)
    assert run() == {"ending": OfWorkflow(steps=4, completed=1, failed=2)}
    waiting.cancel()
    assert run() == {"ending": OfWorkflow(steps=5, completed=1, failed=2, cancelled=1)}


def test_sleeps_waits_signals_and_children_count_once_for_each_step_event(app: App, run: Callable[..., Any]) -> None:
    parent = app.machine("parent", state=str)
    child = app.machine("child", state=str)

    @parent.step(start=True)
    def bear(ctx: Context, text: str) -> Continuation:
        return ctx.spawn([child.child(text)], then=bear_more, state=text)

    @parent.step()
    def bear_more(ctx: Context, text: str) -> Continuation:
        return ctx.gather([child.child(text), child.child(text)], then=rest, state=text)

    @parent.step()
    def rest(ctx: Context, text: str) -> Continuation:
        return ctx.sleep(0.001, then=ask, state=text)

    @parent.step()
    def ask(ctx: Context, text: str) -> Continuation:
        return ctx.wait_for("answer", then=end, state=text)

    @parent.step()
    def end(ctx: Context, text: str) -> Continuation:
        return ctx.done()

    @child.step(start=True)
    def grow(ctx: Context, text: str) -> Continuation:
        ctx.set_progress("grown")
        return ctx.done(text)

    handle = parent.start("x")
    run()
    handle.signal("answer")
    handle.set_attributes({"a": 1})
    assert run() == {"parent": OfWorkflow(steps=5, completed=1), "child": OfWorkflow(steps=3, completed=3)}


def test_a_detached_step_counts_when_its_answer_is_committed(app: App, run: Callable[..., Any]) -> None:
    slow = app.machine("slow", state=float)

    @slow.step(start=True, retry=AGAIN)
    async def wait(ctx: Context, seconds: float) -> Continuation:
        await asyncio.sleep(seconds)
        if ctx.attempt == 1:
            raise RuntimeError("again")
        return ctx.done()

    slow.start_many([0.2] * 3)
    assert run() == {"slow": OfWorkflow(steps=3, retries=3, completed=3)}


def test_linear_workflows_count_their_step_events(app: App, run: Callable[..., Any]) -> None:
    tries: list[int] = []

    @app.step(retry=AGAIN)
    async def flaky(text: str) -> str:
        tries.append(1)
        if len(tries) % 2:
            raise RuntimeError("again")
        return text

    @app.workflow
    async def flow(text: str) -> str:
        await flaky(text)
        await sleep("1ms")
        return await flaky(text)

    handle = flow.start("x")
    found = run()
    assert handle.result(timeout=1) == "x"
    assert len(tries) == 4
    assert (found["flow"].retries, found["flow"].completed, found["flow"].dead_letters) == (2, 1, 0)
    with psycopg.connect(app.client.dsn) as connection:
        (last_seq,) = connection.execute(
            "select max(seq) from (select (durable.log(s.shard)).* from durable.shard s) l"
        ).fetchone() or (0,)
    assert found["flow"].steps + found["flow"].retries == last_seq, "each number is a step or an attempt that failed"


def test_transactional_steps_that_conflict_or_fail_count_once(app: App, run: Callable[..., Any]) -> None:
    paying = app.machine("paying", state=int)
    conflicts = [1, 1]

    @paying.step(start=True, transactional=True, retry=ONCE)
    def pay(ctx: Context, number: int) -> Continuation:
        if number == 3 and conflicts:
            conflicts.pop()
            raise DeadlockDetected("somebody else's")
        if number == 5:
            raise RuntimeError("no")
        return ctx.done()

    paying.start_many(list(range(10)))
    assert run() == {"paying": OfWorkflow(steps=9, dead_letters=1, completed=9)}
    assert not conflicts


def test_names_that_only_the_log_knows_are_one_and_lines_that_nobody_can_have_sent_none(
    app: App, run: Callable[..., Any], conn: psycopg.Connection[Any]
) -> None:
    known = app.machine("known", state=str)

    @known.step(start=True)
    def end(ctx: Context, text: str) -> Continuation:
        return ctx.done()

    for number, (workflow, more) in enumerate(
        {"nobody": ',"u":99999', "somebody": ',"u":99999', 'evil\\"} 1\\n#': "", "later": "", "@signal": ""}.items()
    ):
        line = f'{{"w":"{number:032x}","n":1,"f":"{workflow}","s":"x","v":1,"d":null{more}}}'
        conn.execute("select durable.append(0, %s, 1)", (line,))
    known.start("x")
    runner = Runner(app)
    try:
        while runner.consumer.work(lambda: False, lambda: None):
            pass
        totals = runner.consumer.meters.totals
    finally:
        runner.close()
    assert by_workflow(totals) == {UNKNOWN: OfWorkflow(dead_letters=2), "known": OfWorkflow(steps=1, completed=1)}
    assert sum(of.unroutable for of in totals.values()) == 1


def test_what_goes_back_to_the_end_of_the_log_for_heavier_ones_counts_when_its_turn_comes(
    app: App, run: Callable[..., Any]
) -> None:
    weighed = app.machine("weighed", state=str)

    @weighed.step(start=True)
    def end(ctx: Context, text: str) -> Continuation:
        return ctx.done()

    weighed.start_many(["x"] * 200, priority=0.1)
    weighed.start_many(["x"] * 20, priority=10)
    assert run() == {"weighed": OfWorkflow(steps=220, completed=220)}


def test_a_page_is_counted_with_its_size_and_what_it_took(app: App) -> None:
    quick = app.machine("quick", state=str)

    @quick.step(start=True)
    def end(ctx: Context, text: str) -> Continuation:
        return ctx.done()

    quick.start_many(["x"] * 90)
    runner = Runner(app)
    try:
        runner.run(until_idle=True)
        totals = runner.consumer.meters.totals
        report = runner.consumer.meters.report()
        assert report.totals is totals
        assert runner.consumer.meters.report().totals is None, "nothing new is told twice"
    finally:
        runner.close()
    assert sum(of.pages for of in totals.values()) == sum(sum(of.page_steps.counts) for of in totals.values())
    assert sum(of.page_steps.sum for of in totals.values()) == 90
    for of in totals.values():
        assert of.pages == sum(of.page_s.counts) == sum(of.commit_s.counts) <= sum(of.claim_s.counts)
        assert of.commit_s.sum > 0


def test_a_commit_that_is_fenced_counts_for_nothing_but_that(app: App, conn: psycopg.Connection[Any]) -> None:
    quick = app.machine("quick", state=str)

    @quick.step(start=True)
    def end(ctx: Context, text: str) -> Continuation:
        if not stolen:
            stolen.append(conn.execute("update durable.win set owner = 1, active = '-infinity'").rowcount)
        return ctx.done()

    stolen: list[int] = []
    quick.start("x")
    runner = Runner(app)
    try:
        runner.run(until_idle=True)
        totals = runner.consumer.meters.totals
    finally:
        runner.close()
    assert stolen == [1]
    assert sum(of.fenced for of in totals.values()) == 1
    assert sum(of.pages for of in totals.values()) == 1
    assert by_workflow(totals) == {"quick": OfWorkflow(steps=1, completed=1)}


@pytest.mark.parametrize(("value", "bucket"), [(0.0, 0), (0.0005, 0), (0.0006, 1), (30.0, 14), (30.1, 15)])
def test_a_value_at_a_bound_falls_below_it(value: float, bucket: int) -> None:
    histogram = Histogram.over(SECONDS)
    histogram.add(value)
    assert histogram.counts.index(1) == bucket
    assert histogram.sum == value


def test_a_look_gives_processor_time_to_the_type_whose_step_runs(app: App) -> None:
    """Deterministic: the steps look themselves, as the watchdog does now and then."""
    busy, idle = app.machine("busy", state=float), app.machine("idle", state=float)
    runner = Runner(app)

    @busy.step(start=True)
    def reckon(ctx: Context, seconds: float) -> Continuation:
        burn(seconds)
        runner.consumer.meters.look(runner.consumer.inline)
        return ctx.done()

    @idle.step(start=True)
    async def wait(ctx: Context, seconds: float) -> Continuation:
        runner.consumer.meters.look(runner.consumer.inline)
        return ctx.done()

    busy.start_many([0.05] * 3)
    runner.run(until_idle=True)
    seen = runner.consumer.meters.report().step_cpu_s
    assert seen.keys() == {"busy"}
    assert 0.15 <= seen["busy"] <= time.process_time()
    burn(0.05)
    runner.consumer.meters.look(runner.consumer.inline)  # nothing runs: it goes to nobody
    idle.start(1.0)
    runner.run(until_idle=True)
    after = runner.consumer.meters.report().step_cpu_s
    assert after["busy"] == seen["busy"]
    assert 0 < after["idle"] < 0.05
    runner.close()


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_what_runs_at_once_shares_evenly(app: App) -> None:
    runner = Runner(app)
    burn(0.02)
    runner.consumer.meters.saw(["a", "b", "b", "b"])
    seen = runner.consumer.meters.report().step_cpu_s
    assert seen["b"] == pytest.approx(3 * seen["a"])
    assert sum(seen.values()) >= 0.02
    runner.close()


def test_sums_leave_what_they_are_made_of_and_come_through_a_pipe() -> None:
    one = {0: OfShard(pages=1, workflows={"a": OfWorkflow(steps=2)})}
    one[0].page_steps.add(7, STEPS)
    other = {0: OfShard(pages=2, workflows={"a": OfWorkflow(steps=1, failed=1)}), 1: OfShard(fenced=1)}
    total = summed([one, other])
    assert (total[0].pages, total[1].fenced, total[0].page_steps.sum) == (3, 1, 7)
    assert total[0].workflows == {"a": OfWorkflow(steps=3, failed=1)}
    assert one[0].workflows == {"a": OfWorkflow(steps=2)}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(total), type=Totals) == total
