"""``app.run()``: every shard of the database in this one process and thread, for scripts, debuggers and notebooks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from durable_cluster import metric_export, metrics, replay_statements, schedules, schema, telemetry, unrouted
from durable_cluster.consumer import Consumer
from durable_cluster.database import connect
from durable_cluster.figures import Reader
from durable_cluster.firing import Firing
from durable_cluster.projection import Projection

logger = logging.getLogger("durable_cluster.runner")

WORTH_WAITING_S = 60.0
NAMES_SHOWN_MAX = 5

if TYPE_CHECKING:
    from durable_cluster.app import App


async def run_beside(app: App, *, until_idle: bool, limit: timedelta | None) -> int:
    """As ``run_here``, in a thread; cancelled, that ends first."""
    is_cancelled = threading.Event()
    running = asyncio.ensure_future(
        asyncio.to_thread(run_here, app, until_idle=until_idle, limit=limit, should_end=is_cancelled.is_set)
    )
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        is_cancelled.set()
        await running
        raise


def run_here(
    app: App, *, until_idle: bool, limit: timedelta | None, should_end: Callable[[], bool] = lambda: False
) -> int:
    """Run until nothing is ready, due within a minute or left by a process that died; or the limit is over; or it should end."""
    stop_at = None if limit is None else time.monotonic() + limit.total_seconds()

    def is_over() -> bool:
        return should_end() or (stop_at is not None and time.monotonic() >= stop_at)

    tracing = telemetry.configure("run")
    try:
        runner = Runner(app, tracing=tracing)
        try:
            with metric_export.exported(runner.families, role="run"):
                runner.run(until_idle=until_idle, is_over=is_over)
        finally:
            runner.close()
        return runner.consumer.steps
    finally:
        if tracing is not None:
            tracing.shutdown()


class Runner:
    """One consumer of all shards of the app's database, what fires its schedules, and what projects its timelines."""

    def __init__(self, app: App, *, tracing: telemetry.Tracing | None = None) -> None:
        dsn = app.client.dsn
        with connect(dsn, name="durable-cluster run") as connection:
            shards = schema.demand_installed(connection)
            replay_statements.declare_types(connection, app.declared_types(app.settings))
            schedules.declare(app, connection)
        self._machines = app.machines
        self._left: Counter[str] = Counter()
        self.consumer = Consumer(dsn, 0, app.machines, app.settings, tracing=tracing)
        self.consumer.shards = list(range(shards))
        self._shards = shards
        self._tracing = tracing
        self._figures = Reader(dsn)
        self._firing = Firing()
        self._projection = Projection()
        self._worth_waiting_s = app.clock.real_s(WORTH_WAITING_S)
        self._unroutable_limit_s = app.settings.unroutable_limit_s

    def run(self, *, until_idle: bool, is_over: Callable[[], bool] = lambda: False) -> None:
        """Run until that is over, or, if asked, until nothing is ready or will soon be."""
        consumer, firing = self.consumer, self._firing
        last_work, may_have_work = time.monotonic(), True
        while not is_over():
            may_have_work |= firing.tend(consumer.connection)
            self._projection.tend(consumer.connection)
            if may_have_work and consumer.work(is_over, lambda: None):
                last_work, may_have_work = time.monotonic(), True
            elif until_idle and not self._expects_work():
                may_have_work = firing.tend(consumer.connection, is_asked=True)
                if not may_have_work:
                    self._say_what_is_left()
                    break
            else:
                may_have_work = consumer.wait(time.monotonic() - last_work)
        self._projection.tend(consumer.connection, is_asked=True)

    def families(self) -> metrics.Families:
        """What has been counted, and what the database says. Any thread may ask."""
        meters, found = self.consumer.meters, metrics.Families()
        metrics.put_build(found)
        metrics.put_totals(found, [meters.copied()], self._shards)
        metrics.put_detached(found, [meters.report().detached], self._shards)
        found.put("durable_spans_dropped_total", self._tracing.dropped if self._tracing else 0)
        metrics.put_database(found, self._figures.latest())
        return found

    def _expects_work(self) -> bool:
        """Whether anything is ready or will soon be. Steps that no code here knows come back each minute, for a day: not those."""
        if self.consumer.expects_work(0.0):
            return True
        found = unrouted.left(
            self.consumer.connection, self._machines, self._worth_waiting_s, limit_s=self._unroutable_limit_s
        )
        self._left = found or Counter()
        return found is None

    def _say_what_is_left(self) -> None:
        if self._left:
            of = ", ".join(f"{workflow} {steps:,}" for workflow, steps in self._left.most_common(NAMES_SHOWN_MAX))
            logger.warning("%d left for a process that knows them (steps by workflow: %s)", self._left.total(), of)

    def close(self) -> None:
        """Set free what the consumer holds."""
        self.consumer.close()
