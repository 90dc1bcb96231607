"""What a cluster's processes write to standard error: which format, which fields, and whose."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import structlog
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from durable_cluster import App, ConfigurationError, Context, Retry, gather, log_output
from durable_cluster.consumer import Consumer
from durable_cluster.envelope import Envelope
from durable_cluster.executor import Task, context_of
from durable_cluster.log_output import Output
from durable_cluster.ops import cli
from durable_cluster.running import RUNNING, begin
from durable_cluster.telemetry import Tracing

WHOLE = "0123456789ab" + "c" * 20
SHORT = WHOLE[:12]

Read = Callable[[], list[dict[str, Any]]]


def envelope(workflow: str = "order", step: str = "charge", attempt: int = 1) -> Envelope:
    return Envelope(WHOLE, 1, workflow, step, 1, msgspec.Raw(b"1"), attempt=attempt)


class Written(NamedTuple):
    output: Output
    text: io.StringIO

    @property
    def records(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.text.getvalue().splitlines()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Written]]:
    """The root logger with our handler, and nothing running."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers
    running = RUNNING.set(None)

    def make(form: str) -> Written:
        text, root.handlers = io.StringIO(), []  # pytest has put some there
        monkeypatch.setattr(sys, "stderr", text)
        output = log_output.configure("INFO", form)
        assert output is not None
        return Written(output, text)

    yield make
    RUNNING.reset(running)
    root.handlers = handlers
    root.setLevel(level)


def test_plain_lines_are_as_ever(written: Callable[[str], Written]) -> None:
    to = written("plain")
    logging.getLogger("shop").warning("hello %s", "there")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ MainProcess WARNING hello there\n", to.text.getvalue())


def test_json_has_a_field_for_everything(written: Callable[[str], Written]) -> None:
    to = written("json")
    begin(envelope(attempt=3))
    logging.getLogger("shop").info("hello %s", "there", extra={"customer": "ada", "total": 3})
    (record,) = to.records
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", record.pop("timestamp"))
    assert record == {
        "event": "hello there",
        "level": "info",
        "logger": "shop",
        "process": "MainProcess",
        "customer": "ada",
        "total": 3,
        "workflow": "order",
        "workflow_id": SHORT,
        "step": "charge",
        "attempt": 3,
    }


@pytest.mark.parametrize("form", ["plain", "json", "pretty"])
def test_the_whole_id_of_its_workflow_does_not_leave(written: Callable[[str], Written], form: str) -> None:
    to = written(form)
    begin(envelope())
    try:
        raise ValueError(f"nothing of {WHOLE}")
    except ValueError:
        logging.getLogger("shop").exception("order %s failed", WHOLE, extra={"whole": WHOLE})
    said = to.text.getvalue()
    assert WHOLE not in said
    assert "Traceback" in said
    assert SHORT in said


def test_what_runs_nowhere_has_no_fields_of_a_step(written: Callable[[str], Written]) -> None:
    to = written("json")
    logging.getLogger("shop").info("at large")
    assert to.records[0].keys() == {"event", "level", "logger", "process", "timestamp"}


def test_a_workflows_own_logger_says_in_fields_what_a_line_says_ahead(written: Callable[[str], Written]) -> None:
    app = App("shop", dsn="nowhere")
    machine = app.machine("order", state=int)

    @machine.step(start=True)
    def charge(ctx: Context, n: int) -> Any:
        return ctx.done()

    context = context_of(Task(machine, machine.steps["charge"], envelope()))
    to = written("json")
    context.logger.info("paid")
    (record,) = to.records
    assert (record["event"], record["workflow_id"], record["step"], record["attempt"]) == ("paid", SHORT, "charge", 1)
    to = written("plain")
    context.logger.info("paid")
    assert to.text.getvalue().endswith(f" INFO {SHORT}… charge: paid\n")


def test_steps_in_the_pages_own_thread_are_followed_and_no_other_threads(written: Callable[[str], Written]) -> None:
    app = App("shop", dsn="nowhere")
    machine = app.machine("order", state=int)

    @machine.step(start=True)
    def charge(ctx: Context, n: int) -> Any:
        return ctx.done()

    to = written("json")
    to.output.follow(lambda: Task(machine, machine.steps["charge"], envelope(attempt=2)))
    logging.getLogger("shop").info("inside")
    logging.getLogger("durable_cluster.page").warning("of the cluster's own, which may be elsewhere already")
    other = threading.Thread(target=logging.getLogger("shop").info, args=("beside",))
    other.start()
    other.join()
    inside, ours, beside = to.records
    assert (inside["step"], inside["attempt"]) == ("charge", 2)
    assert "step" not in ours
    assert "step" not in beside


def test_lines_of_a_linear_workflow_are_the_workflows_and_no_steps(written: Callable[[str], Written]) -> None:
    app = App("shop", dsn="nowhere")

    @app.workflow()
    async def order(n: int) -> None:
        return

    to = written("json")
    to.output.follow(lambda: Task(order, order.steps["workflow.start"], envelope(step="workflow.start")))
    logging.getLogger("shop").info("between two steps")
    (record,) = to.records
    assert (record["workflow"], record["workflow_id"], "step" in record) == ("order", SHORT, False)


def test_steps_of_a_linear_workflow_say_which_one_whether_they_run_ahead_in_a_thread_or_several_at_once(
    dsn: str, written: Callable[[str], Written]
) -> None:
    log = logging.getLogger("shop")
    app = App("shop", dsn=dsn)
    twice = Retry(attempts=2, backoff=0.001)

    @app.step(retry=twice)
    def charge(ctx: Context) -> None:
        log.info("in charge")
        if ctx.attempt == 1:
            raise ValueError("not yet")

    @app.step(blocking=True)
    def pack() -> None:
        log.info("in pack")

    @app.step()
    async def ship(parcel: int) -> None:
        await asyncio.sleep(0)
        log.info("in ship")

    @app.step()
    def note() -> None:
        log.info("in note")

    @app.workflow()
    async def order(n: int) -> None:
        await note()
        log.info("between")
        await charge()
        await note()
        await pack()
        await gather(ship(1), ship(2))
        log.info("at the end")

    consumer = Consumer(dsn, 0, app.machines, app.settings)
    consumer.shards = [0, 1]
    to = written("json")
    to.output.follow(lambda: consumer.inline)
    handle = order.start(1)
    while handle.status() == "running":
        consumer.work(lambda: False, lambda: None)
    consumer.close()
    told = [(one["event"], one.get("step"), one.get("attempt")) for one in to.records if one["logger"] == "shop"]
    assert told == [
        ("in note", "note", 1),
        ("between", None, None),
        ("in charge", "charge", 1),
        ("in charge", "charge", 2),
        ("between", None, None),  # the function is entered anew
        ("in note", "note", 1),
        ("in pack", "pack", 1),
        ("in ship", "ship", 1),
        ("in ship", "ship", 1),
        ("at the end", None, None),
    ]


def test_tasks_and_threads_of_a_step_say_whose_they_are(written: Callable[[str], Written]) -> None:
    to = written("json")

    async def step() -> None:
        begin(envelope())
        await asyncio.gather(later(), asyncio.to_thread(logging.getLogger("shop").info, "in a thread"))

    async def later() -> None:
        logging.getLogger("shop").info("in a task")

    asyncio.run(step())
    assert {(record["event"], record["step"]) for record in to.records} == {
        ("in a task", "charge"),
        ("in a thread", "charge"),
    }


@pytest.mark.parametrize("sample", [0.0, 1.0])
def test_the_span_is_said_where_there_is_one(written: Callable[[str], Written], sample: float) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), role="test", sample=sample)
    to = written("json")
    begin(envelope())
    with tracing.step(envelope(), quotes=True) if sample else tracing.unrecorded(WHOLE):
        logging.getLogger("shop").info("inside")
    (record,) = to.records
    if not sample:
        assert record.keys().isdisjoint({"trace_id", "span_id"})
        return
    span = next(span for span in exporter.get_finished_spans() if span.name == "charge")
    assert record["trace_id"] == f"{span.context.trace_id:032x}"
    assert record["span_id"] == f"{span.context.span_id:016x}"


def test_what_is_no_json_is_written_all_the_same(written: Callable[[str], Written]) -> None:
    to = written("json")
    logging.getLogger("shop").info("new\nline \x00 %s", object, extra={"it": {1, 2}, "event": "mine", "level": 7})
    logging.getLogger("shop").info("💥 \ud800")
    assert len(to.records) == 2
    assert to.records[0]["it"] in ("{1, 2}", "{2, 1}")
    assert to.records[0]["event"].startswith("new\nline"), "what is ours is not given away"
    assert to.records[0]["level"] == "info"


def test_a_structlog_of_the_users_comes_the_same_way(written: Callable[[str], Written]) -> None:
    to = written("json")
    begin(envelope())
    wrapped = structlog.wrap_logger(
        logging.getLogger("shop"),
        processors=[structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    wrapped.info("paid", total=3)
    (record,) = to.records
    assert (record["event"], record["total"], record["step"]) == ("paid", 3, "charge")


def test_handlers_that_are_there_stay(written: Callable[[str], Written]) -> None:
    mine = logging.NullHandler()
    logging.getLogger().handlers = [mine]
    assert log_output.configure("INFO", "json") is None
    assert logging.getLogger().handlers == [mine]


def test_pretty_shows_no_variables_of_a_traceback(written: Callable[[str], Written]) -> None:
    to = written("pretty")
    card = "4111-1111"
    try:
        raise ValueError(len(card))
    except ValueError:
        logging.getLogger("shop").exception("no")
    assert "Traceback" in to.text.getvalue()
    assert card not in to.text.getvalue().replace('card = "4111-1111"', "")


@pytest.mark.parametrize(
    ("asked", "said", "is_terminal", "expected"),
    [
        (None, "", False, "plain"),
        (None, "", True, "pretty"),
        (None, "json", True, "json"),
        ("plain", "json", True, "plain"),
    ],
)
def test_the_format_is_asked_for_or_said_or_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, said: str, is_terminal: bool, expected: str
) -> None:
    monkeypatch.setenv("DURABLE_LOG_FORMAT", said)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert log_output.chosen(asked) == expected


def test_a_format_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["start", "--log-format", "xml"]) == 2
    assert "argument --log-format: invalid choice: 'xml'" in capsys.readouterr().err
    monkeypatch.setenv("DURABLE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigurationError, match="DURABLE_LOG_FORMAT=xml: choose json, pretty or plain"):
        log_output.chosen(None)


def test_structlog_is_imported_only_where_it_is_asked_for() -> None:
    program = (
        "import sys; from durable_cluster import log_output; from durable_cluster.shards import child;"
        " log_output.configure('INFO', 'plain'); print('structlog' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "False"
