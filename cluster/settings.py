"""Every setting with its default and unit, and the only reader of the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from durable_cluster.errors import AppError, ConfigurationError

SHARDS_MAX = 64
RETENTION_DAYS_MAX = 36_500
MAY_BE_ZERO = ("page_window_ms", "takeover_probe_s", "restarts_max", "functions_max", "run_ahead_ms", "history_sample")
METRICS = "127.0.0.1:9464"
NAME_PATTERN = "[a-z0-9_.-]{1,57}"
OTLP, CONSOLE = "otlp", "console"
SPANS_MAX = 2_048
LOG_FORMATS = ("json", "pretty", "plain")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and intervals of one cluster; each can be given to ``App`` or on the command line. See ``MEANINGS``."""

    page_lines_max: int = 1_000
    page_window_ms: int = 50
    page_bytes_max: int = 1 << 20
    transactional_steps_max: int = 100
    payload_bytes_max: int = 256 << 10
    memo_bytes_max: int = 16 << 20
    dead_interval_s: float = 15.0
    heartbeat_s: float = 1.0
    boot_timeout_s: float = 30.0
    hang_timeout_s: float = 300.0
    step_timeout_s: float = 300.0
    hang_grace_s: float = 10.0
    detached_max: int = 1_000
    blocking_threads_max: int = 32
    max_crashes: int = 3
    functions_max: int = 10_000
    run_ahead_ms: int = 10
    unroutable_limit_s: float = 86_400.0
    sweep_s: float = 0.02
    drain_grace_s: float = 30.0
    idle_poll_s_max: float = 1.0
    busy_poll_s: float = 0.01
    takeover_probe_s: float = 0.5
    maintenance_s: float = 5.0
    lock_timeout_ms: int = 5_000
    restarts_max: int = 20
    restart_window_s: float = 60.0
    retention_days: int = 30
    audit_days: int = 90
    history_sample: float = 0.0
    history_lag_max_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("retention_days", "audit_days"):
            days = getattr(self, name)
            if not isinstance(days, int) or not 1 <= days <= RETENTION_DAYS_MAX:
                raise ConfigurationError(
                    f"setting {name}: {days} is out of range; choose 1 to {RETENTION_DAYS_MAX} whole days"
                )
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                raise ConfigurationError(f"setting {name}: {value} is out of range; it is more than zero")
        if not self.history_sample <= 1:
            raise ConfigurationError(
                f"setting history_sample: {self.history_sample} is a part of all workflows, from 0 to 1"
            )


MEANINGS = {
    "page_lines_max": "step events that a process reads, runs and commits at once",
    "page_window_ms": "after so long a page is cut and committed; async and blocking steps that still run go on beside the pages",
    "page_bytes_max": "bytes of step events that a process reads at once",
    "transactional_steps_max": "transactional steps of a page that share one transaction",
    "payload_bytes_max": "bytes of an input, a state, an output or a signal, as JSON",
    "memo_bytes_max": "bytes that a linear workflow may have on record of its awaits, as JSON, before any codec",
    "dead_interval_s": "a process that says nothing for so long loses its windows to a sibling",
    "heartbeat_s": "how often processes that hold work say that they live",
    "boot_timeout_s": "a process that is not ready within this ends the cluster with its error",
    "hang_timeout_s": "a process whose loop stands still for so long is killed and started again",
    "step_timeout_s": "how long a step may run that names no timeout of its own",
    "hang_grace_s": "a step that is beyond its timeout gets so long to end before its process is given up",
    "detached_max": "steps that a process runs beside its pages at the same time",
    "blocking_threads_max": "threads of a process for its blocking steps",
    "max_crashes": "so many processes may die with a step; one more, and it becomes a dead letter",
    "functions_max": "linear workflows whose functions a process keeps between steps, some 6 KB each; others are entered anew",
    "run_ahead_ms": "for so long quick steps of a linear workflow run in a row and are committed together; 0: each alone",
    "history_sample": "part of all workflows that is recorded for timeline(), from 0 to 1, whatever their type says",
    "history_lag_max_s": "what projects these records passes over what is older, so that it holds no log back",
    "unroutable_limit_s": "for so long a step waits for code that knows it before it becomes a dead letter",
    "sweep_s": "how often a process that has work looks for timers that are due",
    "drain_grace_s": "so long slow steps have to end when the cluster is told to stop; the rest is handed back",
    "idle_poll_s_max": "the longest pause between two looks of a process that has nothing to do and hears of nothing",
    "busy_poll_s": "for so long after its last work a process goes on looking often, before it waits to be notified",
    "takeover_probe_s": "how often a process looks for windows whose owner has fallen silent",
    "maintenance_s": "how often upkeep is due: partitions, rotation, retention, the names of the dead",
    "lock_timeout_ms": "a lock that a process does not get within this is an error, and the page is tried again",
    "restarts_max": "a process that ended by itself is started again so often within restart_window_s; one more ends the cluster",
    "restart_window_s": "the span in which restarts are counted",
    "retention_days": "days that a workflow is kept after its end",
    "audit_days": "days that rows of the audit are kept",
}
"""What each setting is for, in words that follow its name."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says; nothing else in the package reads it. ``actor``: on whose behalf, for the audit.

    ``trace_sample``: which part of all workflows is traced step by step, from 0 to 1. ``log_format``: one of LOG_FORMATS, if any.
    ``metrics``: where their page is served, ``[HOST:]PORT``.
    """

    dsn: str | None
    data: Path
    pg_bin: Path | None
    actor: str | None = None
    trace_sample: float = 0.01
    console_token: str | None = None
    console_viewer_token: str | None = None
    log_format: str | None = None
    metrics: str | None = None


def environment() -> Environment:
    """Read the environment now (never at import)."""
    pg_bin = os.environ.get("DURABLE_PG_BIN")
    return Environment(
        dsn=os.environ.get("DURABLE_DSN") or None,
        data=Path(os.environ.get("DURABLE_DATA") or ".durable"),
        pg_bin=Path(pg_bin) if pg_bin else None,
        actor=os.environ.get("DURABLE_ACTOR") or None,
        trace_sample=_part("DURABLE_TRACE_SAMPLE", default=0.01),
        console_token=os.environ.get("DURABLE_CONSOLE_TOKEN") or None,
        console_viewer_token=os.environ.get("DURABLE_CONSOLE_VIEWER_TOKEN") or None,
        log_format=_one_of("DURABLE_LOG_FORMAT", LOG_FORMATS),
        metrics=os.environ.get("DURABLE_METRICS") or None,
    )


def span_exporters() -> tuple[str, ...]:
    """By OpenTelemetry's own variables; without any, OTLP where an endpoint is set. Raises ConfigurationError.

    Read by who sends spans alone: what else runs in this environment may have exporters that nothing here knows.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    has_endpoint = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{of}ENDPOINT") for of in ("", "TRACES_"))
    said = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or (OTLP if has_endpoint else "none")
    names = tuple(dict.fromkeys(name.strip() for name in said.split(",")))
    if said == "none":
        return ()
    if unknown := [name for name in names if name not in (OTLP, CONSOLE)]:
        raise ConfigurationError(
            f"OTEL_TRACES_EXPORTER={said}: there is no '{unknown[0]}'; choose otlp, console, both, or none"
        )
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if OTLP in names and protocol not in (None, "", "http/protobuf"):
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: spans are sent by http/protobuf alone; leave it out and name the endpoint of"
            " that (usually port 4318), or set OTEL_TRACES_EXPORTER=none"
        )
    return names


def spans_max() -> int:
    """How many spans wait for an exporter. Raises ConfigurationError."""
    return _count("OTEL_BSP_MAX_QUEUE_SIZE", default=SPANS_MAX)


def _count(variable: str, *, default: int) -> int:
    """A whole number above zero. Raises ConfigurationError."""
    said = os.environ.get(variable)
    if said and not (said.isascii() and said.isdigit() and int(said)):
        raise ConfigurationError(f"{variable}={said}: it is a whole number above zero, such as {default}")
    return int(said) if said else default


def _one_of(variable: str, known: tuple[str, ...]) -> str | None:
    """One of these words, or None where nothing is said. Raises ConfigurationError."""
    said = os.environ.get(variable)
    if said and said not in known:
        raise ConfigurationError(f"{variable}={said}: choose {', '.join(known[:-1])} or {known[-1]}")
    return said or None


def sends_metrics() -> bool:
    """Whether metrics go out by OTLP, as OpenTelemetry's own variables say. Raises ConfigurationError."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    has_endpoint = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{of}ENDPOINT") for of in ("", "METRICS_"))
    said = os.environ.get("OTEL_METRICS_EXPORTER", "").strip().lower() or ("otlp" if has_endpoint else "none")
    if said not in ("otlp", "none"):
        raise ConfigurationError(
            f"OTEL_METRICS_EXPORTER={said}: choose otlp or none; for Prometheus there is --metrics"
        )
    return said == "otlp"


def metric_export_interval_s() -> float:
    """How often metrics are sent. Raises ConfigurationError."""
    said = os.environ.get("OTEL_METRIC_EXPORT_INTERVAL") or "60000"
    if not (said.isascii() and said.isdigit() and int(said)):
        raise ConfigurationError(
            f"OTEL_METRIC_EXPORT_INTERVAL={said}: it is a whole number of milliseconds, such as 60000"
        )
    return int(said) / 1000


def _part(variable: str, *, default: float) -> float:
    """A number from 0 to 1. Raises ConfigurationError."""
    said = os.environ.get(variable)
    try:
        part = default if not said else float(said)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise ConfigurationError(f"{variable}={said}: it is a part of all, from 0 to 1, such as 0.01")
    return part


def checked_name(what: str, name: str) -> str:
    """``name`` if it is one. Raises AppError."""
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise AppError(f"{what} name {str(name)[:80]!r} is not of [a-z0-9_.-], 1 to 57 characters")
    return name


def checked_shards(shards: int) -> int:
    """``shards`` if a cluster can have so many."""
    if not 1 <= shards <= SHARDS_MAX:
        raise ConfigurationError(f"shards: {shards} is out of range; choose 1 to {SHARDS_MAX}")
    return shards


class ServiceManager(msgspec.Struct, frozen=True, kw_only=True):
    """Where systemd listens, and how often it has to hear of this process: see sd_notify(3). None: it does not ask."""

    address: str | None = None
    watchdog_s: float | None = None


def service_manager() -> ServiceManager:
    """What systemd has told the process that it started; what that one starts inherits the words, and is not meant."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    is_meant = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
    return ServiceManager(
        address=os.environ.get("NOTIFY_SOCKET") or None,
        watchdog_s=int(usec) / 1e6 if usec.isascii() and usec.isdigit() and int(usec) and is_meant else None,
    )
