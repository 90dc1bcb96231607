"""Metrics by OTLP: the figures of the page, sent now and then and at the end, to an endpoint that may be away or slow."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric

from durable_cluster import App, Context, Continuation
from durable_cluster.errors import ConfigurationError
from durable_cluster.meters import STEPS, Histogram, OfShard
from durable_cluster.metric_export import Sender, exported, name_of
from durable_cluster.metrics import METRICS, Families, put_build, put_totals

CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE


class Receiver(ThreadingHTTPServer):
    """An OTLP/HTTP endpoint that keeps the metrics it gets."""

    def __init__(self) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []
        super().__init__(("127.0.0.1", 0), Take)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def last(self) -> dict[str, Metric]:
        """What came last, by name."""
        (resource,) = self.requests[-1].resource_metrics
        return {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}


class Take(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/metrics":
            self.server.requests.append(ExportMetricsServiceRequest.FromString(body))
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


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the tests says."""
    for name in ("ENDPOINT", "METRICS_ENDPOINT", "TRACES_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name in ("METRICS_EXPORTER", "METRIC_EXPORT_INTERVAL", "SDK_DISABLED"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)


def collected() -> Families:
    found = Families()
    put_build(found)
    of = OfShard(pages=3)
    for steps in (1, 7, 5000):
        of.page_steps.add(steps, STEPS)
    put_totals(found, [{0: of}], 1)
    found.put("durable_lag_seconds", 1.5, 0)
    found.put("durable_process_memory_bytes", 4096, "maintenance", "")
    return found


def numbers(metric: Metric) -> dict[tuple[str, ...], float]:
    points = (metric.sum if metric.HasField("sum") else metric.gauge).data_points
    return {
        tuple(one.value.string_value for one in point.attributes): point.as_int or point.as_double for point in points
    }


def test_nothing_is_sent_unless_an_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Families:
        pytest.fail("nobody asked")

    with exported(never, role="test"):
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in (("OTEL_METRICS_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true")):
        with monkeypatch.context() as inside:
            inside.setenv(name, value)
            with exported(never, role="test"):
                pass
    assert "durable-metrics" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"])
def test_the_last_values_are_sent_at_the_end(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    is_whole = "METRICS" in variable
    monkeypatch.setenv(variable, receiver.endpoint + ("/v1/metrics" if is_whole else ""))
    began_ns = time.time_ns()
    with exported(collected, role="test"):
        pass
    assert len(receiver.requests) == 1
    found = receiver.last()
    pages, sizes = found["durable.pages"], found["durable.page_steps"]
    assert (pages.unit, pages.sum.is_monotonic, pages.sum.aggregation_temporality) == ("{pages}", True, CUMULATIVE)
    assert numbers(pages) == {("0",): 3}
    assert began_ns <= pages.sum.data_points[0].start_time_unix_nano <= pages.sum.data_points[0].time_unix_nano
    assert (found["durable.lag"].unit, numbers(found["durable.lag"])) == ("s", {("0",): 1.5})
    assert found["durable.process_memory"].unit == "By"
    assert numbers(found["durable.process_memory"]) == {("maintenance",): 4096}, "an empty label is none"
    (point,) = sizes.histogram.data_points
    assert sizes.histogram.aggregation_temporality == CUMULATIVE
    assert (point.count, point.sum, list(point.explicit_bounds)) == (3, 5008, list(STEPS))
    assert list(point.bucket_counts) == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert not (point.HasField("min") or point.HasField("max")), "nobody keeps them"
    told = {one.key: one.value.string_value for one in receiver.requests[0].resource_metrics[0].resource.attributes}
    assert (told["service.name"], told["durable.role"]) == ("durable-cluster", "test")
    assert told["service.instance.id"].startswith(told["host.name"])


def test_values_are_sent_every_interval(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "10")
    with exported(collected, role="test"):
        eventually(lambda: len(receiver.requests) > 2)


def test_names_there_become_those_of_the_page_again() -> None:
    """By the rules by which Prometheus takes OTLP: dots, units and the ending of counters."""
    words = {"seconds": "_seconds", "bytes": "_bytes"}
    for metric in METRICS.values():
        ending = words.get(metric.unit, "") + ("_total" if metric.kind == "counter" else "")
        assert name_of(metric).replace(".", "_") + ending == metric.name
    assert len({name_of(metric) for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize("is_silent", [True, False], ids=["takes and never answers", "refuses"])
def test_an_endpoint_that_is_away_holds_nobody_up(is_silent: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not is_silent:
            listener.close()
        exporter = OTLPMetricExporter(endpoint=f"http://127.0.0.1:{port}/v1/metrics")
        sender = Sender(exporter, collected, role="test", interval_s=0.01)
        sender.start()
        began = time.monotonic()
        sender.stop()
        assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_METRICS_EXPORTER", "console", "OTEL_METRICS_EXPORTER=console: choose otlp or none"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1m", "OTEL_METRIC_EXPORT_INTERVAL=1m: it is a whole number of milliseconds"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "OTEL_METRIC_EXPORT_INTERVAL=0"),
    ],
)
def test_what_cannot_be_is_told_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=re.escape(said)), exported(collected, role="test"):
        pass


def test_a_missing_exporter_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'durable-cluster\[otlp\]'"),
        exported(collected, role="t"),
    ):
        pass


def test_a_program_that_runs_its_own_steps_sends_what_it_counted(
    dsn: str, conn: psycopg.Connection[Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App("sending", dsn=dsn)
    quick = app.machine("quick", state=str)

    @quick.step(start=True)
    def end(ctx: Context, text: str) -> Continuation:
        return ctx.done()

    quick.start_many(["x"] * 30)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    app.run(until_idle=True)
    found = receiver.last()
    assert sum(numbers(found["durable.steps"]).values()) == 30
    assert numbers(found["durable.database_up"]) == {(): 1}
    ids = {one for (one,) in conn.execute("select durable.hex(id) from durable.started")}
    sent = b"".join(request.SerializeToString() for request in receiver.requests).decode("latin-1")
    assert set(re.findall("[0-9a-f]{32}", sent)).isdisjoint(ids)
    assert len(ids) == 30


def test_an_empty_histogram_adds_up_to_nothing() -> None:
    empty = Histogram.over(STEPS)
    empty.add_all(Histogram.over(STEPS))
    assert empty == Histogram([0] * 11)
