"""The Prometheus page of one host, and two addresses that say whether it is well. In threads: a slow reader holds nobody up."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import msgspec

from durable_cluster.errors import ConfigurationError
from durable_cluster.meters import Histogram
from durable_cluster.metrics import COUNTER, HISTOGRAM, Family
from durable_cluster.settings import METRICS

READERS_MAX = 8
READER_S_MAX = 10.0

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Families = Callable[[], Iterable[Family]]
Unread = Callable[[], Sequence[int]]
"""Which shards nobody reads."""


class Address(msgspec.Struct, frozen=True):
    """Where the page is served."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address_of(said: str, *, source: str) -> Address:
    """``[HOST:]PORT`` as an address; without a host this machine alone can read it. Raises ConfigurationError."""
    host, _, port = said.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigurationError(f"{source}{said}: the metrics page needs a port, such as {METRICS} or 9464")
    return Address(host or "127.0.0.1", int(port))


class Page:
    """A page that is served. ``address``: with the port that the system chose, where 0 was asked for."""

    def __init__(self, address: Address, app: App) -> None:
        try:
            infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, place = infos[0]
            self._server = _Server(place[:2], family)
        except OSError as error:
            raise ConfigurationError(
                f"the metrics page cannot be served at {address}: {error.strerror or error};"
                " choose another address with --metrics HOST:PORT"
            ) from error
        self._server.set_app(app)
        self.address = Address(address.host, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="durable-metrics-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer; whoever is being answered is left alone."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def served(address: Address, *, families: Families, unread: Unread) -> Iterator[Page]:
    """Inside, the page is served. Raises ConfigurationError: the extra is missing, or the address cannot be had."""
    page = Page(address, _app(families, unread))
    try:
        yield page
    finally:
        page.close()


class _Handler(WSGIRequestHandler):
    timeout = READER_S_MAX

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape is no news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread a reader, and so many at most: who comes beside them is sent away."""

    daemon_threads = True

    def __init__(self, place: tuple[Any, ...], family: int) -> None:
        self.address_family = family
        self._seats = threading.BoundedSemaphore(READERS_MAX)
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        """As its parents do, without asking for the host's name: that may take long."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._seats.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._seats.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a reader that goes away in the middle is no news either."""


def _app(families: Families, unread: Unread) -> App:
    """What answers: ``/metrics``, ``/-/healthy``, ``/-/ready``."""
    if find_spec("prometheus_client") is None:
        raise ConfigurationError("the metrics page needs the extra 'metrics': pip install 'durable-cluster[metrics]'")
    prometheus_client = import_module("prometheus_client")
    registry = prometheus_client.CollectorRegistry(auto_describe=False)
    registry.register(_Collector(families))
    metrics: App = prometheus_client.make_wsgi_app(registry)

    def answer(request: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if request["PATH_INFO"] == "/metrics":
            return metrics(request, start_response)
        status, text = _told(request["PATH_INFO"], unread)
        body = f"{text}\n".encode()
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [] if request["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def _told(path: str, unread: Unread) -> tuple[str, str]:
    if path == "/-/healthy":
        return "200 OK", "healthy"
    if path != "/-/ready":
        return "404 Not Found", "there are /metrics, /-/healthy and /-/ready"
    if shards := unread():
        return "503 Service Unavailable", f"not ready: no process reads shard {', '.join(map(str, shards))}"
    return "200 OK", "ready"


class _Collector:
    """The metrics in the form of the library that writes them."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Any]:
        """Every metric that has a value."""
        return (_written(family) for family in self._families() if family.values)


def _written(family: Family) -> Any:
    core = import_module("prometheus_client.core")
    metric = family.metric
    kinds = {COUNTER: core.CounterMetricFamily, HISTOGRAM: core.HistogramMetricFamily}
    written: Any = kinds.get(metric.kind, core.GaugeMetricFamily)(metric.name, metric.help, labels=metric.labels)
    for labels, value in family.values.items():
        if isinstance(value, Histogram):
            written.add_metric(labels, _cumulated(metric.bounds, value.counts), value.sum)
        else:
            written.add_metric(labels, value)
    return written


def _cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """How many values lie at or below each bound."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))
