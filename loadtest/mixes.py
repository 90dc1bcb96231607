"""What the load test starts: four mixes of workflows, named after real loads, in one App.

    durable-cluster start --app durable_cluster.loadtest.mixes:app

    order      order fulfilment, as in examples/orders: five steps, two of them in the transaction that hands it on
    agent      turns of a model that takes its time, with two tools at once in between
    batch      a fan-out: children, started in one transaction and joined
    purchase   a request that waits for a person's word

What a model or a person takes is slept, and named in the input: the rest of the time is the product's.
"""

from __future__ import annotations

import asyncio

import msgspec

from durable_cluster import gather, loop, wait_for
from durable_cluster.examples.orders.linear import app, order

__all__ = ["Purchase", "Talk", "agent", "app", "batch", "order", "part", "purchase"]

SAID_CHARS = 200


class Talk(msgspec.Struct, frozen=True):
    """The input of an agent, and the state of its loop. ``said``: a text for each message so far."""

    turns: int
    think_s: float
    said: tuple[str, ...] = ()


class Purchase(msgspec.Struct, frozen=True):
    """The input of a purchase."""

    ref: str
    euros: int


@app.step
async def think(talk: Talk) -> str:
    """What the model says next: a call that takes its time, beside the pages."""
    await asyncio.sleep(talk.think_s)
    return "thought ".ljust(SAID_CHARS, ".")


@app.step
def use_tool(what: str) -> str:
    """A quick tool."""
    return f"{what} ".ljust(SAID_CHARS, ".")


@app.workflow
async def agent(talk: Talk) -> int:
    """How many messages it took."""
    async for turn in loop(talk):
        so_far: Talk = turn.state
        reply = await think(so_far)
        found = await gather(use_tool("calendar"), use_tool("weather"))
        turn.state = msgspec.structs.replace(so_far, turns=so_far.turns - 1, said=(*so_far.said, reply, *found))
        if not turn.state.turns:
            break
    return len(turn.state.said)


@app.workflow
async def part(number: int) -> int:
    """One child of a batch."""
    return await square(number)


@app.step
def square(number: int) -> int:
    """Its work."""
    return number * number


@app.workflow
async def batch(width: int) -> int:
    """Adds up what so many children come to."""
    return sum(await gather(*(part.spawn(number) for number in range(width))))


@app.step
def ask(request: Purchase) -> str:
    """Stands for the mail to whoever decides."""
    return f"{request.ref} for {request.euros} EUR"


@app.step
def close(request: Purchase, *, is_approved: bool) -> str:
    """The decision is on record."""
    return f"{request.ref} {'approved' if is_approved else 'rejected'}"


@app.workflow
async def purchase(request: Purchase) -> str:
    """What became of it."""
    await ask(request)
    is_approved = await wait_for("decided", bool, timeout="1h")
    return await close(request, is_approved=bool(is_approved))
