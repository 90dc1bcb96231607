"""What slow steps cost the quick ones beside them: in one page, and as a thousand calls in flight in one process."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from datetime import datetime
from statistics import median

import msgspec

from durable_cluster import Settings
from durable_cluster.database import connect
from durable_cluster.loadtest import measure, stage, survival_flows
from durable_cluster.loadtest.figures import Figure, say
from durable_cluster.loadtest.measure import Connection
from durable_cluster.loadtest.stage import RunningCluster
from durable_cluster.loadtest.workloads import STEPS, short_flows
from durable_cluster.machine import Machine

APP = survival_flows.__name__ + ":app"
SETTINGS = Settings(drain_grace_s=1.0)  # what is cut off at the end of a measurement is nobody's loss
PAGE_MS_MAX = 200.0
SLOWER_PERCENT_MAX = 10.0
WARM_UP_WORKFLOWS = 500
LOADED_AT_ONCE = 10_000
LOOK_S = 0.25
STEADY_SHARE = 0.98
MARGIN = 1.6


def page(dsn: str, *, lines: int, slow_s: float, rounds: int) -> list[Figure]:
    """One slow step, first of a page, and ``lines`` - 1 quick ones: until the last of those is done. The worst of the rounds."""
    with (
        stage.running_cluster(dsn, processes=1, shards=1, app=APP, settings=SETTINGS) as cluster,
        connect(dsn, name="durable-loadtest") as connection,
    ):
        figures = []
        for kind, slow in (("async", survival_flows.awaited), ("blocking", survival_flows.threaded)):
            took_ms = [_page_ms(connection, slow, lines - 1, slow_s) for _ in range(rounds)]
            say(f"page: beside an {kind} step: " + ", ".join(f"{ms:.0f}" for ms in took_ms) + " ms")
            where = f"{lines - 1} lines beside one {kind} step of {slow_s:g} s: "
            figures += [
                Figure(of="page", what=f"{where}done, the first time", value=took_ms[0], unit="ms", limit=PAGE_MS_MAX),
                Figure(
                    of="page", what=f"{where}the worst of {rounds}", value=max(took_ms), unit="ms", limit=PAGE_MS_MAX
                ),
            ]
        cluster.demand_whole()
    return figures


def _page_ms(connection: Connection, slow: Machine, quick: int, slow_s: float) -> float:
    """From just before the commit that starts all of them, to the end of the last quick one, by the database's clock."""
    ended = _ended(connection)
    stage.await_sleep(connection)
    with connection.transaction():
        slow.start(slow_s, tx=connection)
        survival_flows.quick.start_many(list(range(quick)), tx=connection)
        begun = _now(connection)
    stage.until(lambda: _ended(connection) >= ended + quick, what="the quick steps to end")
    row = connection.execute("select max(at) from durable.finished where at >= %s", (begun,)).fetchone()
    assert row is not None
    return float((row[0] - begun).total_seconds() * 1000)


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """A backlog of ten-step chains, drained by one process."""

    steps_per_s: float
    cpu_us_per_step: float
    seconds: float


def beside(dsn: str, *, naps: int, rounds: int, seconds: float) -> list[Figure]:
    """Chains on one process with and without ``naps`` steps of ten seconds in flight there, by turns."""
    with (
        stage.running_cluster(dsn, processes=1, shards=1, app=APP, settings=SETTINGS) as cluster,
        connect(dsn, name="durable-loadtest") as connection,
    ):
        last = _chains(connection, cluster, WARM_UP_WORKFLOWS)
        last = _chains(connection, cluster, int(last.steps_per_s / STEPS) or 1)
        alone: list[Round] = []
        along: list[Round] = []
        for number in range(1, rounds + 1):
            workflows = max(WARM_UP_WORKFLOWS, int(last.steps_per_s * seconds / STEPS))
            last = _chains(connection, cluster, workflows)
            alone.append(last)
            along.append(
                _beside_naps(
                    connection,
                    cluster,
                    workflows,
                    naps,
                    fill_s=min(seconds, survival_flows.NAP_S / 2),
                    expected_s=last.seconds,
                )
            )
            say(f"beside: round {number} of {rounds}: {last.steps_per_s:,.0f} and {along[-1].steps_per_s:,.0f} steps/s")
        cluster.demand_whole()
    without, with_naps = (median(one.steps_per_s for one in some) for some in (alone, along))
    slower = [100 * (1 - b.steps_per_s / a.steps_per_s) for a, b in zip(alone, along, strict=True)]
    beside_them = f"beside {naps:,} calls of {survival_flows.NAP_S:g} s"
    return [
        Figure(of="beside", what="ten-step chains, one process, alone", value=without, unit="steps/s"),
        Figure(of="beside", what=f"the same {beside_them}", value=with_naps, unit="steps/s"),
        Figure(
            of="beside", what="slower by", value=100 * (1 - with_naps / without), unit="%", limit=SLOWER_PERCENT_MAX
        ),
        Figure(of="beside", what="slower by, the median of neighbouring rounds", value=median(slower), unit="%"),
        Figure(of="beside", what="CPU a step, alone", value=median(one.cpu_us_per_step for one in alone), unit="µs"),
        Figure(
            of="beside", what=f"CPU a step {beside_them}", value=median(one.cpu_us_per_step for one in along), unit="µs"
        ),
    ]


def _beside_naps(
    connection: Connection, cluster: RunningCluster, workflows: int, naps: int, *, fill_s: float, expected_s: float
) -> Round:
    """The chains, while so many naps are in flight from before to after; again with longer naps if they ended too early."""
    while True:
        until = time.time() + fill_s + expected_s * MARGIN
        spread = [survival_flows.Nap(random.uniform(0.1, survival_flows.NAP_S), until) for _ in range(naps)]
        survival_flows.nap.start_many(spread, tx=connection)
        stage.until(lambda: _in_flight(connection) >= naps * STEADY_SHARE, what="the naps to begin")
        one = _chains(connection, cluster, workflows)
        is_valid = time.time() < until
        stage.until(lambda: not _in_flight(connection), what="the naps to end")
        stage.await_quiet(connection)
        if is_valid:
            return one
        expected_s *= 2


def _chains(connection: Connection, cluster: RunningCluster, workflows: int) -> Round:
    ended = _ended(connection)
    with connect(connection.info.dsn, name="durable-loadtest feed") as feed, feed.transaction():
        for size in _chunks(workflows):
            survival_flows.ten_steps.start_many(short_flows(size), tx=feed)
        begun = _now(feed)
        before = measure.read_meters(connection, pids=cluster.pids, thread_id=cluster.thread_id)

    def have_ended() -> bool:
        time.sleep(LOOK_S)
        return _ended(connection) >= ended + workflows

    stage.until(have_ended, what="the chains to end")
    after = measure.read_meters(connection, pids=cluster.pids, thread_id=cluster.thread_id)
    row = connection.execute("select max(at) from durable.finished where at >= %s", (begun,)).fetchone()
    assert row is not None
    seconds = float((row[0] - begun).total_seconds())
    cpu_s = measure.span_between(before, after).cpu_s or 0.0
    steps = workflows * STEPS
    return Round(steps_per_s=steps / seconds, cpu_us_per_step=cpu_s / steps * 1e6, seconds=seconds)


def _chunks(total: int) -> Iterable[int]:
    return (min(LOADED_AT_ONCE, total - first) for first in range(0, total, LOADED_AT_ONCE))


def _in_flight(connection: Connection) -> int:
    return _count(connection, "select count(*) from durable.detached")


def _ended(connection: Connection) -> int:
    return _count(connection, "select count(*) from durable.finished")


def _count(connection: Connection, query: str) -> int:
    row = connection.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


def _now(connection: Connection) -> datetime:
    row = connection.execute("select clock_timestamp()").fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]
