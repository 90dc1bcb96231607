"""Spans of steps say what the SDK's own would, whether anything is said in them or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, Status, StatusCode, TraceFlags

from durable_cluster.spans import Spans

PARENT = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
OTHER = SpanContext(0x123, 0x456, is_remote=True)
ATTRIBUTES = {"durable.step.name": "charge", "durable.step.seq": 3}


def silent(span: Span) -> None:
    """Most steps."""


def speaking(span: Span) -> None:
    """All that can be said, each of it twice."""
    for n in range(2):
        span.set_attribute(f"one.{n}", n)
        span.set_attributes({f"two.{n}": "b", "durable.step.seq": 4})
        span.add_event(f"event {n}", {"x": n}, timestamp=5)
        span.add_link(OTHER, {"y": n})
        span.update_name(f"name {n}")
        span.set_status(Status(StatusCode.ERROR, f"status {n}"))
        span.record_exception(ValueError(f"exception {n}"), timestamp=6)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    return Spans([SimpleSpanProcessor(exporter)], role="test")


def told(span: ReadableSpan) -> dict[str, Any]:
    """All that is exported of a span, but its own id."""
    return {
        "name": span.name,
        "trace": (span.context.trace_id, span.context.trace_flags, span.context.is_remote, span.context.trace_state),
        "parent": span.parent,
        "times": (span.start_time, span.end_time),
        "attributes": dict(span.attributes),
        "events": [(event.name, dict(event.attributes), event.timestamp) for event in span.events],
        "links": [(link.context, dict(link.attributes)) for link in span.links],
        "status": (span.status.status_code, span.status.description),
        "kind": span.kind,
        "resource": span.resource,
        "scope": span.instrumentation_scope,
        "dropped": (span.dropped_attributes, span.dropped_events, span.dropped_links),
    }


@pytest.mark.parametrize("say", [silent, speaking])
def test_a_span_says_what_one_of_the_sdk_says(
    spans: Spans, exporter: InMemorySpanExporter, say: Callable[[Span], None]
) -> None:
    ours = spans.begin("charge", PARENT, ATTRIBUTES, 1_000)
    theirs = spans.tracer.start_span(
        "charge", trace.set_span_in_context(NonRecordingSpan(PARENT)), attributes=ATTRIBUTES, start_time=1_000
    )
    for span in (ours, theirs):
        say(span)
        assert span.is_recording()
        span.end(2_000)
        assert not span.is_recording()
    first, second = exporter.get_finished_spans()
    assert told(first) == told(second)
    assert first.context == ours.get_span_context(), "what was begun in it has this span as its parent"


@pytest.mark.parametrize("say", [silent, speaking])
def test_what_is_said_after_its_end_is_not_told(
    spans: Spans, exporter: InMemorySpanExporter, say: Callable[[Span], None]
) -> None:
    span = spans.begin("charge", PARENT, ATTRIBUTES, 1_000)
    say(span)
    span.end(2_000)
    before = told(exporter.get_finished_spans()[0])
    speaking(span)
    span.end(3_000)
    assert [told(one) for one in exporter.get_finished_spans()] == [before]


def test_what_is_begun_in_a_span_is_its_child(spans: Spans, exporter: InMemorySpanExporter) -> None:
    step = spans.begin("charge", PARENT, ATTRIBUTES, 1_000)
    with trace.use_span(step, end_on_exit=True), spans.tracer.start_as_current_span("query"):
        pass
    child, parent = exporter.get_finished_spans()
    assert (child.parent, parent.parent) == (step.get_span_context(), PARENT)
    assert child.context.span_id != parent.context.span_id
