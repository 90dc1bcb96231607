"""The agent again, as a function: a loop of turns, tools that are steps, a person who is asked, onlookers who hear of it.

What was said is the state of the loop, handed from turn to turn; what a turn recorded is forgotten. In ``flows`` the transcript
is a table and the tools are workflows: for talks beyond 256 KiB, and for tools that live longer than their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from durable_cluster import Context, Handle, TerminalError, loop, select, set_progress
from durable_cluster.examples.agent import model
from durable_cluster.examples.agent.flows import CALLS, PATIENCE, SHELF, TURNS_MAX, Question, app
from durable_cluster.examples.agent.model import Message, Reply, Wanted

LOOK_S = 0.05


class Talk(msgspec.Struct, frozen=True):
    """What was said so far."""

    messages: tuple[Message, ...]
    turns: int = 0


@app.step(blocking=True, retry=CALLS, timeout="5m")
def ask_model(ctx: Context, address: str, talk: Talk) -> Reply:
    """One turn, which comes in parts. Onlookers hear of them about once a second; the next attempt finds how many had come."""

    def on_part(parts: int) -> None:
        ctx.set_progress({"turn": talk.turns, "parts": parts})
        ctx.heartbeat({"parts": parts})

    return model.ask(address, talk.messages, key=ctx.idempotency_key, on_part=on_part)


@app.step
def look_up(what: str) -> str:
    """A tool that changes nothing may run twice."""
    return SHELF.get(what, "nothing is known about that")


@app.step(blocking=True, retry=CALLS, timeout="1m")
def act(ctx: Context, address: str, wanted: Wanted) -> str:
    """An effect outside the database: the same key for all attempts, so it is done once."""
    return model.act(address, wanted.tool, wanted.argument, key=ctx.idempotency_key)


@app.workflow
async def assistant(question: Question) -> str:
    """The answer."""
    answer = ""
    async for turn in loop(Talk((Message("user", question.text),))):
        talk = turn.state
        if talk.turns == TURNS_MAX:
            raise TerminalError(f"no answer within {TURNS_MAX} turns")
        reply = await ask_model(question.address, talk)
        if reply.answer is not None:
            answer = reply.answer
            break
        found = await asyncio.gather(*(use(question.address, wanted) for wanted in reply.calls))
        turn.state = Talk((*talk.messages, Message("model", reply), Message("tools", found)), talk.turns + 1)
    return answer


async def use(address: str, wanted: Wanted) -> Any:
    """What a tool gave; money needs a person, and silence is a no. Of a tool that is not there the model is told."""
    if wanted.tool == "look_up":
        return await look_up(str(wanted.argument.get("what")))
    if wanted.tool == "refund":
        set_progress({"asks": wanted})
        word = await select("approved", "rejected", timeout=PATIENCE)
        if word is None or word.name == "rejected":
            return {"refused by": None if word is None else word.actor}
    elif wanted.tool != "mail":
        return {"error": f"there is no tool {wanted.tool}"}
    return await act(address, wanted)


async def heard(handle: Handle) -> AsyncIterator[Any]:
    """Its progress, whenever that changes, until it has ended: what a client shows."""
    told = None
    while True:
        is_over = await handle.status_async() != "running"
        progress = await handle.progress_async()
        if progress != told:
            yield progress
        elif is_over:
            return
        else:
            await asyncio.sleep(LOOK_S)
        told = progress
