"""Spans on their way out: whoever takes them slowly, badly or not at all slows no step, and what is lost is counted."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from receiver import Receiver, attributes_of, receiving

from durable_cluster import ConfigurationError, span_export, telemetry
from durable_cluster.envelope import Envelope
from durable_cluster.settings import span_exporters, spans_max
from durable_cluster.telemetry import Tracing

OTEL = (
    *("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"),
    *("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED", "OTEL_BSP_MAX_QUEUE_SIZE"),
)

PROGRAM = """
import logging, time
logging.basicConfig(format="LOG %(message)s")
from durable_cluster import App, Context, Continuation

app = App("traced")
machine = app.machine("flow", state=int)

@machine.step(start=True)
def first(ctx: Context, n: int) -> Continuation:
    return ctx.goto(second, n)

@machine.step()
def second(ctx: Context, n: int) -> Continuation:
    return ctx.done(n)

handles = machine.start_many(list(range(1000)))
began = time.monotonic()
app.run(until_idle=True)
print(time.monotonic() - began, sum(handle.status() == "completed" for handle in handles))
app.close()
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OTEL:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def envelope(n: int) -> Envelope:
    return Envelope(f"{n:032x}", 1, "flow", "first", 1, msgspec.Raw(b"1"))


def traced(monkeypatch: pytest.MonkeyPatch, endpoint: str, **variables: str) -> Tracing:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("DURABLE_TRACE_SAMPLE", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracing = telemetry.configure("test")
    assert tracing is not None
    return tracing


def run_steps(tracing: Tracing, steps: int) -> float:
    """Of different workflows; how many seconds that took."""
    began = time.monotonic()
    for n in range(1, steps + 1):
        with tracing.step(envelope(n), quotes=True):
            pass
    return time.monotonic() - began


def test_what_an_endpoint_takes_is_not_lost(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> None:
    tracing = traced(monkeypatch, receiver.endpoint)
    run_steps(tracing, 900)
    tracing.shutdown()
    assert tracing.dropped == 0
    assert len(receiver.spans) == 1800, "a root and a step each"


def test_an_endpoint_that_never_answers_slows_no_step_and_no_end(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.may_answer.clear()
    patience = {"OTEL_BSP_SCHEDULE_DELAY": "1", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
    tracing = traced(monkeypatch, receiver.endpoint, **patience)
    assert run_steps(tracing, 5_000) < 30, "some 100 µs a step, and not a minute for each request"
    assert tracing.dropped == 10_000 - 2_048, "what there is no room for"
    began = time.monotonic()
    tracing.shutdown()
    assert time.monotonic() - began < span_export.SHUTDOWN_S + 5
    assert tracing.dropped == 10_000
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("spans lost so far: 1 (the queue is full); no step waits for them.")


@pytest.mark.parametrize("is_up", [False, True])
def test_an_endpoint_that_is_down_or_in_error_costs_its_spans_and_one_warning_a_minute(
    monkeypatch: pytest.MonkeyPatch,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
    is_up: bool,
) -> None:
    receiver.status = 500
    endpoint = receiver.endpoint if is_up else closed_port()
    tracing = traced(monkeypatch, endpoint, OTEL_BSP_SCHEDULE_DELAY="1", OTEL_EXPORTER_OTLP_TIMEOUT="0.3")
    deadline = time.monotonic() + 20
    for round_ in range(1, 4):
        run_steps(tracing, 100)
        while tracing.dropped < round_ * 200:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    began = time.monotonic()
    tracing.shutdown()
    assert time.monotonic() - began < span_export.SHUTDOWN_S + 5
    assert tracing.dropped == 600
    assert len(caplog.records) == 1
    assert caplog.records[0].name == "durable_cluster.telemetry"
    assert "Failed to export" in caplog.records[0].getMessage(), "it says why"


def test_the_warning_comes_again_after_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(span_export.time, "monotonic", lambda: now)
    complaint = span_export.Complaint()
    for at in (1000.0, 1001.0, 1059.9, 1060.1, 1100.0):
        now = at
        complaint.speak(int(at))
    complaint.close()
    assert [record.getMessage().split()[4] for record in caplog.records] == ["1000", "1060"]


def test_what_other_exporters_say_is_let_through(caplog: pytest.LogCaptureFixture) -> None:
    complaint = span_export.Complaint()
    for name in span_export.EXPORTERS_SAY:
        logging.getLogger(name).error("of somebody else")
    complaint.close()
    assert len(caplog.records) == len(span_export.EXPORTERS_SAY)


def test_after_a_loss_roots_are_told_again(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> None:
    tracing = traced(monkeypatch, receiver.endpoint, OTEL_BSP_SCHEDULE_DELAY="1")
    receiver.status = 500
    run_steps(tracing, 50)
    deadline = time.monotonic() + 20
    while tracing.dropped < 100:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    receiver.status = 200
    run_steps(tracing, 50)
    tracing.shutdown()
    known = {(span.trace_id, span.span_id) for span in receiver.spans}
    children = [span for span in receiver.spans if span.parent_span_id]
    assert len(children) == 50
    assert all((span.trace_id, span.parent_span_id) in known for span in children)


def test_a_root_is_told_once_and_again_only_where_it_was_lost_itself(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    tracing = traced(monkeypatch, receiver.endpoint, OTEL_BSP_SCHEDULE_DELAY="1")
    run_steps(tracing, 20)
    tracing.provider.force_flush()
    receiver.status = 500
    run_steps(tracing, 50)
    tracing.provider.force_flush()
    assert tracing.dropped == 20 + 2 * 30, "of the first twenty a step each, of the others the root too"
    receiver.status = 200
    for _ in range(3):
        run_steps(tracing, 50)
    tracing.shutdown()
    roots = Counter(span.trace_id for span in receiver.spans if not span.parent_span_id)
    assert (len(roots), set(roots.values())) == (50, {1})
    assert len(receiver.spans) == 20 + 50 + 3 * 50


def test_where_the_queue_is_full_only_the_roots_that_found_no_place_are_told_again(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    receiver.may_answer.clear()
    tracing = traced(monkeypatch, receiver.endpoint, OTEL_BSP_MAX_QUEUE_SIZE="8", OTEL_BSP_SCHEDULE_DELAY="1")
    run_steps(tracing, 6)
    run_steps(tracing, 6)
    assert tracing.dropped == 4 + 4 + 4, (
        "four have a place for a root and a step; then those lose a step, the others both, twice"
    )
    receiver.may_answer.set()
    tracing.provider.force_flush()
    run_steps(tracing, 4)
    tracing.shutdown()
    roots = Counter(span.trace_id for span in receiver.spans if not span.parent_span_id)
    assert (len(roots), set(roots.values())) == (4, {1})


@pytest.mark.parametrize("how", ["down", "silent", "error"])
def test_a_run_ends_with_its_work_whatever_its_endpoint_does(
    dsn: str, receiver: Receiver, tmp_path: Path, how: str
) -> None:
    program = tmp_path / "traced.py"
    program.write_text(PROGRAM)
    receiver.status = 500 if how == "error" else 200
    if how == "silent":
        receiver.may_answer.clear()
    endpoint = closed_port() if how == "down" else receiver.endpoint
    variables = {
        "DURABLE_DSN": dsn,
        "DURABLE_TRACE_SAMPLE": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "10",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "60",
        "OTEL_METRICS_EXPORTER": "none",
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    seconds, completed = done.stdout.split()
    assert (done.returncode, completed) == (0, "1000")
    assert float(seconds) < 30, "one request to who does not answer takes a minute"
    assert [line[: line.index(":")] for line in done.stderr.splitlines()] == ["LOG spans lost so far"]


def test_on_the_console_a_span_is_a_line_of_json_beside_what_is_answered(dsn: str, tmp_path: Path) -> None:
    program = tmp_path / "traced.py"
    program.write_text(PROGRAM.replace("range(1000)", "range(3)"))
    variables = {"DURABLE_DSN": dsn, "DURABLE_TRACE_SAMPLE": "1", "OTEL_TRACES_EXPORTER": "console"}
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split()[1] == "3"
    spans = [msgspec.json.decode(line) for line in done.stderr.splitlines()]
    assert sorted(span["name"] for span in spans if not span["name"].startswith("process")) == sorted(
        ["flow", "first", "second"] * 3
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"}, ("otlp",)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "true"}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "console"}, ("console",)),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("otlp",)),
        ({"OTEL_TRACES_EXPORTER": " OTLP, console,otlp "}, ("otlp", "console")),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("console",)),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, ("otlp",)),
    ],
)
def test_opentelemetrys_variables_choose_the_exporters(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[str, ...]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert span_exporters() == expected


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin: there is no 'zipkin'; choose otlp, console"),
        ({"OTEL_TRACES_EXPORTER": "otlp,"}, "there is no ''"),
        ({"OTEL_TRACES_EXPORTER": "none,console"}, "there is no 'none'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: spans are sent by http/protobuf alone",
        ),
        (
            {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_QUEUE_SIZE": "0"},
            "OTEL_BSP_MAX_QUEUE_SIZE=0: it is a whole",
        ),
        (
            {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_QUEUE_SIZE": "²"},
            "OTEL_BSP_MAX_QUEUE_SIZE=²: it is a whole",
        ),
    ],
)
def test_what_cannot_be_exported_to_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        telemetry.configure("test")
    assert said in str(refused.value)


def test_a_small_queue_is_one(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> None:
    receiver.may_answer.clear()
    tracing = traced(monkeypatch, receiver.endpoint, OTEL_BSP_MAX_QUEUE_SIZE="7")
    assert spans_max() == 7
    run_steps(tracing, 10)
    assert tracing.dropped == 13
    receiver.may_answer.set()
    tracing.shutdown()
    assert len(receiver.spans) == 7


def test_without_the_exporter_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    with pytest.raises(ConfigurationError, match=r"pip install 'durable-cluster\[otlp\]'"):
        telemetry.configure("test")


def test_a_service_keeps_the_name_that_its_environment_gives_it(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    for variables, expected in (({}, "durable-cluster"), ({"OTEL_SERVICE_NAME": "shop"}, "shop")):
        tracing = traced(monkeypatch, receiver.endpoint, **variables)
        assert tracing.provider.resource.attributes["service.name"] == expected
        tracing.shutdown()


def test_a_sampler_of_opentelemetrys_variables_takes_no_root_away(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    tracing = traced(monkeypatch, receiver.endpoint, OTEL_TRACES_SAMPLER="always_off")
    run_steps(tracing, 3)
    tracing.shutdown()
    assert len(receiver.spans) == 6


def test_ids_that_nobody_made_are_traced_as_any_other(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> None:
    tracing = traced(monkeypatch, receiver.endpoint)
    strange = msgspec.structs.replace(envelope(1), workflow_id="z" * 32)
    assert not tracing.is_sampled(strange.workflow_id)
    tracing.failure(strange, time.time_ns(), "it is wrong")
    tracing.shutdown()
    assert {attributes_of(span)["durable.workflow.short_id"] for span in receiver.spans} == {"z" * 12}
