"""Spans as the SDK makes them, and quieter ones for steps. With ``telemetry`` and what exports, the only importer of opentelemetry.

Most steps say nothing in their span: its name, times and attributes are known beforehand. Such a one is put together when it
ends, for a third of what the SDK's own costs. Who does say something in it speaks to one of the SDK's, with the same ids.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    set_span_in_context,
)
from opentelemetry.util.types import AnyValue, Attributes

SCOPE = "durable_cluster"
UNSET = Status(StatusCode.UNSET)


class Ids(RandomIdGenerator):
    """Random ones, but for the next span of this thread if its id is chosen."""

    def __init__(self) -> None:
        self._chosen = threading.local()

    def choose(self, span_id: int) -> None:
        """The next span has this id."""
        self._chosen.span_id = span_id

    def generate_span_id(self) -> int:
        """See ``choose``."""
        return self._chosen.__dict__.pop("span_id", 0) or super().generate_span_id()


class Spans:
    """What makes the spans of one process, and hands them to these processors."""

    def __init__(self, processors: Sequence[SpanProcessor], *, role: str) -> None:
        self.ids = Ids()
        self.processors = processors
        # Which workflows are sampled is decided elsewhere; what a user's code begins follows what it belongs to.
        self.provider = TracerProvider(
            sampler=DEFAULT_ON, resource=_resource(role), shutdown_on_exit=False, id_generator=self.ids
        )
        for processor in processors:
            self.provider.add_span_processor(processor)
        self.tracer = self.provider.get_tracer(SCOPE)
        self._scope = InstrumentationScope(SCOPE, "", "")

    def begin(self, name: str, parent: SpanContext, attributes: Mapping[str, AnyValue], began_ns: int) -> Span:
        """A span of which nothing more is known until somebody says it."""
        return QuietSpan(self, name, parent, attributes, began_ns)

    def tell(
        self,
        name: str,
        context: SpanContext,
        attributes: Mapping[str, AnyValue],
        *,
        parent: SpanContext | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
        status: Status | None = None,
        times: tuple[int, int],
    ) -> None:
        """A span that has ended. ``times``: when it began and ended, in ns."""
        span = ReadableSpan(
            name=name,
            context=context,
            parent=parent,
            resource=self.provider.resource,
            attributes=attributes,
            links=links,
            kind=kind,
            status=status or UNSET,
            start_time=times[0],
            end_time=times[1],
            instrumentation_scope=self._scope,
        )
        for processor in self.processors:
            processor.on_end(span)


class QuietSpan(Span):
    """See ``Spans.begin``. Whatever is said in it makes it one of the SDK's."""

    __slots__ = ("_attributes", "_began_ns", "_context", "_is_ended", "_lock", "_name", "_parent", "_spans", "_spoken")

    def __init__(
        self, spans: Spans, name: str, parent: SpanContext, attributes: Mapping[str, AnyValue], began_ns: int
    ) -> None:
        self._spans = spans
        self._name = name
        self._parent = parent
        self._attributes = attributes
        self._began_ns = began_ns
        self._context = SpanContext(parent.trace_id, spans.ids.generate_span_id(), False, parent.trace_flags)
        self._spoken: Span | None = None
        self._is_ended = False
        self._lock = threading.Lock()

    def end(self, end_time: int | None = None) -> None:
        """It is over; only the first time counts."""
        with self._lock:
            was_ended, self._is_ended = self._is_ended, True
        if self._spoken is not None:
            self._spoken.end(end_time)
        elif not was_ended:
            times = self._began_ns, end_time or time.time_ns()
            self._spans.tell(self._name, self._context, self._attributes, parent=self._parent, times=times)

    def get_span_context(self) -> SpanContext:
        """Its ids."""
        return self._context

    def is_recording(self) -> bool:
        """Until it has ended."""
        return not self._is_ended

    def set_attributes(self, attributes: Mapping[str, AnyValue]) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.set_attributes(attributes)

    def set_attribute(self, key: str, value: AnyValue) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.set_attribute(key, value)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.add_event(name, attributes, timestamp)

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.add_link(context, attributes)

    def update_name(self, name: str) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.update_name(name)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.set_status(status, description)

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """See ``Span``."""
        if span := self._speak():
            span.record_exception(exception, attributes, timestamp, escaped)

    def _speak(self) -> Span | None:
        """The SDK's own span in its place; None once it has ended."""
        with self._lock:
            if self._spoken is None and not self._is_ended:
                parent = set_span_in_context(NonRecordingSpan(self._parent), Context())
                self._spans.ids.choose(self._context.span_id)
                self._spoken = self._spans.tracer.start_span(
                    self._name, parent, attributes=self._attributes, start_time=self._began_ns
                )
            return self._spoken


class HashedOnce(Resource):
    """Exporters group spans by their resource; to hash one, the SDK writes all of it as JSON, for each span."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = hash(resource)

    def __hash__(self) -> int:
        """As the SDK's."""
        return self._hash


def _resource(role: str) -> Resource:
    resource = Resource.create({"durable.role": role, "process.pid": os.getpid()})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # neither of OTel's variables names one
        resource = resource.merge(Resource({"service.name": "durable-cluster"}))
    return HashedOnce(resource)
