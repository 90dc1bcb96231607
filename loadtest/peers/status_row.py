"""Workload A, a mutable status row per workflow: no queue at all, each worker owns its rows and writes them in place."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec
import psycopg

from durable_cluster.database import connect
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import READY, System, Workers
from durable_cluster.loadtest.peers.skip_locked import BY_INDEX_ONLY, stepped

ROWS = 1_000
POLL_S = 0.002
SET = "set"
PIPELINED = "pipelined"

# `state` is in no index, and half of each page is free: the update of a step is a HOT one, that of the last step is not.
INSTALL = """
create table flow (
  id bigint primary key,
  state text not null,
  is_finished boolean not null default false
) with (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
"""
OWN = """
drop index if exists unfinished;
create index unfinished on flow ((id %% {count}), id) where not is_finished;
analyze flow;
"""
START = "insert into flow (id, state) values (%s, %s)"
COPY = "copy flow (id, state) from stdin"
READ = "select id, state from flow where id %% {count} = %s and not is_finished order by id limit %s"
WRITE_SET = """
update flow f
set state = coalesce(next.state, f.state), is_finished = next.state is null
from (
  select line.id, nullif(line.state, '') as state
  from rows from (unnest(%s::bigint[]), string_to_table(%s, E'\\n')) as line (id, state)
) next
where f.id = next.id
"""
WRITE_ONE = "update flow set state = %s where id = %s"
FINISH_ONE = "update flow set is_finished = true where id = %s"

Connection = psycopg.Connection[Any]

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Flow).decode


class StatusRowSet(System):
    """The strongest form: 1,000 rows an update, one update a commit."""

    name = "status_row_set"
    configuration = (
        f"ours: each worker reads {ROWS:,} of its own rows and writes them in one set-based HOT update a commit; "
        "expression index on the unfinished rows of each worker, fillfactor 45, prepared statements"
    )
    processes = 4
    lacks: ClassVar = {
        "W4": "no timers",
        "W5": "no join",
        "W6": "no queue: a row waits for its own worker",
        "W7": "no notification: it polls all the time",
    }
    kind: ClassVar[str] = SET
    _client: Connection | None = None
    _count = 1

    def install(self) -> None:
        self._connection().execute(INSTALL)

    def start_one(self, flow: Flow) -> None:
        self._connection().execute(START, (flow.number, encode(flow).decode()))

    def start_many(self, flows: Sequence[Flow]) -> None:
        states = ((flow.number, encode(flow).decode().replace("\\", "\\\\")) for flow in flows)
        with self._connection().cursor().copy(COPY) as copy:
            copy.write("".join(f"{number}\t{state}\n" for number, state in states))

    @contextmanager
    def workers(self, count: int) -> Iterator[Workers]:
        """As always, once the rows are dealt out among so many."""
        self._count = count
        self._connection().execute(OWN.format(count=count).replace("%%", "%").encode())
        with super().workers(count) as running:
            yield running

    def worker_command(self, number: int) -> list[str]:
        return [sys.executable, "-m", __name__, str(number), str(self._count), self.kind]

    def close(self) -> None:
        if self._client:
            self._client.close()

    def _connection(self) -> Connection:
        if self._client is None:
            self._client = connect(self.dsn, name=f"durable-bench {self.name}")
        return self._client


class StatusRowPipelined(StatusRowSet):
    """The usual form: each step is an update and a commit of its own, without waiting for the one before."""

    name = "status_row_pipelined"
    configuration = (
        f"ours: each worker reads {ROWS:,} of its own rows and writes each in an update and a commit of its own, all sent at "
        "once (psycopg's pipeline mode, COMMIT AND CHAIN after each); index, fillfactor and prepared statements as in "
        "status_row_set"
    )
    kind = PIPELINED


def write_set(connection: Connection, numbers: Sequence[int], flows: Sequence[Flow | None]) -> None:
    """All in one update and one commit; an empty line is a flow that has ended."""
    lines = "\n".join(encode(flow).decode() if flow else "" for flow in flows)
    connection.execute(WRITE_SET, (numbers, lines), prepare=True)


def write_pipelined(connection: Connection, numbers: Sequence[int], flows: Sequence[Flow | None]) -> None:
    """Each in an update and a commit of its own. ``Pipeline.sync``, which commits too, would wait for each."""
    with connection.pipeline(), connection.transaction():
        for number, flow in zip(numbers, flows, strict=True):
            if flow:
                connection.execute(WRITE_ONE, (encode(flow).decode(), number), prepare=True)
            else:
                connection.execute(FINISH_ONE, (number,), prepare=True)
            connection.execute("commit and chain", prepare=True)


def run(number: int, count: int, kind: str) -> None:
    """Work until killed; what was not committed is run again by the one that is started next."""
    write = write_set if kind == SET else write_pipelined
    read = READ.format(count=count).encode()
    with connect(os.environ["DURABLE_BENCH_DSN"], name="durable-bench status_row") as connection:
        connection.execute(BY_INDEX_ONLY)
        sys.stdout.write(f"{READY}\n")
        with asyncio.Runner() as runner:
            while True:
                rows = connection.execute(read, (number, ROWS), prepare=True).fetchall()
                if rows:
                    write(connection, [row[0] for row in rows], stepped([decode(row[1]) for row in rows], runner))
                else:
                    time.sleep(POLL_S)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
