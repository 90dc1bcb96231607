"""Tracing, keyed on workflow ids that never leave whole. See ``spans`` for who else imports opentelemetry.

A workflow's trace id, and the id of that trace's root span, are a keyed hash of its id: no process has to hand them on, and they
do not give the id away. Whether a workflow is sampled is a pure function of its id. A step of a sampled workflow
is a span; so are, of all others, attempts that fail and those that follow them. A page that has steps of sampled workflows is a
span with links to these. Nothing is recorded until ``configure`` is called with an exporter set.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from durable_cluster.context import short_id
from durable_cluster.dead_letters import reason_of, without_id
from durable_cluster.envelope import Envelope, Page
from durable_cluster.settings import environment, span_exporters, spans_max
from durable_cluster.traceparents import ids_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

LINKS_MAX = 100
ROOTS_MAX = 10_000
REASON_CHARS_MAX = 200
STACK_CHARS_MAX = 4_000
SAMPLE_DIGITS = slice(12, 20)
"""Of a workflow id: random ones, and none that a truncated id shows."""
ALL = "g"
"""More than any such digits."""
SAMPLED, UNSAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
_TRACE_KEY = b"durable-cluster trace id"


class Tracing:
    """The spans of one process, for these processors. ``sample``: which part of all workflows, from 0 to 1."""

    def __init__(self, *processors: SpanProcessor, role: str, sample: float) -> None:
        from durable_cluster.spans import Spans

        self._spans = Spans(processors, role=role)
        self.provider = self._spans.provider
        sampled = round(sample * 16**8)
        self.sampled_below = f"{sampled:08x}" if sampled < 16**8 else ALL
        self._roots: OrderedDict[int, SpanContext] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def dropped(self) -> int:
        """How many spans did not get to where they are sent, since this process began."""
        return sum(getattr(processor, "dropped", 0) for processor in self._spans.processors)

    def is_sampled(self, workflow_id: str) -> bool:
        """Whether each step of this workflow is a span."""
        return workflow_id[SAMPLE_DIGITS] < self.sampled_below

    def page(self, shard: int, page: Page) -> AbstractContextManager[object]:
        """Around the run of a page: a span with links to its sampled workflows, if it has any."""
        links = self._links(page)
        if not links:
            ids = self._spans.ids
            return self._unrecorded(ids.generate_trace_id(), ids.generate_span_id())
        return self._page(shard, page, links)

    @contextmanager
    def _page(self, shard: int, page: Page, links: list[Link]) -> Iterator[None]:
        ids, began_ns = self._spans.ids, time.time_ns()
        context = SpanContext(ids.generate_trace_id(), ids.generate_span_id(), is_remote=False, trace_flags=SAMPLED)
        status: Status | None = None
        try:
            with self._unrecorded(context.trace_id, context.span_id):
                yield
        except BaseException as error:  # what the database says may name a row by its whole id
            status = Status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            attributes: dict[str, str | int] = {
                "messaging.system": "pgque",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": f"durable_{shard}",
                "messaging.batch.message_count": len(page.lines),
                "durable.shard": shard,
                "durable.batch": page.header.batch,
                "durable.takeovers": page.header.takeovers,
            }
            self._spans.tell(
                f"process durable_{shard}",
                context,
                attributes,
                kind=SpanKind.CONSUMER,
                links=links,
                status=status,
                times=(began_ns, time.time_ns()),
            )

    def unrecorded(self, workflow_id: str) -> AbstractContextManager[object]:
        """Around a step of a workflow that is not sampled, where no page is: what its code traces is not recorded."""
        return self._unrecorded(*_ids_of(workflow_id))

    def _unrecorded(self, trace_id: int, span_id: int) -> AbstractContextManager[object]:
        """Who asks what is sampled by what it belongs to, hears no."""
        return trace.use_span(NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=False, trace_flags=UNSAMPLED)))

    def step(self, envelope: Envelope, *, quotes: bool) -> StepSpan:
        """A span around one attempt of a step: what runs in it finds it as the current one.

        ``quotes``: it tells what an exception says, and not only its class.
        """
        began_ns = time.time_ns()
        span = self._spans.begin(envelope.step, self._root(envelope, began_ns), _attributes(envelope), began_ns)
        return StepSpan(span, envelope, quotes=quotes)

    def failure(self, envelope: Envelope, began_ns: int, why: BaseException | str, *, quotes: bool = True) -> None:
        """The span of an attempt that has failed, and was none while it ran."""
        span = self._spans.begin(envelope.step, self._root(envelope, began_ns), _attributes(envelope), began_ns)
        _tell(span, envelope, why, quotes=quotes)
        span.end()

    def lost(self, spans: Sequence[ReadableSpan]) -> None:
        """These got nowhere. Roots among them are told again, each with the next span of its workflow. Any thread may say so."""
        with self._lock:
            for span in spans:
                if span.parent is None and span.context is not None:
                    self._roots.pop(span.context.trace_id, None)

    def shutdown(self) -> None:
        """Send what is not sent yet, for a second or two."""
        self.provider.shutdown()

    def _root(self, envelope: Envelope, began_ns: int) -> SpanContext:
        """The root of its workflow's trace, as the parent of a span. Each process tells it with the first span that it has of the
        workflow, and again where it was lost: no span is an orphan, whichever process died before it sent its own.
        """
        trace_id, span_id = _ids_of(envelope.workflow_id)
        known = self._roots.get(trace_id)
        if known is not None:
            return known
        root = SpanContext(trace_id, span_id, is_remote=True, trace_flags=SAMPLED)
        with self._lock:  # of two threads both may tell it: it is one span all the same
            self._roots[trace_id] = root
            if len(self._roots) > ROOTS_MAX:
                self._roots.popitem(last=False)
        self._tell_root(envelope, root, began_ns)
        return root

    def _tell_root(self, envelope: Envelope, root: SpanContext, began_ns: int) -> None:
        attributes = {k: v for k, v in _attributes(envelope).items() if k.startswith("durable.workflow.")}
        caller = ids_of(envelope.traceparent) if envelope.traceparent else None
        links = []
        if caller is not None:
            links.append(Link(SpanContext(caller[0], caller[1], is_remote=True, trace_flags=TraceFlags(caller[2]))))
        self._spans.tell(envelope.workflow, root, attributes, links=links, times=(began_ns, began_ns))

    def _links(self, page: Page) -> list[Link]:
        below = self.sampled_below
        sampled = [one for one in page.lines if one is not None and one.workflow_id[SAMPLE_DIGITS] < below]
        links: list[Link] = []
        for envelope in sampled:
            if envelope.workflow.startswith("@") or not envelope.is_of_a_workflow:
                continue  # a signal on its way, or what somebody has put into the log by hand
            trace_id, span_id = _ids_of(envelope.workflow_id)
            root = SpanContext(trace_id, span_id, is_remote=True, trace_flags=SAMPLED)
            links.append(Link(root, {"durable.workflow.short_id": short_id(envelope.workflow_id)}))
            if len(links) == LINKS_MAX:
                break
        return links


class StepSpan:
    """The span of an attempt, for as long as that lasts; it tells what the attempt raises."""

    __slots__ = ("_envelope", "_quotes", "_span", "_token")

    def __init__(self, span: Span, envelope: Envelope, *, quotes: bool) -> None:
        self._span = span
        self._envelope = envelope
        self._quotes = quotes

    def __enter__(self) -> StepSpan:
        self._token = attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, of: TracebackType | None) -> None:
        detach(self._token)
        if error is not None:
            _tell(self._span, self._envelope, error, quotes=self._quotes)
        self._span.end()

    def tell(self, why: str) -> None:
        """What is wrong with it though it raised nothing."""
        _tell(self._span, self._envelope, why)


def configure(role: str) -> Tracing | None:
    """Export spans as OpenTelemetry's variables say: see ``settings.span_exporters``; call it after the process was spawned.

    Whoever traces nothing does not pay for the SDK: its imports would be a fifth of the start of every process and command.
    Raises ConfigurationError.
    """
    exporters = span_exporters()
    if not exporters:
        return None
    from durable_cluster.span_export import processors

    queues = processors(exporters, queue_max=spans_max())
    tracing = Tracing(*queues, role=role, sample=environment().trace_sample)
    for queue in queues:
        queue.on_lost = tracing.lost
    if isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider
    ):  # a program that has set one of its own keeps it
        trace.set_tracer_provider(tracing.provider)
    return tracing


def trace_id_of(workflow_id: str) -> int:
    """The 128-bit trace id of a workflow: a keyed hash of its id."""
    return _ids_of(workflow_id)[0]


def _tell(span: Span, envelope: Envelope, why: BaseException | str, *, quotes: bool = True) -> None:
    """What is wrong with the attempt that the span stands for. ``quotes``: see ``Tracing.step``."""
    if isinstance(why, BaseException):
        kind = type(why).__name__
        span.set_attribute("error.type", kind)
        reason = without_id(reason_of(why), envelope) if quotes else kind
        if quotes:
            stack = without_id("".join(traceback.format_exception(why))[-STACK_CHARS_MAX:], envelope)
            said = {"exception.type": kind, "exception.message": reason, "exception.stacktrace": stack}
            span.add_event("exception", said)
    else:
        reason = without_id(why, envelope)
    span.set_status(Status(StatusCode.ERROR, reason[:REASON_CHARS_MAX]))


def _ids_of(workflow_id: str) -> tuple[int, int]:
    """Of its trace, and of that trace's root span."""
    digest = blake2b(workflow_id.encode(), key=_TRACE_KEY, digest_size=24).digest()
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
