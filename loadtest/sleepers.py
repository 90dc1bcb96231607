"""A million workflows asleep for months: what they cost while nothing is due, and how late the last of many due at once runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from durable_cluster.database import connect
from durable_cluster.loadtest import measure, stage, survival_flows
from durable_cluster.loadtest.figures import Figure, say
from durable_cluster.loadtest.measure import Connection

STARTED_AT_ONCE = 10_000
DAYS_MIN = 30
DAYS_MAX = 365
POSTGRES_PERCENT_MAX = 1.0
LATE_S_MAX = 1.0
LONG_S = 60.0  # what sleeps longer is a row in durable.wait, and its timer carries no line
TRIES_MAX = 20


def sleepers(
    dsn: str, *, count: int, shards: int, idle_s: float, due: int, due_after_s: Sequence[float]
) -> list[Figure]:
    """Start ``count`` sleepers and look on; then have ``due`` more wake at once, after each of ``due_after_s``."""
    with (
        stage.running_cluster(dsn, processes=shards, shards=shards, app=survival_flows.__name__ + ":app") as cluster,
        connect(dsn, name="durable-loadtest") as connection,
    ):
        figures = [start(connection, count)]
        figures += idle(connection, cluster, shards=shards, seconds=idle_s)
        for after_s in due_after_s:
            figures += due_at_once(connection, due, after_s)
        cluster.demand_whole()
    return figures


def start(connection: Connection, count: int) -> Figure:
    """Put so many to sleep, for months."""
    begun = time.perf_counter()
    for first in range(0, count, STARTED_AT_ONCE):
        numbers = range(first, min(count, first + STARTED_AT_ONCE))
        days = DAYS_MIN + (DAYS_MAX - DAYS_MIN) * first / count
        survival_flows.sleeper.start_many(list(numbers), after=days * 86_400, tx=connection)
    rate = count / (time.perf_counter() - begun)
    say(f"sleepers: {count:,} started, {rate:,.0f}/s")
    # What the server would do on its own within minutes, and what a crowd that came in a minute is not to be blamed for.
    connection.execute(
        "vacuum (analyze) durable.wait, durable.started, durable.timer_0, durable.timer_1, durable.timer_2"
    )
    connection.execute("checkpoint")
    return Figure(
        of="sleepers", what=f"{count:,} workflows put to sleep for {DAYS_MIN} to {DAYS_MAX} days", value=rate, unit="/s"
    )


class Meters(msgspec.Struct, frozen=True):
    """One look while nothing happens."""

    at_s: float
    xid: int
    rows: int
    vacuums: object
    backends_s: dict[int, float]
    children_s: dict[int, float]


def idle(connection: Connection, cluster: stage.RunningCluster, *, shards: int, seconds: float) -> list[Figure]:
    """All consumers asleep, for so long. A span in which autovacuum worked is measured again."""
    stage.await_sleep(connection)
    time.sleep(measure.SETTLED_S)
    for _ in range(TRIES_MAX):
        begin = _read(connection, cluster)
        time.sleep(seconds)
        end = _read(connection, cluster)
        if begin.vacuums == end.vacuums:
            break
    else:
        raise stage.StageError("autovacuum never rests on this server, so idleness cannot be told; measure again")
    span_s = end.at_s - begin.at_s
    postgres, children = (
        100 * sum(spent - before.get(pid, 0.0) for pid, spent in after.items()) / span_s
        for before, after in ((begin.backends_s, end.backends_s), (begin.children_s, end.children_s))
    )
    where = f"idle for {span_s:.0f} s, {shards} shards: "
    return [
        Figure(of="sleepers", what=f"{where}transaction ids", value=end.xid - begin.xid, unit="", limit=0),
        Figure(of="sleepers", what=f"{where}rows changed", value=end.rows - begin.rows, unit="", limit=0),
        Figure(of="sleepers", what=f"{where}Postgres", value=postgres, unit="% of a core", limit=POSTGRES_PERCENT_MAX),
        Figure(of="sleepers", what=f"{where}the cluster's processes", value=children, unit="% of a core"),
    ]


def _read(connection: Connection, cluster: stage.RunningCluster) -> Meters:
    return Meters(
        at_s=time.perf_counter(),
        xid=measure.xid(connection),
        rows=measure.changed_rows(connection),
        vacuums=measure.vacuums(connection),
        backends_s={pid: measure.processor_s(str(pid)) for pid in measure.server_pids(connection)},
        children_s={pid: measure.processor_s(str(pid)) for pid in cluster.pids},
    )


def due_at_once(connection: Connection, count: int, after_s: float, *, late_s_max: float = LATE_S_MAX) -> list[Figure]:
    """Workflows that wake in one moment: when they ran, less when they should have."""
    with connection.transaction():
        connection.execute(
            "create temp table expected (id uuid primary key, due timestamptz not null) on commit preserve rows"
        )
        for first in range(0, count, STARTED_AT_ONCE):
            numbers = list(range(first, min(count, first + STARTED_AT_ONCE)))
            survival_flows.sleeper.start_many(numbers, after=after_s, tx=connection)
        connection.execute(
            "insert into expected select t.workflow_id, t.due from durable.timer t"
            " where t.txid = pg_current_xact_id() and t.due > clock_timestamp()"
        )
    say(f"due: {count:,} in {after_s:g} s")
    late = (
        "select count(*) as n, max(extract(epoch from f.at - e.due))::float8, count(*) filter (where f.at < e.due),"
        " percentile_cont(0.5) within group (order by extract(epoch from f.at - e.due))"
        " from expected e join durable.finished f on f.id = e.id"
    )
    time.sleep(after_s)
    stage.until(
        lambda: _row(connection, "select count(*) from expected e join durable.finished f on f.id = e.id")[0] == count,
        what="all that is due to run",
    )
    _, last_s, early, median_s = _row(connection, late)
    connection.execute("drop table expected")
    kind = "long" if after_s > LONG_S else "short"
    where = f"{count:,} {kind} sleeps due at once: "
    return [
        Figure(of="due", what=f"{where}the last runs after", value=float(last_s), unit="s", limit=late_s_max),
        Figure(of="due", what=f"{where}the median after", value=float(median_s), unit="s"),
        Figure(of="due", what=f"{where}ran too early", value=float(early), unit="", limit=0),
    ]


def _row(connection: Connection, query: str) -> tuple[Any, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return tuple(row)
