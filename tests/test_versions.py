"""Code that changes while workflows live: versions beside each other, and types of yesterday read as those of today."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import msgspec
import pytest

from durable_cluster import (
    App,
    AppError,
    Context,
    Retry,
    Settings,
    WorkflowCancelled,
    WorkflowStuck,
    loop,
    scope,
    sleep,
    wait_for,
)

ONCE = Retry(attempts=1)
HOW = {"resumed": Settings(run_ahead_ms=0), "entered anew": Settings(functions_max=0)}


@pytest.fixture(params=HOW)
def program(request: pytest.FixtureRequest, dsn: str) -> Iterator[Callable[[], App]]:
    """``program()``: the program after one more deployment, with nothing declared yet."""
    apps: list[App] = []

    def deployed() -> App:
        apps.append(App("versions", dsn=dsn, settings=HOW[request.param]))
        return apps[-1]

    yield deployed
    for app in apps:
        app.close()


# Versions.


def waiting(app: App, version: int) -> Any:
    @app.workflow(name="flow", version=version)
    async def flow(n: int) -> str:
        word = await wait_for("go", str)
        return f"version {version}: {n} {word}"

    return flow


def test_workflows_go_on_with_the_code_of_their_version_beside_the_newest(program: Callable[[], App]) -> None:
    old = program()
    early = waiting(old, 1).start(7)
    old.run(until_idle=True)
    new = program()
    second, first = waiting(new, 2), waiting(new, 1)
    assert new.named("flow") is second, "the newest, in whichever order they are declared"
    late, chosen = second.start(8), first.start(9)
    for handle in (early, late, chosen):
        handle.signal("go", "now")
    new.run(until_idle=True)
    assert early.result(timeout=1) == "version 1: 7 now"
    assert late.result(timeout=1) == "version 2: 8 now"
    assert chosen.result(timeout=1) == "version 1: 9 now"


def test_workflows_of_a_version_that_is_gone_go_on_with_the_next_one(program: Callable[[], App]) -> None:
    old = program()
    early = waiting(old, 1).start(7)
    old.run(until_idle=True)
    new = program()
    waiting(new, 2)
    waiting(new, 3)
    early.signal("go", "now")
    new.run(until_idle=True)
    assert early.result(timeout=1) == "version 2: 7 now"


def test_code_that_is_too_old_leaves_a_workflow_to_newer_code_and_says_so(
    program: Callable[[], App], caplog: pytest.LogCaptureFixture
) -> None:
    new = program()
    handle = waiting(new, 2).start(7)
    handle.signal("go", "now")
    old = program()
    waiting(old, 1)
    with caplog.at_level(logging.WARNING):
        old.run(until_idle=True, timeout=0.5)
    assert "workflow 'flow' has come to version 2; this code is of version 1" in caplog.text
    assert handle.status() == "running"
    new.run(until_idle=True)
    assert handle.result(timeout=1) == "version 2: 7 now"


def test_a_cancelled_workflow_is_cleaned_up_by_the_code_of_its_version(program: Callable[[], App]) -> None:
    def machine(app: App, version: int) -> Any:
        machine = app.machine("m", version=version, state=int)
        seen: list[int] = []

        @machine.step(start=True)
        def begin(ctx: Context, n: int) -> Any:
            return ctx.sleep("1h", begin, n)

        @machine.step(on_cancel=True)
        def clean(ctx: Context, n: int) -> Any:
            seen.append(version)
            return ctx.done()

        return machine, seen

    app = program()
    (first, by_first), (_, by_second) = machine(app, 1), machine(app, 2)
    handle = first.start(1)
    app.run(until_idle=True)
    handle.cancel("enough")
    app.run(until_idle=True)
    with pytest.raises(WorkflowCancelled):
        handle.result(timeout=1)
    assert (by_first, by_second) == ([1], [])


@pytest.mark.parametrize("version", [-1, 2**31, "2", True, 1.0, None])
def test_a_version_that_is_none_is_refused(program: Callable[[], App], version: Any) -> None:
    with pytest.raises(AppError, match="workflow 'flow': version="):
        waiting(program(), version)


def test_two_of_one_name_and_version_are_refused(program: Callable[[], App]) -> None:
    app = program()
    waiting(app, 1)
    waiting(app, 2)
    with pytest.raises(AppError, match="has a workflow 'flow' of version 1 already"):
        waiting(app, 1)


# Types.


class LineV1(msgspec.Struct):
    article: str


class Line(msgspec.Struct):
    article: str
    quantity: int


class OrderV1(msgspec.Struct):
    lines: list[LineV1]


class OrderV2(msgspec.Struct):
    positions: list[Line]


class Order(msgspec.Struct):
    positions: list[Line]
    customer: str


@dataclasses.dataclass
class Box:
    best: Line | None
    by_name: dict[str, Line]


class Note(TypedDict):
    line: Line


def one_line(old: LineV1) -> Line:
    return Line(old.article, 1)


def positions(old: OrderV1) -> OrderV2:
    return OrderV2([one_line(line) for line in old.lines])


def with_customer(old: OrderV2) -> Order:
    return Order(old.positions, "nobody")


@pytest.mark.parametrize(
    ("type_", "encoded", "value"),
    [
        (Line, b'{"article":"tea"}', Line("tea", 1)),
        (Line, b'{"article":"tea","quantity":3}', Line("tea", 3)),
        (list[Line], b'[{"article":"tea"},{"article":"cup","quantity":2}]', [Line("tea", 1), Line("cup", 2)]),
        (tuple[int, Line], b'[5,{"article":"tea"}]', (5, Line("tea", 1))),
        (tuple[Line, ...], b'[{"article":"tea"}]', (Line("tea", 1),)),
        (Line | None, b'{"article":"tea"}', Line("tea", 1)),
        (int | list[Line | None], b'[null,{"article":"tea"}]', [None, Line("tea", 1)]),
        (dict[str, Line], b'{"a":{"article":"tea"}}', {"a": Line("tea", 1)}),
        (
            Box,
            b'{"best":{"article":"a"},"by_name":{"b":{"article":"b"}}}',
            Box(Line("a", 1), {"b": Line("b", 1)}),
        ),
        (Note, b'{"line":{"article":"tea"}}', {"line": Line("tea", 1)}),
        (Order, b'{"positions":[],"customer":"ada"}', Order([], "ada")),
        (Order, b'{"positions":[{"article":"tea"}],"customer":"ada"}', Order([Line("tea", 1)], "ada")),
        (Order, b'{"positions":[{"article":"tea"}]}', Order([Line("tea", 1)], "nobody")),
        (Order, b'{"lines":[{"article":"tea"}]}', Order([Line("tea", 1)], "nobody")),
    ],
)
def test_what_older_code_wrote_is_upcast_wherever_it_stands(
    program: Callable[[], App], type_: Any, encoded: bytes, value: Any
) -> None:
    app = program()
    app.upcast(LineV1, Line)(one_line)
    app.upcast(OrderV1, OrderV2)(positions)
    app.upcast(OrderV2, Order)(with_customer)
    assert app.upcasts.decoded(msgspec.json.Decoder(type_), encoded) == value


def test_what_fits_no_type_is_told_as_ever(program: Callable[[], App]) -> None:
    app = program()
    app.upcast(LineV1, Line)(one_line)
    with pytest.raises(msgspec.ValidationError, match="Expected `object`, got `int`"):
        app.upcasts.decoded(msgspec.json.Decoder(list[Line]), b'[{"article":"tea"},7]')


def test_upcasts_that_cannot_be_are_refused(program: Callable[[], App]) -> None:
    app = program()
    with pytest.raises(AppError, match="from LineV1 to int: the new type has to be a class"):
        app.upcast(LineV1, int)(lambda old: 1)
    with pytest.raises(AppError, match="closes a circle"):
        app.upcast(Line, Line)(lambda old: old)
    app.upcast(LineV1, Line)(one_line)
    with pytest.raises(AppError, match="from Line to LineV1 closes a circle"):
        app.upcast(Line, LineV1)(lambda new: LineV1(new.article))


def flow_of_v1(app: App) -> Any:
    @app.step
    def pick(order: OrderV1, line: LineV1) -> LineV1:
        return line

    async def picked(order: OrderV1) -> LineV1:
        return await pick(order, order.lines[0])

    @app.workflow
    async def flow(order: OrderV1) -> LineV1:
        line = await pick(order, order.lines[0])
        line = await scope(picked, order)
        told = line
        async for _ in loop(line):
            await sleep("1h")
            told = await wait_for("told", LineV1)
            break
        return told

    return flow


def flow_of_today(app: App) -> Any:
    @app.step
    def pick(order: Order, line: Line) -> Line:
        raise AssertionError("it has run in code of version 1")

    async def picked(order: Order) -> Line:
        return await pick(order, order.positions[0])

    @app.workflow
    async def flow(order: Order) -> Line:
        assert order == Order([Line("tea", 1)], "nobody")
        line = await pick(order, order.positions[0])
        assert line == Line("tea", 1)
        assert await scope(picked, order) == line
        told = line
        async for turn in loop(line):
            assert turn.state == line
            await sleep("1h")
            told = await wait_for("told", Line)
            break
        return told

    return flow


def test_a_linear_workflow_meets_its_old_values_as_new_ones(
    program: Callable[[], App], clock: Callable[[float], None]
) -> None:
    old, new = program(), program()
    handle = flow_of_v1(old).start(OrderV1([LineV1("tea")]), key="one")
    old.run(until_idle=True)
    clock(7_200)
    handle.signal("told", LineV1("cup"))
    new.upcast(LineV1, Line)(one_line)
    new.upcast(OrderV1, OrderV2)(positions)
    new.upcast(OrderV2, Order)(with_customer)
    flow = flow_of_today(new)
    new.run(until_idle=True)
    assert flow.get(key="one").result(timeout=1) == Line("cup", 1)
    assert handle.result(timeout=1) == LineV1("cup"), "an older client reads what it knows of it"


def test_a_machine_meets_its_old_state_as_a_new_one_and_an_upcast_that_fails_is_told(
    program: Callable[[], App],
) -> None:
    def declare(app: App, type_: Any) -> Any:
        machine = app.machine("m", state=type_)

        @machine.step(start=True)
        def begin(ctx: Context, line) -> Any:  # type: ignore[no-untyped-def]
            return ctx.wait_for("go", then=end, state=line)

        @machine.step(retry=ONCE)
        def end(ctx: Context, line) -> Any:  # type: ignore[no-untyped-def]
            assert isinstance(line, type_)
            return ctx.done(line)

        return machine

    old = program()
    handle = declare(old, LineV1).start(LineV1("tea"))
    old.run(until_idle=True)
    handle.signal("go")
    broken = program()
    broken.upcast(LineV1, Line)(lambda old: Line(old.article, 1 // 0))
    declare(broken, Line)
    broken.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="the upcast from LineV1 to Line failed: ZeroDivisionError"):
        handle.result(timeout=1)
    mended = program()
    mended.upcast(LineV1, Line)(one_line)
    declare(mended, Line)
    handle.retry()
    mended.run(until_idle=True)
    assert handle.result(timeout=1) == {"article": "tea", "quantity": 1}
