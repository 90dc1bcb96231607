"""pgqueuer: a job for each step, which enqueues the next."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pgqueuer
import uvloop
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, Job, Queries
from pgqueuer.core.completion import CompletionWatcher
from psycopg.conninfo import conninfo_to_dict

from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import READY, System

STEP = "step"
FAN_OUT = "fan-out"
BATCH = 100
POOL = 10
POLL_S = 1.0
HEARTBEAT_TIMEOUT_S = 10.0
NUMBERS_A_PARENT = 1_000_000


class FanOut(msgspec.Struct, frozen=True):
    """What a job is told that spawns children and waits for them."""

    flow: Flow
    width: int


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Flow).decode
decode_fan_out = msgspec.json.Decoder(FanOut).decode


def address(dsn: str) -> dict[str, Any]:
    """As asyncpg wants it: it reads addresses as URLs only."""
    known = conninfo_to_dict(dsn)
    return {
        "host": known.get("host"),
        "port": known.get("port"),
        "user": known.get("user"),
        "password": known.get("password"),
        "database": known.get("dbname"),
    }


class PgQueuer(System):
    """Chained jobs."""

    name = "pgqueuer"
    package = "pgqueuer"
    configuration = (
        "chained jobs; asyncpg, one connection for the queue manager and a pool for what the jobs enqueue, durable tables, "
        "autovacuum settings as installed by `pgq autovac` (its 'Performance Tuning' and 'Benchmarks' pages), uvloop as its "
        f"own `pgq run`; {BATCH} jobs a dequeue, the batch enqueue to start many, heartbeat_timeout "
        f"{HEARTBEAT_TIMEOUT_S:.0f} s and "
        f"dequeue_timeout {POLL_S:.0f} s for a short recovery (30 s each by default); W5 waits for its jobs by CompletionWatcher, "
        "in memory ('Completion Tracking')"
    )
    processes = 2

    def __init__(self, dsn: str, directory: Path) -> None:
        super().__init__(dsn, directory)
        self._loop = asyncio.new_event_loop()
        self._connection: asyncpg.Connection | None = None

    def install(self) -> None:
        self._run(self._install())

    def start_one(self, flow: Flow) -> None:
        self._run(self._enqueue([flow]))

    def start_many(self, flows: Sequence[Flow]) -> None:
        self._run(self._enqueue(flows))

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        self._run(self._enqueue(flows, after=timedelta(seconds=due_s - time.time())))

    def start_fan_out(self, flow: Flow, width: int) -> None:
        self._run(self._enqueue_fan_out(FanOut(flow, width)))

    def close(self) -> None:
        if self._connection is not None:
            self._run(self._connection.close())
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._loop.run_until_complete(coroutine)

    async def _install(self) -> None:
        queries = await self._queries()
        await queries.install()
        await queries.optimize_autovacuum()

    async def _enqueue(self, flows: Sequence[Flow], *, after: timedelta | None = None) -> None:
        await enqueue(await self._queries(), flows, after=after)

    async def _enqueue_fan_out(self, fan_out: FanOut) -> None:
        await (await self._queries()).enqueue(FAN_OUT, encode(fan_out))

    async def _queries(self) -> Queries:
        if self._connection is None:
            self._connection = await asyncpg.connect(**address(self.dsn))
        return Queries(AsyncpgDriver(self._connection))


async def enqueue(queries: Queries, flows: Sequence[Flow], *, after: timedelta | None = None) -> list[Any]:
    """A job for the next step of each, in one batch."""
    count = len(flows)
    return await queries.enqueue([STEP] * count, [encode(flow) for flow in flows], [0] * count, [after] * count)


async def run() -> None:
    """Work until SIGTERM."""
    at = address(os.environ["DURABLE_BENCH_DSN"])
    connection = await asyncpg.connect(**at)
    async with asyncpg.create_pool(**at, min_size=POOL, max_size=POOL) as pool:
        producer = Queries(AsyncpgPoolDriver(pool))
        manager = pgqueuer.PgQueuer(AsyncpgDriver(connection))

        @manager.entrypoint(STEP)
        async def step(job: Job) -> None:
            after = await work.step_beside(decode(job.payload or b""))
            if after:
                await producer.enqueue(STEP, encode(after))

        @manager.entrypoint(FAN_OUT)
        async def fan_out(job: Job) -> None:
            asked = decode_fan_out(job.payload or b"")
            first = -asked.flow.number * NUMBERS_A_PARENT
            children = await enqueue(producer, [Flow(first - at, of=1) for at in range(asked.width)])
            async with CompletionWatcher(manager.connection, queries=producer) as watcher:
                await asyncio.gather(*(watcher.wait_for(child) for child in children))
            await producer.enqueue(STEP, encode(asked.flow))

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, manager.shutdown.set)
        sys.stdout.write(f"{READY}\n")
        await manager.run(
            batch_size=BATCH,
            dequeue_timeout=timedelta(seconds=POLL_S),
            heartbeat_timeout=timedelta(seconds=HEARTBEAT_TIMEOUT_S),
        )
    await connection.close()


if __name__ == "__main__":
    logging.disable()
    uvloop.run(run())
