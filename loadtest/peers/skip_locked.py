"""The baseline everyone builds first, built well: one table, ``for update skip locked``, one update and one commit a group."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import psycopg

from durable_cluster.database import connect
from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import READY, System

GROUP = 500
POLL_S_MAX = 1.0
NUMBERS_A_PARENT = 1_000_000

# A step changes `state` alone, which no index covers, and half of each page is free: the update is a HOT one.
INSTALL = """
create table flow (
  id bigint primary key,
  state text not null,
  due timestamptz default now(),
  parent bigint,
  spawns int,
  unjoined int
) with (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
create index on flow (due) where due is not null;
"""

# The planner has no statistics of a table that was just filled, and must not scan it for a group of 500.
BY_INDEX_ONLY = "set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off; set jit = off"

START = """
with started as (insert into flow (id, state, due, spawns) values (%s, %s, now(), %s))
select pg_notify('flow', '')
"""
NOTIFY = "select pg_notify('flow', '')"
COPY = "copy flow (id, state, due) from stdin"

CLAIM = """
select id, state, parent, spawns
from flow
where due <= statement_timestamp()
order by due
limit %s
for update skip locked
"""
NEXT_DUE = "select extract(epoch from min(due) - clock_timestamp())::float from flow where due > statement_timestamp()"

# One text of lines instead of an array of texts: psycopg would quote each element, and Postgres parse it.
ADVANCE = """
update flow f
set state = coalesce(next.state, f.state), due = case when next.state is not null then f.due end
from (
  select line.id, nullif(line.state, '') as state
  from rows from (unnest(%s::bigint[]), string_to_table(%s, E'\\n')) as line (id, state)
) next
where f.id = next.id
"""
SPAWN = """
insert into flow (id, state, parent)
select child.id, child.state, %s
from rows from (unnest(%s::bigint[]), string_to_table(%s, E'\\n')) as child (id, state)
"""
AWAIT_CHILDREN = "update flow set due = null, unjoined = spawns, spawns = null where id = %s"
# In the order of the parents, lest two groups wait for each other.
JOIN = """
update flow f
set unjoined = f.unjoined - ended.children, due = case when f.unjoined = ended.children then now() end
from (
  select parent, count(*)::int as children from unnest(%s::bigint[]) parent group by parent order by parent
) ended
where f.id = ended.parent
"""

Connection = psycopg.Connection[Any]
Claimed = tuple[int, str, int | None, int | None]
"""A row that is ours until we commit: id, state, parent, children to spawn."""
Statement = tuple[str, Sequence[Any]]

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Flow).decode


class SkipLocked(System):
    """A table of flows and a worker loop, as a careful engineer would write them for one job."""

    name = "skip_locked"
    configuration = (
        f"ours: workers claim up to {GROUP} due rows FOR UPDATE SKIP LOCKED, run their steps, write all with one set-based "
        "HOT update and one durable commit, which carries the next claim in the same round trip (pipeline, COMMIT AND "
        "CHAIN); partial index, fillfactor 45, prepared statements; LISTEN/NOTIFY with a poll each second; COPY to start many"
    )
    processes = 4
    _client: Connection | None = None

    def install(self) -> None:
        self._connection().execute(INSTALL)

    def start_one(self, flow: Flow) -> None:
        self._connection().execute(START, (flow.number, encode(flow).decode(), None))

    def start_many(self, flows: Sequence[Flow]) -> None:
        self._copy(flows, due="now")

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        connection = self._connection()
        row = connection.execute("select to_timestamp(%s)::text", (due_s,)).fetchone()
        self._copy(flows, due=str(row and row[0]))

    def start_fan_out(self, flow: Flow, width: int) -> None:
        self._connection().execute(START, (flow.number, encode(flow).decode(), width))

    def close(self) -> None:
        if self._client:
            self._client.close()

    def _copy(self, flows: Sequence[Flow], *, due: str) -> None:
        lines = "".join(f"{flow.number}\t{_copied(encode(flow).decode())}\t{due}\n" for flow in flows)
        connection = self._connection()
        with connection.transaction():
            with connection.cursor().copy(COPY) as copy:
                copy.write(lines)
            connection.execute(NOTIFY)

    def _connection(self) -> Connection:
        if self._client is None:
            self._client = connect(self.dsn, name="durable-bench skip_locked")
        return self._client


def _copied(text: str) -> str:
    """As COPY reads it; JSON has no tabs and no line ends of its own."""
    return text.replace("\\", "\\\\")


def stepped(flows: Sequence[Flow], runner: asyncio.Runner) -> list[Flow | None]:
    """One step of each: in line, or side by side if they wait for something."""
    if any(flow.pause_ms for flow in flows):
        return runner.run(_side_by_side(flows))
    return [work.step(flow) for flow in flows]


async def _side_by_side(flows: Sequence[Flow]) -> list[Flow | None]:
    return await asyncio.gather(*(work.step_beside(flow) for flow in flows))


def handed_on(group: Sequence[Claimed], runner: asyncio.Runner) -> Iterator[Statement]:
    """Run a step of each; the statements that write the group."""
    rows = [row for row in group if row[3] is None]
    after = stepped([decode(state) for _, state, _, _ in rows], runner)
    if rows:
        yield ADVANCE, ([row[0] for row in rows], _lines(after))
    parents = [row[2] for row, flow in zip(rows, after, strict=True) if row[2] is not None and flow is None]
    if parents:
        yield JOIN, (parents,)
    for number, _, _, spawns in group:
        if spawns is not None:
            children = [Flow(-number * NUMBERS_A_PARENT - child, of=1) for child in range(1, spawns + 1)]
            yield SPAWN, (number, [child.number for child in children], _lines(children))
            yield AWAIT_CHILDREN, (number,)
            yield NOTIFY, ()


def _lines(flows: Iterable[Flow | None]) -> str:
    """The states, one a line; an empty one is that of a flow that has ended."""
    return "\n".join(encode(flow).decode() if flow else "" for flow in flows)


def claim(connection: Connection) -> list[Claimed]:
    """The first group after a pause."""
    return connection.execute(CLAIM, (GROUP,), prepare=True).fetchall()


def write_and_claim(connection: Connection, statements: Iterable[Statement]) -> list[Claimed]:
    """Commit a group and claim the next, in one round trip."""
    with connection.pipeline():
        for query, parameters in statements:
            connection.execute(query.encode(), parameters, prepare=True)
        connection.execute("commit and chain", prepare=True)
        claimed = connection.execute(CLAIM, (GROUP,), prepare=True)
    return claimed.fetchall()


def await_work(connection: Connection) -> None:
    """Until a notification, the next sleeper's time, or a second has passed."""
    row = connection.execute(NEXT_DUE, prepare=True).fetchone()
    connection.commit()
    due_after_s = row[0] if row and row[0] is not None else POLL_S_MAX
    for _ in connection.notifies(timeout=min(POLL_S_MAX, max(0.0, due_after_s)), stop_after=1):
        pass


def run() -> None:
    """Work until killed, which loses nothing: what is claimed is unlocked with the connection."""
    with connect(os.environ["DURABLE_BENCH_DSN"], name="durable-bench skip_locked") as connection:
        connection.execute(BY_INDEX_ONLY)
        connection.execute("listen flow")
        connection.autocommit = False
        sys.stdout.write(f"{READY}\n")
        with asyncio.Runner() as runner:
            while True:
                group = claim(connection)
                while group:
                    group = write_and_claim(connection, list(handed_on(group, runner)))
                await_work(connection)


if __name__ == "__main__":
    run()
