"""The page of costs: what each type of workflow writes and keeps, by samples of what is stored anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster.ops import costs, lookups
from durable_cluster.ops.console.access import Access, access_of
from durable_cluster.ops.console.processor import step_cpu_s
from durable_cluster.ops.console.shared import Shared
from durable_cluster.ops.console.views import render
from durable_cluster.ops.costs import Kept, Log, Reading

FRESH_S = 15.0
"""So long what was sampled counts."""
SPAN_S_MIN, SPAN_S_MAX = 5.0, 3_600.0
"""How long the span is over which WAL is counted."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a type costs, estimated; None: not known. ``share``: its part of the bytes that were written for steps, 0 to 1.

    ``wal_bytes``: of the server's WAL a step event, as ``share`` says. ``cpu_share``: of the processor time of all steps.
    ``kept_bytes``: of starts and results.
    """

    workflow: str
    steps: float
    steps_per_s: float | None
    step_bytes: float | None
    share: float
    wal_bytes: float | None
    cpu_share: float | None
    workflows: float
    living: float
    kept_bytes: float
    sampled: int


class Wal(msgspec.Struct, frozen=True, kw_only=True):
    """What the server wrote within a span, for all that it does. ``per_step``: None where too little was appended meanwhile."""

    seconds: float
    bytes: int
    steps: float
    per_step: float | None


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """The page. ``wal`` is None until two looks are some seconds apart; ``cpu_s``: of all steps, as clusters say, else 0."""

    types: list[Cost]
    log: Log
    wal: Wal | None
    cpu_s: float


class Meter:
    """The samples of one console: however many look, they are taken once in a while, and never while nobody looks."""

    def __init__(self, access: Access, metrics: Sequence[str]) -> None:
        self._access = access
        self._metrics = metrics
        self._first: Reading | None = None
        self._shared = Shared(self._read, fresh_s=FRESH_S)

    def costs(self) -> Costs:
        """As they are now, or were a few seconds ago. Raises DurableError, psycopg.Error, Refused."""
        return self._shared.newest()

    def _read(self) -> Costs:
        with self._access.connection() as connection:
            shards = lookups.installed(connection).shards
            now = costs.reading(connection)
            kept = costs.kept_sample(connection)
        parts = []
        for shard in range(shards):  # each by itself: none keeps a rotation waiting for long
            with self._access.connection() as connection:
                parts += costs.log_sample(connection, shard)
        log = costs.log_of(parts)
        wal = wal_between(self._first, now, log)
        if self._first is None or (now.at - self._first.at).total_seconds() > SPAN_S_MAX:
            self._first = now
        cpu_s = step_cpu_s(self._metrics)
        return Costs(types=costs_of(log, kept, wal, cpu_s), log=log, wal=wal, cpu_s=sum(cpu_s.values()))


def wal_between(first: Reading | None, now: Reading, log: Log) -> Wal | None:
    """From one look to the next. How many steps an entry of the log holds, those for timelines included, the sample says."""
    if first is None or (now.at - first.at).total_seconds() < SPAN_S_MIN or now.wal_bytes < first.wal_bytes:
        return None
    written = now.wal_bytes - first.wal_bytes
    steps = (now.entries - first.entries) * (log.lines / log.entries if log.entries else 0.0)
    return Wal(
        seconds=(now.at - first.at).total_seconds(),
        bytes=written,
        steps=steps,
        per_step=written / steps if steps >= 1 else None,
    )


def costs_of(log: Log, kept: Sequence[Kept], wal: Wal | None, cpu_s: Mapping[str, float]) -> list[Cost]:
    """Type by type, those that write the most first. ``cpu_s``: seconds of processor time by type, as far as they are known."""
    logged = {one.workflow: one for one in log.types}
    stored = {one.workflow: one for one in kept}
    cpu_total_s = sum(cpu_s.values())
    found = []
    for name in {**logged, **stored, **cpu_s}:
        lines = logged[name].lines if name in logged else 0.0
        size = logged[name].bytes if name in logged else 0.0
        share = size / log.bytes if log.bytes else 0.0
        mine = stored.get(name)
        found.append(
            Cost(
                workflow=name,
                steps=lines,
                steps_per_s=lines / log.seconds if log.seconds else None,
                step_bytes=size / lines if lines else None,
                share=share,
                # The WAL of all steps, in proportion to bytes.
                wal_bytes=wal.per_step * share * log.lines / lines if wal and wal.per_step and lines else None,
                cpu_share=cpu_s.get(name, 0.0) / cpu_total_s if cpu_total_s else None,
                workflows=mine.workflows if mine else 0.0,
                living=mine.living if mine else 0.0,
                kept_bytes=mine.input_bytes + mine.output_bytes if mine else 0.0,
                sampled=logged[name].sampled if name in logged else 0,
            )
        )
    return sorted(found, key=lambda one: (-one.share, -one.kept_bytes, one.workflow))


def show(request: Request) -> Response:
    """The types, and how each figure was come by."""
    state = request.app.state
    if not hasattr(state, "meter"):
        state.meter = Meter(access_of(request), state.settings.metrics)
    return render(request, "cost.html", costs=state.meter.costs())


routes = [Route("/cost", show)]
