"""Metrics sent by OTLP over HTTP, in a thread of its own: an endpoint that is away or slow holds nobody up.

Imports opentelemetry only once it is known that something is to be sent.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from durable_cluster.errors import ConfigurationError
from durable_cluster.meters import Histogram
from durable_cluster.metrics import COUNTER, HISTOGRAM, Family, Metric
from durable_cluster.settings import metric_export_interval_s, sends_metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricsData

LAST_S = 1.0
UNITS = {"seconds": "s", "bytes": "By"}

logger = logging.getLogger("durable_cluster.metrics")

Collect = Callable[[], Iterable[Family]]


@contextmanager
def exported(collect: Collect, *, role: str) -> Iterator[None]:
    """Inside, what ``collect`` gives is sent now and then if the environment says where to, and at the end once more.

    Raises ConfigurationError where the exporter is not installed.
    """
    if not sends_metrics():
        yield
        return
    sender = Sender(_exporter(), collect, role=role, interval_s=metric_export_interval_s())
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def _exporter() -> MetricExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter  # an extra
    except ImportError as error:
        raise ConfigurationError(
            "an endpoint for metrics is set (OTEL_EXPORTER_OTLP_ENDPOINT) but the exporter is not installed;"
            " pip install 'durable-cluster[otlp]', or set OTEL_METRICS_EXPORTER=none"
        ) from error
    return OTLPMetricExporter()


class Sender(threading.Thread):
    """Gives ``exporter`` all that ``collect`` gives, every ``interval_s`` seconds and at the end."""

    def __init__(self, exporter: MetricExporter, collect: Collect, *, role: str, interval_s: float) -> None:
        super().__init__(name="durable-metrics", daemon=True)
        self._exporter = exporter
        self._collect = collect
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._began_ns = time.time_ns()
        host, pid = socket.gethostname(), os.getpid()
        self._resource = {
            "service.name": "durable-cluster",
            "service.instance.id": f"{host}:{pid}",
            "host.name": host,
            "durable.role": role,
        }

    def run(self) -> None:
        """Send until it is over."""
        while not self._is_over.wait(self._interval_s):
            self._send()
        self._send()

    def stop(self) -> None:
        """Send once more, for a second at the most; an export that hangs is left behind."""
        self._is_over.set()
        self.join(LAST_S)
        self._exporter.shutdown()

    def _send(self) -> None:
        try:
            self._export()
        except Exception as error:  # an exporter's, or a database's: the next time may go well
            logger.warning("metrics were not sent: %s", error)

    def _export(self) -> None:
        self._exporter.export(data_of(self._collect(), self._resource, began_ns=self._began_ns, now_ns=time.time_ns()))


def data_of(families: Iterable[Family], resource: dict[str, str], *, began_ns: int, now_ns: int) -> MetricsData:
    """The values as the SDK's exporters take them: cumulative."""
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    metrics = [_metric(family, began_ns, now_ns) for family in families if family.values]
    scope = ScopeMetrics(InstrumentationScope("durable_cluster"), metrics, "")
    return MetricsData([ResourceMetrics(Resource.create(dict(resource)), [scope], "")])


def name_of(metric: Metric) -> str:
    """Its name there: without seconds or bytes, which stand beside it, and a counter's ending."""
    name = metric.name.removesuffix("_total")
    return (name.removesuffix(f"_{metric.unit}") if metric.unit in UNITS else name).replace("durable_", "durable.", 1)


def _metric(family: Family, began_ns: int, now_ns: int) -> Any:
    from opentelemetry.sdk.metrics import export

    metric = family.metric
    points = [_point(metric, labels, value, began_ns, now_ns) for labels, value in family.values.items()]
    data: Any
    if metric.kind == COUNTER:
        data = export.Sum(points, export.AggregationTemporality.CUMULATIVE, is_monotonic=True)
    elif metric.kind == HISTOGRAM:
        data = export.Histogram(points, export.AggregationTemporality.CUMULATIVE)
    else:
        data = export.Gauge(points)
    return export.Metric(
        name_of(metric), metric.help, UNITS.get(metric.unit, metric.unit and f"{{{metric.unit}}}"), data
    )


def _point(metric: Metric, labels: tuple[str, ...], value: float | Histogram, began_ns: int, now_ns: int) -> Any:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint, NumberDataPoint

    attributes = {label: said for label, said in zip(metric.labels, labels, strict=True) if said}
    if not isinstance(value, Histogram):
        return NumberDataPoint(attributes, began_ns, now_ns, value)
    unknown: Any = None  # nobody keeps the least and the greatest
    return HistogramDataPoint(
        attributes, began_ns, now_ns, sum(value.counts), value.sum, value.counts, metric.bounds, unknown, unknown
    )
