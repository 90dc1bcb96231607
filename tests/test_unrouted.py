"""Steps of workflows that this program does not know: a run until idle leaves them where they are, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from durable_cluster import App, Context, Continuation, sleep, unrouted

HANGS_S = 20.0
"""Longer than any of these runs takes that does not wait for what never comes."""


@pytest.fixture
def program(dsn: str) -> Iterator[Callable[[str], App]]:
    """``program(name)``: an App with one workflow of that name, which has one step."""
    made: list[App] = []

    def program_of(name: str) -> App:
        app = App("program", dsn=dsn)
        machine = app.machine(name, state=int)

        @machine.step(start=True)
        def only(ctx: Context, number: int) -> Continuation:
            return ctx.done(number)

        made.append(app)
        return app

    yield program_of
    for app in made:
        app.close()


def said_of_what_is_left(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "durable_cluster.runner"]


def test_a_run_until_idle_leaves_steps_of_unknown_workflows_and_says_how_many(
    program: Callable[[str], App], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unrouted, "AT_ONCE_MAX", 10)
    for name, starts in (("shipping", 30), ("billing", 2)):
        program(name).named(name).start_many(list(range(starts)))
    here = program("greeting")
    greeted = here.named("greeting").start(1)
    with caplog.at_level(logging.WARNING):
        here.run(until_idle=True, timeout=HANGS_S)
    assert greeted.result(timeout=1) == 1
    assert said_of_what_is_left(caplog) == [
        "32 left for a process that knows them (steps by workflow: shipping 30, billing 2)"
    ]


def test_who_knows_them_runs_them_though_others_have_put_them_off(
    program: Callable[[str], App], caplog: pytest.LogCaptureFixture
) -> None:
    there = program("shipping")
    handle = there.named("shipping").start(7)
    program("greeting").run(until_idle=True, timeout=HANGS_S)
    assert handle.status() == "running"
    caplog.clear()
    there.run(until_idle=True, timeout=HANGS_S)
    assert handle.status() == "completed"
    assert said_of_what_is_left(caplog) == []


def test_a_sleep_within_a_minute_is_waited_for_beside_unknown_steps(dsn: str, program: Callable[[str], App]) -> None:
    program("shipping").named("shipping").start_many([1, 2, 3])
    here = program("greeting")

    @here.workflow
    async def nap() -> str:
        await sleep("1.5s")
        return "awake"

    handle = nap.start()
    here.run(until_idle=True, timeout=HANGS_S)
    assert handle.result(timeout=1) == "awake"
