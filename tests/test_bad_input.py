"""Bad input: a clear error that names the thing, nothing lost, and a step that returns garbage stops its own workflow alone."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    AppError,
    ConfigurationError,
    ConnectionFailed,
    Context,
    Continuation,
    Handle,
    InputError,
    Machine,
    NotInstalled,
    Retry,
    Settings,
    TerminalError,
    UnknownWorkflow,
    WorkflowFailed,
    WorkflowStuck,
    statements,
)
from durable_cluster.settings import checked_shards

LIMIT = Settings().payload_bytes_max


class Line(msgspec.Struct):
    sku: str
    quantity: int = 1


class Order(msgspec.Struct):
    lines: list[Line]
    note: str | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Sparse(msgspec.Struct, omit_defaults=True):
    n: int = 0


class Camel(msgspec.Struct, rename="camel"):
    order_id: int


def echoing(dsn: str, state: Any = Any, **settings: Any) -> Machine:
    """A machine of one step that gives back its state."""
    machine = App("echo", dsn=dsn, settings=Settings(**settings)).machine("echo", state=state)

    @machine.step(start=True)
    def echo(ctx: Context, state) -> Continuation:
        return ctx.done(state)

    return machine


def nothing_started(conn: psycopg.Connection) -> bool:
    rows = conn.execute("select (select count(*) from durable.started) + (select count(*) from durable.key)").fetchone()
    return rows == (0,) and not conn.execute("select from durable.shard s, durable.log(s.shard)").fetchall()


# Names.


@pytest.mark.parametrize(
    "name", ["", "Upper", "with space", "new\nline", "name\n", "x" * 58, "ümlaut", "nul\x00", "a/b", "'"]
)
def test_a_name_that_is_none_is_refused_and_shown(dsn: str, name: str) -> None:
    app = App("names", dsn=dsn)
    machine = app.machine("m")
    for make in (
        lambda: App(name, dsn=dsn),
        lambda: app.machine(name),
        lambda: machine.step(name=name or " ")(lambda state: None),
    ):
        with pytest.raises(AppError, match=r"name .* is not of \[a-z0-9_.-\]"):
            make()


def test_names_up_to_57_characters_of_the_allowed_kind_work(dsn: str) -> None:
    name = "a0_.-" + "x" * 52
    machine = App(name, dsn=dsn).machine(name)
    machine.step(start=True, name=name)(lambda state: None)
    assert machine.start(1).workflow == name


@pytest.mark.parametrize("name", ["Upper", "new\nline", "", 'a","x":"', "x" * 58, None])
def test_the_database_refuses_bad_names_too(conn: psycopg.Connection, name: str | None) -> None:
    for workflow, step in ((name, "ok"), ("ok", name)):
        with pytest.raises(InputError, match="name"):
            statements.start(conn, workflow, version=1, step=step, payload="1", key=None)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name"):
            statements.start_many(conn, workflow, version=1, step=step, payloads=["1"], keys=None)  # type: ignore[arg-type]
    assert nothing_started(conn)


def test_one_name_stands_once(dsn: str) -> None:
    app = App("twice", dsn=dsn)
    machine = app.machine("m")
    machine.step(start=True, name="s")(lambda state: None)
    with pytest.raises(AppError, match="'m' of version 1 already"):
        app.machine("m")
    with pytest.raises(AppError, match="step 's' already"):
        machine.step(name="s")(lambda state: None)
    with pytest.raises(AppError, match="starts at 's' already"):
        machine.step(start=True, name="t")(lambda state: None)


# Handlers' signatures.


def no_state() -> None: ...
def two_states(a: int, b: int) -> None: ...
def keyword_only(*, a: int) -> None: ...
def context_last(state: int, ctx: Context) -> None: ...
def unreadable(state: Line | Order) -> None: ...


@pytest.mark.parametrize("handler", [no_state, two_states, keyword_only, context_last, unreadable])
def test_a_handler_that_cannot_be_called_is_refused_by_name(dsn: str, handler: Callable[..., Any]) -> None:
    with pytest.raises(AppError, match=handler.__name__):
        App("signatures", dsn=dsn).machine("m").step(start=True)(handler)


def test_a_step_cannot_be_both_async_and_transactional(dsn: str) -> None:
    async def both(state: int) -> None: ...

    with pytest.raises(AppError, match="both"):
        App("signatures", dsn=dsn).machine("m").step(transactional=True)(both)


def test_a_machine_without_a_first_step_says_how_to_declare_one(dsn: str) -> None:
    with pytest.raises(AppError, match=r"start=True"):
        App("empty", dsn=dsn).machine("m").start(1)


# Inputs.


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"lines": [{"sku": "a"}, {"sku": 2}]}, r"lines\[1\].sku"),
        ({"lines": [{"sku": "a", "quantity": "three"}]}, r"lines\[0\].quantity"),
        ({"lines": [{}]}, "sku"),
        ({}, "lines"),
        ([], "Order"),
        (None, "Order"),
        ({"lines": [], "colour": "red"}, "colour"),
        ({"lines": [{"sku": "a", "size": 3}]}, r"lines\[0\].size"),
        (object(), "JSON"),
        ({"lines": {1, 2}, "note": object()}, "JSON"),
        ({"lines": [], "note": "\ud800"}, "(UTF-8|surrogate)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_with_the_path_of_what_does_not(
    dsn: str, conn: psycopg.Connection, value: object, says: str
) -> None:
    machine = echoing(dsn, Order)
    for start in (lambda: machine.start(value), lambda: machine.start_many([Order([]), value])):
        with pytest.raises(InputError, match=says) as caught:
            start()
        assert "workflow 'echo'" in str(caught.value)
    assert nothing_started(conn)


@pytest.mark.parametrize(
    ("state", "value"),
    [
        (Order, Order([Line("a")])),
        (Order, {"lines": [{"sku": "a"}], "note": None}),
        (Point, Point(1)),
        (Point, {"x": 1}),
        (dict[int, int], {1: 2}),
        (dict[str, list[Line]], {"a": [{"sku": "x"}]}),
        (Sparse, {"n": 0}),
        (list[Sparse], [Sparse(0), {"n": 0}]),
        (Camel, {"orderId": 1}),
        (tuple[int, str], (1, "a")),
        (Decimal, Decimal("1.10")),
        (int | None, None),
        (Any, {"anything": [1, {"at": ["all"]}]}),
    ],
    ids=str,
)
def test_an_input_that_fits_its_type_is_taken(dsn: str, state: Any, value: object) -> None:
    assert echoing(dsn, state).start(value).status() == "running"


def test_a_field_that_later_code_wrote_is_tolerated_in_a_stored_state(dsn: str, conn: psycopg.Connection) -> None:
    machine = echoing(dsn, Order)
    workflow_id, _ = statements.start(
        conn, "echo", version=1, step="echo", payload='{"lines":[],"note":null,"from_the_future":1}', key=None
    )
    machine.app.run(until_idle=True)
    assert machine.app.get(workflow_id).result(timeout=5) == {"lines": [], "note": None}


def test_a_stored_state_that_does_not_fit_is_a_dead_letter_alone_and_at_once_and_says_where(
    dsn: str, conn: psycopg.Connection
) -> None:
    machine = echoing(dsn, Order)
    workflow_id, _ = statements.start(conn, "echo", version=1, step="echo", payload='{"lines":[{"sku":7}]}', key=None)
    good = machine.start(Order([]))
    machine.app.run(until_idle=True)
    assert good.status() == "completed"
    with pytest.raises(WorkflowStuck, match=r"after 1 attempt: .*lines\[0\].sku"):
        machine.app.get(workflow_id).result(timeout=5)


# Limits.


def test_a_payload_at_the_limit_is_taken_and_one_byte_more_is_refused(dsn: str, conn: psycopg.Connection) -> None:
    machine = echoing(dsn, str)
    with pytest.raises(InputError, match=rf"{LIMIT + 1:,} bytes.*{LIMIT:,}"):
        machine.start("x" * (LIMIT - 1))
    assert nothing_started(conn)
    handle = machine.start("x" * (LIMIT - 2))
    machine.app.run(until_idle=True)
    assert len(handle.result(timeout=5)) == LIMIT - 2


def test_the_limit_counts_bytes_and_not_characters(dsn: str) -> None:
    machine = echoing(dsn, str)
    assert machine.start("ü" * ((LIMIT - 2) // 2)).status() == "running"
    with pytest.raises(InputError, match="bytes"):
        machine.start("ü" * (LIMIT // 2))


def test_the_database_holds_the_limit_too(conn: psycopg.Connection) -> None:
    with pytest.raises(InputError, match="bytes"):
        statements.start(conn, "w", version=1, step="s", payload=f'"{"x" * (LIMIT - 1)}"', key=None)
    assert nothing_started(conn)


@pytest.mark.parametrize("payload", ["", "{", "nope", '"a" "b"', "[1,]"])
def test_the_database_refuses_a_payload_that_is_not_json(conn: psycopg.Connection, payload: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        statements.start(conn, "w", version=1, step="s", payload=payload, key=None)
    assert nothing_started(conn)


def test_a_payload_of_several_lines_stays_one_line_of_the_log(dsn: str, conn: psycopg.Connection) -> None:
    machine = echoing(dsn)
    workflow_id, _ = statements.start(conn, "echo", version=1, step="echo", payload='{\n"a":\r\n1}', key=None)
    others = machine.start_many([1, 2])
    machine.app.run(until_idle=True)
    assert machine.app.get(workflow_id).result(timeout=5) == {"a": 1}
    assert [handle.result(timeout=5) for handle in others] == [1, 2]


@pytest.mark.parametrize("key", ["", "x" * 256, "new\nline", "tab\t", "nul\x00", "\ud800", 5, b"bytes"])
def test_a_key_that_is_none_is_refused_and_named(dsn: str, conn: psycopg.Connection, key: Any) -> None:
    machine = echoing(dsn)
    with pytest.raises(InputError, match="key"):
        machine.start(1, key=key)
    with pytest.raises(InputError, match="key"):
        machine.start_many([1, 2], keys=["good", key])
    assert nothing_started(conn)


def test_a_key_of_255_characters_is_taken(dsn: str) -> None:
    assert echoing(dsn).start(1, key="ü" * 255).status() == "running"


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "b", "c"], ["a\nb"], ["a\nb", "c", "d"]])
def test_keys_that_are_not_one_a_value_are_refused(dsn: str, conn: psycopg.Connection, keys: list[str]) -> None:
    with pytest.raises(InputError, match="key"):
        echoing(dsn).start_many([1, 2], keys=keys)
    assert nothing_started(conn)


def test_nul_and_unusual_characters_pass_through_states_and_outputs(dsn: str) -> None:
    text = "nul \x00, newline \n, quote ', \u2028, emoji 🦉, \\u0000, %s, \x0c, \x1f, \x7f"
    machine = App("chars", dsn=dsn).machine("chars", state=str)

    @machine.step(start=True)
    def first(ctx: Context, state: str) -> Continuation:
        return ctx.goto(second, state + state)

    @machine.step(transactional=True)
    def second(ctx: Context, state: str) -> Continuation:
        return ctx.done(state)

    handles = machine.start_many([text, "plain"])
    machine.app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles] == [text * 2, "plainplain"]


# Handlers that return or raise what they should not.


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def raising(error: BaseException) -> Callable[[Context], object]:
    def act(_: Context) -> object:
        raise error

    return act


def endless(ctx: Context) -> object:
    return endless(ctx)


GARBAGE: dict[str, Callable[[Context], Any]] = {
    "None": lambda ctx: None,
    "a string": lambda ctx: "done",
    "a state": lambda ctx: {"n": 1},
    "a class": lambda ctx: Continuation,
    "an output that is no JSON": lambda ctx: ctx.done(object()),
    "an output that holds itself": lambda ctx: ctx.done((loop := [], loop.append(loop))[0]),
    "an output with a lone surrogate": lambda ctx: ctx.done("\ud800"),
    "an output too large": lambda ctx: ctx.done("x" * LIMIT),
    "a state too large": lambda ctx: ctx.goto("step", "x" * LIMIT),
    "an unknown step": lambda ctx: ctx.goto("nowhere", 1),
    "no step at all": lambda ctx: ctx.goto(None, 1),
    "another function": lambda ctx: ctx.goto(print, 1),
    "a raw output of two lines": lambda ctx: ctx.done(msgspec.Raw(b"1\n2")),
    "a raw output that is no JSON": lambda ctx: ctx.done(msgspec.Raw(b"{")),
    "a raw state of two lines": lambda ctx: ctx.goto("step", msgspec.Raw(b"1\n2")),
    "a raw state that is no JSON": lambda ctx: ctx.goto("step", msgspec.Raw(b"{")),
    "a raw state with a form feed": lambda ctx: ctx.goto("step", msgspec.Raw(b"1\f2")),
    "a failure with a newline": lambda ctx: ctx.fail("one\ntwo\x00\ud800"),
    "an exception": raising(ValueError("no")),
    "an exception with odd characters": raising(ValueError("one\ntwo\x00\ud800" + "x" * 100_000)),
    "an exception that cannot be printed": raising(Unprintable()),
    "a group of exceptions": raising(ExceptionGroup("several", [ValueError(1), KeyError(2)])),
    "StopIteration": raising(StopIteration()),
    "a recursion without end": endless,
    "a cancellation": raising(asyncio.CancelledError()),
    "an exit": raising(SystemExit(3)),
    "a terminal error with odd characters": raising(TerminalError("one\ntwo\x00\ud800" + "x" * 100_000)),
    "a use of ctx.tx": lambda ctx: ctx.tx,
}
ENDS_ITS_WORKFLOW = ("a failure with a newline", "a terminal error with odd characters")


@pytest.mark.parametrize("kind", ["def", "async def", "blocking", "transactional"])
@pytest.mark.parametrize("what", GARBAGE)
def test_a_step_that_returns_or_raises_garbage_stops_its_workflow_alone(dsn: str, what: str, kind: str) -> None:
    if (what, kind) == ("a use of ctx.tx", "transactional"):
        pytest.skip("that is its right")
    app = App("garbage", dsn=dsn)
    machine = app.machine("garbage")

    def step(ctx: Context, state: object) -> Continuation:
        return GARBAGE[what](ctx) if state == "bad" else ctx.done(state)

    async def async_step(ctx: Context, state: object) -> Continuation:
        return step(ctx, state)

    options = {"transactional": kind == "transactional", "blocking": kind == "blocking", "retry": Retry(attempts=1)}
    machine.step(start=True, name="step", **options)(async_step if kind == "async def" else step)
    good, bad, also_good = machine.start_many(["good", "bad", "also good"])
    app.run(until_idle=True, timeout=20)
    status, error = ("failed", WorkflowFailed) if what in ENDS_ITS_WORKFLOW else ("stuck", WorkflowStuck)
    assert [good.status(), bad.status(), also_good.status()] == ["completed", status, "completed"]
    assert [good.result(timeout=5), also_good.result(timeout=5)] == ["good", "also good"], "each its own"
    with pytest.raises(error, match=r"in step 'step'"):
        bad.result(timeout=5)


def test_a_plain_function_that_returns_a_coroutine_is_a_dead_letter_with_a_hint(dsn: str) -> None:
    app = App("garbage", dsn=dsn)
    machine = app.machine("garbage")

    async def inner() -> None: ...

    @machine.step(start=True)
    def forgot_to_await(ctx: Context, state: object) -> Any:
        coroutine = inner()
        coroutine.close()
        return coroutine

    handle = machine.start(1)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match=r"after 1 attempt: .*returned coroutine"):
        handle.result(timeout=5)


def test_workflows_and_steps_that_no_code_knows_wait_for_code_that_does_and_then_are_dead_letters_by_name(
    dsn: str, conn: psycopg.Connection
) -> None:
    machine = echoing(dsn, unroutable_limit_s=1)
    ids = [
        statements.start(conn, "stranger", version=1, step="s", payload="1", key=None)[0],
        statements.start(conn, "echo", version=1, step="stranger", payload="1", key=None)[0],
    ]
    good = machine.start(1)
    echoing(dsn).app.run(until_idle=True, timeout=0.5)
    assert good.status() == "completed"
    assert [machine.app.get(workflow_id).status() for workflow_id in ids] == ["running", "running"]
    machine.app.run(until_idle=True)
    for workflow_id in ids:
        with pytest.raises(WorkflowStuck, match="stranger"):
            machine.app.get(workflow_id).result(timeout=5)
    with pytest.raises(UnknownWorkflow, match=r"stranger.*echo"):
        machine.app.named("stranger")


# Garbage in the log.

STRANGE_ENTRIES = [
    ("no envelope", "1"),
    ("", "1"),
    ("\n\n", "3"),
    ("{}", "1"),
    ("[1,2]\n{}\nnull", "3"),
    ("fewer lines than said", "5"),
    ("more\nlines\nthan\nsaid", "1"),
    ("no count", None),
    ("no number", "many"),
    ("none", "0"),
    ("less", "-3"),
    (None, "1"),
    ('{"w":"zz","n":1,"f":"echo","s":"echo","v":1,"d":1}', "1"),
    ('{"w":"00000000000000000000000000000000","n":-1,"f":"","s":"\\n","v":1,"d":1}', "1"),
    ('{"w":"00000000000000000000000000000000","n":1,"f":"","s":"\\n","v":1,"d":1}', "1"),
    ('{"w":"00000000000000000000000000000000","n":-1,"f":"echo","s":"echo","v":1,"d":"no"}', "1"),
    ('{"w":"00000000000000000000000000000000","n":1,"f":"echo","s":"echo","v":1,"d":"no","a":1e30}', "1"),
    ('{"w":"zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz","n":1,"f":"stranger","s":"s","v":1,"d":1}', "1"),
]


@pytest.mark.parametrize("lines_max", [1, 1000])
@pytest.mark.parametrize(("text", "count"), STRANGE_ENTRIES)
def test_a_strange_entry_in_the_log_does_not_stop_the_shard_and_repeats_nobody(
    dsn: str, conn: psycopg.Connection, text: str | None, count: str | None, lines_max: int
) -> None:
    settings = Settings(page_window_ms=0 if lines_max == 1 else 50, page_lines_max=lines_max)
    app = App("strange", dsn=dsn, settings=settings)
    machine = app.machine("echo", state=int)
    runs: list[int] = []

    @machine.step(start=True)
    def echo(ctx: Context, n: int) -> Continuation:
        runs.append(n)
        return ctx.done(n)

    handles: list[Handle] = []
    for n in range(3):
        handles += machine.start_many(list(range(10 * n, 10 * n + 8)))
        for shard in (0, 1):
            conn.execute(
                "select pgque.insert_event(durable.queue_of(%s), 'steps', %s, %s, null, null, null)",
                (shard, text, count),
            )
    app.run(until_idle=True, timeout=5)
    assert {handle.status() for handle in handles} == {"completed"}
    assert sorted(runs) == sorted(n for start in (0, 10, 20) for n in range(start, start + 8))


# The database and the settings.


@pytest.mark.parametrize("shards", [0, 65, -1, 1000])
def test_a_number_of_shards_out_of_range_is_refused(shards: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"{shards}.*1 to 64"):
        checked_shards(shards)


def test_a_dsn_that_refuses_is_an_error_that_names_the_server_and_not_its_password() -> None:
    app = App("refused", dsn="host=/nowhere port=1 user=me password=opensesame dbname=db")
    app.machine("m").step(start=True, name="s")(lambda state: None)
    with pytest.raises(ConnectionFailed, match="/nowhere:1/db") as caught:
        app.named("m").start(1)
    assert "opensesame" not in str(caught.value)


@pytest.mark.parametrize(
    "dsn", ["no dsn at all", "host=a b c", "postgresql://u:opensesame@h:port/db", "hots=localhost password=opensesame"]
)
def test_a_dsn_that_cannot_be_read_is_an_error_that_says_how_to_write_one(dsn: str) -> None:
    app = App("unreadable", dsn=dsn)
    app.machine("m").step(start=True, name="s")(lambda state: None)
    with pytest.raises((ConfigurationError, ConnectionFailed), match=r"postgresql://|connect") as caught:
        app.named("m").start(1)
    assert "opensesame" not in str(caught.value)


def test_a_database_without_the_schema_is_an_error_that_names_init(empty_dsn: str) -> None:
    machine = echoing(empty_dsn)
    for call in (
        lambda: machine.start(1),
        lambda: machine.get(key="k"),
        machine.app.run,
        lambda: machine.app.get("0" * 32),
    ):
        with pytest.raises(NotInstalled, match="durable-cluster init"):
            call()


def test_a_shard_that_does_not_exist_is_named_with_those_that_do(conn: psycopg.Connection) -> None:
    with pytest.raises(ConfigurationError, match=r"shard 7 .*0 to 1"):
        statements.claim(conn, 7, member="m", owner=1, lines_max=1, bytes_max=1)


@pytest.mark.parametrize(
    "setting",
    [
        {"page_lines_max": 0},
        {"page_bytes_max": 0},
        {"transactional_steps_max": 0},
        {"payload_bytes_max": -1},
        {"dead_interval_s": 0},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_refused_by_name(dsn: str, setting: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        App("settings", dsn=dsn, settings=Settings(**setting))


def test_an_app_can_be_run_from_inside_an_event_loop_as_in_a_notebook(dsn: str) -> None:
    app = App("notebook", dsn=dsn)
    machine = app.machine("m", state=int)

    @machine.step(start=True)
    async def awaited(ctx: Context, n: int) -> Continuation:
        await asyncio.sleep(0)
        return ctx.done(n)

    handle = machine.start(1)

    async def cell() -> int:
        return app.run(until_idle=True)

    assert asyncio.run(cell()) == 1
    assert handle.result(timeout=5) == 1


def test_an_app_can_be_run_from_a_thread(dsn: str) -> None:
    machine = echoing(dsn)
    handle = machine.start(1)
    thread = threading.Thread(target=machine.app.run, kwargs={"until_idle": True})
    thread.start()
    thread.join(20)
    assert handle.result(timeout=5) == 1
