"""Tracing, keyed on workflow ids that never leave whole: the only importer of opentelemetry.

A workflow's trace id, and the id of that trace's root span, are a keyed hash of its id: no process has to hand them on, and they
do not give the id away. Whether a workflow is sampled is a pure function of its id. A step of a sampled workflow
is a span; so are, of all others, attempts that fail and those that follow them. A page is a span with links to the sampled
workflows whose steps it ran. Nothing is recorded until ``configure`` is called with an endpoint set.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from durable_cluster.context import short_id
from durable_cluster.envelope import Envelope, Page
from durable_cluster.errors import ConfigurationError
from durable_cluster.settings import environment

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

LINKS_MAX = 100
ROOTS_MAX = 10_000
REASON_CHARS_MAX = 200
SAMPLE_DIGITS = slice(12, 20)
"""Of a workflow id: random ones, and none that a truncated id shows."""
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_TRACE_KEY = b"durable-cluster trace id"


class Tracing:
    """The spans of one process, for ``processor``. ``sample``: which part of all workflows, from 0 to 1."""

    def __init__(self, processor: SpanProcessor, *, role: str, sample: float) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        chosen = self._chosen = threading.local()

        class Ids(RandomIdGenerator):
            """Random ones, but for the span whose ids are chosen."""

            def generate_trace_id(self) -> int:
                return chosen.__dict__.pop("trace_id", 0) or super().generate_trace_id()

            def generate_span_id(self) -> int:
                return chosen.__dict__.pop("span_id", 0) or super().generate_span_id()

        resource = Resource.create({"service.name": "durable-cluster", "durable.role": role})
        self.provider = TracerProvider(resource=resource, id_generator=Ids())
        self.provider.add_span_processor(processor)
        self._tracer = self.provider.get_tracer("durable_cluster")
        self._sampled_below = round(sample * 2**32)
        self._roots: dict[str, None] = {}

    def is_sampled(self, workflow_id: str) -> bool:
        """Whether each step of this workflow is a span."""
        return int(workflow_id[SAMPLE_DIGITS], 16) < self._sampled_below

    @contextmanager
    def page(self, shard: int, page: Page) -> Iterator[None]:
        """A span around one page, with links to its sampled workflows."""
        attributes: dict[str, str | int] = {
            "messaging.system": "pgque",
            "messaging.operation.type": "process",
            "messaging.destination.name": f"durable_{shard}",
            "messaging.batch.message_count": len(page.lines),
            "durable.shard": shard,
            "durable.batch": page.header.batch,
            "durable.takeovers": page.header.takeovers,
        }
        with self._tracer.start_as_current_span(
            f"process durable_{shard}", kind=SpanKind.CONSUMER, attributes=attributes, links=self._links(page)
        ):
            yield

    @contextmanager
    def step(self, envelope: Envelope, *, quotes: bool) -> Iterator[Span]:
        """A span around one attempt of a step: what runs in it finds it as the current one.

        ``quotes``: it tells what an exception says, and not only its class.
        """
        parent = self._root(envelope, time.time_ns())
        with self._tracer.start_as_current_span(
            envelope.step,
            parent,
            attributes=_attributes(envelope),
            record_exception=quotes,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                tell(span, f"{type(error).__name__}: {error}" if quotes else type(error).__name__)
                raise

    def failure(self, envelope: Envelope, began_ns: int, reason: str) -> None:
        """The span of an attempt that has failed, and was none while it ran."""
        parent = self._root(envelope, began_ns)
        span = self._tracer.start_span(envelope.step, parent, attributes=_attributes(envelope), start_time=began_ns)
        tell(span, reason)
        span.end()

    def shutdown(self) -> None:
        """Send what is not sent yet."""
        self.provider.shutdown()

    def _root(self, envelope: Envelope, began_ns: int) -> Context:
        """The root of its workflow's trace, as the parent of a span. It is told where the workflow begins, or with the first
        span of one that is not sampled: no span is an orphan.
        """
        workflow_id = envelope.workflow_id
        trace_id, span_id = _ids_of(workflow_id)
        is_told = envelope.seq == 1 if self.is_sampled(workflow_id) else workflow_id not in self._roots
        if is_told:
            self._chosen.trace_id, self._chosen.span_id = trace_id, span_id
            attributes = {k: v for k, v in _attributes(envelope).items() if k.startswith("durable.workflow.")}
            span = self._tracer.start_span(envelope.workflow, Context(), attributes=attributes, start_time=began_ns)
            span.end(began_ns)
            self._remember(workflow_id)
        root = SpanContext(trace_id, span_id, is_remote=True, trace_flags=SAMPLED)
        return trace.set_span_in_context(NonRecordingSpan(root), Context())

    def _remember(self, workflow_id: str) -> None:
        if len(self._roots) >= ROOTS_MAX:
            del self._roots[next(iter(self._roots))]
        self._roots[workflow_id] = None

    def _links(self, page: Page) -> list[Link]:
        links: list[Link] = []
        for envelope in page.lines:
            if envelope is None or not envelope.is_of_a_workflow or not self.is_sampled(envelope.workflow_id):
                continue
            trace_id, span_id = _ids_of(envelope.workflow_id)
            root = SpanContext(trace_id, span_id, is_remote=True, trace_flags=SAMPLED)
            links.append(Link(root, _attributes(envelope)))
            if len(links) == LINKS_MAX:
                break
        return links


def configure(role: str) -> Tracing | None:
    """Export spans by OTLP over HTTP if ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set; call it after the process was spawned.

    Whoever traces nothing does not pay for the SDK: its imports would be a fifth of the start of every process and command.
    Raises ConfigurationError.
    """
    here = environment()
    if here.otlp_endpoint is None:
        return None
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # an extra
    except ImportError as error:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set but the exporter is not installed; pip install 'durable-cluster[otlp]'"
        ) from error
    tracing = Tracing(BatchSpanProcessor(OTLPSpanExporter()), role=role, sample=here.trace_sample)
    trace.set_tracer_provider(tracing.provider)  # once a process: a program that has set one of its own keeps it
    return tracing


def trace_id_of(workflow_id: str) -> int:
    """The 128-bit trace id of a workflow: a keyed hash of its id."""
    return _ids_of(workflow_id)[0]


def tell(span: Span, reason: str) -> None:
    """What is wrong with what the span stands for."""
    span.set_status(Status(StatusCode.ERROR, reason[:REASON_CHARS_MAX]))


def _ids_of(workflow_id: str) -> tuple[int, int]:
    """Of its trace, and of that trace's root span."""
    digest = blake2b(bytes.fromhex(workflow_id), key=_TRACE_KEY, digest_size=24).digest()
    return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:], "big") or 1


def _attributes(envelope: Envelope) -> dict[str, str | int]:
    return {
        "durable.workflow.name": envelope.workflow,
        "durable.workflow.short_id": short_id(envelope.workflow_id),
        "durable.workflow.version": envelope.version,
        "durable.step.name": envelope.step,
        "durable.step.seq": envelope.seq,
        "durable.step.attempt": envelope.attempt,
    }
