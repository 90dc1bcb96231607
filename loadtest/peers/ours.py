"""durable-cluster itself: what its users run, a supervisor with consumer processes, on the schema that ``init`` installs.

Two variations add to every step what others keep a row for. Their rows are written by a trigger on the log, for all steps of
a chunk in one statement, in the page's own transaction: the cheapest way there is, so that the row is what is measured.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import msgspec

from durable_cluster import App, Context, Continuation, schema
from durable_cluster.database import connect
from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.peers.base import System, Workers
from durable_cluster.loadtest.stage import RunningCluster
from durable_cluster.machine import Machine

SHARDS = 4
STARTED_AT_ONCE = 10_000

app = App("bench")
flow_machine = app.machine("flow", state=Flow)
pausing_machine = app.machine("pausing", state=Flow)
waiting_machine = app.machine("waiting", state=Flow)
joining_machine = app.machine("joining", state=Flow)
child_machine = app.machine("child", state=int)
family_machine = app.machine("family", state=Flow)


@flow_machine.step(start=True)
def run(ctx: Context, flow: Flow) -> Continuation:
    """Any of the steps."""
    after = work.step(flow)
    return ctx.done() if after is None else ctx.goto(run, after)


@pausing_machine.step(start=True)
async def run_beside(ctx: Context, flow: Flow) -> Continuation:
    """Any of the steps, when they await something."""
    after = await work.step_beside(flow)
    return ctx.done() if after is None else ctx.goto(run_beside, after)


@waiting_machine.step(start=True)
def run_and_wait(ctx: Context, flow: Flow) -> Continuation:
    """Any of the steps; before the next, a wait for a signal that does not come, for a millisecond."""
    after = work.step(flow)
    return ctx.done() if after is None else ctx.wait_for("never", timeout=0.001, then=run_and_wait, state=after)


@joining_machine.step(start=True)
def run_and_join(ctx: Context, flow: Flow) -> Continuation:
    """Any of the steps; before the next, a child of one step that it waits for."""
    after = work.step(flow)
    return ctx.done() if after is None else ctx.gather([child_machine.child(0)], then=run_and_join, state=after)


@child_machine.step(start=True)
def end(ctx: Context, number: int) -> Continuation:
    """All that a child does."""
    return ctx.done(number)


@family_machine.step(start=True)
def fan_out(ctx: Context, flow: Flow) -> Continuation:
    """Spawns as many flows of one step as ``ballast`` says."""
    width = int(flow.ballast)
    children = [flow_machine.child(Flow(-(flow.number * width + child), of=1)) for child in range(1, width + 1)]
    return ctx.gather(children, then=joined, state=msgspec.structs.replace(flow, ballast=""))


@family_machine.step()
def joined(ctx: Context, flow: Flow) -> Continuation:
    """The only step of the flow that spawned, after all of the others."""
    ctx.results.values()
    work.step(flow)
    return ctx.done()


@app.step
def quick(flow: Flow) -> Flow | None:
    """Any of the steps of a linear flow."""
    return work.step(flow)


@app.step
async def awaited(flow: Flow) -> Flow | None:
    """The same, committed before the next begins."""
    return await work.step_beside(flow)


@app.workflow
async def linear(flow: Flow) -> None:
    """Ten quick steps."""
    after: Flow | None = flow
    while after is not None:
        after = await quick(after)


@app.workflow
async def strict(flow: Flow) -> None:
    """Ten steps, a commit each."""
    after: Flow | None = flow
    while after is not None:
        after = await awaited(after)


class Ours(System):
    """The product."""

    name = "ours"
    configuration = "`durable-cluster start --shards 4` with the default settings: one consumer process a shard."
    shards: ClassVar[int] = SHARDS
    trigger: ClassVar[str | None] = None

    def __init__(self, dsn: str, directory: Path) -> None:
        super().__init__(dsn, directory)
        self._connection = connect(dsn, name="durable-bench client")

    def install(self) -> None:
        schema.install(self._connection, shards=self.shards)
        if self.trigger:
            self._connection.execute(self.trigger.encode())
            logs = self._connection.execute(
                "select i.inhrelid::regclass::text from pg_inherits i join pgque.queue q"
                " on i.inhparent = q.queue_data_pfx::regclass where q.queue_name like 'durable\\_%'"
            ).fetchall()
            for (log,) in logs:
                self._connection.execute(
                    f"create trigger bench after insert on {log} referencing new table as chunks"
                    " for each statement execute function loadtest.of_each_step()".encode()
                )

    def start_one(self, flow: Flow) -> None:
        self._machine([flow]).start(flow, tx=self._connection)

    def start_many(self, flows: Sequence[Flow]) -> None:
        for first in range(0, len(flows), STARTED_AT_ONCE):
            some = flows[first : first + STARTED_AT_ONCE]
            self._machine(some).start_many(some, tx=self._connection)

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        with self._connection.transaction():
            now = self._connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
            assert now is not None
            flow_machine.start_many(flows, after=due_s - now[0], tx=self._connection)

    def start_fan_out(self, flow: Flow, width: int) -> None:
        family_machine.start(msgspec.structs.replace(flow, ballast=str(width)), tx=self._connection)

    @contextmanager
    def workers(self, count: int) -> Iterator[Workers]:
        os.environ[work.DIRECTORY] = str(self.directory)
        cluster = OurWorkers(self.dsn, processes=count, shards=self.shards, app=f"{__name__}:app")
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()

    def close(self) -> None:
        self._connection.close()

    def _machine(self, flows: Sequence[Flow]) -> Machine:
        return pausing_machine if flows[0].pause_ms else flow_machine


class OurWorkers(RunningCluster):
    """The cluster, whose supervisor starts again what was killed."""

    def kill_one(self) -> int:
        pid = next(pid for name, pid in self.supervisor.pids.items() if name[-1].isdigit())
        os.kill(pid, signal.SIGKILL)
        return pid


class OursWithDedup(Ours):
    """Workload C: what engines do that keep a row per step to know it has run."""

    name = "ours_dedup"
    configuration = "The product, and a row per step under a unique key, written set-wise in the page's transaction."
    trigger = """
        create schema loadtest;
        create table loadtest.dedup (
            id uuid not null, seq int not null, at timestamptz not null default now(), primary key (id, seq));
        create function loadtest.of_each_step() returns trigger language plpgsql security definer as $$
        begin
            insert into loadtest.dedup (id, seq)
            select substr(l.line, 7, 32)::uuid, split_part(split_part(l.line, '"n":', 2), ',', 1)::int
            from chunks c, string_to_table(c.ev_data, E'\\n') l(line);
            return null;
        end $$"""


class OursWithStatus(Ours):
    """Workload D: what engines do that keep a row per workflow which says where it stands."""

    name = "ours_status"
    configuration = "The product, and a row per workflow updated at every step, set-wise in the page's transaction."
    trigger = """
        create schema loadtest;
        create table loadtest.status (
            id uuid primary key, seq int not null, at timestamptz not null default now()) with (fillfactor = 50);
        create function loadtest.of_each_step() returns trigger language plpgsql security definer as $$
        begin
            insert into loadtest.status (id, seq)
            select substr(l.line, 7, 32)::uuid, split_part(split_part(l.line, '"n":', 2), ',', 1)::int
            from chunks c, string_to_table(c.ev_data, E'\\n') l(line)
            on conflict (id) do update set seq = excluded.seq, at = excluded.at;
            return null;
        end $$"""


class OursWaiting(Ours):
    """A wait a step: rows in ``durable.wait``, timers and their sweeps."""

    name = "ours_waiting"
    configuration = "The product; every step waits for a signal and goes on after a millisecond without it."

    def _machine(self, flows: Sequence[Flow]) -> Machine:
        return waiting_machine


class OursJoining(Ours):
    """A join a step: another workflow started, ended and counted for each."""

    name = "ours_joining"
    configuration = "The product; every step spawns a child, a workflow of one step, and waits for it."

    def _machine(self, flows: Sequence[Flow]) -> Machine:
        return joining_machine


class OursLinear(Ours):
    """The same steps in an ordinary function."""

    name = "ours_linear"
    configuration = "The product; an ordinary function that awaits ten `def` steps, which run ahead."

    def _machine(self, flows: Sequence[Flow]) -> Machine:
        return linear


class OursLinearAsync(Ours):
    """The same, each step on record before the next begins."""

    name = "ours_linear_async"
    configuration = "The product; an ordinary function that awaits ten `async def` steps, a commit each."

    def _machine(self, flows: Sequence[Flow]) -> Machine:
        return strict


class OursOnOneShard(Ours):
    """The product on one shard, with one consumer process."""

    name = "ours_1_shard"
    shards = processes = 1


class OursOnTwoShards(Ours):
    """The product on two shards."""

    name = "ours_2_shards"
    shards = processes = 2


class OursOnEightShards(Ours):
    """The product on eight shards."""

    name = "ours_8_shards"
    shards = processes = 8
