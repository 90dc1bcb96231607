"""Linear workflows whose lines do what they should not: told by name, and no neighbour is harmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from durable_cluster import App, Retry, Settings, WorkflowStuck, sleep


@pytest.fixture(params=["kept", "entered anew"])
def app(request: pytest.FixtureRequest, dsn: str) -> Iterator[App]:
    settings = Settings() if request.param == "kept" else Settings(functions_max=0)
    app = App("misbehaviour", dsn=dsn, settings=settings)
    yield app
    app.close()


def neighbour_of(app: App) -> Any:
    @app.step
    async def think(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    @app.workflow
    async def neighbour(n: int) -> int:
        return await think(await think(n))

    return neighbour


def test_lines_that_take_turns_without_end_and_wait_for_nothing_are_a_dead_letter(app: App) -> None:
    @app.step
    async def charge(n: int) -> int:
        ran.append(n)
        return n

    @app.workflow
    async def spins(n: int) -> int:
        await charge(n)
        while not is_mended:
            await asyncio.sleep(0)
        return n

    ran: list[int] = []
    is_mended = False
    handle, neighbour = spins.start(1), neighbour_of(app).start(1)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match=r"'spins' ran 100,000 turns without waiting for a step, a time, a signal"):
        handle.result(timeout=1)
    assert neighbour.result(timeout=1) == 3
    is_mended = True
    handle.retry()
    app.run(until_idle=True)
    assert handle.result(timeout=1) == 1
    assert ran == [1], "what its step came to was kept"


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_lines_that_recurse_without_end_are_a_dead_letter(app: App, kind: str) -> None:
    async def deeper(n: int) -> int:
        return await deeper(n + 1)

    def deep(n: int) -> int:
        return deep(n + 1)

    @app.workflow
    async def recurses(n: int) -> int:
        return await deeper(n) if kind == "async" else deep(n)

    handle, neighbour = recurses.start(1), neighbour_of(app).start(1)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="RecursionError"):
        handle.result(timeout=1)
    assert neighbour.result(timeout=1) == 3


@pytest.mark.parametrize("is_plain", [False, True])
def test_lines_that_swallow_every_end_are_put_away_all_the_same_and_told(
    app: App, caplog: pytest.LogCaptureFixture, is_plain: bool
) -> None:
    async def swallows(n: int) -> None:
        while True:
            try:
                await sleep("1h")
            except:  # noqa: E722
                swallowed.append(n)

    def swallows_plainly(n: int) -> None:
        while True:
            try:
                sleep("1h")
            except:  # noqa: E722
                swallowed.append(n)

    swallowed: list[int] = []
    workflow = app.workflow(name="swallows")(swallows_plainly if is_plain else swallows)
    handle, neighbour = workflow.start(1), neighbour_of(app).start(1)
    app.run(until_idle=True)
    handle.cancel("enough")
    app.run(until_idle=True)
    assert neighbour.result(timeout=1) == 3
    assert len(swallowed) < 100
    assert f"workflow 'swallows' ({handle.id[:12]}…) did not let itself be put away" in caplog.text


def test_lines_that_keep_the_others_waiting_are_told(app: App, caplog: pytest.LogCaptureFixture) -> None:
    @app.step(retry=Retry(attempts=1))
    def quick(n: int) -> int:
        return n

    @app.workflow
    async def blocks(n: int) -> int:
        until = time.monotonic() + 1.1
        while time.monotonic() < until:
            pass
        return await quick(n)

    handle = blocks.start(1)
    app.run(until_idle=True)
    assert handle.result(timeout=1) == 1
    assert "workflow 'blocks'" in caplog.text
    assert "kept the others of its process waiting for 1.1 s; long work belongs in a step" in caplog.text
