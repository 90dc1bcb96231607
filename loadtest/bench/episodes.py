"""Workloads W2 and W4 to W8: single events rather than a load. Each adds its cells to the results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from durable_cluster.loadtest import measure
from durable_cluster.loadtest.bench import meters
from durable_cluster.loadtest.bench.cells import Cell, Point, Results
from durable_cluster.loadtest.bench.scene import HELD, Scene, held_snapshot, scene
from durable_cluster.loadtest.bench.work import Flow, Stamp
from durable_cluster.loadtest.measure import quantile
from durable_cluster.loadtest.peers.base import System, Workers
from durable_cluster.loadtest.stage import StageError

END_S_MAX = 120.0
WARM_UPS = 5
CHAIN_STEPS = 50
SETTLE_S = 3.0
IDLE_TRIES = 5
BATCH = 10_000
PAUSE_MS = 20
RECOVERING_FLOWS = 100
RECOVERING_STEPS = 50


class Episode:
    """Adds cells of one system and workload."""

    def __init__(self, kind: type[System], workload: str, results: Results, condition: str = "") -> None:
        self._kind = kind
        self._workload = workload
        self._results = results
        self._condition = condition

    def add(self, metric: str, value: float | None, unit: str, note: str = "") -> None:
        """One more figure."""
        self._results.cells.append(
            Cell(
                system=self._kind.name,
                workload=self._workload,
                condition=self._condition,
                metric=metric,
                value=value,
                unit=unit,
                note=note,
            )
        )

    def add_quantiles(self, metric: str, values: Sequence[float], unit: str) -> None:
        """Its median, its 95th and its 99th percentile."""
        ordered = sorted(values)
        for name, part in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            self.add(f"{metric} {name}", quantile(ordered, part), unit)

    def add_point(self, metric: str, at_s: float, value: float) -> None:
        """One more look."""
        self._results.points.append(
            Point(
                system=self._kind.name,
                workload=self._workload,
                condition=self._condition,
                metric=metric,
                at_s=at_s,
                value=value,
            )
        )


def lone(kind: type[System], server: str, results: Results, *, seconds: float) -> None:
    """W2: one ten-step flow after the other on an idle system: from before its start to when its last step runs."""
    say = Episode(kind, "W2", results)
    with scene(kind, server) as here, here.system.workers(kind.processes) as workers:
        took_ms: list[float] = []
        began = time.monotonic()
        while len(took_ms) < WARM_UPS + 3 or time.monotonic() - began < seconds:
            flow = here.flows(1, Flow(0))[0]
            started_s = time.time()
            here.system.start_one(flow)
            took_ms.append((here.await_stamp(workers, flow, timeout_s=END_S_MAX).at_s - started_s) * 1000)
    say.add_quantiles("ten steps", took_ms[WARM_UPS:], "ms")


def chain(kind: type[System], server: str, results: Results, *, seconds: float, held_s: float, bucket_s: float) -> None:
    """W2 beside a held snapshot: chains of fifty steps, one at a time; the time between two steps, before and with it."""
    say = Episode(kind, "W2", results, HELD)
    with scene(kind, server) as here, here.system.workers(kind.processes) as workers:
        _chains(here, workers, min(1.0, seconds))
        begun_s = time.time()
        before = _chains(here, workers, seconds)
        with held_snapshot(here.system.dsn):
            held_from_s = time.time()
            beside = _chains(here, workers, held_s)
    late_from_s = held_from_s + held_s * 2 / 3
    late = [ms for at_s, ms in beside if at_s > late_from_s] or [ms for _, ms in beside]
    say.add_quantiles("step before", [ms for _, ms in before], "ms")
    say.add_quantiles("step at the end", late, "ms")
    p50_before, p50_late = (quantile(sorted(some), 0.5) for some in ([ms for _, ms in before], late))
    say.add("drift", 100 * (p50_late / p50_before - 1), "%")
    for at_s, ms in _by_bucket([*before, *beside], begun_s, bucket_s):
        say.add_point("step p50, ms", at_s, ms)


def _chains(here: Scene, workers: Workers, seconds: float) -> list[tuple[float, float]]:
    """When each step ran, and how many milliseconds after the one before."""
    took: list[tuple[float, float]] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        flow = here.flows(1, Flow(0, of=CHAIN_STEPS, is_told=True))[0]
        here.system.start_one(flow)
        stamps: list[Stamp] = []
        deadline = time.monotonic() + END_S_MAX
        while len(stamps) < CHAIN_STEPS:
            stamps += here.ledger.new_stamps()
            time.sleep(0.002)
            if time.monotonic() > deadline:
                workers.demand_running()
                raise StageError(f"a chain stands still after {len(stamps)} of {CHAIN_STEPS} steps")
        times = sorted(stamp.at_s for stamp in stamps)
        took += [(later, (later - earlier) * 1000) for earlier, later in pairwise(times)]
    return took


def _by_bucket(took: Iterable[tuple[float, float]], begun_s: float, bucket_s: float) -> Iterable[tuple[float, float]]:
    buckets: dict[int, list[float]] = {}
    for at_s, ms in took:
        buckets.setdefault(int((at_s - begun_s) / bucket_s), []).append(ms)
    return [((number + 1) * bucket_s, quantile(sorted(some), 0.5)) for number, some in sorted(buckets.items())]


def sleepers(kind: type[System], server: str, results: Results, *, count: int, ahead_s: float) -> None:
    """W4: so many flows that are due in one moment: how late they run."""
    say = Episode(kind, "W4", results)
    with scene(kind, server) as here:
        begun = time.monotonic()
        here.system.start_sleepers(here.flows(min(count, 100), Flow(0, of=1)), time.time() + 3600)
        load_s = (time.monotonic() - begun) * max(1, count / 100)  # to load all; those in an hour disturb nobody
        with here.system.workers(kind.processes) as workers:
            due_s = time.time() + ahead_s + 2 * load_s
            flows = here.flows(count, Flow(0, of=1))
            here.system.start_sleepers(flows, due_s)
            if time.time() > due_s - 1:
                raise StageError(f"{count:,} sleepers could not be started in {ahead_s + 2 * load_s:.0f} s")
            due = {flow.number for flow in flows}
            late_s: dict[int, float] = {}
            deadline = due_s + END_S_MAX
            while len(late_s) < count and time.time() < deadline:
                time.sleep(0.01)
                late_s |= {s.number: s.at_s - due_s for s in here.ledger.new_stamps() if s.number in due}
            workers.demand_running()
    if not late_s:
        raise StageError(f"none of {count:,} sleepers woke within {END_S_MAX:g} s")
    say.add("sleepers", count, "flows")
    say.add("the median late by", quantile(sorted(late_s.values()), 0.5), "s")
    say.add(
        "the last late by", max(late_s.values()) if len(late_s) == count else None, "s", _missing(count - len(late_s))
    )
    say.add("too early", sum(late < -0.001 for late in late_s.values()), "flows")


def fan_out(kind: type[System], server: str, results: Results, *, width: int, rounds: int) -> None:
    """W5: a flow that spawns so many and goes on when the last of them has ended."""
    say = Episode(kind, "W5", results)
    took_s = []
    with scene(kind, server) as here, here.system.workers(kind.processes) as workers:
        for _ in range(rounds + 1):
            flow = here.flows(1, Flow(0, of=1))[0]
            started_s = time.time()
            here.system.start_fan_out(flow, width)
            took_s.append(here.await_stamp(workers, flow, timeout_s=END_S_MAX).at_s - started_s)
    say.add("children", width, "flows")
    say.add("joined after", quantile(sorted(took_s[1:]), 0.5), "s")


def recovery(kind: type[System], server: str, results: Results, *, kills: int, patience_s: float) -> None:
    """W6: a worker is killed with SIGKILL while it runs flows: until each flow whose step it ran last goes on."""
    say = Episode(kind, "W6", results)
    gaps_s: list[float] = []
    lost = twice = 0
    with scene(kind, server) as here, here.system.workers(max(2, kind.processes)) as workers:
        for _ in range(kills):
            flows = here.flows(RECOVERING_FLOWS, Flow(0, of=RECOVERING_STEPS, pause_ms=PAUSE_MS, is_told=True))
            here.system.start_many(flows)
            stamps = _stamped(here, [], lambda some: len(some) >= RECOVERING_FLOWS * 5, END_S_MAX)
            killed_s = time.time()
            dead = workers.kill_one()
            stamps = _stamped(here, stamps, lambda some: _have_ended(some, RECOVERING_FLOWS), patience_s)
            some_s, missing = _gaps(stamps, dead, killed_s)
            gaps_s += some_s
            lost += missing
            seen = [(stamp.number, stamp.step) for stamp in stamps]
            twice += len(seen) - len(set(seen))
            if missing:
                break
    say.add("flows in hand", len(gaps_s) + lost, "flows")
    say.add("median gap", quantile(sorted(gaps_s), 0.5) if gaps_s else None, "s")
    say.add("longest gap", max(gaps_s) if gaps_s and not lost else None, "s", _missing(lost, patience_s))
    say.add("not gone on", lost, "flows")
    say.add("steps run twice", twice, "steps")


def _stamped(
    here: Scene, stamps: list[Stamp], is_enough: Callable[[list[Stamp]], bool], timeout_s: float
) -> list[Stamp]:
    deadline = time.monotonic() + timeout_s
    while not is_enough(stamps) and time.monotonic() < deadline:
        time.sleep(0.02)
        stamps = stamps + here.ledger.new_stamps()
    return stamps


def _have_ended(stamps: Iterable[Stamp], flows: int) -> bool:
    return len({stamp.number for stamp in stamps if stamp.step == RECOVERING_STEPS}) >= flows


def _gaps(stamps: Iterable[Stamp], dead: int, killed_s: float) -> tuple[list[float], int]:
    """Seconds from the kill until a flow went on, for each that the dead had last; and how many did not."""
    by_flow: dict[int, list[Stamp]] = {}
    for stamp in sorted(stamps, key=lambda one: one.at_s):
        by_flow.setdefault(stamp.number, []).append(stamp)
    gaps_s, missing = [], 0
    for own in by_flow.values():
        before = [stamp for stamp in own if stamp.at_s <= killed_s]
        if not before or before[-1].pid != dead or before[-1].step == RECOVERING_STEPS:
            continue
        after = [stamp.at_s for stamp in own if stamp.at_s > killed_s and stamp.pid != dead]
        if after:
            gaps_s.append(after[0] - killed_s)
        else:
            missing += 1
    return gaps_s, missing


def idle(kind: type[System], server: str, results: Results, *, seconds: float) -> None:
    """W7: workers up, nothing to do: what that costs."""
    say = Episode(kind, "W7", results)
    with scene(kind, server) as here, here.system.workers(kind.processes) as workers:
        flow = here.flows(1, Flow(0))[0]
        here.system.start_one(flow)
        here.await_stamp(workers, flow, timeout_s=END_S_MAX)
        time.sleep(SETTLE_S)
        for _ in range(IDLE_TRIES):
            begin, before = here.read(workers), measure.vacuums(here.connection)
            time.sleep(seconds)
            end = here.read(workers)
            if measure.vacuums(here.connection) == before:
                break  # else autovacuum worked, which is not this system's idleness
        cost = meters.between(begin, end)
    if cost.server_s is not None:
        say.add("Postgres", 100 * cost.server_s / cost.seconds, "% of a core")
    say.add("workers", 100 * cost.workers_s / cost.seconds, "% of a core")
    say.add("transaction ids", cost.xids / cost.seconds, "/s")
    say.add("commits", cost.commits / cost.seconds, "/s")
    say.add("WAL", cost.wal_bytes / cost.seconds, "B/s")


def starts(kind: type[System], server: str, results: Results, *, seconds: float) -> None:
    """W8: flows started by one client on one connection, without workers: one by one, each durable, and in batches of 10,000."""
    say = Episode(kind, "W8", results)
    with scene(kind, server) as here:
        for metric, size in (("single", 1), ("batch", BATCH)):
            done, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds or done <= size:
                flows = here.flows(size, Flow(0))
                if size == 1:
                    here.system.start_one(flows[0])
                else:
                    here.system.start_many(flows)
                if not done:
                    begun = time.perf_counter()  # the first pays for connections and plans
                done += size
            say.add(metric, (done - size) / (time.perf_counter() - begun), "starts/s")
        say.add("client's memory", meters.peak_bytes([os.getpid()]) / (1 << 20), "MiB")


def _missing(lost: int, patience_s: float = END_S_MAX) -> str:
    return f"{lost:,} not within {patience_s:g} s" if lost else ""
