"""Where spans go: by OTLP over HTTP, or to the console; behind a bounded queue, so that whoever takes them cannot slow a step.

What the queue has no room for, what the exporter could not deliver and what is left when its time to end is over is dropped and
counted. The log says so, at most once a minute.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult

from durable_cluster.errors import ConfigurationError
from durable_cluster.settings import CONSOLE

logger = logging.getLogger("durable_cluster.telemetry")

SHUTDOWN_S = 1.5
WARN_S = 60.0
BATCH_MAX = 512
CONSOLE_DELAY_MS = 200
EXPORTERS_SAY = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.exporter.otlp.common.http")


class BoundedSpans(SpanProcessor):
    """At most ``queue_max`` spans wait for ``exporter``, which a thread of its own calls.

    ``dropped``: how many got nowhere; ``on_lost`` is told which, but for those that an end leaves behind.
    """

    def __init__(self, exporter: SpanExporter, *, queue_max: int, delay_ms: float | None = None) -> None:
        self.dropped = 0
        self.on_lost: Callable[[Sequence[ReadableSpan]], None] = lambda spans: None
        self._lock = threading.Lock()
        self._waiting = 0
        self._queue_max = queue_max
        self._is_ending = False
        self._complaint = Complaint()
        # Its own queue drops the oldest, and says it to nobody: it never fills, because what waits is counted here.
        self._batches = BatchSpanProcessor(
            _Counted(exporter, self),
            max_queue_size=queue_max,
            max_export_batch_size=None if queue_max >= BATCH_MAX else queue_max,
            schedule_delay_millis=delay_ms,
        )

    def on_end(self, span: ReadableSpan) -> None:
        """Queue it, if there is room."""
        if not (span.context and span.context.trace_flags.sampled):
            return
        with self._lock:
            has_room = self._waiting < self._queue_max and not self._is_ending
            if has_room:
                self._waiting += 1
        if has_room:
            self._batches.on_end(span)
        else:
            self.on_lost([span])
            self._lose(1)

    def shutdown(self) -> None:
        """Send what waits, for a second or two; what is left then is lost. Safe twice."""
        self._is_ending = True
        ending = threading.Thread(target=self._batches.shutdown, name="durable-spans-end", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_S)
        if ending.is_alive():
            self.ended(self._waiting, is_lost=True)
        else:
            self._complaint.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits now."""
        return self._batches.force_flush(timeout_millis)

    def begun(self) -> None:
        """The thread that calls this has the exporter send some."""
        self._complaint.thread_id = threading.get_ident()

    def ended(self, count: int, *, is_lost: bool) -> None:
        """So many wait no longer."""
        with self._lock:
            count = min(count, self._waiting)  # at the end they were given up already
            self._waiting -= count
        if is_lost and count:
            self._lose(count)

    def _lose(self, count: int) -> None:
        with self._lock:
            self.dropped += count
        self._complaint.speak(self.dropped)


class _Counted(SpanExporter):
    """An exporter, and what became of each batch."""

    def __init__(self, exporter: SpanExporter, queue: BoundedSpans) -> None:
        self._exporter = exporter
        self._queue = queue

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._queue.begun()
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            is_lost = result is not SpanExportResult.SUCCESS
            if is_lost:
                self._queue.on_lost(spans)
            self._queue.ended(len(spans), is_lost=is_lost)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class Complaint(logging.Filter):
    """One warning a minute in place of all that the exporter in ``thread_id`` says of each batch; it quotes the last of that."""

    def __init__(self) -> None:
        super().__init__()
        self.thread_id: int | None = None
        self._reason = "the queue is full"
        self._speak_at = 0.0
        for name in EXPORTERS_SAY:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep what it says, and let through what others say."""
        if record.thread != self.thread_id:
            return True
        self._reason = record.getMessage()
        return False

    def speak(self, dropped: int) -> None:
        """Warn, unless that was a moment ago."""
        now = time.monotonic()
        if now < self._speak_at:
            return
        self._speak_at = now + WARN_S
        logger.warning(
            "spans lost so far: %d (%s); no step waits for them. See whether what OTEL_EXPORTER_OTLP_ENDPOINT names is up",
            dropped,
            self._reason,
        )

    def close(self) -> None:
        """The exporter has ended."""
        for name in EXPORTERS_SAY:
            logging.getLogger(name).removeFilter(self)


def processors(names: Sequence[str], *, queue_max: int) -> list[BoundedSpans]:
    """One for each exporter of ``OTEL_TRACES_EXPORTER``. Raises ConfigurationError for one that is not installed."""
    return [_console(queue_max) if name == CONSOLE else _otlp(queue_max) for name in names]


def _console(queue_max: int) -> BoundedSpans:
    """A line of JSON each, on standard error: what a command answers with is on the other."""
    exporter = ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: f"{span.to_json(indent=None)}\n")
    return BoundedSpans(exporter, queue_max=queue_max, delay_ms=CONSOLE_DELAY_MS)


def _otlp(queue_max: int) -> BoundedSpans:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # an extra
    except ImportError as error:
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER is set but the exporter is not installed;"
            " pip install 'durable-cluster[otlp]'"
        ) from error
    return BoundedSpans(OTLPSpanExporter(), queue_max=queue_max)
