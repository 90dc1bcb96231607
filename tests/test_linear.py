"""Linear workflows: an ordinary function whose awaits are checkpoints, resumed where it waits or entered anew."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    AppError,
    ChildFailed,
    Context,
    InputError,
    Limit,
    Retry,
    Settings,
    StepFailed,
    TerminalError,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowStuck,
    at_least,
    compensation,
    continue_as_new,
    current,
    executor,
    first,
    gather,
    loop,
    now,
    patched,
    random,
    scope,
    select,
    set_attributes,
    set_progress,
    side_effect,
    sleep,
    uuid4,
    wait_for,
    waits,
)
from durable_cluster.envelope import Envelope

ONCE = Retry(attempts=1)
TWICE = Retry(attempts=2, backoff=0.001)


class Line(msgspec.Struct):
    article: str
    quantity: int


class Order(msgspec.Struct):
    number: int
    lines: list[Line]


@dataclasses.dataclass
class Receipt:
    total: int


class Declined(Exception):
    pass


HOW = {
    "resumed": Settings(run_ahead_ms=0),
    "entered anew": Settings(functions_max=0, run_ahead_ms=0),
    "run ahead": Settings(run_ahead_ms=60_000),
}


@pytest.fixture(params=HOW)
def app(request: pytest.FixtureRequest, dsn: str) -> Iterator[App]:
    """Its functions are kept between two steps, or never; or run ahead where they can."""
    app = App("linear", dsn=dsn, settings=HOW[request.param])
    yield app
    app.close()


@contextmanager
def another(app: App) -> Iterator[App]:
    """Other code on the same database: the next version of the program."""
    other = App("linear", dsn=app.client.dsn, settings=app.settings)
    yield other
    other.close()


def ran(app: App, handle: Any) -> Any:
    app.run(until_idle=True)
    return handle.result(timeout=1)


def test_a_function_awaits_its_steps_one_after_the_other_with_types(app: App) -> None:
    @app.step
    def total(order: Order, *, factor: int = 1) -> Receipt:
        return Receipt(factor * sum(line.quantity for line in order.lines))

    @app.step
    async def thank(ctx: Context, receipt: Receipt) -> list[Line]:
        assert isinstance(receipt, Receipt)
        return [Line("thanks", receipt.total)]

    @app.workflow
    async def fulfil(order: Order) -> Receipt:
        assert isinstance(order, Order)
        one = await total(order)
        lines = await thank(one)
        assert isinstance(lines[0], Line)
        return await total(order=Order(2, lines), factor=10)

    handle = fulfil.start(Order(1, [Line("tea", 2), Line("cups", 3)]), key="o1")
    assert ran(app, handle) == Receipt(50)
    assert fulfil.get(key="o1").result() == Receipt(50)


def test_a_plain_def_is_a_workflow_too(app: App) -> None:
    @app.step
    async def double(n: int) -> int:
        return 2 * n

    @app.step
    def add(n: int, m: int) -> int:
        return n + m

    @app.workflow
    def plain(n: int) -> list[Any]:
        first_one: Any = double(n)
        sleep(0.001)
        children = [other.spawn(k) for k in range(2)]
        said: Any = wait_for("go", int)
        more: Any = gather(other.spawn(5), other.spawn(6))
        return [add(first_one, 1), [child.result() for child in children], said, more]

    @app.workflow
    async def other(n: int) -> int:
        return await double(n)

    handle = plain.start(4)
    handle.signal("go", 7)
    assert ran(app, handle) == [9, [0, 2], 7, [10, 12]]


def test_a_step_called_outside_of_a_workflow_is_the_plain_function(app: App) -> None:
    @app.step
    def double(n: int) -> int:
        return 2 * n

    @app.step
    async def triple(n: int) -> int:
        return 3 * n

    assert double(4) == 8
    assert asyncio.run(triple(4)) == 12  # type: ignore[arg-type]
    assert double.function(5) == 10


def test_a_step_is_retried_and_what_it_raises_for_good_is_raised_at_its_await(app: App) -> None:
    attempts: list[tuple[int, str]] = []

    @app.step(retry=TWICE)
    def charge(ctx: Context, amount: int) -> str:
        attempts.append((ctx.attempt, ctx.idempotency_key))
        if amount > 100:
            raise Declined("limit", amount)
        return "paid"

    @app.workflow
    async def pay(amount: int) -> list[str]:
        try:
            return [await charge(amount)]
        except Declined as error:
            return [str(error), await charge(1)]

    assert ran(app, pay.start(200)) == ["('limit', 200)", "paid"]
    assert [attempt for attempt, _ in attempts] == [1, 2, 1]
    assert attempts[0][1] == attempts[1][1] != attempts[2][1], (
        "one key for the attempts of a call, another for another call"
    )


def test_a_failure_that_nobody_catches_leaves_the_workflow_stuck_in_that_step_and_a_retry_goes_on(app: App) -> None:
    is_broken, ran_steps = [True], []

    @app.step
    def before(n: int) -> int:
        ran_steps.append("before")
        return n + 1

    @app.step(retry=ONCE)
    def fragile(n: int) -> int:
        ran_steps.append("fragile")
        if is_broken[0]:
            raise RuntimeError("out of order")
        return n * 10

    @app.workflow
    async def work(n: int) -> int:
        return await fragile(await before(n))

    handle = work.start(1)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="stuck in step 'fragile' after 1 attempt: RuntimeError: out of order"):
        handle.result(timeout=1)
    is_broken[0] = False
    handle.retry()
    assert ran(app, handle) == 20
    assert ran_steps == ["before", "fragile", "fragile"]


def test_a_dead_letter_is_retried_with_edited_arguments_if_they_fit(app: App, conn: psycopg.Connection[Any]) -> None:
    @app.step(retry=ONCE)
    def halve(line: Line) -> int:
        if line.quantity % 2:
            raise ValueError("odd")
        return line.quantity // 2

    @app.workflow
    async def work(order: Order) -> list[int]:
        return [await halve(line) for line in order.lines]

    handle = work.start(Order(1, [Line("tea", 2), Line("cups", 3)]), key="odd")
    app.run(until_idle=True)
    letter = conn.execute("select durable.dead_letter_state(%s)", (handle.id,)).fetchone()
    assert letter is not None
    edited = letter[0].replace('"quantity":3', '"quantity":4')
    assert edited != letter[0]
    state = msgspec.json.decode(edited)
    with another(app) as other:  # which has not run that step yet
        other.step(retry=ONCE)(halve.function)
        again = other.workflow(work.function)
        for one in (app, other):
            with pytest.raises(
                InputError, match=r"input of workflow 'work' does not fit Order: lines\[0\]: expected obj"
            ):
                one.get(handle.id).retry(state | {"i": {"number": 1, "lines": [2]}})
            with pytest.raises(
                InputError, match=r"arguments do not fit step 'halve': line.quantity: expected int.*\(true\)"
            ):
                one.get(handle.id).retry(state | {"a": [state["a"][0], [{"article": "cups", "quantity": True}]]})
            with pytest.raises(InputError, match="has a field 'wrong' that Carried does not know"):
                one.get(handle.id).retry(state | {"wrong": 1})
        other.get(handle.id).retry(state)
        other.run(until_idle=True)
        assert again.get(key="odd").result(timeout=1) == [1, 2]


def test_an_error_of_the_lines_themselves_is_a_dead_letter_that_the_mended_code_takes_up(app: App) -> None:
    runs = []

    def declare(app: App, *, is_mended: bool) -> Any:
        @app.step
        def count(n: int) -> int:
            runs.append(n)
            return n + 1

        @app.workflow
        async def work(n: int) -> int:
            m = await count(n)
            return m if is_mended else m // 0

        return work

    handle = declare(app, is_mended=False).start(1)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="ZeroDivisionError"):
        handle.result(timeout=1)
    with another(app) as mended:
        work = declare(mended, is_mended=True)
        again = work.app.get(handle.id)
        again.retry()
        assert ran(mended, again) == 2
    assert runs == [1], "the step has run and is not run again"


def test_terminal_errors_end_the_workflow_wherever_they_are_raised(app: App) -> None:
    @app.step
    def refuse(why: str) -> None:
        raise TerminalError(why)

    @app.workflow
    async def of_a_step(why: str) -> None:
        await refuse(why)

    @app.workflow
    async def of_its_lines(why: str) -> None:
        await sleep(0)
        raise TerminalError(why)

    @app.workflow
    async def caught(why: str) -> str:
        try:
            await refuse(why)
        except TerminalError as error:
            return f"caught: {error.reason}"
        return "never"

    handles = [of_a_step.start("no stock"), of_its_lines.start("too late")]
    assert ran(app, caught.start("no way")) == "caught: no way"
    for handle, reason in zip(handles, ("no stock", "too late"), strict=True):
        with pytest.raises(WorkflowFailed) as failure:
            handle.result(timeout=1)
        assert failure.value.reason == reason


def test_an_exception_whose_class_cannot_be_made_again_is_a_step_failed(app: App) -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    @app.step(retry=ONCE)
    def odd() -> None:
        raise Odd(1, 2)

    @app.workflow
    async def work() -> list[str]:
        try:
            await odd()
        except StepFailed as error:
            return [error.kind.rpartition(".")[2], error.message]
        return []

    assert ran(app, work.start()) == ["Odd", "1 and 2"]


def test_sleeps_are_durable_and_short_ones_too(app: App, clock: Callable[[float], None]) -> None:
    @app.workflow
    async def nap(duration: str) -> str:
        await sleep(duration)
        await asyncio.sleep(0.001)
        return duration

    short, long = nap.start("2ms"), nap.start("7d")
    assert ran(app, short) == "2ms"
    assert long.status() == "running"
    clock(8 * 86_400)
    assert ran(app, long) == "7d"


def test_signals_are_awaited_with_types_timeouts_and_tokens(app: App, clock: Callable[[float], None]) -> None:
    tokens: dict[str, str] = {}

    @app.step
    def mail(ctx: Context) -> None:
        tokens[ctx.workflow_id] = ctx.token

    @app.step
    def nothing() -> None:
        pass

    @app.workflow
    async def approval(days: int) -> list[Any]:
        line = await wait_for("line", Line)
        await mail()
        await nothing()
        granted = await wait_for("approved", bool, timeout=f"{days}d", require_token=True)
        chosen = await select("left", "right", timeout="1d")
        return [line.article, granted, None if chosen is None else [chosen.name, chosen.actor]]

    handles = [approval.start(3) for _ in range(3)]
    for handle in handles:
        handle.signal("line", Line("tea", 1))
    app.run(until_idle=True)
    with pytest.raises(Exception, match="token"):
        handles[0].signal("approved", True)
    handles[0].signal("approved", True, token=tokens[handles[0].id])
    handles[0].signal("right", actor="ada")
    handles[1].signal("approved", False, token=tokens[handles[1].id])
    assert ran(app, handles[0]) == ["tea", True, ["right", "ada"]]
    clock(4 * 86_400)
    app.run(until_idle=True)
    clock(9 * 86_400)
    assert ran(app, handles[1]) == ["tea", False, None]
    assert handles[2].result(timeout=1) == ["tea", None, None]


def test_steps_are_gathered_at_once_and_keep_their_places(app: App) -> None:
    running, most = [0], [0]

    @app.step
    async def slow(n: int) -> int:
        running[0] += 1
        most[0] = max(most[0], running[0])
        for _ in range(20 - n):
            await asyncio.sleep(0)
        running[0] -= 1
        return n * n

    @app.workflow
    async def fan(n: int) -> list[int]:
        mine = await gather(*(slow(k) for k in range(n)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(slow(k)) for k in range(3)]
        theirs = await asyncio.gather(*(slow(k) for k in range(3)))
        return [*mine, *(task.result() for task in tasks), *theirs]

    assert ran(app, fan.start(10)) == [k * k for k in range(10)] + [0, 1, 4] * 2
    assert most[0] == 10


def test_a_step_that_fails_in_a_gather_is_retried_there_and_stuck_alone(app: App) -> None:
    calls: list[int] = []
    is_broken = [True]

    @app.step(retry=TWICE)
    async def act(n: int) -> int:
        calls.append(n)
        if n == 2 and is_broken[0]:
            raise RuntimeError("two")
        return n

    @app.workflow
    async def fan(n: int) -> list[int]:
        return await gather(*(act(k) for k in range(n)))

    handle = fan.start(4)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="RuntimeError: two"):
        handle.result(timeout=1)
    assert sorted(calls) == [0, 1, 2, 2, 3]
    is_broken[0] = False
    handle.retry()
    assert ran(app, handle) == [0, 1, 2, 3]
    assert sorted(calls) == [0, 1, 2, 2, 2, 3], "what has ended is not run again"


def test_two_steps_that_fail_at_one_time_are_both_retried(app: App) -> None:
    is_broken = [True]

    @app.step(retry=ONCE)
    async def act(n: int) -> int:
        if is_broken[0]:
            raise RuntimeError("out of order")
        return n

    @app.workflow
    async def fan(n: int) -> list[int]:
        return await gather(*(act(k) for k in range(n)))

    handle = fan.start(3)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="out of order"):
        handle.result(timeout=1)
    is_broken[0] = False
    handle.retry()
    assert ran(app, handle) == [0, 1, 2]


def test_a_step_that_fails_in_a_function_that_cannot_be_entered_any_more_is_a_dead_letter(app: App) -> None:
    def declare(app: App, input_type: Any) -> Any:
        @app.step(retry=ONCE)
        async def fail() -> None:
            raise RuntimeError("out of order")

        async def work(value: Any) -> None:
            await wait_for("go")
            await fail()
            await fail.opts(timeout="9s")()

        work.__annotations__["value"] = input_type
        return app.workflow(work)

    handle = declare(app, int).start(1)
    app.run(until_idle=True)
    envelope = Envelope(handle.id, 2, "work", "fail", 1, msgspec.Raw(b'{"i":1,"m":[],"a":["2 fail",[]]}'))
    with another(app) as changed:
        declare(changed, str)
        task = executor.resolve(changed.machines, envelope, limit_s=1)
        assert isinstance(task, executor.Task)
        letter = executor.failed(task, RuntimeError("out of order"), executor.context_of(task))
    assert isinstance(letter, executor.DeadLetter)
    assert letter.details["reason"] == "RuntimeError: out of order"


def test_a_function_that_went_on_in_an_event_that_failed_is_entered_anew(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [psycopg.OperationalError("the server is away")]
    asked = waits.group_of

    def group_of(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return asked(*args)

    monkeypatch.setattr(waits, "group_of", group_of)

    @app.workflow
    async def child(n: int) -> int:
        await wait_for("go")
        return n

    @app.workflow
    async def parent(n: int) -> int:
        one, other = child.spawn(1), child.spawn(2)
        await wait_for("begin")
        return await one + await other

    handle = parent.start(0)
    app.run(until_idle=True)
    handle.signal("begin")
    app.run(until_idle=True)
    assert not failures
    for one in handle.children():
        app.get(one.id).signal("go")
    assert ran(app, handle) == 3


def test_a_timeout_of_asyncio_cancels_the_step_and_the_function_goes_on(app: App) -> None:
    cancelled = []

    @app.step
    async def endless(n: int) -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(n)
            raise
        return n

    @app.step
    def quick(n: int) -> int:
        return n

    @app.workflow
    async def bounded(n: int) -> list[Any]:
        try:
            async with asyncio.timeout(0.05):
                await endless(n)
        except TimeoutError:
            return ["late", await quick(n)]
        return ["never"]

    @app.workflow
    async def race(n: int) -> int:
        return await first(endless(n), quick(n + 1))

    handles = [bounded.start(1), race.start(2)]
    app.run(until_idle=True)
    assert [handle.result(timeout=1) for handle in handles] == [["late", 1], 3]
    assert sorted(cancelled) == [1, 2]


def test_transactional_steps_commit_with_the_handoff_or_not_at_all(app: App, conn: psycopg.Connection[Any]) -> None:
    conn.execute("create table ledger (what text, amount int check (amount > 0))")
    conn.commit()

    @app.step(transactional=True, retry=ONCE)
    def book(ctx: Context, what: str, amount: int) -> int:
        ctx.tx.execute("insert into ledger values (%s, %s)", (what, amount))
        return amount

    @app.workflow
    async def post(amount: int) -> list[Any]:
        booked = [await book("one", amount)]
        try:
            await book("two", -1)
        except Exception as error:
            booked.append(type(error).__name__)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(book(f"t{k}", k + 1)) for k in range(3)]
        return booked + [task.result() for task in tasks]

    handle = post.start(5)
    result = ran(app, handle)
    assert result == [5, "CheckViolation", 1, 2, 3] or result[1] == "StepFailed"
    rows = conn.execute("select what, amount from ledger order by what").fetchall()
    assert rows == [("one", 5), ("t0", 1), ("t1", 2), ("t2", 3)]


def test_children_are_awaited_one_by_one_in_any_order_or_together(app: App) -> None:
    @app.workflow
    async def child(n: int) -> Line:
        if n < 0:
            raise TerminalError(f"no {n}")
        await sleep(0.001 * n)
        return Line("child", n)

    @app.workflow
    async def parent(n: int) -> list[Any]:
        slow, quick = child.spawn(20), child.spawn(1)
        seen: list[Any] = [(await quick).quantity]
        more = [child.spawn(k) for k in range(3)]
        seen.append([line.quantity for line in await gather(*more)])
        seen.append((await slow).quantity)
        try:
            await child.spawn(-1)
        except ChildFailed as error:
            seen.append(str(error))
        seen.append((await first(child.spawn(-2), child.spawn(5))).quantity)
        seen.append(
            sorted(line.quantity for line in await at_least(2, child.spawn(1), child.spawn(2), child.spawn(-3)))
        )
        return seen

    seen = ran(app, parent.start(0))
    assert seen[:3] == [1, [0, 1, 2], 20]
    assert "has failed: no -1" in seen[3]
    assert seen[4:] == [5, [1, 2]]


def test_signals_and_children_are_awaited_at_once(app: App, clock: Callable[[float], None]) -> None:
    @app.workflow
    async def child(n: int) -> str:
        await sleep(3_600.0 * n)
        return f"child {n}"

    @app.step
    def note(what: str) -> str:
        return what

    @app.workflow
    async def parent(n: int) -> list[Any]:
        kept = child.spawn(n)
        word = await first(kept.wait(), wait_for("stop", str))
        await note(word)
        try:
            async with asyncio.timeout(7_200):
                late = await first(kept.wait(), wait_for("again", str))
        except TimeoutError:
            late = "too late"
        return [word, late]

    early, later, ended, never = (parent.start(n) for n in (24, 24, 1, 24))
    early.signal("stop", "early")
    early.signal("again", "at once")
    app.run(until_idle=True)
    assert early.result(timeout=1) == ["early", "at once"]
    for handle in (later, never):
        handle.signal("stop", "later")
    app.run(until_idle=True)
    clock(3_700)
    app.run(until_idle=True)
    assert ended.result(timeout=1) == ["child 1", "child 1"]
    assert [later.status(), never.status()] == ["running", "running"]
    later.signal("again", "once more")
    assert ran(app, later) == ["later", "once more"]
    clock(7_300)
    assert ran(app, never) == ["later", "too late"]


def test_a_signal_with_a_token_counts_beside_children(app: App) -> None:
    tokens: list[str] = []

    @app.workflow
    async def child(n: int) -> str:
        await wait_for("never")
        return "never"

    @app.step
    def ask(ctx: Context) -> None:
        tokens.append(ctx.token)

    @app.workflow
    async def parent() -> str:
        await ask()
        return await first(child.spawn(1).wait(), wait_for("approved", str, require_token=True))

    handle = parent.start()
    app.run(until_idle=True)
    with pytest.raises(Exception, match="token"):
        handle.signal("approved", "nobody")
    handle.signal("approved", "ada", token=tokens[0])
    assert ran(app, handle) == "ada"


def test_two_thousand_children_are_spawned_in_waves(app: App) -> None:
    @app.workflow
    async def child(n: int) -> int:
        return n

    @app.workflow
    async def parent(n: int) -> int:
        return sum(await gather(*(child.spawn(k) for k in range(n))))

    assert ran(app, parent.start(2_000)) == sum(range(2_000))


def test_code_that_asks_for_something_else_is_found_at_that_await_and_a_fix_goes_on(app: App) -> None:
    def declare(app: App, version: str) -> Any:
        @app.step
        def reserve(n: int) -> int:
            return n + 1

        @app.step
        def charge(n: int) -> int:
            return n + 10

        @app.workflow
        async def fulfil(n: int) -> int:
            if version == "swapped":
                n = await charge(n)
            n = await reserve(n)
            await wait_for("go")
            if version == "more" and patched("more"):
                n = await charge(n)
            return n

        return fulfil

    handle = declare(app, "first").start(1)
    app.run(until_idle=True)
    handle.signal("go")
    with another(app) as changed:
        declare(changed, "swapped")
        changed.run(until_idle=True)
        with pytest.raises(WorkflowStuck) as stuck:
            handle.result(timeout=1)
        assert "at await 1 'reserve' is recorded, and the code now asks for 'charge'" in str(stuck.value)
        assert "'fulfil'" in str(stuck.value)
    with another(app) as mended:
        fulfil = declare(mended, "more")
        handle.retry()
        new = fulfil.start(1)
        new.signal("go")
        mended.run(until_idle=True)
    assert (handle.result(timeout=1), new.result(timeout=1)) == (12, 12)


def test_a_run_that_was_past_a_patch_does_not_take_it(app: App) -> None:
    def declare(app: App, *, is_patched: bool) -> Any:
        @app.step
        def step(n: int) -> int:
            return n + 1

        @app.workflow
        async def work(n: int) -> int:
            if is_patched and patched("twice"):
                n = await step(n)
            n = await step(n)
            await wait_for("go")
            return n

        return work

    old = declare(app, is_patched=False).start(0)
    app.run(until_idle=True)
    with another(app) as after:
        new = declare(after, is_patched=True).start(0)
        for handle in (old, new):
            handle.signal("go")
        after.run(until_idle=True)
    assert (old.result(timeout=1), new.result(timeout=1)) == (1, 2)


@pytest.mark.parametrize("waits_for", ["a signal", "a time", "a step", "a child"])
def test_a_run_that_waits_right_behind_a_patch_is_past_it(
    app: App, clock: Callable[[float], None], waits_for: str
) -> None:
    def declare(app: App, *, is_patched: bool) -> Any:
        @app.step(retry=ONCE)
        async def fragile(n: int) -> int:
            if not is_patched:
                raise ValueError("not yet")
            return n

        @app.step
        def add(n: int) -> int:
            return n + 10

        @app.workflow
        async def child() -> None:
            await wait_for("go")

        @app.workflow
        async def work(n: int) -> int:
            if is_patched and patched("first"):
                n = await add(n)
            match waits_for:
                case "a signal":
                    await wait_for("go")
                case "a time":
                    await sleep("1h")
                case "a step":
                    await fragile(n)
                case "a child":
                    await child.spawn()
            return await add(n) if is_patched and patched("second") else n

        return work

    old = declare(app, is_patched=False).start(0)
    app.run(until_idle=True)
    with another(app) as after:
        new = declare(after, is_patched=True).start(0)
        after.run(until_idle=True)
        if waits_for == "a step":
            old.retry()
        clock(7200)
        for handle in (
            (old, new) if waits_for == "a signal" else [after.get(one.id) for h in (old, new) for one in h.children()]
        ):
            handle.signal("go")
        after.run(until_idle=True)
    assert (old.result(timeout=1), new.result(timeout=1)) == (10, 20)


def test_what_is_not_the_same_again_is_recorded(app: App) -> None:
    made = []

    @app.workflow
    async def odds() -> list[Any]:
        before = [now().isoformat(), str(uuid4()), random(), side_effect(lambda: made.append(1) or len(made))]
        await sleep(0)
        made.append(before)
        await sleep(0)
        return before

    result = ran(app, odds.start())
    assert all(one == result for one in made[1:])
    assert result[3] == 1


def test_a_side_effect_is_of_the_type_that_its_function_returns(app: App) -> None:
    def line() -> Line:
        return Line("tea", 1)

    @app.step
    def nothing() -> None:
        pass

    @app.workflow
    async def work() -> str:
        made = side_effect(line)
        await nothing()
        return made.article

    assert ran(app, work.start()) == "tea"


def test_a_line_is_logged_once_by_a_truncated_id_however_often_the_function_is_entered(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    @app.step(retry=TWICE)
    async def charge(ctx: Context, n: int) -> int:
        ctx.logger.info("charging %s", n, extra={"cents": n})
        if ctx.attempt == 1:
            raise ValueError("not yet")
        return n

    @app.workflow
    async def work(n: int) -> int:
        current().logger.info("run %s begins", n)
        await charge(n)
        current().logger.warning("charged")
        await gather(charge(10), charge(20))
        current().logger.info("again")
        if n == 1:
            continue_as_new(2)
        return n

    caplog.set_level("INFO", logger="durable_cluster.workflow.work")
    handle = work.start(1)
    assert ran(app, handle) == 2
    short = handle.id[:12]
    said = [record.getMessage() for record in caplog.records if record.name == "durable_cluster.workflow.work"]
    lines = [text for text in said if text.startswith(f"{short}…: ")]
    assert [text.partition(": ")[2] for text in lines] == [
        *("run 1 begins", "charged", "again"),
        *("run 2 begins", "charged", "again"),
    ]
    assert said.count(f"{short}… charge: charging 1") == said.count(f"{short}… charge: charging 2") == 2
    steps = [record for record in caplog.records if getattr(record, "step", None) == "charge"]
    assert {(record.workflow, record.workflow_id, record.attempt, record.cents) for record in steps} >= {
        ("work", short, 1, 1),
        ("work", short, 2, 1),
    }
    assert handle.id not in caplog.text


def test_a_loop_carries_its_state_alone_and_can_be_left(app: App, conn: psycopg.Connection[Any]) -> None:
    @app.step
    def think(n: int) -> int:
        return n + 1

    @app.workflow
    async def agent(limit: int) -> list[int]:
        start = await think(0)
        seen = 0
        async for turn in loop(Line("turn", start)):
            more = await think(turn.state.quantity)
            turn.state = Line("turn", more)
            seen = turn.number
            if more >= limit:
                break
        return [seen, turn.state.quantity, await think(100)]

    assert ran(app, agent.start(40)) == [38, 40, 101]


def test_a_scope_is_carried_as_its_result(app: App) -> None:
    calls = []

    @app.step
    def act(n: int) -> int:
        calls.append(n)
        return n

    async def some(n: int) -> Line:
        return Line("sum", sum([await act(k) for k in range(n)]))

    @app.workflow
    async def work(n: int) -> list[Any]:
        one = await scope(some, n)
        both = await gather(scope(some, 2), scope(some, 3))
        return [one.quantity, [line.quantity for line in both], await act(7)]

    assert ran(app, work.start(4)) == [6, [1, 3], 7]
    assert sorted(calls) == sorted([0, 1, 2, 3, 0, 1, 0, 1, 2, 7])


def test_continue_as_new_begins_again_with_nothing_recorded(app: App) -> None:
    keys = set()

    @app.step
    def act(ctx: Context, n: int) -> int:
        keys.add(ctx.idempotency_key)
        return n + 1

    @app.workflow
    async def work(n: int) -> list[int]:
        m = await act(n)
        if m < 5:
            continue_as_new(m)
        return [m, current().run]

    assert ran(app, work.start(0)) == [5, 4]
    assert len(keys) == 5


def test_a_cancel_is_raised_where_the_function_waits_and_what_it_has_done_is_undone(app: App) -> None:
    done: list[str] = []

    @app.step
    def act(what: str) -> str:
        done.append(what)
        return what

    @app.workflow
    async def saga(how: str) -> str:
        async with compensation() as undo:
            await act("book flight")
            undo(act, "give back flight")
            await act("book hotel")
            undo(act, "give back hotel")
            if how == "fail":
                raise TerminalError("full")
            await wait_for("never")
        return "never"

    handle = saga.start("wait")
    app.run(until_idle=True)
    handle.cancel("changed my mind")
    app.run(until_idle=True)
    with pytest.raises(WorkflowCancelled, match="changed my mind"):
        handle.result(timeout=1)
    assert done == ["book flight", "book hotel", "give back hotel", "give back flight"]
    done.clear()
    failing = saga.start("fail")
    app.run(until_idle=True)
    with pytest.raises(WorkflowFailed, match="full"):
        failing.result(timeout=1)
    assert done == ["book flight", "book hotel", "give back hotel", "give back flight"]


def test_what_has_ended_of_several_is_undone_when_the_others_are_cancelled(
    app: App, eventually: Callable[..., None], conn: psycopg.Connection[Any]
) -> None:
    done: list[str] = []

    @app.step
    async def act(what: str) -> str:
        if what == "slow":
            await asyncio.Event().wait()
        done.append(what)
        return what

    @app.workflow
    async def saga() -> None:
        async def one(what: str) -> None:
            async with compensation() as undo:
                await act(what)
                undo(act, f"undo {what}")
                await act("slow")

        await gather(one("a"), one("b"))

    handle = saga.start()
    runner = threading.Thread(target=app.run, kwargs={"until_idle": True})
    runner.start()
    eventually(lambda: _reported(conn) >= 2)
    handle.cancel("stop")
    runner.join(30)
    with pytest.raises(WorkflowCancelled, match="stop"):
        handle.result(timeout=10)
    assert sorted(done) == ["a", "b", "undo a", "undo b"]


def _reported(conn: psycopg.Connection[Any]) -> int:
    """How many results the detached step has reported."""
    row = conn.execute("select progress from durable.detached").fetchone()
    conn.commit()
    return 0 if row is None or row[0] is None else len(msgspec.json.decode(row[0]))


def test_a_step_that_fails_after_others_were_undone_fails_the_workflow(app: App) -> None:
    done: list[str] = []

    @app.step(retry=ONCE)
    def act(what: str) -> None:
        done.append(what)
        if what == "break":
            raise Declined("no")

    @app.workflow
    async def saga() -> None:
        async with compensation() as undo:
            await act("one")
            undo(act, "undo one")
            await act("break")

    handle = saga.start()
    app.run(until_idle=True)
    with pytest.raises(WorkflowFailed, match="Declined: no"):
        handle.result(timeout=1)
    assert done == ["one", "break", "undo one"]


def test_a_workflow_that_is_cancelled_before_it_began_never_does(app: App) -> None:
    @app.workflow
    async def work() -> str:
        await sleep("1h")
        return "never"

    handle = work.start(after="1h")
    handle.cancel("not wanted")
    app.run(until_idle=True)
    with pytest.raises(WorkflowCancelled, match="not wanted"):
        handle.result(timeout=1)


def test_a_limited_step_is_counted_by_its_arguments(app: App) -> None:
    @app.step(limit=Limit("by-customer", concurrency=1, key=lambda name, n: name))
    def act(name: str, n: int) -> str:
        return f"{name}{n}"

    @app.workflow
    async def work(name: str) -> list[str]:
        return [await act(name, 1), *await gather(act(name, 2), act("b", 3))]

    handles = [work.start("a"), work.start("b")]
    app.run(until_idle=True)
    assert [handle.result(timeout=1) for handle in handles] == [["a1", "a2", "b3"], ["b1", "b2", "b3"]]


def test_lines_say_attributes_and_progress_once(app: App) -> None:
    @app.step
    def act() -> None:
        pass

    @app.workflow
    async def work() -> None:
        set_attributes({"stage": "one"})
        set_progress({"done": 1})
        await act()
        set_attributes({"stage": "two"})
        await wait_for("go")

    handle = work.start()
    app.run(until_idle=True)
    assert handle.attributes() == {"stage": "two"}
    assert handle.progress() == {"done": 1}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("foreign", "awaits something that no step, sleep, signal or child will bring"),
        ("thread", r"do no I/O and run no threads \(run_in_executor\)"),
        ("output", "returned what is not"),
        ("itself", "cancelled itself"),
        ("step output", "step 'wrong' returned what does not fit its type: Expected int, got str"),
        ("step args", "the arguments of step 'wrong' are not JSON"),
        ("arity", "missing a required argument: 'n'"),
        ("goto", "step 'machinelike' is of a linear workflow: it returns a value"),
    ],
)
def test_what_cannot_be_is_a_dead_letter_that_says_so(app: App, kind: str, said: str) -> None:
    @app.step(retry=ONCE)
    def wrong(n: Any) -> int:
        return "text"  # type: ignore[return-value]

    @app.step
    def machinelike(ctx: Context) -> Any:
        return ctx.done(1)

    @app.workflow
    async def work(kind: str) -> int:
        if kind == "goto":
            await machinelike()
        if kind == "foreign":
            await asyncio.get_running_loop().create_future()
        if kind == "thread":
            await asyncio.to_thread(len, "")
        if kind == "itself":
            raise asyncio.CancelledError
        if kind == "step output":
            await wrong(1)
        if kind == "step args":
            await wrong(object())
        if kind == "arity":
            await wrong()  # type: ignore[call-arg]
        return "text"  # type: ignore[return-value]

    handle = work.start(kind)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match=said):
        handle.result(timeout=1)


def test_what_cannot_be_declared_is_refused(dsn: str) -> None:
    app = App("linear", dsn=dsn)

    def two(a: int, b: int) -> None: ...
    def stars(*a: int) -> None: ...
    async def awaits() -> None: ...

    with pytest.raises(AppError, match="takes 2 inputs"):
        app.workflow(two)  # type: ignore[type-var]
    with pytest.raises(AppError, match=r"takes \*a"):
        app.step(stars)
    with pytest.raises(AppError, match="async and transactional"):
        app.step(transactional=True)(awaits)
    with pytest.raises(AppError, match=r"names that begin with 'workflow\.'"):
        app.step(name="workflow.start")(awaits)
    app.step(awaits)
    with pytest.raises(AppError, match="has a step 'awaits' already"):
        app.step(awaits)
    with pytest.raises(AppError, match=r"app\.named\('awaits'\) finds one"):
        app.workflow("awaits")  # type: ignore[call-overload]
    with pytest.raises(AppError, match="for the lines of a workflow"):
        sleep(1)


def test_an_input_that_does_not_fit_is_refused_at_the_start(app: App) -> None:
    @app.workflow
    async def work(order: Order) -> None: ...

    with pytest.raises(InputError, match=r"lines\[0\]\.quantity: expected int"):
        work.start({"number": 1, "lines": [{"article": "tea", "quantity": "two"}]})  # type: ignore[arg-type]
