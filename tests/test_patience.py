"""How many steps a page begins beside itself, and which it waits for: the limits of what ``Patience`` learns, each at its edge."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import pytest

from durable_cluster import App, Context, Continuation, patience
from durable_cluster.beside import Run
from durable_cluster.envelope import Envelope
from durable_cluster.executor import Task
from durable_cluster.patience import Patience

WINDOW_S = 0.1


@pytest.fixture
def run() -> Callable[..., Run]:
    """A run of one step, that has ended or was detached."""
    machine = App("patience").machine("calls")

    @machine.step(start=True)
    async def call(ctx: Context, data: object) -> Continuation:
        return ctx.done(None)

    def made(*, ended: bool = True) -> Run:
        line = Envelope("0" * 32, 1, "calls", "call", 1, msgspec.Raw(b"1"))
        made = Run(Task(machine, machine.steps["call"], line), 0)
        made.is_detached = not ended
        return made

    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What ``Patience`` takes for the time: ``clock.at`` seconds."""
    clock = SimpleNamespace(at=0.0)
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: clock.at))
    return clock


def runs(run: Callable[..., Run], begun: int, ended: int) -> list[Run]:
    return [run(ended=number < ended) for number in range(begun)]


@pytest.mark.parametrize(
    ("begun", "ended", "awaited"),
    [
        pytest.param(32, 16, True, id="half of so few"),
        pytest.param(32, 15, False, id="less than half of so few"),
        pytest.param(33, 0, True, id="none of so many that they hold each other up"),
        pytest.param(1, 0, False, id="the only one"),
    ],
)
def test_a_kind_is_slow_of_which_few_run_and_fewer_than_half_end(
    run: Callable[..., Run], begun: int, ended: int, awaited: bool
) -> None:
    learnt = Patience(WINDOW_S, 4_000)
    learnt.learn(runs(run, begun, ended), WINDOW_S)
    assert learnt.awaits(run()) is awaited


def test_a_slow_kind_is_tried_again_after_one_second_two_four_and_at_most_sixty(
    run: Callable[..., Run], clock: SimpleNamespace
) -> None:
    learnt = Patience(WINDOW_S, 4_000)
    for pause_s in (1, 2, 4, 8, 16, 32, 60, 60):
        learnt.learn(runs(run, 1, 0), WINDOW_S)
        clock.at += pause_s - 0.001
        assert not learnt.awaits(run())
        clock.at += 0.001
        assert learnt.awaits(run())
    learnt.learn(runs(run, 1, 1), WINDOW_S)
    learnt.learn(runs(run, 1, 0), WINDOW_S)
    clock.at += 1
    assert learnt.awaits(run()), "one that ended in time is not slow any more, and the next pause is the first again"


@pytest.mark.parametrize(
    ("begun", "ended", "took", "crowd"),
    [
        pytest.param(128, 100, 1.0, 100, id="as many as ended"),
        pytest.param(128, 33, 1.0, 33, id="as many as ended, few"),
        pytest.param(128, 0, 1.0, 32, id="a quarter at least"),
        pytest.param(128, 128, 0.7, 128, id="just as many fill the window's share"),
        pytest.param(128, 128, 0.35, 256, id="twice as many fill it"),
        pytest.param(128, 128, 0.01, 256, id="twice as many at most"),
        pytest.param(128, 128, 0.9, 99, id="fewer, for all ended late"),
        pytest.param(127, 127, 0.01, 128, id="a page that began fewer shows nothing"),
    ],
)
def test_a_page_begins_what_ended_in_time_before(
    run: Callable[..., Run], begun: int, ended: int, took: float, crowd: int
) -> None:
    learnt = Patience(WINDOW_S, 4_000)
    learnt.learn(runs(run, begun, ended), took * WINDOW_S)
    assert learnt.crowd == crowd


def test_a_page_never_begins_fewer_than_run_well_at_once_nor_more_than_it_may(run: Callable[..., Run]) -> None:
    learnt = Patience(WINDOW_S, 300)
    for _ in range(3):
        learnt.learn(runs(run, learnt.crowd, learnt.crowd), 0.01 * WINDOW_S)
    assert learnt.crowd == 300
    for _ in range(5):
        learnt.learn(runs(run, 33, 0), WINDOW_S)
    assert learnt.crowd == 32
    assert Patience(WINDOW_S, 8).crowd == 8
