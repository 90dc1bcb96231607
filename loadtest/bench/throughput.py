"""Workloads W1 and W3: a backlog of ten-step flows, steps counted while it is worked off, and what they cost.

The backlog is loaded before the clock starts, and is larger than what can be done while it runs. The clock is a window: steps
counted in it, cost and rows in it. Beside a held snapshot the window has two parts, the snapshot is taken between them and
kept; the drift is what the last third of the second part has lost against the first part.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import pairwise
from statistics import median

from durable_cluster.loadtest.bench import meters
from durable_cluster.loadtest.bench.cells import Cell, Point, Results
from durable_cluster.loadtest.bench.meters import Cost
from durable_cluster.loadtest.bench.scene import Scene, held_snapshot, scene
from durable_cluster.loadtest.bench.work import TEN_STEPS, Flow
from durable_cluster.loadtest.peers.base import System, Workers
from durable_cluster.loadtest.stage import StageError

WORKLOAD = "W1"
RELATIONS = "W3"
CALIBRATION_S = 1.0
CALIBRATION_FLOWS = 40
CALIBRATION_S_MAX = 60.0
MARGIN = 1.5
WARM_SHARE = 0.1
LOADED_AT_ONCE = 10_000
MIB = 1 << 20

Look = tuple[float, int, meters.Reading]


def throughput(
    kind: type[System],
    server: str,
    results: Results,
    *,
    seconds: float,
    held_s: float = 0.0,
    bucket_s: float,
    condition: str = "",
    like: Flow = TEN_STEPS,
    round_: int = 1,
) -> None:
    """Measure ``seconds`` of it, and then ``held_s`` beside a held snapshot. Adds its cells and points to ``results``."""
    with scene(kind, server) as here, here.system.workers(kind.processes) as workers:
        rate = _calibrated(here, workers, like)
        window_s = seconds + held_s
        _load(here, like, steps=rate * (window_s * (1 + WARM_SHARE) + 1) * MARGIN)
        time.sleep(window_s * WARM_SHARE)
        with ExitStack() as stack:
            looks = [_look(here, workers)]
            for number in range(1, max(2, round(window_s / bucket_s)) + 1):
                if held_s and number == round(seconds / bucket_s) + 1:
                    stack.enter_context(held_snapshot(here.system.dsn))
                time.sleep(max(0.0, looks[0][0] + number * bucket_s - time.perf_counter()))
                looks.append(_look(here, workers))
                _top_up(here, like, looks, rest_s=(round(window_s / bucket_s) - number) * bucket_s)
            workers.demand_running()
            peak = meters.peak_bytes(workers.pids)
            results.cells += _relations(here, condition, round_)
        results.points += _points(kind.name, condition, round_, looks)
        results.cells += _cells(kind.name, condition, round_, looks, peak=peak, free_s=seconds, held_s=held_s)


def _calibrated(here: Scene, workers: Workers, like: Flow) -> float:
    """Steps a second, of a backlog that takes a second."""
    flows = CALIBRATION_FLOWS
    while True:
        before, begun = here.ledger.steps(), time.perf_counter()
        here.system.start_many(here.flows(flows, like))
        here.await_steps(workers, before + flows * like.of, timeout_s=CALIBRATION_S_MAX)
        spent_s = time.perf_counter() - begun
        if spent_s >= CALIBRATION_S:
            return flows * like.of / spent_s
        flows *= 4


def _load(here: Scene, like: Flow, *, steps: float) -> None:
    left = int(steps / like.of) + 1
    while left > 0:
        here.system.start_many(here.flows(min(left, LOADED_AT_ONCE), like))
        left -= LOADED_AT_ONCE


def _top_up(here: Scene, like: Flow, looks: list[Look], *, rest_s: float) -> None:
    """Load more if what is left would not last: a large backlog may be worked off faster than the small one that calibrated."""
    (earlier_s, earlier, _), (at_s, steps, _) = looks[-2:]
    rate = (steps - earlier) / (at_s - earlier_s)
    if here.flows_made * like.of - steps < rate * min(rest_s, 2 * (at_s - earlier_s)):
        _load(here, like, steps=rate * rest_s * MARGIN)


def _look(here: Scene, workers: Workers) -> Look:
    return time.perf_counter(), here.ledger.steps(), here.read(workers)


def _points(system: str, condition: str, round_: int, looks: list[Look]) -> Iterable[Point]:
    for (earlier_s, earlier, _), (at_s, steps, reading) in pairwise(looks):
        for metric, value in (
            ("steps/s", (steps - earlier) / (at_s - earlier_s)),
            ("dead rows", float(reading.dead)),
            ("MiB", (reading.table_bytes + reading.index_bytes) / MIB),
        ):
            yield Point(
                system=system,
                workload=WORKLOAD,
                condition=condition,
                metric=metric,
                at_s=at_s - looks[0][0],
                value=value,
                round=round_,
            )


def _relations(here: Scene, condition: str, round_: int) -> Iterable[Cell]:
    """What was written to each table since the beginning, calibration and loading included."""
    for one in meters.relations(here.connection):
        for metric in ("inserted", "updated", "deleted", "dead"):
            yield Cell(
                system=here.system.name,
                workload=RELATIONS,
                condition=condition,
                metric=f"{one.table} {metric}",
                value=getattr(one, metric),
                unit="rows",
                round=round_,
            )


def _cells(
    system: str, condition: str, round_: int, looks: list[Look], *, peak: int, free_s: float, held_s: float
) -> Iterable[Cell]:
    def cell(metric: str, value: float | None, unit: str) -> Cell:
        return Cell(
            system=system, workload=WORKLOAD, condition=condition, metric=metric, value=value, unit=unit, round=round_
        )

    first_s, first, first_reading = looks[0]
    last_s, last, last_reading = looks[-1]
    steps = last - first
    if not steps:
        raise StageError("no step ran while the clock did")
    cost = meters.between(first_reading, last_reading)
    yield cell("steps/s", steps / (last_s - first_s), "steps/s")
    yield from (cell(*told) for told in _of_a_step(cost, steps))
    yield cell("autovacuums", cost.autovacuums, "runs")
    yield cell("memory", peak / MIB, "MiB")
    if held_s:
        rates = [
            (at_s - first_s, (now - before) / (at_s - before_s))
            for (before_s, before, _), (at_s, now, _) in pairwise(looks)
        ]
        free = median(rate for at_s, rate in rates if at_s <= free_s * 1.01)
        late = median(rate for at_s, rate in rates if at_s > free_s + held_s * 2 / 3)
        yield cell("steps/s before", free, "steps/s")
        yield cell("steps/s at the end", late, "steps/s")
        yield cell("drift", 100 * (1 - late / free), "%")


def _of_a_step(cost: Cost, steps: int) -> Iterable[tuple[str, float | None, str]]:
    server_us = None if cost.server_s is None else cost.server_s / steps * 1e6
    workers_us = cost.workers_s / steps * 1e6
    yield "CPU", None if server_us is None else server_us + workers_us, "µs/step"
    yield "CPU of Postgres", server_us, "µs/step"
    yield "CPU of workers", workers_us, "µs/step"
    yield "WAL", cost.wal_bytes / steps, "B/step"
    yield "growth", (cost.table_bytes + cost.index_bytes) / steps, "B/step"
    yield "changed rows", cost.changed / steps, "rows/step"
    yield "dead rows", cost.dead / steps, "rows/step"
    yield "transaction ids", cost.xids / steps, "/step"
    yield "commits", cost.commits / steps, "/step"
