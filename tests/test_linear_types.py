"""What goes into linear workflows and comes out of them: Structs, dataclasses, TypedDicts and pydantic models, at every place."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple, NotRequired, TypedDict

import msgspec
import pytest

from durable_cluster import App, InputError, Retry, Settings, WorkflowStuck, loop, sleep, wait_for

try:
    import pydantic
except ImportError:
    pydantic = None  # type: ignore[assignment]

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
HOW = {"resumed": Settings(run_ahead_ms=0), "entered anew": Settings(functions_max=0, run_ahead_ms=0)}


class Grade(enum.Enum):
    A = "a"
    B = "b"


class Kind(NamedTuple):
    """A way to write the same types."""

    line: Any
    order: Any
    receipt: Any


class StructLine(msgspec.Struct):
    article: str
    quantity: int
    price: Decimal = Decimal(1)


class StructOrder(msgspec.Struct):
    number: int
    lines: list[StructLine]
    at: datetime
    grade: Grade = Grade.A


class StructReceipt(msgspec.Struct):
    total: Decimal
    lines: list[StructLine]


@dataclasses.dataclass
class DataLine:
    article: str
    quantity: int
    price: Decimal = Decimal(1)


@dataclasses.dataclass
class DataOrder:
    number: int
    lines: list[DataLine]
    at: datetime
    grade: Grade = Grade.A


@dataclasses.dataclass
class DataReceipt:
    total: Decimal
    lines: list[DataLine]


class DictLine(TypedDict):
    article: str
    quantity: int
    price: NotRequired[Decimal]


class DictOrder(TypedDict):
    number: int
    lines: list[DictLine]
    at: datetime
    grade: NotRequired[Grade]


class DictReceipt(TypedDict):
    total: Decimal
    lines: list[DictLine]


KINDS = {
    "Struct": Kind(StructLine, StructOrder, StructReceipt),
    "dataclass": Kind(DataLine, DataOrder, DataReceipt),
    "TypedDict": Kind(DictLine, DictOrder, DictReceipt),
}

if pydantic is not None:

    class ModelLine(pydantic.BaseModel):
        article: str
        quantity: int
        price: Decimal = Decimal(1)

    class ModelOrder(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(strict=True)

        number: int
        lines: list[ModelLine]
        at: datetime
        grade: Grade = Grade.A

    class ModelReceipt(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid", populate_by_name=True)

        total: Decimal = pydantic.Field(alias="Total")
        lines: list[ModelLine]

    KINDS["pydantic"] = Kind(ModelLine, ModelOrder, ModelReceipt)

HAS_NO_PYDANTIC = "PYDANTIC MODELS WERE NOT TESTED: pip install 'durable-cluster[pydantic]'"


@pytest.fixture(params=HOW)
def app(request: pytest.FixtureRequest, dsn: str) -> Iterator[App]:
    """Its functions are kept between two steps, or never."""
    app = App("types", dsn=dsn, settings=HOW[request.param])
    yield app
    app.close()


@pytest.fixture(params=["Struct", "dataclass", "TypedDict", "pydantic"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each way; pydantic's only where it is installed."""
    if request.param not in KINDS:
        pytest.skip(HAS_NO_PYDANTIC)
    return KINDS[request.param]


@pytest.fixture
def models() -> Kind:
    """Pydantic's, where it is installed."""
    if "pydantic" not in KINDS:
        pytest.skip(HAS_NO_PYDANTIC)
    return KINDS["pydantic"]


def typed(function: Callable[..., Any], **types: Any) -> Callable[..., Any]:
    """The function, its parameters annotated with these; ``gives``: what it returns."""
    function.__annotations__ = {"return": types.pop("gives"), **types}
    return function


def demand(value: Any, type_: Any) -> Any:
    """``value``, which has to be of the type; a TypedDict is a dict at run time."""
    assert isinstance(value, type_ if dataclasses.is_dataclass(type_) or not issubclass(type_, dict) else dict), value
    return value


def of(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, dict) else getattr(value, name)


def an_order(kind: Kind, *quantities: int) -> Any:
    lines = [kind.line(article="tea", quantity=quantity) for quantity in quantities]
    return kind.order(number=1, lines=lines, at=AT, grade=Grade.B)


def declared(app: App, kind: Kind) -> Any:
    """A workflow that takes an order, gives its lines to steps, a child and a loop, and all of it to a step of its own."""

    def multiplied(line: Any, *, times: int = 1) -> Any:
        demand(line, kind.line)
        return kind.line(article="more", quantity=times * of(line, "quantity"))

    async def receipted(order: Any, lines: Any) -> Any:
        demand(order, kind.order)
        assert (of(order, "at"), of(order, "grade")) == (AT, Grade.B)
        return kind.receipt(total=Decimal(sum(of(demand(line, kind.line), "quantity") for line in lines)), lines=lines)

    multiply: Any = app.step(typed(multiplied, line=kind.line, times=int, gives=kind.line))
    receipt: Any = app.step(typed(receipted, order=kind.order, lines=list[kind.line], gives=kind.receipt))  # type: ignore[name-defined]

    async def child(line: Any) -> Any:
        return await multiply(demand(line, kind.line), times=3)

    trebled: Any = app.workflow(typed(child, line=kind.line, gives=kind.line))

    async def fulfil(order: Any) -> Any:
        demand(order, kind.order)
        lines = [demand(await multiply(line, times=2), kind.line) for line in of(order, "lines")]
        lines.append(demand(await trebled.spawn(lines[0]), kind.line))
        async for turn in loop(lines[0]):
            await sleep(0.001)
            turn.state = demand(await multiply(turn.state), kind.line)
            if turn.number == 1:
                break
        lines.append(demand(await wait_for("more", kind.line), kind.line))
        return demand(await receipt(order, lines), kind.receipt)

    return app.workflow(typed(fulfil, order=kind.order, gives=kind.receipt))


def test_types_are_what_they_are_at_every_place_where_values_go_through(app: App, kind: Kind) -> None:
    fulfil = declared(app, kind)
    handle = fulfil.start(an_order(kind, 1, 2), key="whole")
    app.run(until_idle=True)
    handle.signal("more", kind.line(article="tea", quantity=100))
    app.run(until_idle=True)
    receipt = demand(handle.result(timeout=1), kind.receipt)
    assert of(receipt, "total") == 2 + 4 + 6 + 100
    assert [of(demand(line, kind.line), "quantity") for line in of(receipt, "lines")] == [2, 4, 6, 100]
    assert fulfil.get(key="whole").result() == receipt


def test_what_is_written_as_json_fits_too(app: App, kind: Kind) -> None:
    fulfil = declared(app, kind)
    line = {"article": "tea", "quantity": 5}
    handle = fulfil.start({"number": 1, "lines": [line], "at": AT, "grade": "b"})
    app.run(until_idle=True)
    handle.signal("more", line)
    app.run(until_idle=True)
    assert of(handle.result(timeout=1), "total") == 10 + 30 + 5


MANY = {"article": "cups", "quantity": "many"}
TOLD = r"lines\[2\]\.quantity: expected .*int.*\(\"many\"\)"


def a_wrong_order() -> dict[str, Any]:
    line = {"article": "tea", "quantity": 1}
    return {"number": 1, "lines": [line, line, MANY], "at": AT, "grade": "b"}


def test_an_input_or_a_signal_that_does_not_fit_is_told_with_its_path(app: App, kind: Kind) -> None:
    fulfil = declared(app, kind)
    with pytest.raises(InputError, match=rf"the input of workflow 'fulfil' does not fit \w+Order: {TOLD}$"):
        fulfil.start(a_wrong_order())
    with pytest.raises(
        InputError, match=r"lines\[0\](: object missing required field `?quantity|\.quantity: field required)"
    ):
        fulfil.start({**a_wrong_order(), "lines": [{"article": "tea"}]})
    handle = fulfil.start(an_order(kind, 1))
    app.run(until_idle=True)
    handle.signal("more", MANY)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match=r"the payload of signal 'more' does not fit: quantity: expected .*int"):
        handle.result(timeout=1)


WRONG = {
    "argument": rf"the arguments do not fit step 'look': order\.{TOLD}",
    "result": rf"step 'look' returned what does not fit its type: \[0\]\.{TOLD}",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_or_a_result_that_does_not_fit_is_told_with_its_path(app: App, kind: Kind, wrong: str) -> None:
    def looked(order: Any) -> Any:
        return [a_wrong_order()]

    async def ask() -> None:
        await look(a_wrong_order() if wrong == "argument" else an_order(kind, 1))

    orders = list[kind.order]  # type: ignore[name-defined]
    look: Any = app.step(name="look", retry=Retry(attempts=1))(typed(looked, order=kind.order, gives=orders))
    handle = app.workflow(ask).start()
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match=WRONG[wrong]):
        handle.result(timeout=1)


def test_a_field_that_the_type_does_not_know_is_refused_and_a_model_decides_for_itself(app: App, kind: Kind) -> None:
    fulfil = declared(app, kind)
    order = {"number": 1, "lines": [], "at": AT, "grade": "b", "tip": 1}
    if kind is KINDS.get("pydantic"):
        assert fulfil.start(order).status() == "running", "that ignores it"
        with pytest.raises(InputError, match=r"does not fit ModelReceipt: tip: extra inputs are not permitted \(1\)"):
            app.workflow(typed(pay, receipt=kind.receipt, gives=kind.receipt)).start(
                {"Total": 1, "lines": [], "tip": 1}
            )  # type: ignore[call-overload]
        return
    with pytest.raises(InputError, match="has a field 'tip' that"):
        fulfil.start(order)


async def pay(receipt: Any) -> Any:
    return receipt
