"""``app.run()``: every shard of the database in this one process and thread, for scripts, debuggers and notebooks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from durable_cluster import replay_statements, schedules, schema, telemetry
from durable_cluster.consumer import Consumer
from durable_cluster.database import connect
from durable_cluster.firing import Firing

WORTH_WAITING_S = 60.0

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
            runner.run(until_idle=until_idle, is_over=is_over)
        finally:
            runner.close()
        return runner.consumer.steps
    finally:
        if tracing is not None:
            tracing.shutdown()


class Runner:
    """One consumer of all shards of the app's database, and what fires its schedules."""

    def __init__(self, app: App, *, tracing: telemetry.Tracing | None = None) -> None:
        dsn = app.client.dsn
        with connect(dsn, name="durable-cluster run") as connection:
            shards = schema.demand_installed(connection)
            replay_statements.declare_types(connection, app.declared_types())
            schedules.declare(app, connection)
        self.consumer = Consumer(dsn, 0, app.machines, app.settings, tracing=tracing)
        self.consumer.shards = list(range(shards))
        self._firing = Firing()
        self._worth_waiting_s = app.clock.real_s(WORTH_WAITING_S)

    def run(self, *, until_idle: bool, is_over: Callable[[], bool] = lambda: False) -> None:
        """Run until that is over, or, if asked, until nothing is ready or will soon be."""
        consumer, firing = self.consumer, self._firing
        last_work, may_have_work = time.monotonic(), True
        while not is_over():
            may_have_work |= firing.tend(consumer.connection)
            if may_have_work and consumer.work(is_over, lambda: None):
                last_work, may_have_work = time.monotonic(), True
            elif until_idle and not consumer.expects_work(self._worth_waiting_s):
                may_have_work = firing.tend(consumer.connection, is_asked=True)
                if not may_have_work:
                    break
            else:
                may_have_work = consumer.wait(time.monotonic() - last_work)

    def close(self) -> None:
        """Set free what the consumer holds."""
        self.consumer.close()
