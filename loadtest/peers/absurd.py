"""absurd: tasks on a queue, each step a checkpoint, worker processes that poll, claim and run them in threads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

import msgspec
from absurd_sdk import Absurd as Client
from absurd_sdk import TaskContext
from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict

from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import READY, System
from durable_cluster.loadtest.stage import StageError
from durable_cluster.premises import wheel_binaries

QUEUE = "flows"
CHILDREN = "children"  # a task may only wait for tasks of another queue
AT_ONCE = 10
CLAIM_S = 5
POLLING_S = 0.01
CHILDREN_POLLING_S = 0.05

SPAWN = "select task_id::text from unnest(%s::jsonb[]) as tasks (params), absurd.spawn_task(%s, %s, params)"

State = dict[str, Any]


class Absurd(System):
    """absurd, by its Python SDK and its stored functions."""

    name: ClassVar[str] = "absurd"
    package: ClassVar[str | None] = "absurd-sdk"
    configuration: ClassVar[str] = (
        f"The synchronous worker of its Python SDK page with {AT_ONCE} threads a process (the asynchronous one takes more CPU a "
        "step, and claims again only once its whole batch has ended), polling every "
        f"{POLLING_S * 1000:.0f} ms (default 250 ms: W7 shows what that costs, W2 what it gains); claims of {CLAIM_S} s "
        "instead of 120 s, which by its Concepts page every checkpoint extends and which bound how long the tasks of a dead "
        "worker wait; unpartitioned queues; batches by its stored function absurd.spawn_task in one statement."
    )
    processes: ClassVar[int] = 4

    def install(self) -> None:
        for arguments in (["init"], ["create-queue", QUEUE], ["create-queue", CHILDREN]):
            _absurdctl(*arguments, f"--database={_url(self.dsn)}")

    def start_one(self, flow: Flow) -> None:
        self._client.spawn("flow", _state(flow), queue=QUEUE)

    def start_many(self, flows: Sequence[Flow]) -> None:
        _spawn(self._connection, QUEUE, "flow", map(_state, flows))

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        """There is no start with a delay: each runs once before it is due, to fall asleep."""
        _spawn(self._connection, QUEUE, "sleeper", ({"flow": _state(flow), "due_s": due_s} for flow in flows))

    def start_fan_out(self, flow: Flow, width: int) -> None:
        children = [_state(Flow(-(flow.number * width + child), of=1)) for child in range(1, width + 1)]
        self._client.spawn("fan_out", {"flow": _state(flow), "children": children}, queue=QUEUE)

    def close(self) -> None:
        self._connection.close()

    @cached_property
    def _connection(self) -> Connection[Any]:
        return Connection.connect(self.dsn, autocommit=True)

    @cached_property
    def _client(self) -> Client:
        return Client(self._connection, queue_name=QUEUE)


def _absurdctl(*arguments: str) -> None:
    """Run what ``pip install absurdctl`` put beside this interpreter. It needs a psql: the PATH's, else the wheel's."""
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("psql") is None:
        path = f"{path}{os.pathsep}{wheel_binaries()}"
    ended = subprocess.run(
        [Path(sys.executable).parent / "absurdctl", *arguments],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise StageError(f"absurdctl {arguments[0]} failed: {ended.stderr.strip() or ended.stdout.strip()}")


def _url(dsn: str) -> str:
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    return f"postgresql:///{quote(parts.pop('dbname'))}?{urlencode(parts)}"


def _spawn(connection: Connection[Any], queue: str, task: str, params: Iterable[State]) -> list[str]:
    """Many tasks in one statement, and so in one transaction; their ids."""
    encoded = [msgspec.json.encode(one).decode() for one in params]
    return [task_id for (task_id,) in connection.execute(SPAWN, (encoded, queue, task))]


def _state(flow: Flow) -> State:
    state: State = msgspec.to_builtins(flow)
    return state


def _run(state: State, context: TaskContext) -> None:
    """A flow from ``state`` to its last step; absurd counts steps of the same name."""
    left: State | None = state
    while left is not None:
        left = context.step("step", partial(_next, left))


def _next(state: State) -> State | None:
    after = work.step(msgspec.convert(state, Flow))
    return None if after is None else _state(after)


def _flows(connection: Connection[Any]) -> Client:
    """The worker's client of the queue of flows."""
    client = Client(connection, queue_name=QUEUE)

    @client.register_task("flow")
    def flow(params: State, context: TaskContext) -> None:
        _run(params, context)

    @client.register_task("sleeper")
    def sleeper(params: State, context: TaskContext) -> None:
        context.sleep_until("due", params["due_s"])
        _run(params["flow"], context)

    @client.register_task("fan_out")
    def fan_out(params: State, context: TaskContext) -> None:
        spawned = context.step("spawn", lambda: _spawn(connection, CHILDREN, "child", params["children"]))
        for task_id in spawned:
            context.await_task_result(task_id, queue_name=CHILDREN)
        _run(params["flow"], context)

    return client


def _children(connection: Connection[Any]) -> Client:
    """The worker's client of the queue of children."""
    client = Client(connection, queue_name=CHILDREN)

    @client.register_task("child")
    def child(params: State, context: TaskContext) -> None:
        _run(params, context)

    return client


def _work(client: Client, name: str, polling_s: float) -> None:
    client.start_worker(worker_id=name, claim_timeout=CLAIM_S, concurrency=AT_ONCE, poll_interval=polling_s)


def main() -> None:
    """A worker of both queues until SIGTERM, each with a connection of its own."""
    dsn, name = os.environ["DURABLE_BENCH_DSN"], f"worker-{sys.argv[1]}"
    with Connection.connect(dsn, autocommit=True) as one, Connection.connect(dsn, autocommit=True) as other:
        flows, children = _flows(one), _children(other)
        beside = threading.Thread(target=_work, args=(children, name, CHILDREN_POLLING_S))

        def stop(*_: object) -> None:
            flows.stop_worker()
            children.stop_worker()

        signal.signal(signal.SIGTERM, stop)
        beside.start()
        print(READY)
        _work(flows, name, POLLING_S)
        beside.join()


if __name__ == "__main__":
    main()
