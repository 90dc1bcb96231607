"""Tracing, received by a real OTLP endpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from durable_cluster import telemetry

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


class Receiver(ThreadingHTTPServer):
    """An OTLP/HTTP endpoint that keeps what it gets."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), Take)

    @property
    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        scopes = [
            scope for request in requests for resource in request.resource_spans for scope in resource.scope_spans
        ]
        return [span for scope in scopes for span in scope.spans]


class Take(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_page_is_a_span_linked_to_its_sampled_workflows_and_no_whole_id_leaves(
    dsn: str, conn: psycopg.Connection, receiver: Receiver, tmp_path: Path
) -> None:
    program = tmp_path / "traced.py"
    program.write_text(PROGRAM)
    endpoint = f"http://127.0.0.1:{receiver.server_address[1]}"
    environment = {**os.environ, "DURABLE_DSN": dsn, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    subprocess.run([sys.executable, str(program)], check=True, env=environment, timeout=60)

    spans = receiver.spans
    counts = [a.value.int_value for span in spans for a in span.attributes if a.key == "messaging.batch.message_count"]
    assert sum(counts) == 2 * WORKFLOWS
    ids = [workflow_id for (workflow_id,) in conn.execute("select durable.hex(id) from durable.started")]
    sampled = {telemetry.trace_id_of(i).to_bytes(16, "big") for i in ids if telemetry.is_sampled(i)}
    assert {link.trace_id for span in spans for link in span.links} == sampled
    sent = b"".join(receiver.bodies).decode("latin-1")
    assert set(re.findall("[0-9a-f]{32}", sent)).isdisjoint(ids)


def test_about_one_workflow_in_a_hundred_is_sampled_by_its_trace_id_alone() -> None:
    sampled = sum(telemetry.is_sampled(f"{n:028x}5123") for n in range(20_000))
    assert 140 < sampled < 260


def test_nothing_is_exported_until_an_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert telemetry.configure("test") is None
