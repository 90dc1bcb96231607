"""``python -m durable_cluster.examples.agent``: an agent at work, and you are asked; ``--check`` kills it and compares.

``--linear``: the one that is a function; what it does is streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading
from secrets import token_hex
from typing import Any

import msgspec
import psycopg

from durable_cluster.examples.agent.check import BROKEN, check
from durable_cluster.examples.agent.flows import Question, agent, app, prepare, transcript
from durable_cluster.examples.agent.linear import assistant, heard
from durable_cluster.examples.agent.model_stub import World

ROUND_S = 0.5


def main() -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m durable_cluster.examples.agent", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="kill it in the middle of a turn, compare what came of it, and end"
    )
    parser.add_argument("--linear", action="store_true", help="the agent that is a function")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        if options.check:
            return check()
        return asyncio.run(listen()) if options.linear else converse()
    finally:
        app.close()


def converse() -> int:
    """One conversation, printed as it goes; what needs approval is asked here."""
    with psycopg.connect(app.client.dsn, autocommit=True) as connection, World() as world:
        prepare(connection)
        threading.Thread(target=world.serve_forever, daemon=True).start()
        conversation = f"trial-{token_hex(3)}"
        handle = agent.start(Question(conversation, world.address, BROKEN), key=conversation)
        printed = 0
        is_over = False
        while not is_over:
            ask(connection, conversation)
            app.run(timeout=ROUND_S)
            is_over = handle.status() != "running"
            said = transcript(connection, conversation)
            for message in said[printed:]:
                print(f"{message.role:>6}: {msgspec.json.encode(message.content).decode()}")
            printed = len(said)
        world.shutdown()
    return 0


async def listen() -> int:
    """One conversation with the function: what it is at is printed as it goes, and what needs approval is asked here."""
    workflows = asyncio.create_task(app.run_async())
    with World() as world:
        threading.Thread(target=world.serve_forever, daemon=True).start()
        handle = await assistant.start_async(Question("", world.address, BROKEN))
        async for progress in heard(handle):
            print(f"{msgspec.json.encode(progress).decode()}")
            if progress and "asks" in progress:
                said = await asyncio.to_thread(input, "   you: may it? [y/n] ")
                await handle.signal_async("approved" if said.startswith("y") else "rejected", actor="you")
        print(await handle)
        world.shutdown()
    workflows.cancel()
    await asyncio.wait([workflows])
    return 0


def ask(connection: psycopg.Connection[Any], conversation: str) -> None:
    """Ask the person at the terminal what nobody has decided yet."""
    for workflow, token, tool, argument in connection.execute(
        "select workflow, token, tool, argument from agent.approval where conversation = %s", (conversation,)
    ).fetchall():
        said = input(f"   you: {tool} {argument}? [y/n] ")
        app.get(workflow.hex).signal(
            "approved" if said.startswith("y") else "rejected", key="terminal", token=token, actor="you"
        )
        app.run(timeout=ROUND_S)


if __name__ == "__main__":
    sys.exit(main())
