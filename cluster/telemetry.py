"""Tracing, keyed on truncated workflow ids: the only importer of opentelemetry.

A workflow's trace id is derived from its id by a hash, so no process has to hand it on and it does not give the id away.
Whether a workflow is sampled is a pure function of that trace id, the same everywhere. A page is one span, linked to the
sampled workflows whose steps it ran. Nothing is recorded until ``configure`` is called with an endpoint set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags

from durable_cluster.context import short_id
from durable_cluster.envelope import Page
from durable_cluster.errors import ConfigurationError
from durable_cluster.settings import environment

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SAMPLED_OF_10_000 = 100
LINKS_MAX = 100
_TRACE_KEY = b"durable-cluster trace id"


def configure(role: str) -> TracerProvider | None:
    """Export spans by OTLP over HTTP if ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set; call it after the process was spawned.

    Whoever traces nothing does not pay for the SDK: its imports would be a fifth of the start of every process and command.
    """
    if environment().otlp_endpoint is None:
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # an extra
    except ImportError as error:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set but the exporter is not installed; pip install 'durable-cluster[otlp]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "durable-cluster", "durable.role": role}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)  # once a process: a program that has set one of its own keeps it
    return provider


def trace_id_of(workflow_id: str) -> int:
    """The 128-bit trace id of a workflow: a keyed hash of its id."""
    return int.from_bytes(blake2b(bytes.fromhex(workflow_id), key=_TRACE_KEY, digest_size=16).digest(), "big")


def is_sampled(workflow_id: str) -> bool:
    """Whether a workflow is traced: one in a hundred, decided by its trace id alone."""
    return trace_id_of(workflow_id) % 10_000 < SAMPLED_OF_10_000


@contextmanager
def page_span(shard: int, page: Page) -> Iterator[None]:
    """A span around one page, with links to its sampled workflows."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        yield
        return
    tracer = trace.get_tracer("durable_cluster")
    attributes: dict[str, str | int] = {
        "messaging.system": "pgque",
        "messaging.operation.type": "process",
        "messaging.destination.name": f"durable_{shard}",
        "messaging.batch.message_count": len(page.lines),
        "durable.shard": shard,
        "durable.batch": page.header.batch,
        "durable.takeovers": page.header.takeovers,
    }
    with tracer.start_as_current_span(
        f"process durable_{shard}", kind=SpanKind.CONSUMER, attributes=attributes, links=_links(page)
    ):
        yield


def _links(page: Page) -> list[Link]:
    links: list[Link] = []
    for envelope in page.lines:
        if envelope is None or not is_sampled(envelope.workflow_id):
            continue
        trace_id = trace_id_of(envelope.workflow_id)
        context = SpanContext(
            trace_id, trace_id & (2**64 - 1) or 1, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )
        links.append(
            Link(
                context,
                {
                    "durable.workflow.short_id": short_id(envelope.workflow_id),
                    "durable.workflow.name": envelope.workflow,
                    "durable.step.name": envelope.step,
                    "durable.step.seq": envelope.seq,
                },
            )
        )
        if len(links) == LINKS_MAX:
            break
    return links
