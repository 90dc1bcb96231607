"""Linear workflows beside the death of their process: at any await, with any order of ends, results keep their places."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from durable_cluster import App, Context, Retry, Settings, executor, gather, loop, recorded, scope, sleep
from durable_cluster import random as recorded_random
from durable_cluster.chunks import Chunks
from durable_cluster.envelope import Envelope, decode_line, encode_line
from durable_cluster.executor import Later, Task
from durable_cluster.memo import Spilled
from durable_cluster.notes import Noted
from durable_cluster.statements import Outcome

SEED = int(os.environ.get("DURABLE_TEST_SEED", "0")) or random.randrange(1, 2**31)
SEEDS = int(os.environ.get("DURABLE_CRASH_SEEDS", "150"))
WIDTH = 20


class Died(KeyboardInterrupt):
    """The process, at this line."""


class Store:
    """``durable.spill`` of one workflow, in memory."""

    def __init__(self) -> None:
        self.rows: list[Spilled] = []

    def write(self, rows: Sequence[Spilled]) -> None:
        assert all("\n" not in row.text for row in rows)
        self.rows += rows

    def counting(self, before: int) -> list[Spilled]:
        """Of the rows before that one, those that no newer one replaces, the last chunk first."""
        found: list[Spilled] = []
        for row in reversed(self.rows[:before]):
            if not found or row.number < found[-1].number:
                found.append(row)
        return found

    def chunks(self, ref: int) -> list[tuple[int, str]]:
        ends = [index + 1 for index, row in enumerate(self.rows) if row.ref == ref]
        return [(row.ref, row.text) for row in reversed(self.counting(ends[-1])) if row.text] if ends else []

    def rotate(self) -> None:
        self.rows = self.counting(len(self.rows))[::-1]


class World:
    """One workflow, from event to event; its process dies now and then, and all is gone but what was committed or reported."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.app = App("crashes", dsn="nowhere", settings=Settings(run_ahead_ms=self.dice.choice([0, 10])))
        self.store = Store()
        self.chunks = 0
        self.deaths = 0
        self.drawn: list[float] = []
        app = self.app

        def may_die() -> None:
            if self.deaths < 12 and self.dice.random() < 0.04:
                self.deaths += 1
                raise Died

        @app.step(retry=Retry(attempts=3, backoff=0.0))
        async def fetch(ctx: Context, branch: int, n: int) -> list[int]:
            for _ in range(self.dice.randrange(6)):
                await asyncio.sleep(0)
            may_die()
            if self.dice.random() < 0.1 and ctx.attempt < 3:
                raise RuntimeError("try again")
            return [branch, n]

        @app.step
        def quick(branch: int, n: int) -> list[int]:
            may_die()
            return [branch, n]

        @app.step
        def remember(order: list[int]) -> list[int]:
            return order

        async def branch(number: int, ended: list[int]) -> list[list[int]]:
            found = [await fetch(number, 0)]
            for n in range(1, 1 + number % 3):
                found.append(await (quick if number % 2 else fetch)(number, n))
            ended.append(number)
            return found

        @app.workflow
        async def flow(_: int) -> list[Any]:
            chance = recorded_random()
            before = await quick(100, 0)
            ended: list[int] = []
            wide = await gather(*(branch(number, ended) for number in range(WIDTH)))
            order = await remember(ended)
            await sleep("1h")
            assert order == ended, "entered anew, the branches ended in another order"
            self.drawn.append(chance)
            at_once = await gather(slowly(300), spun(), slowly(301))
            await sleep("1h")
            total = 0
            async for turn in loop([0, 0]):
                assert await scope(think, turn.number) == 3 * turn.number
                turn.state = await quick(turn.state[0] + 1, total)
                if turn.state[0] == 5:
                    break
            return [before, wide, turn.state, at_once]

        async def think(number: int) -> int:
            return sum([(await fetch(200 + n, number))[1] for n in range(3)])

        async def slowly(number: int) -> int:
            return sum([(await fetch(number, n))[1] for n in range(8)])

        async def spun() -> int:
            async for turn in loop(0):
                turn.state += await scope(think, turn.number)
                if turn.number == 3:
                    return turn.state
            raise AssertionError

        self.flow = flow

    def lives(self) -> Outcome:
        """Until the end of the workflow."""
        with patch.object(Chunks, "read", lambda _, ref: self.store.chunks(ref)):
            return self._lives()

    def _lives(self) -> Outcome:
        envelope = Envelope("ab" * 16, 1, "flow", "workflow.start", 1, msgspec.Raw(b"1"))
        while True:
            task = executor.resolve(self.app.machines, envelope, limit_s=1)
            assert isinstance(task, Task)
            context = executor.context_of(task)
            try:
                if task.step.signature.is_async:
                    result: Any = asyncio.run(executor.run_async(task, context))
                else:
                    result = executor.run(task, context)
            except Died:
                self.flow.forget_all()
                said = context.said if self.dice.random() < 0.7 else envelope.progress
                envelope = msgspec.structs.replace(envelope, progress=_plain(said))
                continue
            if self.dice.random() < 0.05:
                self.deaths += 1  # after the step, before the commit: here the function is still kept
                continue
            if isinstance(result, Noted):
                self.store.write(result.notes.spilled)
                self.chunks += len(result.notes.spilled)
                result = result.result
            if self.dice.random() < 0.2:
                self.store.rotate()
            if isinstance(result, Outcome):
                return result
            assert isinstance(result, Envelope | Later), result
            envelope = decode_line(encode_line(result.envelope if isinstance(result, Later) else result))
            if self.dice.random() < 0.2:
                self.flow.forget_all()


def _plain(said: Any) -> Any:
    return msgspec.json.decode(said) if isinstance(said, msgspec.Raw) else said


def expected() -> list[Any]:
    wide = [[[number, n] for n in range(1 + number % 3)] for number in range(WIDTH)]
    return [[100, 0], wide, [5, 0], [28, 18, 28]]


@pytest.mark.parametrize("inline", [recorded.INLINE_BYTES_MAX, 60, 20])
def test_a_wide_gather_never_mixes_its_results_whatever_ends_first_and_whenever_the_process_dies(
    inline: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "INLINE_BYTES_MAX", inline)
    deaths = chunks = 0
    for seed in range(SEED, SEED + SEEDS):
        world = World(seed)
        outcome = world.lives()
        assert (outcome.status, msgspec.json.decode(outcome.output)) == ("completed", expected()), f"seed {seed}"
        assert len(set(world.drawn)) == 1, f"seed {seed}: what was recorded was drawn again"
        deaths += world.deaths
        chunks += world.chunks
    print(f"seed {SEED}: {SEEDS} runs, {deaths} deaths, {chunks} chunks")
    assert deaths > SEEDS, "too few deaths to mean anything"
    assert (chunks > 2 * SEEDS) == (inline < 1_000), "too few chunks to mean anything"


def test_a_function_whose_page_was_lost_is_not_taken_up_again() -> None:
    app = App("crashes", dsn="nowhere", settings=Settings(run_ahead_ms=0))
    answers = iter([1, 2])

    @app.step
    def ask() -> int:
        return next(answers)

    @app.step
    def same(n: int) -> int:
        return n

    @app.workflow
    async def flow() -> int:
        return await same(await ask())

    def handed_on(envelope: Envelope) -> Any:
        task = executor.resolve(app.machines, envelope, limit_s=1)
        assert isinstance(task, Task)
        return executor.run(task, executor.context_of(task))

    asked = handed_on(Envelope("ab" * 16, 1, "flow", "workflow.start", 1, msgspec.Raw(b"null")))
    _lost = handed_on(asked)
    committed = handed_on(asked)
    end = handed_on(committed)
    assert isinstance(end, Outcome), end
    assert end.output == "2"


def test_what_another_process_made_of_a_lost_page_is_told_apart_also_where_the_states_do_not_carry_it() -> None:
    store = Store()

    def process(answer: str) -> App:
        app = App("crashes", dsn="nowhere", settings=Settings(run_ahead_ms=0))

        @app.step
        def ask() -> str:
            return answer * 5_000

        @app.step
        def nothing() -> None: ...

        @app.workflow
        async def flow() -> str:
            found = await ask()
            await nothing()
            return found[0]

        return app

    def handed_on(app: App, envelope: Envelope, *, is_committed: bool = True) -> Any:
        task = executor.resolve(app.machines, envelope, limit_s=1)
        assert isinstance(task, Task)
        result = executor.run(task, executor.context_of(task))
        if isinstance(result, Noted):
            store.write(result.notes.spilled if is_committed else ())
            return result.result
        return result

    one, another = process("1"), process("2")
    asked = handed_on(one, Envelope("ab" * 16, 1, "flow", "workflow.start", 1, msgspec.Raw(b"null")))
    handed_on(one, asked, is_committed=False)
    committed = handed_on(another, asked)
    with patch.object(Chunks, "read", lambda _, ref: store.chunks(ref)):
        end = handed_on(one, committed)
    assert (type(end), end.output) == (Outcome, '"2"')


@pytest.mark.slow
def test_a_loop_of_a_hundred_thousand_turns_carries_no_more_at_its_end(dsn: str) -> None:
    app = App("loops", dsn=dsn)
    sizes: list[int] = []

    @app.step
    def think(n: int) -> int:
        return n + 1

    @app.step
    async def look(ctx: Context, n: int) -> int:
        sizes.append(len(bytes(ctx.envelope.state)))
        return n

    @app.workflow
    async def agent(limit: int) -> int:
        async for turn in loop(0):
            turn.state = await think(turn.state)
            if turn.number % 5_000 == 0:
                await look(turn.state)
            if turn.state >= limit:
                break
        return turn.state

    handle = agent.start(100_000)
    app.run(until_idle=True)
    assert handle.result(timeout=1) == 100_000
    assert max(sizes) < min(sizes) + 100
    app.close()
