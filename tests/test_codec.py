"""A codec stands between values and the database: what it made is all that is found there, and what it cannot read is not lost."""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from durable_cluster import (
    App,
    AppError,
    CodecError,
    Context,
    Continuation,
    InputError,
    Limit,
    Retry,
    Settings,
    TerminalError,
    Where,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowStuck,
    compensation,
    continue_as_new,
    gather,
    loop,
    set_progress,
    side_effect,
    sleep,
    telemetry,
    wait_for,
)

Connection = psycopg.Connection[Any]

PAGE = Path(__file__).parent.parent / "docs" / "guide" / "payloads.md"
ONCE = Retry(attempts=1)
TWICE = Retry(attempts=2, backoff=0.001)
KEY, OTHER_KEY = bytes(32), bytes(range(32))
CODED = '{"$codec":"'
NOISE_CHARS = 200_000


def codecs_of_the_page() -> dict[str, Any]:
    """The classes that the page shows, as they stand there."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        shown = [one for one in ast.parse(block).body if isinstance(one, ast.Import | ast.ImportFrom | ast.ClassDef)]
        exec(compile(ast.Module(shown, []), str(PAGE), "exec", dont_inherit=True), names)
    return names


SHOWN = codecs_of_the_page()
AesGcm, Zlib, Chain, ByReference = (SHOWN[name] for name in ("AesGcm", "Zlib", "Chain", "ByReference"))


class Counting:
    """Counts what it is asked for, and leaves bytes as they are."""

    def __init__(self) -> None:
        self.encoded: list[Where] = []
        self.decoded: list[Where] = []

    def encode(self, payload: bytes, where: Where) -> bytes:
        self.encoded.append(where)
        return payload

    def decode(self, coded: bytes, where: Where) -> bytes:
        self.decoded.append(where)
        return coded


class Fickle(Counting):
    """Fails while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = 0

    def encode(self, payload: bytes, where: Where) -> bytes:
        if where.kind != "failure" and self.fails:
            self.fails -= 1
            raise OSError(f"no room for {payload!r}")
        return super().encode(payload, where)


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    app = App("shop", dsn=dsn, codec=AesGcm({1: KEY}))
    yield app
    app.close()


@contextmanager
def another(dsn: str, codec: Any = None, **settings: Any) -> Iterator[App]:
    """An app of the same name, in another program."""
    app = App("shop", dsn=dsn, codec=codec, settings=Settings(**settings))
    yield app
    app.close()


def one(conn: Connection, query: str, *arguments: object) -> Any:
    row = conn.execute(query.encode(), arguments).fetchone()
    assert row is not None
    return row[0]


def sum_of(app: App, *, retry: Retry = ONCE) -> Any:
    """A linear workflow that adds up what it is given, and fails for what is not a number."""

    @app.step(retry=retry)
    def add(total: int, number: Any) -> int:
        return total + int(number)

    @app.workflow
    async def summed(numbers: list[Any]) -> int:
        total = 0
        for number in numbers:
            total = await add(total, number)
        return total

    return summed


# Nothing of it is found.


def dump(conn: Connection) -> str:
    """All rows of all tables, and all bytes of their files, but for those of the system."""
    own = (
        "select c.oid::regclass::text, c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where c.relkind in ('r', 't', 'i') and n.nspname not in ('pg_catalog', 'information_schema')"
    )
    conn.execute("checkpoint")
    texts = []
    for table, oid in conn.execute(own.encode()).fetchall():
        if one(conn, "select relkind = 'r' from pg_class where oid = %s", oid):
            texts += [row for (row,) in conn.execute(f"select t::text from {table} t".encode())]
        held = one(
            conn,
            "select pg_read_binary_file(f.path, 0, (pg_stat_file(f.path, true)).size, true)"
            " from pg_relation_filepath(%s) as f (path)",
            oid,
        )
        texts.append(bytes(held or b"").decode("latin-1"))
    return "\n".join(texts)


class Fragile(Exception):
    """What steps raise, with a value in it."""


def declare(app: App, secret: str, *, released: threading.Event) -> None:
    """Workflows that bring ``secret`` wherever a value can go."""
    machine = app.machine("machine", state=dict)

    @machine.step(start=True, retry=TWICE)
    def begin(ctx: Context, state: dict[str, Any]) -> Continuation:
        ctx.set_progress({"at": secret})
        match state["how"]:
            case "raise":
                raise Fragile(f"no card {secret}")
            case "terminal":
                raise TerminalError(f"no account {secret}")
            case "fail":
                return ctx.fail(f"no luck {secret}")
            case "misfit":
                return ctx.goto(number, secret)
            case "large":
                return ctx.done([secret, "x" * 300_000])
            case "sleep":
                return ctx.sleep("7d", then=finish, state=state)
            case "wait":
                return ctx.wait_for("never", then=finish, state=state, timeout="3d", on_timeout=late)
            case "children":
                children = [child.child({"how": how, "secret": secret}) for how in ("fine", "raise", "fail")]
                return ctx.gather(children, then=joined, state=state, tolerance=0)
            case "limited":
                return ctx.goto(limited, state)
            case "detach":
                return ctx.goto(slow, state)
        return ctx.goto(transactional, state)

    @machine.step(transactional=True, retry=ONCE)
    def transactional(ctx: Context, state: dict[str, Any]) -> Continuation:
        if state["how"] == "sql":
            ctx.tx.execute("select %s::text::int", (secret,))
        return ctx.goto(finish, state)

    @machine.step()
    def finish(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done(state | {"signal": ctx.signal and ctx.signal.payload})

    @machine.step()
    def late(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done(state)

    @machine.step(retry=ONCE)
    def number(ctx: Context, state: int) -> Continuation:
        return ctx.done(state)

    @machine.step()
    def joined(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done([result.output for result in ctx.results])

    @machine.step(limit=Limit("none", concurrency=0))
    def limited(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done(state)

    @machine.step(retry=Retry(attempts=2, backoff="4m", jitter=0))
    async def slow(ctx: Context, state: dict[str, Any]) -> Continuation:
        ctx.heartbeat([secret])
        ctx.set_progress([secret, 2])
        await asyncio.to_thread(released.wait, 20)
        raise Fragile(secret)

    @machine.step(on_cancel=True)
    def clean_up(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done(state)

    child = app.machine("child", state=dict)

    @child.step(start=True)
    def act(ctx: Context, state: dict[str, Any]) -> Continuation:
        match state["how"]:
            case "raise":
                raise TerminalError(state["secret"])
            case "fail":
                return ctx.fail(state["secret"])
        return ctx.done(state)

    @app.step(retry=TWICE)
    def quick(word: str) -> str:
        if word.endswith("!"):
            raise Fragile(word)
        return f"{word} {secret}"

    @app.step
    async def awaited(word: str) -> list[str]:
        return [word, secret]

    @app.workflow
    async def part(word: str) -> str:
        return await quick(word)

    @app.workflow
    async def linear(how: str) -> Any:
        await quick(how)
        side_effect(lambda: secret)
        set_progress(secret)
        await gather(awaited("a"), awaited("b"))
        if how == "wait":
            return await wait_for("go")
        if how == "caught":
            try:
                await quick(f"{secret}!")
            except Fragile as error:
                return str(error)
        if how == "stuck":
            await quick(f"{secret}!")
        if how == "lines":
            raise ValueError(secret)
        if how == "again":
            continue_as_new(f"once more {secret}")
        if how == "loop":
            async for turn in loop([secret]):
                turn.state = await awaited(secret)
                if turn.number:
                    break
        return await part.spawn(secret)

    app.schedule("hourly", "0 * * * *", machine, {"how": "fine", "secret": secret}, due_as="due")


HOWS = {
    "raise": "cancelled", "terminal": "failed", "fail": "failed", "misfit": "stuck", "large": "stuck", "sleep": "cancelled",
    "wait": "running", "children": "completed", "limited": "running", "detach": "running", "sql": "stuck", "fine": "completed",
}  # fmt: skip
LINES = {
    "wait": "completed", "caught": "completed", "stuck": "stuck", "lines": "stuck", "again": "completed", "loop": "completed",
    "fine": "completed",
}  # fmt: skip


@pytest.mark.parametrize("is_coded", [True, False], ids=["with a codec", "without one it is found"])
def test_what_a_codec_has_made_is_all_that_tables_files_and_logs_hold(
    dsn: str, conn: Connection, caplog: pytest.LogCaptureFixture, is_coded: bool, eventually: Callable[..., None]
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("durable_cluster").setLevel(logging.DEBUG)
    conn.execute("update durable.cluster set audit = true")
    secret, released = f"hidden-{uuid.uuid4()}", threading.Event()
    app = App("shop", dsn=dsn, codec=AesGcm({1: KEY}) if is_coded else None)
    declare(app, secret, released=released)
    machine, linear = app.named("machine"), app.named("linear")
    handles = machine.start_many([{"how": how, "secret": secret} for how in HOWS], attributes={"city": "Ulm"})
    lines = linear.start_many(list(LINES))
    machine.start({"how": "fine", "secret": secret}, after="1d")
    runner = threading.Thread(target=app.run, kwargs={"until_idle": True, "timeout": 30})
    runner.start()
    eventually(lambda: one(conn, "select count(*) from durable.detached where progress is not null"), seconds=20)
    by_name, linear_by_name = dict(zip(HOWS, handles, strict=True)), dict(zip(LINES, lines, strict=True))
    by_name["wait"].signal("early", {"secret": secret})
    linear_by_name["wait"].signal("go", {"secret": secret})
    released.set()
    runner.join(40)
    app.schedules.trigger("hourly")
    by_name["sleep"].cancel("enough")
    by_name["raise"].cancel("enough")
    app.run(until_idle=True, timeout=10)
    linear_by_name["stuck"].retry()
    app.run(until_idle=True, timeout=10)
    held = dump(conn)
    said = "\n".join(logging.Formatter().format(record) + repr(record.args) for record in caplog.records)
    statuses = [handle.status() for handle in handles], [handle.status() for handle in lines]
    app.close()
    assert statuses == (list(HOWS.values()), list(LINES.values()))
    for table in ("mailbox", "wait", "progress", "schedule", "queued", "dead_letter", "timer", "finished", "started"):
        assert one(conn, f"select count(*) from durable.{table}"), f"{table} holds something to be found"
    assert (secret in held) is not is_coded
    assert (CODED in held) is is_coded
    if is_coded:
        assert secret not in said


@pytest.mark.parametrize("sample", [0.0, 1.0])
@pytest.mark.parametrize("is_coded", [True, False], ids=["with a codec", "without one it is found"])
def test_traces_say_no_more_of_a_failure_than_its_class(
    dsn: str, monkeypatch: pytest.MonkeyPatch, is_coded: bool, sample: float
) -> None:
    exporter = InMemorySpanExporter()
    tracing = telemetry.Tracing(SimpleSpanProcessor(exporter), role="test", sample=sample)
    monkeypatch.setattr(telemetry, "configure", lambda _: tracing)
    app = App("shop", dsn=dsn, codec=AesGcm({1: KEY}) if is_coded else None)
    declare(app, "hidden", released=threading.Event())
    app.named("machine").start_many(
        [{"how": how, "secret": "hidden"} for how in ("raise", "terminal", "misfit", "sql")]
    )
    app.named("linear").start_many(["caught", "stuck", "lines"])
    app.run(until_idle=True, timeout=10)
    app.close()
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "Fragile" in told
    assert ("hidden" in told) is not is_coded


# It is read again, wherever it went.


@pytest.mark.parametrize(
    "codec", [AesGcm({1: KEY}), Chain(Zlib(), AesGcm({1: KEY})), Zlib()], ids=["aes", "chain", "zlib"]
)
def test_values_come_back_as_they_went_through_machines_of_every_kind_of_step(dsn: str, codec: Any) -> None:
    with another(dsn, codec) as app:
        machine = app.machine("flow")

        @machine.step(start=True)
        def begin(ctx: Context, state: Any) -> Continuation:
            return ctx.goto(awaited, state)

        @machine.step()
        async def awaited(ctx: Context, state: Any) -> Continuation:
            return ctx.goto(blocking, state)

        @machine.step(blocking=True)
        def blocking(ctx: Context, state: Any) -> Continuation:
            return ctx.goto(transactional, state)

        @machine.step(transactional=True)
        def transactional(ctx: Context, state: Any) -> Continuation:
            return ctx.sleep(0.001, then=waiting, state=state)

        @machine.step(limit=Limit("one", concurrency=1, key=lambda state: str(state)[:3]))
        def waiting(ctx: Context, state: Any) -> Continuation:
            return ctx.wait_for("go", then=spawning, state=state)

        @machine.step()
        def spawning(ctx: Context, state: Any) -> Continuation:
            assert ctx.signal is not None
            return ctx.gather([echo.child(state), echo.child(ctx.signal.payload)], then=end, state=state)

        @machine.step()
        def end(ctx: Context, state: Any) -> Continuation:
            return ctx.done([state, *ctx.results.values()])

        echo = app.machine("echo")

        @echo.step(start=True)
        def said(ctx: Context, state: Any) -> Continuation:
            return ctx.done(state)

        values = [{"text": "\u0000 ü \n", "n": [1.5, None]}, "plain", 7]
        handles = machine.start_many(values)
        for handle in handles:
            handle.signal("go", {"of": handle.workflow})
        app.run(until_idle=True, timeout=10)
        for handle, value in zip(handles, values, strict=True):
            assert handle.result(timeout=5) == [value, value, {"of": "flow"}]
            assert msgspec.json.decode(handle.state().output or "") == [value, value, {"of": "flow"}]
            assert [child.output for child in handle.children()] == [value, {"of": "flow"}]


@pytest.mark.parametrize("functions_max", [10_000, 0], ids=["resumed", "entered anew"])
def test_linear_workflows_go_on_where_they_were(dsn: str, functions_max: int) -> None:
    with another(dsn, AesGcm({1: KEY}), functions_max=functions_max) as app:

        @app.step
        async def double(number: int) -> int:
            return 2 * number

        @app.workflow
        async def child(number: int) -> int:
            return await double(number)

        @app.workflow
        def plain(number: int) -> Any:
            return double(number)

        @app.workflow
        async def whole(number: int) -> list[Any]:
            if number < 0:
                continue_as_new(-number)
            chance = side_effect(lambda: os.urandom(4).hex())
            both = await gather(double(number), double(2))
            word = await wait_for("word", str)
            await sleep(0.001)
            children = await gather(child.spawn(1), plain.spawn(2))
            async for turn in loop(0):
                turn.state = await double(turn.state) + 1
                if turn.number == 2:
                    break
            return [both, word, children, turn.state, len(chance)]

        handle = whole.start(-3)
        app.run(until_idle=True, timeout=10)
        handle.signal("word", "yes")
        app.run(until_idle=True, timeout=10)
        assert handle.result(timeout=5) == [[6, 4], "yes", [2, 4], 7, 8]


def test_a_function_that_is_kept_is_found_by_its_state_and_not_entered_anew(app: App) -> None:
    entered: list[int] = []

    @app.step
    async def double(number: int) -> int:
        return 2 * number

    @app.workflow
    async def work(number: int) -> int:
        entered.append(number)
        return await double(await double(await double(number)))

    handle = work.start(1)
    app.run(until_idle=True, timeout=10)
    assert handle.result(timeout=5) == 8
    assert entered == [1]


def test_the_codec_is_asked_once_for_each_value_of_a_step_and_not_for_each_that_is_recorded(dsn: str) -> None:
    codec = Counting()
    with another(dsn, codec) as app:

        @app.step
        async def add(number: int) -> int:
            return number + 1

        @app.workflow
        async def work(number: int) -> int:
            for _ in range(10):
                number = await add(number)
            return number

        handle = work.start(0)
        app.run(until_idle=True, timeout=10)
        kinds = [where.kind for where in codec.encoded]
        assert kinds == ["input", *["state"] * 10, "result"]
        assert [where.kind for where in codec.decoded] == ["input", *["state"] * 10]
        assert {where.workflow_id for where in codec.encoded[1:]} == {handle.id}
        assert handle.result(timeout=5) == 10


def test_a_wait_whose_two_ends_are_the_same_is_coded_once_and_kept_once(conn: Connection, dsn: str) -> None:
    codec = Counting()
    with another(dsn, codec) as app:
        machine = app.machine("waiting")

        @machine.step(start=True)
        def begin(ctx: Context, state: str) -> Continuation:
            return ctx.wait_for("go", then=end, state=state, timeout="1d")

        @machine.step()
        def end(ctx: Context, state: str) -> Continuation:
            return ctx.done(state)

        machine.start("x")
        app.run(until_idle=True, timeout=10)
        assert [where.kind for where in codec.encoded] == ["input", "state"]
        assert one(conn, "select signal_line is null from durable.wait")


def test_progress_is_read_by_onlookers_and_by_the_next_attempt(app: App) -> None:
    seen: list[Any] = []
    machine = app.machine("slow")

    @machine.step(start=True, retry=TWICE)
    def begin(ctx: Context, state: Any) -> Continuation:
        seen.append(ctx.progress)
        if ctx.attempt == 1:
            ctx.heartbeat({"done": 3})
            raise Fragile
        ctx.set_progress({"all": 4})
        return ctx.done()

    handle = machine.start(None)
    app.run(until_idle=True, timeout=10)
    assert seen == [None, {"done": 3}]
    assert handle.progress() == {"all": 4}


@pytest.mark.parametrize("codec", [AesGcm({1: KEY}), None], ids=["with a codec", "without"])
def test_of_several_steps_at_once_the_next_attempt_finds_what_the_last_one_said(dsn: str, codec: Any) -> None:
    seen: list[Any] = []
    with another(dsn, codec) as app:

        @app.step(retry=TWICE)
        async def slow(ctx: Context, number: int) -> int:
            seen.append(ctx.progress)
            if ctx.attempt == 1:
                ctx.heartbeat({"done": number})
                raise Fragile
            return number

        @app.workflow
        async def both() -> list[int]:
            return await gather(slow(1), slow(2))

        handle = both.start()
        app.run(until_idle=True, timeout=10)
        assert handle.result(timeout=5) == [1, 2]
    assert sorted(map(str, seen)) == ["None", "None", "{'done': 1}", "{'done': 2}"]


def test_a_schedule_brings_its_input_and_the_due_time(app: App, conn: Connection) -> None:
    machine = app.machine("report", state=dict)

    @machine.step(start=True)
    def write(ctx: Context, state: dict[str, Any]) -> Continuation:
        return ctx.done(state)

    app.schedule("hourly", "0 * * * *", machine, {"city": "Ulm"}, due_as="due")
    app.run(until_idle=True, timeout=10)
    app.schedules.create("daily", "@daily", machine, {"city": "Bonn"})
    app.schedules.change("daily", value={"city": "Jena"})
    assert one(conn, "select count(*) from durable.schedule where input like %s", f"{CODED}%") == 2
    handles = [app.schedules.trigger(name).handle for name in ("hourly", "daily")]
    app.run(until_idle=True, timeout=10)
    hourly, daily = (handle.result(timeout=5) for handle in handles if handle is not None)
    assert (hourly["city"], sorted(hourly), daily) == ("Ulm", ["city", "due"], {"city": "Jena"})


# What is plain, and what cannot be read.


def waiting_in(app: App) -> Any:
    """A machine that waits for a signal, and ends with its input and the signal's payload."""
    machine = app.machine("flow")

    @machine.step(start=True, retry=ONCE)
    def begin(ctx: Context, state: Any) -> Continuation:
        return ctx.wait_for("go", then=end, state=state)

    @machine.step(retry=ONCE)
    def end(ctx: Context, state: Any) -> Continuation:
        return ctx.done([state, ctx.signal and ctx.signal.payload])

    return machine


def test_what_was_written_plain_is_read_as_it_is(app: App, conn: Connection, dsn: str) -> None:
    with another(dsn) as before:
        early = waiting_in(before).start("early")
        before.run(until_idle=True, timeout=10)
        assert CODED not in one(conn, "select line from durable.wait")
    waiting_in(app)
    late = one(conn, "select durable.hex(id) from durable.start('flow', 1, 'begin', '\"late\"')")
    app.run(until_idle=True, timeout=10)
    for workflow_id in (early.id, late):
        conn.execute("select durable.signal(%s, 'go', '{\"from\": \"SQL\"}')", (workflow_id,))
    app.run(until_idle=True, timeout=10)
    assert app.get(early.id).result(timeout=5) == ["early", {"from": "SQL"}]
    assert app.get(late).result(timeout=5) == ["late", {"from": "SQL"}]
    assert one(conn, "select bool_and(output like %s) from durable.finished", f"{CODED}%")


def test_a_step_that_nobody_can_read_costs_no_attempt_and_waits_for_who_can(
    app: App, conn: Connection, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    handle = waiting_in(app).start("hidden")
    with another(dsn) as blind:
        waiting_in(blind)
        blind.run(timeout=0.5)
        assert (handle.status(), blind.get(handle.id).status()) == ("running", "running")
    assert (
        "step 'begin': the input of workflow 'flow' is coded, and this program's App has no codec: give it the one that wrote it;"
        f" {handle.id[:12]}… waits for a process that can run it" in caplog.text
    )
    app.run(until_idle=True, timeout=10)
    handle.signal("go", "hidden too")
    with another(dsn, AesGcm({1: OTHER_KEY})) as wrong:
        waiting_in(wrong)
        wrong.run(timeout=0.5)
    assert (
        "the state of workflow 'flow' cannot be read by codec AesGcm: it was changed, or belongs elsewhere"
        in caplog.text
    )
    assert handle.status() == "running"
    app.run(until_idle=True, timeout=10)
    assert handle.result(timeout=5) == ["hidden", "hidden too"]
    assert one(conn, "select count(*) from durable.dead_letter") == 0


def test_after_a_while_it_is_a_dead_letter_which_a_retry_takes_up_again(app: App, dsn: str) -> None:
    handle = waiting_in(app).start("hidden")
    with another(dsn, unroutable_limit_s=0.5) as blind:
        waiting_in(blind)
        blind.run(until_idle=True, timeout=10)
        with pytest.raises(WorkflowStuck, match="step 'begin': the input of workflow 'flow' is coded"):
            blind.get(handle.id).result(timeout=5)
    handle.retry()
    handle.signal("go", 1)
    app.run(until_idle=True, timeout=10)
    assert handle.result(timeout=5) == ["hidden", 1]


def test_a_signal_that_nobody_can_read_waits_too(app: App, dsn: str) -> None:
    with another(dsn) as before:
        handle = waiting_in(before).start("plain")
        before.run(until_idle=True, timeout=10)
        app.get(handle.id).signal("go", "hidden")
        before.run(timeout=0.5)
        assert handle.status() == "running"
    waiting_in(app)
    app.run(until_idle=True, timeout=10)
    assert app.get(handle.id).result(timeout=5) == ["plain", "hidden"]


def test_who_asks_without_the_codec_is_told_what_is_coded(app: App, dsn: str) -> None:
    machine, parent = app.machine("flow"), app.machine("parent")

    @machine.step(start=True)
    def begin(ctx: Context, state: Any) -> Continuation:
        ctx.set_progress(state)
        return ctx.done(state)

    @parent.step(start=True)
    def spawn(ctx: Context, state: Any) -> Continuation:
        return ctx.spawn([machine.child(state)], then=end, state=state)

    @parent.step()
    def end(ctx: Context, state: Any) -> Continuation:
        return ctx.fail(f"no luck: {state}")

    handle, failing = machine.start("hidden"), parent.start("hidden")
    app.run(until_idle=True, timeout=10)
    with another(dsn) as blind:
        known, failed = blind.get(handle.id), blind.get(failing.id)
        assert known.status() == "completed"
        for ask, what in (
            (known.result, "the result of workflow 'flow'"),
            (known.state, "the result of workflow 'flow'"),
            (known.progress, "the progress of workflow 'flow'"),
            (lambda: list(failed.children()), "the result of workflow 'flow'"),
        ):
            with pytest.raises(CodecError) as told:
                ask()
            assert (
                str(told.value)
                == f"{what} is coded, and this program's App has no codec: give it the one that wrote it"
            )
        with pytest.raises(WorkflowFailed, match=re.escape("failed (what it says is coded)")):
            failed.result()
    with pytest.raises(WorkflowFailed, match="no luck: hidden"):
        failing.result()


@pytest.mark.parametrize("what", ["result", "state"])
def test_a_value_in_another_workflow_s_place_is_not_read(app: App, conn: Connection, what: str) -> None:
    machine = app.machine("flow", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, state: int) -> Continuation:
        return ctx.goto(end, state)

    @machine.step(retry=ONCE)
    def end(ctx: Context, state: int) -> Continuation:
        if what == "state" and not healed:
            raise Fragile
        return ctx.done(state)

    healed: list[bool] = []
    mine, yours = machine.start_many([1, 2])
    app.run(until_idle=True, timeout=10)
    if what == "result":
        output = one(conn, "select output from durable.finished where id = %s", yours.id)
        conn.execute("update durable.finished set output = %s where id = %s", (output, mine.id))
        with pytest.raises(CodecError, match="it was changed, or belongs elsewhere"):
            mine.result()
        return
    healed.append(True)
    state = one(conn, "select durable.dead_letter_state(%s)", yours.id)
    conn.execute("select durable.retry_dead_letter(%s, %s)", (mine.id, state))
    app.run(timeout=0.5)
    assert mine.status() == "running"
    yours.retry()
    app.run(timeout=1)
    assert yours.result(timeout=5) == 2


def test_where_binds_type_kind_and_id_and_shows_no_id() -> None:
    whole = uuid.uuid4().hex
    wheres = [Where("a", "state", whole), Where("b", "state", whole), Where("a", "result", whole), Where("a", "state")]
    assert len({where.bound for where in wheres}) == 4
    assert whole not in "".join(f"{where} {where!r}" for where in wheres)


@pytest.mark.parametrize(
    "value",
    [
        f'{CODED}%%%"}}',
        '{"$codec":1}',
        '{"$codec":null,"a":1}',
        f'{CODED}"}}',
        f'{CODED}AAAA"}}',
        '{"$codec":"AAAA","b":{}}',
    ],
)
def test_a_value_that_only_looks_coded_waits_as_one_that_cannot_be_read(app: App, conn: Connection, value: str) -> None:
    waiting_in(app)
    workflow_id = one(conn, "select durable.hex(id) from durable.start('flow', 1, 'begin', %s)", value)
    app.run(timeout=0.3)
    assert app.get(workflow_id).status() == "running"
    assert one(conn, "select count(*) from durable.wait where names is not null") == 0


# Keys, and large values.


def test_old_keys_are_read_and_the_newest_writes(dsn: str, conn: Connection) -> None:
    with another(dsn, AesGcm({1: KEY})) as old:
        handle = waiting_in(old).start("hidden")
        old.run(until_idle=True, timeout=10)
    with another(dsn, AesGcm({1: KEY, 2: OTHER_KEY})) as rotated:
        waiting_in(rotated)
        rotated.get(handle.id).signal("go", 1)
        rotated.run(until_idle=True, timeout=10)
        assert rotated.get(handle.id).result(timeout=5) == ["hidden", 1]
    with another(dsn, AesGcm({2: OTHER_KEY})) as new:
        assert new.get(handle.id).result(timeout=5) == ["hidden", 1]
    with another(dsn, AesGcm({1: KEY})) as old, pytest.raises(CodecError, match="key 2 is not among its keys"):
        old.get(handle.id).result(timeout=5)


def test_an_object_that_is_missing_is_waited_for(dsn: str, tmp_path: Path) -> None:
    with another(dsn, ByReference(tmp_path, over=100)) as app:
        handle = waiting_in(app).start("x" * 200)
        (file,) = tmp_path.iterdir()
        held = file.read_bytes()
        file.unlink()
        app.run(timeout=0.3)
        assert handle.status() == "running"
        file.write_bytes(held)
        handle.signal("go", "y")
        app.run(until_idle=True, timeout=10)
        assert handle.result(timeout=5) == ["x" * 200, "y"]


def test_what_counts_is_the_size_when_coded(dsn: str) -> None:
    noise = os.urandom(NOISE_CHARS // 2).hex()
    with another(dsn, AesGcm({1: KEY})) as app:
        machine = app.machine("flow")

        @machine.step(start=True)
        def begin(ctx: Context, state: str) -> Continuation:
            return ctx.done(noise)

        with pytest.raises(
            InputError, match=r"input of workflow 'flow' has 26\d,\d{3} bytes when coded, the limit is 262,144"
        ):
            machine.start(noise)
        with pytest.raises(InputError, match="bytes when coded"):
            machine.child(noise)
        handle = machine.start("small")
        app.run(until_idle=True, timeout=10)
        with pytest.raises(WorkflowStuck, match=r"handed on 26\d,\d{3} bytes when coded, the limit is 262,144"):
            handle.result(timeout=5)
    with another(dsn, Zlib()) as small:

        @small.step
        def repeat(word: str) -> str:
            return 3 * word

        @small.workflow
        async def work(word: str) -> str:
            return await repeat(word)

        large = work.start("x" * 1_000_000)
        small.run(until_idle=True, timeout=10)
        assert large.result(timeout=5) == "x" * 3_000_000


# What fails.


def test_of_a_failure_the_class_stays_readable_and_its_texts_are_told_to_who_can_read_them(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    summed = sum_of(app)
    handle = summed.start([1, "hidden"])
    app.run(until_idle=True, timeout=10)
    details = msgspec.json.decode(one(conn, "select details from durable.dead_letter"))
    assert sorted(details) == ["attempt", "reason", "seq", "step", "texts"]
    assert (details["reason"], details["step"], details["attempt"]) == ("ValueError (what it says is coded)", "add", 1)
    assert one(conn, "select message from durable.dead_letters()") == "ValueError (what it says is coded)"
    with pytest.raises(WorkflowStuck, match=r"ValueError: invalid literal .* 'hidden'") as stuck:
        handle.result(timeout=5)
    assert "hidden" in stuck.value.reason
    assert "hidden" not in caplog.text
    conn.execute("select durable.purge_dead_letter(%s)", (handle.id,))
    with pytest.raises(WorkflowFailed, match=r"ValueError: invalid literal .* 'hidden'"):
        handle.result(timeout=5)
    assert "Traceback" in msgspec.json.decode(handle.state().output or "")["traceback"]


class Card:
    """A model that reads itself, and says what it was given if it does not like it."""

    is_closed = False

    def __init__(self, number: str) -> None:
        self.number = number

    @classmethod
    def model_validate_json(cls, given: bytes) -> Card:
        if cls.is_closed:
            raise ValueError(f"{given!r} is closed")
        return cls(msgspec.json.decode(given))

    def model_dump(self, **_: Any) -> str:
        return self.number


def test_a_log_says_no_more_of_a_failure_than_its_class(
    dsn: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another(dsn, AesGcm({1: KEY}), functions_max=0) as app:

        @app.step(retry=ONCE)
        async def act() -> str:
            monkeypatch.setattr(Card, "is_closed", True)
            raise Fragile

        @app.workflow
        async def work(card: Card) -> str:
            return await act()

        handle = work.start(Card("hidden"))
        app.run(until_idle=True, timeout=10)
        assert handle.status() == "stuck"
    assert "failed, and its workflow could not be told: HandlerError" in caplog.text
    assert "hidden" not in caplog.text


def test_a_parent_reads_why_its_child_failed(app: App) -> None:
    machine, child = app.machine("parent"), app.machine("child")

    @child.step(start=True)
    def act(ctx: Context, state: str) -> Continuation:
        return ctx.fail(f"no {state}")

    @machine.step(start=True)
    def begin(ctx: Context, state: str) -> Continuation:
        return ctx.gather([child.child(state)], then=end, state=state)

    @machine.step()
    def end(ctx: Context, state: str) -> Continuation:
        return ctx.done([result.reason for result in ctx.results])

    handle = machine.start("luck")
    app.run(until_idle=True, timeout=10)
    assert handle.result(timeout=5) == ["no luck"]


def test_a_codec_that_fails_is_a_failed_attempt_whose_words_quote_nothing(
    dsn: str, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    codec = Fickle()
    with another(dsn, codec) as app:
        machine = app.machine("flow")

        @machine.step(start=True, retry=TWICE)
        def begin(ctx: Context, state: str) -> Continuation:
            return ctx.done(state)

        with pytest.raises(CodecError) as told:
            codec.fails = 1
            machine.start("hidden")
        assert str(told.value) == "the input of workflow 'flow' cannot be coded by codec Fickle: OSError"
        once, twice = machine.start_many(["hidden", "hidden"])
        codec.fails = 1
        app.run(until_idle=True, timeout=10)
        assert [one.status() for one in (once, twice)] == ["completed", "completed"]
        stuck = machine.start("hidden")
        codec.fails = 2
        app.run(until_idle=True, timeout=10)
        with pytest.raises(
            WorkflowStuck, match="the result of workflow 'flow' cannot be coded by codec Fickle: OSError"
        ):
            stuck.result(timeout=5)
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("made", ["text", 5, None])
def test_a_codec_that_returns_no_bytes_is_told_so(dsn: str, made: Any) -> None:
    class Wrong(Counting):
        def encode(self, payload: bytes, where: Where) -> Any:
            return made

    told = f"codec Wrong: it returned {type(made).__name__}, and not bytes"
    with another(dsn, Wrong()) as app, pytest.raises(CodecError, match=told):
        waiting_in(app).start("hidden")


def test_an_edited_state_is_coded_as_the_one_it_replaces(app: App, conn: Connection) -> None:
    machine = app.machine("flow", state=int)

    @machine.step(start=True, retry=ONCE)
    def begin(ctx: Context, state: int) -> Continuation:
        return ctx.goto(end, state // (state - 1))

    @machine.step(retry=ONCE)
    def end(ctx: Context, state: int) -> Continuation:
        return ctx.done(10 // (state - 2))

    handle = machine.start(1)
    app.run(until_idle=True, timeout=10)
    handle.retry(2)
    app.run(until_idle=True, timeout=10)
    with pytest.raises(WorkflowStuck, match="ZeroDivisionError"):
        handle.result(timeout=5)
    handle.retry(3)
    assert not one(conn, "select count(*) from durable.dead_letter")
    app.run(until_idle=True, timeout=10)
    assert handle.result(timeout=5) == 10


def test_a_linear_workflow_goes_on_with_an_edited_state(app: App, conn: Connection) -> None:
    handle = sum_of(app).start([1, 2, "three"])
    app.run(until_idle=True, timeout=10)
    where = Where("summed", "state", handle.id)
    coded = one(conn, "select durable.dead_letter_state(%s)", handle.id)
    assert coded.startswith(CODED)
    state = msgspec.json.decode(app.payloads.plain(coded.encode(), where))
    state["i"][2] = state["a"][1][1] = 3
    with pytest.raises(InputError, match="does not fit"):
        handle.retry({**state, "i": "no list"})
    handle.retry(state)
    app.run(until_idle=True, timeout=10)
    assert handle.result(timeout=5) == 6


# A cancel puts a cleanup's state in the place of a step's.


@pytest.mark.parametrize("is_plain", [False, True], ids=["coded", "plain"])
def test_the_cleanup_of_a_workflow_that_has_not_begun_finds_its_input(
    app: App, conn: Connection, is_plain: bool
) -> None:
    machine = app.machine("flow")

    @machine.step(start=True)
    def begin(ctx: Context, state: Any) -> Continuation:
        return ctx.done("never")

    @machine.step(on_cancel=True)
    def clean_up(ctx: Context, state: Any) -> Continuation:
        seen.append(state)
        return ctx.goto(more, state)

    @machine.step()
    def more(ctx: Context, state: Any) -> Continuation:
        seen.append(state)
        return ctx.done(state)

    @app.step
    def act(what: str) -> None:
        seen.append(what)

    @app.workflow
    async def saga(what: str) -> None:
        async with compensation() as undo:
            undo(act, what)
            await wait_for("never")

    seen: list[Any] = []
    if is_plain:
        query = "select durable.hex(id) from durable.start(%s, 1, %s, '\"hidden\"', i_after => '1h')"
        started = [app.get(one(conn, query, *of)) for of in (("flow", "begin"), ("saga", "workflow.start"))]
    else:
        started = [kind.start("hidden", after="1h") for kind in (machine, saga)]
    for handle in started:
        handle.cancel("enough")
    app.run(until_idle=True, timeout=10)
    for handle in started:
        with pytest.raises(WorkflowCancelled, match="enough"):
            handle.result(timeout=5)
    assert seen == ["hidden"] * 3


def test_what_has_ended_of_several_is_undone_when_the_others_are_cancelled(
    app: App, conn: Connection, eventually: Callable[..., None]
) -> None:
    done: list[str] = []
    released = threading.Event()

    @app.step
    async def act(what: str) -> None:
        if what == "slow":
            await asyncio.to_thread(released.wait, 20)
        done.append(what)

    @app.workflow
    async def saga() -> None:
        async def each(what: str) -> None:
            async with compensation() as undo:
                await act(what)
                undo(act, f"undo {what}")
                await act("slow")

        await gather(each("a"), each("b"))

    handle = saga.start()
    runner = threading.Thread(target=app.run, kwargs={"until_idle": True, "timeout": 30})
    runner.start()

    def reported() -> int:
        row = conn.execute("select progress from durable.detached").fetchone()
        coded = msgspec.Raw(((row and row[0]) or "[]").encode())
        return len(app.payloads.value(coded, Where("saga", "heartbeat", handle.id)))

    eventually(lambda: reported() >= 2)
    handle.cancel("enough")
    runner.join(30)
    released.set()
    with pytest.raises(WorkflowCancelled, match="enough"):
        handle.result(timeout=5)
    assert sorted(done) == ["a", "b", "undo a", "undo b"]


@pytest.mark.parametrize("codec", [object(), "aes", type("Half", (), {"encode": lambda *_: b""})()])
def test_what_is_no_codec_is_refused(codec: Any) -> None:
    with pytest.raises(AppError, match=r"has no (en|de)code\(bytes, where\) that returns bytes"):
        App("shop", codec=codec)
