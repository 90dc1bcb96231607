"""What a start, a signal and a cancel take beside a crowd that sleeps and waits, and alone; and what the crowd itself costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from durable_cluster import Handle, WorkflowCancelled
from durable_cluster.database import connect
from durable_cluster.loadtest import sleepers, stage, survival_flows
from durable_cluster.loadtest.figures import Figure, say
from durable_cluster.loadtest.measure import Connection

STARTED_AT_ONCE = 10_000
ACTS = 100
RATIO_MAX = 1.5
LATE_S_MAX = 5.0
DUE_AFTER_S = 90.0
END_S_MAX = 30.0


def crowd(dsn: str, *, asleep: int, waiting: int, shards: int, idle_s: float, due: int) -> list[Figure]:
    """Each act alone, then beside ``asleep`` sleepers and ``waiting`` that wait for a signal; ``due`` more wake at once."""
    with (
        stage.running_cluster(dsn, processes=shards, shards=shards, app=survival_flows.__name__ + ":app") as cluster,
        connect(dsn, name="durable-loadtest") as connection,
    ):
        _medians()  # what is slow once: plans, connections
        alone = _medians()
        sleepers.start(connection, asleep)
        _begin_to_wait(connection, waiting)
        beside = _medians()
        figures = [
            Figure(of="crowd", what=f"{act}, beside the crowd", value=beside[act] * 1000, unit="ms") for act in beside
        ]
        figures += [
            Figure(
                of="crowd",
                what=f"{act}, as a multiple of alone",
                value=beside[act] / alone[act],
                unit="×",
                limit=RATIO_MAX,
            )
            for act in beside
        ]
        figures += sleepers.idle(connection, cluster, shards=shards, seconds=idle_s)
        figures += sleepers.due_at_once(connection, due, DUE_AFTER_S, late_s_max=LATE_S_MAX)
        cluster.demand_whole()
    return figures


def _medians() -> dict[str, float]:
    """Seconds from the act to the workflow's end, at the median: each act on a workflow that stands where it is for."""
    acts: tuple[tuple[str, Iterator[Handle], Callable[[Handle], object]], ...] = (
        ("start", iter(survival_flows.quick.start(n) for n in range(ACTS)), lambda _: None),
        (
            "signal",
            iter(_standing(survival_flows.waiter.start_many(list(range(ACTS))))),
            lambda handle: handle.signal("go"),
        ),
        (
            "cancel of one that waits",
            iter(_standing(survival_flows.waiter.start_many(list(range(ACTS))))),
            Handle.cancel,
        ),
        ("cancel of one asleep", iter(_standing(survival_flows.napper.start_many(list(range(ACTS))))), Handle.cancel),
    )
    return {name: statistics.median(_took_s(handles, act)) for name, handles, act in acts}


def _took_s(handles: Iterator[Handle], act: Callable[[Handle], object]) -> Iterator[float]:
    while True:
        begun = time.perf_counter()
        handle = next(handles, None)
        if handle is None:
            return
        act(handle)
        with suppress(WorkflowCancelled):
            handle.result(timeout=END_S_MAX)
        yield time.perf_counter() - begun


def _standing(handles: Sequence[Handle]) -> Sequence[Handle]:
    """These, once all of them wait."""
    client = survival_flows.app.client
    query = "select count(*) from durable.wait where id = any (%s::uuid[])"
    ids = [handle.id for handle in handles]

    def all_wait() -> bool:
        row = client.connection().execute(query, (ids,)).fetchone()
        return row is not None and row[0] == len(ids)

    stage.until(all_wait, what="workflows to wait")
    return handles


def _begin_to_wait(connection: Connection, count: int) -> None:
    begun = time.perf_counter()
    for first in range(0, count, STARTED_AT_ONCE):
        survival_flows.waiter.start_many(list(range(first, min(count, first + STARTED_AT_ONCE))), tx=connection)
    query = "select count(*) from durable.wait where names is not null"
    stage.until(lambda: connection.execute(query).fetchone() == (count,), what="the crowd to wait")
    say(f"crowd: {count:,} wait, {count / (time.perf_counter() - begun):,.0f}/s")
    connection.execute("vacuum (analyze) durable.wait, durable.started, durable.finished")
    connection.execute("checkpoint")
