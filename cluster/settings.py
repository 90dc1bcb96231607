"""Every setting with its default and unit, and the only reader of the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from durable_cluster.errors import AppError, ConfigurationError

SHARDS_MAX = 64
RETENTION_DAYS_MAX = 36_500
MAY_BE_ZERO = ("page_window_ms", "takeover_probe_s", "restarts_max", "functions_max", "run_ahead_ms")
NAME_PATTERN = "[a-z0-9_.-]{1,57}"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and intervals of one cluster; each can be given to ``App`` or on the command line.

    ``functions_max``: how many linear workflows' functions a process keeps between steps, some 6 KB each; others are entered anew.
    ``run_ahead_ms``: for so long quick steps of such a workflow run one after the other and are committed together; 0: each alone.
    """

    page_lines_max: int = 1_000
    page_window_ms: int = 50
    page_bytes_max: int = 1 << 20
    transactional_steps_max: int = 100
    payload_bytes_max: int = 256 << 10
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
    busy_poll_s: float = 1.0
    takeover_probe_s: float = 0.5
    maintenance_s: float = 5.0
    lock_timeout_ms: int = 5_000
    restarts_max: int = 20
    restart_window_s: float = 60.0
    retention_days: int = 30
    audit_days: int = 90

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


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says; nothing else in the package reads it. ``actor``: on whose behalf, for the audit.

    ``trace_sample``: which part of all workflows is traced step by step, from 0 to 1.
    """

    dsn: str | None
    data: Path
    pg_bin: Path | None
    otlp_endpoint: str | None
    actor: str | None = None
    trace_sample: float = 0.01


def environment() -> Environment:
    """Read the environment now (never at import)."""
    pg_bin = os.environ.get("DURABLE_PG_BIN")
    return Environment(
        dsn=os.environ.get("DURABLE_DSN") or None,
        data=Path(os.environ.get("DURABLE_DATA") or ".durable"),
        pg_bin=Path(pg_bin) if pg_bin else None,
        otlp_endpoint=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or None,
        actor=os.environ.get("DURABLE_ACTOR") or None,
        trace_sample=_part("DURABLE_TRACE_SAMPLE", default=0.01),
    )


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
