"""Tracing, received by a real OTLP endpoint."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from receiver import Receiver, receiving

from durable_cluster import App, ConfigurationError, Context, Continuation, Retry, telemetry
from durable_cluster.envelope import Envelope, Header, Page
from durable_cluster.settings import environment
from durable_cluster.telemetry import Tracing

WORKFLOWS = 1000

PROGRAM = f"""
import msgspec
from durable_cluster import App, Context, Continuation

app = App("traced")
machine = app.machine("flow", state=int)

@machine.step(start=True)
def first(ctx: Context, n: int) -> Continuation:
    return ctx.goto(second, n)

@machine.step()
def second(ctx: Context, n: int) -> Continuation:
    return ctx.done(n)

machine.start_many(list(range({WORKFLOWS})))
app.run(until_idle=True)
app.close()
"""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


def test_a_page_is_a_span_linked_to_its_sampled_workflows_and_no_whole_id_leaves(
    dsn: str, conn: psycopg.Connection, receiver: Receiver, tmp_path: Path
) -> None:
    program = tmp_path / "traced.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ,
        "DURABLE_DSN": dsn,
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "DURABLE_TRACE_SAMPLE": "0.05",
    }
    subprocess.run([sys.executable, str(program)], check=True, env=environment, timeout=60)

    spans = receiver.spans
    counts = [a.value.int_value for span in spans for a in span.attributes if a.key == "messaging.batch.message_count"]
    assert sum(counts) >= 2 * WORKFLOWS, "what a page has no time for is read again"
    ids = [workflow_id for (workflow_id,) in conn.execute("select durable.hex(id) from durable.started")]
    tracing = Tracing(SimpleSpanProcessor(InMemorySpanExporter()), role="test", sample=0.05)
    sampled = {telemetry.trace_id_of(i).to_bytes(16, "big") for i in ids if tracing.is_sampled(i)}
    assert {link.trace_id for span in spans for link in span.links} == sampled
    steps = [span for span in spans if span.trace_id in sampled and not span.links]
    assert len(steps) == 3 * len(sampled), "a root and two steps each"
    sent = b"".join(receiver.bodies).decode("latin-1")
    assert set(re.findall("[0-9a-f]{32}", sent)).isdisjoint(ids)


def test_a_page_that_fails_says_the_kind_of_error_and_not_what_it_quotes() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), role="test", sample=1)
    workflow_id = secrets.token_hex(16)
    line = Envelope(workflow_id, 1, "flow", "first", 1, msgspec.Raw(b"1"))
    header = Header(batch=5, takeovers=0, suspects=0, done=("0", 0, 0), last=True, events=[("1", 1)])
    with pytest.raises(Trouble), tracing.page(3, Page(header, [line], [1])):
        raise Trouble(f"row {workflow_id} is gone")
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.parent) == ("process durable_3", SpanKind.CONSUMER, None)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "Trouble")
    assert [link.context.trace_id for link in span.links] == [telemetry.trace_id_of(workflow_id)]
    assert span.start_time <= span.end_time
    assert workflow_id not in span.to_json()


def test_about_one_workflow_in_a_hundred_is_sampled_by_digits_that_no_truncated_id_shows() -> None:
    ids = [secrets.token_hex(16) for _ in range(20_000)]
    tracing = Tracing(SimpleSpanProcessor(InMemorySpanExporter()), role="test", sample=0.01)
    assert 140 < sum(map(tracing.is_sampled, ids)) < 260
    shown = ids[0][:12]
    assert {tracing.is_sampled(f"{shown}{n:08x}{ids[0][20:]}") for n in (0, 2**31)} == {True, False}
    for sample, expected in ((0, 0), (1, 20_000)):
        tracing = Tracing(SimpleSpanProcessor(InMemorySpanExporter()), role="test", sample=sample)
        assert sum(map(tracing.is_sampled, ids)) == expected


class Trouble(Exception):
    pass


ONCE, TWICE = Retry(attempts=1), Retry(attempts=2, backoff=0.001)


def troubled(app: App) -> Any:
    """A flow with a step of each kind, each of which fails once; what it is told to fail for good in."""
    machine = app.machine("flow", state=str)

    def once(ctx: Context, worst: str) -> None:
        if ctx.attempt == 1 or worst == ctx.step:
            raise Trouble(f"{ctx.step} does not work")

    @machine.step(start=True, retry=TWICE)
    def plain(ctx: Context, worst: str) -> Continuation:
        once(ctx, worst)
        return ctx.goto(waiting, worst)

    @machine.step(retry=TWICE)
    async def waiting(ctx: Context, worst: str) -> Continuation:
        once(ctx, worst)
        return ctx.goto(storing, worst)

    @machine.step(retry=TWICE, transactional=True)
    def storing(ctx: Context, worst: str) -> Continuation:
        once(ctx, worst)
        return ctx.goto(last, worst)

    @machine.step()
    def last(ctx: Context, worst: str) -> Continuation:
        with trace.get_tracer("of the user").start_as_current_span("charging"):
            pass
        return ctx.fail("no") if worst == "last" else ctx.done()

    return machine


@pytest.mark.parametrize("sample", [0.0, 1.0])
@pytest.mark.parametrize("worst", ["", "plain", "waiting", "storing", "last"])
def test_a_workflow_is_one_trace_with_its_retries_and_no_orphans(
    dsn: str, monkeypatch: pytest.MonkeyPatch, sample: float, worst: str
) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), role="test", sample=sample)
    monkeypatch.setattr(telemetry, "configure", lambda _: tracing)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", tracing.provider)
    app = App("traced", dsn=dsn)
    handle = troubled(app).start(worst)
    app.run(until_idle=True)
    app.close()

    trace_id = telemetry.trace_id_of(handle.id)
    spans = [span for span in exporter.get_finished_spans() if span.context.trace_id == trace_id]
    roots = [span for span in spans if span.parent is None]
    assert [root.name for root in roots] == ["flow"]
    known = {span.context.span_id for span in spans}
    assert all(span.parent.span_id in known for span in spans if span.parent is not None)
    steps = [
        (span.name, span.attributes["durable.step.attempt"], span.status.is_ok or span.status.description)
        for span in spans
        if "durable.step.name" in span.attributes
    ]
    names = ["plain", "waiting", "storing", "last"]
    reached = names[: names.index(worst) + 1] if worst else names
    expected: list[Any] = []
    for name in reached[:4]:
        wrong = f"Trouble: {name} does not work"
        if name != "last":
            expected += [(name, 1, wrong), (name, 2, wrong if name == worst else True)]
        elif sample or worst == "last":
            expected.append((name, 1, "the workflow has failed" if worst == "last" else True))
    assert steps == expected
    assert roots[0].attributes["durable.workflow.short_id"] == handle.id[:12]
    own = [span for span in spans if span.name == "charging"]
    assert [span.parent.span_id for span in own] == [
        span.context.span_id for span in spans if span.name == "last" and sample
    ]
    pages = [span for span in exporter.get_finished_spans() if span.name == "process durable_0" or span.links]
    assert {link.context.span_id for span in pages for link in span.links} == (
        {roots[0].context.span_id} if sample else set()
    )
    assert handle.id not in "".join(span.to_json() for span in exporter.get_finished_spans())


@pytest.mark.parametrize("sample", ["2", "-0.1", "much"])
def test_a_part_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, sample: str) -> None:
    monkeypatch.setenv("DURABLE_TRACE_SAMPLE", sample)
    with pytest.raises(ConfigurationError, match=f"DURABLE_TRACE_SAMPLE={sample}: it is a part of all"):
        environment()


def test_nothing_is_exported_until_an_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert telemetry.configure("test") is None
