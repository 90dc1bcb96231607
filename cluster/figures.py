"""What the database says of itself when somebody asks: read at most now and then, for so long and no longer, and never unasked."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.database import connect
from durable_cluster.errors import DurableError, translated

logger = logging.getLogger("durable_cluster.figures")

FRESH_S = 5.0
PATIENCE_S = 0.8
STATEMENT_MS = 500
LOCK_MS = 100

Connection = psycopg.Connection[Any]


class OfShard(msgspec.Struct, frozen=True, kw_only=True):
    """One shard: see ``durable.shard_figures``."""

    shard: int
    lag_events: int
    lag_s: float
    consumers: int
    rotation_age_s: float
    log_bytes: int


class Aside(msgspec.Struct, frozen=True, kw_only=True):
    """What is not in the log: see ``durable.figures``."""

    timers_due: int
    timer_lag_s: float
    schedule_lag_s: float
    sleeping: int
    waits: int
    joins: int
    detached_waiting: int
    queued: int
    parked: int
    stuck: int
    wal_bytes: int | None
    history_lag_s: float | None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One look. ``dead_tuples``: by table."""

    shards: list[OfShard]
    aside: Aside
    dead_tuples: dict[str, int]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The last good look, if there ever was one, and whether the last one was good."""

    is_up: bool = False
    figures: Figures | None = None


def read(connection: Connection) -> Figures:
    """Read all of them. Raises DurableError, psycopg.Error."""
    with translated():
        dead = connection.execute(
            "select regexp_replace(relation, '(_[0-9]+)+$|_default$', ''), sum(dead)::bigint from durable.row_changes()"
            " group by 1 order by 1"
        ).fetchall()
    return Figures(shards=shards(connection), aside=aside(connection), dead_tuples=dict(dead))


def shards(connection: Connection) -> list[OfShard]:
    """Those of shards alone. Raises DurableError, psycopg.Error."""
    with translated(), connection.cursor(row_factory=kwargs_row(OfShard)) as cursor:
        return cursor.execute(
            "select shard, lag_events, lag_s, consumers, rotation_age_s, log_bytes from durable.shard_figures()"
        ).fetchall()


def aside(connection: Connection) -> Aside:
    """Those of what is not in the log alone. Raises DurableError, psycopg.Error."""
    with translated(), connection.cursor(row_factory=kwargs_row(Aside)) as cursor:
        found = cursor.execute(
            "select timers_due, timer_lag_s, schedule_lag_s, sleeping, waits, joins, detached_waiting, queued, parked, stuck,"
            " wal_bytes::bigint, history_lag_s from durable.figures()"
        ).fetchone()
    assert found is not None
    return found


class Reader:
    """Reads on demand, in a thread of its own: whoever asks waits for it for a moment only, however long the database takes."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._lock = threading.Lock()
        self._is_through = threading.Event()
        self._is_through.set()
        self._fresh_until = 0.0
        self._reading = Reading()

    def latest(self) -> Reading:
        """What was read in the last seconds, or is read now."""
        with self._lock:
            if self._is_through.is_set():
                if time.monotonic() < self._fresh_until:
                    return self._reading
                self._is_through.clear()
                threading.Thread(target=self._read, name="durable-figures", daemon=True).start()
        is_in_time = self._is_through.wait(PATIENCE_S)
        return self._reading if is_in_time else Reading(figures=self._reading.figures)

    def _read(self) -> None:
        reading = Reading(figures=self._reading.figures)
        try:
            with connect(self._dsn, name="durable-cluster metrics") as connection:
                connection.execute(
                    "select set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false),"
                    " set_config('jit', 'off', false), set_config('default_transaction_read_only', 'on', false)",
                    (str(STATEMENT_MS), str(LOCK_MS)),
                )
                reading = Reading(is_up=True, figures=read(connection))
        except (DurableError, psycopg.Error) as error:
            logger.info("the database's figures could not be read: %s", type(error).__name__)
        finally:
            self._reading = reading
            self._fresh_until = time.monotonic() + FRESH_S
            self._is_through.set()
