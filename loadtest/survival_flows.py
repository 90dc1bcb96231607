"""What the survival measurements run: sleepers, one slow step among quick ones, naps beside chains, steps that say who ran them.

Imported by every consumer process as ``durable_cluster.loadtest.survival_flows:app``.
"""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from durable_cluster import App, Context, Continuation, Retry
from durable_cluster.joins import CHILDREN_MAX
from durable_cluster.loadtest.workloads import Count, next_count

NAP_S = 10.0
WORK_S = 0.004
CALL_S = 2.0
SCHEMA = """
create schema survival;
create unlogged table survival.ran (
    key text not null, pid int not null, host int not null, at timestamptz not null default clock_timestamp());
create index on survival.ran (at);
"""
"""Who ran which step when, by the database's clock. Unlogged: nobody waits for a disk."""

app = App("survival")


class Nap(msgspec.Struct, frozen=True):
    """Sleep ``first_s``, then ten seconds again and again, until the time ``until`` (seconds since 1970)."""

    first_s: float
    until: float


sleeper = app.machine("sleeper", state=int)
napper = app.machine("napper", state=int)
waiter = app.machine("waiter", state=int)
quick = app.machine("quick", state=int)
fan = app.machine("fan", state=dict)
awaited = app.machine("awaited", state=float)
threaded = app.machine("threaded", state=float)
nap = app.machine("nap", state=Nap)
ten_steps = app.machine("ten-steps", state=Count)
worker = app.machine("worker", state=int)
caller = app.machine("caller", state=int)


@sleeper.step(start=True)
def wake(ctx: Context, number: int) -> Continuation:
    return ctx.done(number)


@napper.step(start=True)
def fall_asleep(ctx: Context, number: int) -> Continuation:
    return ctx.sleep("30d", then=fall_asleep, state=number)


@waiter.step(start=True)
def wait(ctx: Context, number: int) -> Continuation:
    return ctx.wait_for("go", then=go_on, state=number)


@waiter.step()
def go_on(ctx: Context, number: int) -> Continuation:
    return ctx.done(number)


@quick.step(start=True)
def at_once(ctx: Context, number: int) -> Continuation:
    return ctx.done(number)


@fan.step(start=True)
def spread(ctx: Context, state: dict[str, int]) -> Continuation:
    first = state["all"] - state["left"]
    children = [quick.child(number) for number in range(first, min(state["all"], first + CHILDREN_MAX))]
    state["left"] -= len(children)
    if state["left"]:
        return ctx.spawn(children, then=spread, state=state)
    return ctx.gather(children, then=total, state=state)


@fan.step()
def total(ctx: Context, state: dict[str, int]) -> Continuation:
    return ctx.done(sum(child.output for child in ctx.results))


@awaited.step(start=True)
async def long_call(ctx: Context, pause_s: float) -> Continuation:
    await asyncio.sleep(pause_s)
    return ctx.done()


@threaded.step(start=True, blocking=True)
def long_wait(ctx: Context, pause_s: float) -> Continuation:
    time.sleep(pause_s)
    return ctx.done()


@nap.step(start=True)
async def doze(ctx: Context, at: Nap) -> Continuation:
    await asyncio.sleep(max(0.0, min(at.first_s, at.until - time.time())))
    return ctx.done() if time.time() >= at.until else ctx.goto(doze, Nap(NAP_S, at.until))


@ten_steps.step(start=True)
def trivial(ctx: Context, at: Count) -> Continuation:
    return ctx.done(at.total) if at.steps == at.of else ctx.goto(trivial, next_count(at))


@worker.step(start=True, retry=Retry(attempts=1_000, backoff=0.02, max_backoff=0.2))
def work(ctx: Context, number: int) -> Continuation:
    """For ever: a quick step."""
    say_who(ctx)
    time.sleep(WORK_S)
    return ctx.goto(work, number)


@caller.step(start=True, retry=Retry(attempts=1_000, backoff=0.02, max_backoff=0.2))
async def call(ctx: Context, number: int) -> Continuation:
    """For ever: a step that outlasts its page."""
    say_who(ctx)
    await asyncio.sleep(CALL_S)
    return ctx.goto(call, number)


def say_who(ctx: Context) -> None:
    """A line of the ledger: this step began here and now. ``host``: a process group stands for a machine."""
    app.client.connection().execute(
        "insert into survival.ran (key, pid, host) values (%s, %s, %s)",
        (f"{ctx.workflow_id}:{ctx.seq}", os.getpid(), os.getpgrp()),
    )
