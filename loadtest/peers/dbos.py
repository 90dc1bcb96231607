"""DBOS Transact: workflows on a queue, each step recorded, worker processes that are executors with ids of their own."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

import msgspec
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer
from psycopg.conninfo import conninfo_to_dict

from durable_cluster.database import connect
from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import READY, System

NAME = "durable-bench"
QUEUE = "flows"
POLLING_S = 0.05
AT_ONCE = 20  # workflows of a process: as many as its pool has connections
LAST_WORKFLOWS_S = 5

# dbos.enqueue_workflow is the SQL function that DBOS documents among its system tables.
ENQUEUE = f"""
select dbos.enqueue_workflow(
  workflow_name => 'flow', queue_name => '{QUEUE}', positional_args => array[flow]::json[],
  delay_until_epoch_ms => %s, application_name => '{NAME}')
from unnest(%s::text[]) as flows (flow)
"""

State = dict[str, Any]


@DBOS.step(name="step")
def step(state: State) -> State | None:
    """One step, in a thread of its workflow."""
    after = work.step(_flow(state))
    return None if after is None else _state(after)


@DBOS.step(name="step_beside")
async def step_beside(state: State) -> State | None:
    """The same for a workflow that is a coroutine."""
    after = await work.step_beside(_flow(state))
    return None if after is None else _state(after)


@DBOS.workflow(name="flow")
def flow(state: State | None) -> None:
    """A flow, to its last step."""
    while state is not None:
        state = step(state)


@DBOS.workflow(name="child")
async def child(state: State) -> None:
    """A flow of one step."""
    await step_beside(state)


@DBOS.workflow(name="fan_out")
async def fan_out(state: State | None, children: list[State]) -> None:
    """Enqueue the children, await all, then run the flow: concurrently where DBOS allows it, in an order it can repeat."""
    handles = await asyncio.gather(*(DBOS.enqueue_workflow_async(QUEUE, child, one) for one in children))
    await asyncio.gather(*(handle.get_result() for handle in handles))
    while state is not None:
        state = await step_beside(state)


class Dbos(System):
    """DBOS Transact for Python, without its Conductor."""

    name: ClassVar[str] = "dbos"
    package: ClassVar[str | None] = "dbos"
    configuration: ClassVar[str] = (
        f"One queue, polled every {POLLING_S * 1000:.0f} ms (default 1 s; each poll is about 4 ms of CPU) with a worker "
        f"concurrency of {AT_ONCE}, as large as the default pool, and no global limit, as its queue tutorial recommends; "
        "threads, as coroutines take more CPU a step; portable JSON, logs for errors only, no telemetry; an executor id for "
        "every worker and recovery when it returns, as its page on recovery asks of several executors without Conductor; "
        "batches and delayed starts by its SQL function dbos.enqueue_workflow, single starts by DBOSClient.enqueue."
    )
    processes: ClassVar[int] = 2

    def install(self) -> None:
        DBOS.migrate(_url(self.dsn))
        self._client.register_queue(QUEUE, worker_concurrency=AT_ONCE, polling_interval_sec=POLLING_S)

    def start_one(self, flow: Flow) -> None:
        self._client.enqueue({"workflow_name": "flow", "queue_name": QUEUE}, _state(flow))

    def start_many(self, flows: Sequence[Flow]) -> None:
        self._enqueue(flows, None)

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        """Delayed: a workflow that sleeps holds a thread and a place of its worker's concurrency, a delayed one is a row."""
        self._enqueue(flows, math.ceil(due_s * 1000))

    def start_fan_out(self, flow: Flow, width: int) -> None:
        children = [_state(Flow(-(flow.number * width + child), of=1)) for child in range(1, width + 1)]
        self._client.enqueue({"workflow_name": "fan_out", "queue_name": QUEUE}, _state(flow), children)

    def close(self) -> None:
        self._client.destroy()

    @cached_property
    def _client(self) -> DBOSClient:
        return DBOSClient(
            system_database_url=_url(self.dsn), serializer=DBOSPortableJSONSerializer(), application_name=NAME
        )

    def _enqueue(self, flows: Sequence[Flow], due_ms: int | None) -> None:
        with connect(self.dsn, name="durable-bench dbos") as connection:
            connection.execute(ENQUEUE.encode(), (due_ms, [msgspec.json.encode(flow).decode() for flow in flows]))


def _state(flow: Flow) -> State:
    state: State = msgspec.to_builtins(flow)
    return state


def _flow(state: State) -> Flow:
    return msgspec.convert(state, Flow)


def _url(dsn: str) -> str:
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    return f"postgresql:///{quote(parts.pop('dbname'))}?{urlencode(parts)}"


def main() -> None:
    """A worker: an executor that runs what is on the queue until SIGTERM."""
    config = DBOSConfig(
        name=NAME,
        system_database_url=_url(os.environ["DURABLE_BENCH_DSN"]),
        executor_id=f"worker-{sys.argv[1]}",
        serializer=DBOSPortableJSONSerializer(),
        log_level="ERROR",
        enable_otlp=False,
        run_migrations=False,
    )
    is_ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_ended.set())
    DBOS(config=config)
    DBOS.launch()
    print(READY)
    is_ended.wait()
    DBOS.destroy(workflow_completion_timeout_sec=LAST_WORKFLOWS_S)


if __name__ == "__main__":
    main()
