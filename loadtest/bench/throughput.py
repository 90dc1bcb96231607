"""Workloads W1 and W3: a backlog of ten-step flows, steps counted while it is worked off, and what they cost.

The backlog is loaded before the clock starts, and is larger than what can be done while it runs, or in a minute and a half: a
longer run loads more as it goes. The clock is a window: steps counted in it, cost and rows in it. Beside a held snapshot the
window has two parts, the snapshot is taken between them and kept; the drift is what the last third of the second part has lost
against the first part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
# Beside a held snapshot: seconds in which more is loaded do not count, and there are few; a machine may become twice as fast.
MARGIN_HELD = 2.5
WARM_SHARE = 0.1
WARM_S_MAX = 10.0
LOADED_AHEAD_S = 90.0
LOW_S = 5.0
LOADED_AT_ONCE = 10_000
MIB = 1 << 20

Look = tuple[float, int, meters.Reading, bool]
"""When, how many steps so far, the meters, and whether more was loaded since the look before: then it says little of steps."""


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
    with scene(kind, server) as here:
        fresh = meters.read(here.connection, pids=[])
        with here.system.workers(kind.processes) as workers:
            looks, peak = _watched(here, workers, like, seconds=seconds, held_s=held_s, bucket_s=bucket_s)
        here.await_end_of_sessions()
        whole = meters.between(fresh, meters.read(here.connection, pids=[]))
        told = _Told(kind.name, condition, round_)
        results.points += told.points(looks)
        results.cells += [
            *told.rates(looks, free_s=seconds, held_s=held_s),
            *told.costs(looks),
            *told.rows(whole, here.ledger.steps()),
            *told.relations(here),
            told.cell("memory", peak / MIB, "MiB"),
        ]


def _watched(
    here: Scene, workers: Workers, like: Flow, *, seconds: float, held_s: float, bucket_s: float
) -> tuple[list[Look], int]:
    """Looks at a loaded system, one a bucket; and the peak memory of its largest process."""
    window_s = seconds + held_s
    margin = MARGIN_HELD if held_s else MARGIN
    _fill(here, like, rate=_calibrated(here, workers, like), window_s=window_s, margin=margin)
    with ThreadPoolExecutor(1) as feeder, ExitStack() as stack:
        feeding, is_fed = feeder.submit(_load, here, like, steps=0.0), False
        looks = [_look(here, workers, is_fed=is_fed)]
        for number in range(1, max(2, round(window_s / bucket_s)) + 1):
            if held_s and number == round(seconds / bucket_s) + 1:
                stack.enter_context(held_snapshot(here.system.dsn))
            time.sleep(max(0.0, looks[0][0] + number * bucket_s - time.perf_counter()))
            looks.append(_look(here, workers, is_fed=is_fed))
            if feeding.done():
                feeding.result()
                rest_s = (round(window_s / bucket_s) - number) * bucket_s
                missing = _missing(here, like, looks, rest_s=rest_s)
                feeding, is_fed = feeder.submit(_load, here, like, steps=missing), missing > 0
        feeding.result()
        workers.demand_running()
        return looks, meters.peak_bytes(workers.pids)


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


def _fill(here: Scene, like: Flow, *, rate: float, window_s: float, margin: float) -> None:
    """Load what lasts the window, at the rate of the warm-up that ends it: that of a large backlog is higher."""
    warm_s = min(WARM_S_MAX, window_s * WARM_SHARE)
    lasts_s = min(LOADED_AHEAD_S, window_s)
    left = 0
    while left < rate * lasts_s * margin:
        _load(here, like, steps=rate * (lasts_s + warm_s + 1) * margin - left)
        before, begun = here.ledger.steps(), time.perf_counter()
        time.sleep(warm_s)
        done = here.ledger.steps()
        rate = (done - before) / (time.perf_counter() - begun)
        left = here.flows_made * like.of - done


def _load(here: Scene, like: Flow, *, steps: float) -> None:
    left = math.ceil(steps / like.of)
    while left > 0:
        here.system.start_many(here.flows(min(left, LOADED_AT_ONCE), like))
        left -= LOADED_AT_ONCE


def _missing(here: Scene, like: Flow, looks: list[Look], *, rest_s: float) -> float:
    """Steps to load more if what is left would not last: a large backlog may be worked off faster than the one that calibrated."""
    (earlier_s, earlier, *_), (at_s, steps, *_) = looks[-2:]
    rate = (steps - earlier) / (at_s - earlier_s)
    has_enough = here.flows_made * like.of - steps >= rate * min(rest_s, LOW_S)
    return 0.0 if has_enough else rate * min(rest_s, LOADED_AHEAD_S) * MARGIN


def _look(here: Scene, workers: Workers, *, is_fed: bool) -> Look:
    return time.perf_counter(), here.ledger.steps(), here.read(workers), is_fed


def _rate(one: Look, other: Look) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _postgres_per_worker(pairs: list[tuple[Look, Look]]) -> float | None:
    """Processor time of Postgres for each second of the workers', between these looks: a machine that slows down slows both."""
    costs = [meters.between(one[2], other[2]) for one, other in pairs]
    workers_s = sum(cost.workers_s for cost in costs)
    server_s = [cost.server_s for cost in costs if cost.server_s is not None]
    return sum(server_s) / workers_s if workers_s and len(server_s) == len(costs) else None


def _unfed(looks: list[Look], from_s: float, to_s: float) -> list[tuple[Look, Look]]:
    """Looks of that span with the looks after them, between which nothing was loaded; all, if something always was."""
    begun_s = looks[0][0]
    pairs = [(one, other) for one, other in pairwise(looks) if from_s <= other[0] - begun_s <= to_s]
    return [pair for pair in pairs if not pair[1][3]] or pairs


class _Told:
    """The cells and points of one system under one condition."""

    def __init__(self, system: str, condition: str, round_: int) -> None:
        self._system = system
        self._condition = condition
        self._round = round_

    def cell(self, metric: str, value: float | None, unit: str, workload: str = WORKLOAD) -> Cell:
        return Cell(
            system=self._system,
            workload=workload,
            condition=self._condition,
            metric=metric,
            value=value,
            unit=unit,
            round=self._round,
        )

    def points(self, looks: list[Look]) -> Iterable[Point]:
        for (earlier_s, earlier, *_), (at_s, steps, reading, _) in pairwise(looks):
            for metric, value in (
                ("steps/s", (steps - earlier) / (at_s - earlier_s)),
                ("dead rows", float(reading.dead)),
                ("MiB", (reading.table_bytes + reading.index_bytes) / MIB),
            ):
                yield Point(
                    system=self._system,
                    workload=WORKLOAD,
                    condition=self._condition,
                    metric=metric,
                    at_s=at_s - looks[0][0],
                    value=value,
                    round=self._round,
                )

    def rates(self, looks: list[Look], *, free_s: float, held_s: float) -> Iterable[Cell]:
        first_s, first, *_ = looks[0]
        last_s, last, *_ = looks[-1]
        if last == first:
            raise StageError("no step ran while the clock did")
        yield self.cell("steps/s", (last - first) / (last_s - first_s), "steps/s")
        if held_s:
            begun, ending = (0.0, free_s * 1.01), (free_s + held_s * 2 / 3, math.inf)
            free, late = (median(_rate(*pair) for pair in _unfed(looks, *span)) for span in (begun, ending))
            yield self.cell("steps/s before", free, "steps/s")
            yield self.cell("steps/s at the end", late, "steps/s")
            yield self.cell("drift", 100 * (1 - late / free), "%")
            before, after = (_postgres_per_worker(_unfed(looks, *span)) for span in (begun, ending))
            gained = None if before is None or after is None else 100 * (after / before - 1)
            yield self.cell("CPU of Postgres drift", gained, "%")

    def costs(self, looks: list[Look]) -> Iterable[Cell]:
        """What a step of the window cost."""
        steps, cost = looks[-1][1] - looks[0][1], meters.between(looks[0][2], looks[-1][2])
        server_us = None if cost.server_s is None else cost.server_s / steps * 1e6
        workers_us = cost.workers_s / steps * 1e6
        yield self.cell("CPU", None if server_us is None else server_us + workers_us, "µs/step")
        yield self.cell("CPU of Postgres", server_us, "µs/step")
        yield self.cell("CPU of workers", workers_us, "µs/step")
        yield self.cell("WAL", cost.wal_bytes / steps, "B/step")
        yield self.cell("growth", (cost.table_bytes + cost.index_bytes) / steps, "B/step")
        yield self.cell("transaction ids", cost.xids / steps, "/step")

    def rows(self, whole: Cost, steps: int) -> Iterable[Cell]:
        """What all steps of the scene did to rows: a backend in a pipeline tells the statistics nothing before it ends."""
        yield self.cell("changed rows", whole.changed / steps, "rows/step")
        yield self.cell("dead rows", whole.dead / steps, "rows/step")
        yield self.cell("commits", whole.commits / steps, "/step")
        yield self.cell("autovacuums", whole.autovacuums, "runs")

    def relations(self, here: Scene) -> Iterable[Cell]:
        """What was written to each table, starting the flows included."""
        for one in meters.relations(here.connection):
            for metric in ("inserted", "updated", "deleted", "dead"):
                yield self.cell(f"{one.table} {metric}", getattr(one, metric), "rows", RELATIONS)
