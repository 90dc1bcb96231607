"""procrastinate: a job for each step, which defers the next."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import procrastinate
from procrastinate.tasks import Task

from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import READY, System

CONCURRENCY = 10
POLL_S = 1.0
HEARTBEAT_S = 1.0
STALLED_S = 3.0
EVERY_3_S = "* * * * * */3"

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Flow).decode


def told(flows: Sequence[Flow]) -> list[dict[str, Any]]:
    """The arguments of their jobs."""
    return [{"flow": encode(flow).decode()} for flow in flows]


class Procrastinate(System):
    """Chained jobs."""

    name = "procrastinate"
    package = "procrastinate"
    configuration = (
        f"chained jobs; PsycopgConnector with a pool of concurrency + 1 ('Mind the size of your PostgreSQL pool'), {CONCURRENCY} "
        "async jobs at a time, jobs deleted when they succeed ('Delete finished jobs'), batch_defer to start many; stalled jobs "
        f"retried by a periodic task as in 'Retry stalled jobs', tuned: a heartbeat each second, stalled after {STALLED_S:.0f} s, "
        f"looked for every 3 s; polled each {POLL_S:.0f} s for scheduled jobs (https://procrastinate.readthedocs.io)"
    )
    processes = 2
    lacks: ClassVar[Mapping[str, str]] = {"W5": "no join"}

    def __init__(self, dsn: str, directory: Path) -> None:
        super().__init__(dsn, directory)
        self._app = procrastinate.App(
            connector=procrastinate.SyncPsycopgConnector(conninfo=dsn, min_size=1, max_size=1)
        )
        self._step = step_of(self._app)

    def install(self) -> None:
        self._app.open()
        self._app.schema_manager.apply_schema()

    def start_one(self, flow: Flow) -> None:
        self._step.defer(flow=encode(flow).decode())

    def start_many(self, flows: Sequence[Flow]) -> None:
        self._step.batch_defer(*told(flows))

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        later = self._step.configure(schedule_at=datetime.fromtimestamp(due_s, UTC))
        later.batch_defer(*told(flows))

    def close(self) -> None:
        self._app.close()


def step_of(app: procrastinate.App) -> Task[Any, Any, Any]:
    """The task that runs a step and defers the next."""

    @app.task(name="step")
    async def step(flow: str) -> None:
        after = await work.step_beside(decode(flow))
        if after:
            await step.defer_async(flow=encode(after).decode())

    return step


def retry_stalled_jobs(app: procrastinate.App) -> None:
    """Have the jobs of dead workers taken up again, as its documentation shows."""

    @app.periodic(cron=EVERY_3_S)
    @app.task(name="retry_stalled_jobs", queueing_lock="retry_stalled_jobs", pass_context=True)
    async def retry(context: procrastinate.JobContext, timestamp: int) -> None:
        for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=STALLED_S):
            await app.job_manager.retry_job(job)


async def run(number: str) -> None:
    """Work until SIGTERM."""
    app = procrastinate.App(
        connector=procrastinate.PsycopgConnector(
            conninfo=os.environ["DURABLE_BENCH_DSN"], min_size=CONCURRENCY + 1, max_size=CONCURRENCY + 1
        )
    )
    step_of(app)
    retry_stalled_jobs(app)
    async with app.open_async():
        sys.stdout.write(f"{READY}\n")
        await app.run_worker_async(
            name=f"worker-{number}",
            concurrency=CONCURRENCY,
            fetch_job_polling_interval=POLL_S,
            update_heartbeat_interval=HEARTBEAT_S,
            stalled_worker_timeout=STALLED_S,
            delete_jobs=procrastinate.jobs.DeleteJobCondition.SUCCESSFUL,
        )


if __name__ == "__main__":
    logging.disable()
    asyncio.run(run(sys.argv[1]))
