"""What the chaos run runs: ten steps of every kind, each handoff in a ledger, and some workflows that kill their process.

    plain → book → awaited → book → blocking → book → sleep → book → plain → book

``book`` is transactional: its line in the ledger commits with the handoff, so a handoff that happened twice, or a step that was
lost, shows there.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import time

import msgspec

from durable_cluster import App, Context, Continuation, Retry

STEPS = 10
POISONS = ("exit", "segfault", "hang", "raise")
PLAIN_S = 0.004
SLOW_S = 1.0
SLOW_SHARE = 0.05
RAISE_SHARE = 0.02


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """``number``: which workflow; ``position``: steps behind it; ``poison``: how its fifth step ends, or nothing."""

    number: int
    position: int = 0
    poison: str = ""


app = App("chaos")
chain = app.machine("chain", state=Job)
PATIENT = Retry(attempts=20, backoff=0.02, max_backoff=0.2)


@chain.step(start=True, retry=PATIENT)
def plain(ctx: Context, job: Job) -> Continuation:
    time.sleep(PLAIN_S)
    fail_now_and_then()
    return ctx.goto(book, after(job))


@chain.step(transactional=True, retry=PATIENT)
def book(ctx: Context, job: Job) -> Continuation:
    ctx.tx.execute(
        "insert into chaos.ledger (number, position, seq) values (%s, %s, %s)", (job.number, job.position, ctx.seq)
    )
    fail_now_and_then()
    done = after(job)
    if done.position == STEPS:
        return ctx.done(job.number)
    if done.position == 6:
        return ctx.sleep(random.uniform(0.01, 0.5), asleep, done)
    return ctx.goto({2: awaited, 4: blocking, 8: plain}[done.position], done)


@chain.step(retry=PATIENT)
async def awaited(ctx: Context, job: Job) -> Continuation:
    await asyncio.sleep(slowness())
    fail_now_and_then()
    return ctx.goto(book, after(job))


@chain.step(blocking=True, timeout="3s", retry=Retry(attempts=3, backoff=0.02, max_backoff=0.2))
def blocking(ctx: Context, job: Job) -> Continuation:
    if job.poison:
        ends_badly(job.poison)
    time.sleep(slowness())
    return ctx.goto(book, after(job))


@chain.step()
def asleep(ctx: Context, job: Job) -> Continuation:
    return ctx.goto(book, after(job))


def after(job: Job) -> Job:
    """One step further."""
    return msgspec.structs.replace(job, position=job.position + 1)


def slowness() -> float:
    """Seconds: mostly a moment, now and then longer than any page."""
    return random.uniform(0.1, SLOW_S) if random.random() < SLOW_SHARE else 0.001


def fail_now_and_then() -> None:
    """What a network does."""
    if random.random() < RAISE_SHARE:
        raise ConnectionError("the peer went away")


def ends_badly(how: str) -> None:
    """End this process, or never end."""
    if how == "exit":
        os._exit(17)
    if how == "segfault":
        ctypes.string_at(0)
    while how == "hang":
        try:
            time.sleep(0.05)
        except BaseException:  # it does not let itself be interrupted
            continue
    raise ValueError("it fails every time")
