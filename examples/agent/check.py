"""The self-check: an agent that is killed in the middle of a turn and of an effect, one that never ends, one that is cancelled.

Then transcripts and effects are compared with what they must be.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import psycopg

from durable_cluster import Handle, WorkflowFailed
from durable_cluster.examples.agent.flows import TURNS_MAX, Question, agent, app, prepare, transcript
from durable_cluster.examples.agent.linear import assistant, heard
from durable_cluster.examples.agent.model_stub import PARTS, World

WAIT_S = 60.0
END_S = 30.0
BROKEN = "order 17 arrived broken"
REFUND = {"tool": "refund", "argument": {"order": 17, "eur": 40}}
FACTS = ["a lamp, 40 EUR, delivered on Monday", "what arrives broken is refunded", {"error": "there is no tool dance"}]

Connection = psycopg.Connection[Any]
Compared = tuple[str, object, object]


def check() -> int:
    """Play it all through, say what was expected and what was found; 0 if they are equal."""
    with psycopg.connect(app.client.dsn, autocommit=True) as connection, World() as world:
        prepare(connection)
        threading.Thread(target=world.serve_forever, daemon=True).start()
        with cluster(app.client.dsn):
            stage = Stage(connection, world, f"check-{token_hex(4)}")
            compared = [*stage.killed(), *stage.endless(), *stage.cancelled(), *stage.linear()]
        world.shutdown()
    for what, expected, found in compared:
        print(f"✓ {what}" if expected == found else f"✗ {what}: {found}, not {expected}")
    return 0 if all(expected == found for _, expected, found in compared) else 1


@contextmanager
def cluster(dsn: str) -> Generator[None]:
    """A cluster in a process of its own, which replaces the processes that are killed."""
    words = [sys.executable, "-m", "durable_cluster.ops", "start", "--app", "durable_cluster.examples.agent.linear:app"]
    spare = ["--consumers-per-shard", "2", "--log-level", "error"]
    with (
        TemporaryDirectory() as data,
        subprocess.Popen(
            [*words, *spare, "--data", data], env={**os.environ, "DURABLE_DSN": dsn}, stdout=subprocess.DEVNULL
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


class Stage:
    """The side of the user, of those who approve, and of an unkind fate."""

    def __init__(self, connection: Connection, world: World, trial: str) -> None:
        self._connection = connection
        self._world = world
        self._trial = trial

    def killed(self) -> list[Compared]:
        in_a_turn, mail = self._world.hold("turns"), self._world.hold("effects")
        handle = self.ask("killed", BROKEN)
        os.kill(in_a_turn(WAIT_S), signal.SIGKILL)
        os.kill(mail(WAIT_S), signal.SIGKILL)
        approval = self.approval("killed")
        refund = self._world.hold("effects")
        self.approve(approval, "approved")
        os.kill(refund(WAIT_S), signal.SIGKILL)
        answer = handle.result(timeout=WAIT_S)
        said = self.said("killed")
        roles = ["user", "model", "tools", "model", "tools", "model"]
        return [
            ("the answer", "The lamp is refunded.", answer),
            ("a transcript without gaps or doubles", roles, [role for role, _ in said]),
            (
                "what the tools gave, in order",
                [FACTS, ["refund 2 is done", "mail 1 is done"]],
                [c for r, c in said if r == "tools"],
            ),
            ("each effect once", ["mail", "refund"], [effect.tool for effect in self._world.effects.values()]),
            ("each turn of the model once", 3, len(self._world.turns)),
            (
                "calls that failed or died were repeated",
                True,
                self._world.calls.total() > 3 + 2 + self._world.failures > 3 + 2,
            ),
            ("nothing waits for approval", 0, self.approvals()),
            ("its progress is the last turn", {"turn": 2}, handle.progress()),
        ]

    def endless(self) -> list[Compared]:
        try:
            found = self.ask("endless", "what is it all about?").result(timeout=WAIT_S)
        except WorkflowFailed as error:
            found = error.reason
        said = len(self.said("endless"))
        return [
            ("no more turns than it may take", (f"no answer within {TURNS_MAX} turns", 2 * TURNS_MAX), (found, said)),
        ]

    def cancelled(self) -> list[Compared]:
        handle = self.ask("cancelled", BROKEN)
        effects = len(self._world.effects)
        workflow, _ = self.approval("cancelled")
        until(lambda: len(self._world.effects) == effects + 1, "the mail")
        handle.cancel("the customer called")
        until(lambda: handle.status() == "cancelled", "the cancel")
        until(lambda: app.get(workflow.hex).status() == "cancelled", "the cancel of the tool")
        last = self.said("cancelled")[-1]
        return [
            (
                "a cancelled agent cleans up",
                (("system", "cancelled: the customer called"), 0),
                (last, self.approvals()),
            ),
            ("and does nothing any more", effects + 1, len(self._world.effects)),
        ]

    def linear(self) -> list[Compared]:
        """The same as a function, killed at the same places; whoever looks on hears of the turns, and is asked."""
        turns, effects = len(self._world.turns), len(self._world.effects)
        in_a_turn, mail = self._world.hold("turns"), self._world.hold("effects")
        conversation = f"{self._trial}-linear"
        handle = assistant.start(Question(conversation, self._world.address, BROKEN), key=conversation)
        os.kill(in_a_turn(WAIT_S), signal.SIGKILL)
        os.kill(mail(WAIT_S), signal.SIGKILL)
        told: list[Any] = []

        async def look_on() -> None:
            async for progress in heard(handle):
                told.append(progress)
                if progress and "asks" in progress:
                    await handle.signal_async("approved", key="once", actor="Grace")

        asyncio.run(asyncio.wait_for(look_on(), WAIT_S))
        done = [effect.tool for effect in self._world.effects.values()][effects:]
        endless = assistant.start(Question("endless", self._world.address, "what is it all about?"))
        try:
            found = endless.result(timeout=WAIT_S)
        except WorkflowFailed as error:
            found = error.reason
        return [
            ("the function's answer", "The lamp is refunded.", handle.result(timeout=WAIT_S)),
            ("its effects, once each", ["mail", "refund"], sorted(done)),
            ("its turns, once each", 3, len(self._world.turns) - turns - TURNS_MAX),
            (
                "its onlookers heard who was asked for what",
                {"asks": REFUND},
                next((t for t in told if "asks" in t), told),
            ),
            ("and of the last turn", {"turn": 2, "parts": PARTS}, told[-1]),
            ("it takes no more turns than it may", f"no answer within {TURNS_MAX} turns", found),
        ]

    def ask(self, name: str, text: str) -> Handle:
        conversation = f"{self._trial}-{name}"
        return agent.start(Question(conversation, self._world.address, text), key=conversation)

    def approval(self, name: str) -> tuple[Any, str]:
        """Who waits for a person, and the token."""
        found: list[tuple[Any, str]] = []

        def look() -> bool:
            found[:] = self._connection.execute(
                "select workflow, token from agent.approval where conversation = %s", (f"{self._trial}-{name}",)
            ).fetchall()
            return bool(found)

        until(look, "a question to approve")
        return found[0]

    def approve(self, approval: tuple[Any, str], decision: str) -> None:
        app.get(approval[0].hex).signal(decision, token=approval[1], actor="Grace")

    def approvals(self) -> int:
        row = self._connection.execute(
            "select count(*)::int from agent.approval where starts_with(conversation, %s)", (self._trial,)
        ).fetchone()
        return row[0] if row else 0

    def said(self, name: str) -> list[tuple[str, Any]]:
        return [msgspec.structs.astuple(one) for one in transcript(self._connection, f"{self._trial}-{name}")]


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it. Raises TimeoutError."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {WAIT_S:g} s")
        time.sleep(0.01)
