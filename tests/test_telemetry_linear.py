"""Spans of linear workflows: each step is one, whichever event ran it, and whatever it ran beside, ahead of or after."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from durable_cluster import App, Context, Retry, Settings, TerminalError, gather, sleep, telemetry
from durable_cluster.telemetry import Tracing

TWICE = Retry(attempts=2, backoff=0.001)


class Trouble(Exception):
    pass


class Traced:
    """An app whose spans are kept. ``sample``: 0 or 1."""

    def __init__(self, dsn: str, monkeypatch: pytest.MonkeyPatch, sample: float, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        tracing = Tracing(SimpleSpanProcessor(self.exporter), role="test", sample=sample)
        monkeypatch.setattr(telemetry, "configure", lambda _: tracing)
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", tracing.provider)
        self.app = App("traced", dsn=dsn, settings=Settings(**settings))

    def run(self, workflow: Any, value: Any = None) -> list[tuple[str, int, str]]:
        """Run one: each step's name, attempt and error, in the order of their beginnings. It is one trace without orphans."""
        self.handle = workflow.start(value)
        self.app.run(until_idle=True)
        self.app.close()
        trace_id = telemetry.trace_id_of(self.handle.id)
        self.spans = [one for one in self.exporter.get_finished_spans() if one.context.trace_id == trace_id]
        roots = [one for one in self.spans if one.parent is None]
        assert {one.name for one in roots} <= {workflow.name}
        assert len(roots) == bool(self.spans)
        known = {one.context.span_id for one in self.spans}
        assert all(one.parent.span_id in known for one in self.spans if one.parent is not None)
        told = "".join(one.to_json() for one in self.exporter.get_finished_spans())
        assert self.handle.id not in told
        steps = [one for one in self.spans if "durable.step.name" in one.attributes]
        assert all(one.parent.span_id == roots[0].context.span_id for one in steps), "steps are siblings"
        return [
            (one.name, one.attributes["durable.step.attempt"], one.status.description or "")
            for one in sorted(steps, key=lambda one: one.start_time)
        ]


@pytest.fixture
def traced(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Traced]:
    return lambda sample, **settings: Traced(dsn, monkeypatch, sample, **settings)


@pytest.mark.parametrize("run_ahead_ms", [0, 1_000])
def test_every_step_is_a_span_of_its_own_whether_it_waits_for_its_event_or_runs_ahead(
    traced: Callable[..., Traced], run_ahead_ms: int
) -> None:
    made = traced(1.0, run_ahead_ms=run_ahead_ms)
    app = made.app

    @app.step()
    def reserve() -> None:
        with trace.get_tracer("of the user").start_as_current_span("inside"):
            pass

    @app.step()
    async def charge() -> None:
        await asyncio.sleep(0.01)

    @app.step(transactional=True)
    def book(ctx: Context) -> None:
        ctx.tx.execute("select 1")

    @app.step(blocking=True)
    def ship() -> None:
        return

    @app.workflow()
    async def order(n: int) -> str:
        await reserve()
        await charge()
        await reserve()
        await book()
        await ship()
        await reserve()
        return "done"

    steps = made.run(order, 1)
    assert made.handle.result() == "done"
    mine = [step for step in steps if not step[0].startswith("workflow.")]
    assert mine == [(name, 1, "") for name in ("reserve", "charge", "reserve", "book", "ship", "reserve")]
    assert [name for name, *_ in steps if name.startswith("workflow.")] == ["workflow.start"]
    spans = {one.context.span_id: one for one in made.spans}
    inside = [one for one in made.spans if one.name == "inside"]
    assert [spans[one.parent.span_id].name for one in inside] == ["reserve"] * 3
    charged = next(one for one in made.spans if one.name == "charge")
    after = [one for one in made.spans if one.name == "reserve" and one.start_time > charged.start_time]
    assert all(one.start_time >= charged.end_time for one in after), "a step's span ends where its function has ended"


@pytest.mark.parametrize("sample", [0.0, 1.0])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_step_that_fails_once_and_one_whose_failure_is_caught_are_told_once_for_each_attempt(
    traced: Callable[..., Traced], sample: float, is_ahead: bool
) -> None:
    made = traced(sample, run_ahead_ms=1_000 if is_ahead else 0)
    app = made.app

    @app.step(retry=TWICE)
    def plain(ctx: Context) -> None:
        if ctx.attempt == 1:
            raise Trouble(f"plain of {ctx.workflow_id}")

    @app.step(retry=TWICE)
    async def waiting(ctx: Context) -> None:
        if ctx.attempt == 1:
            raise Trouble("waiting")

    @app.step(retry=TWICE, transactional=True)
    def storing(ctx: Context) -> None:
        if ctx.attempt == 1:
            raise Trouble("storing")

    @app.step(retry=Retry(attempts=1))
    def hopeless() -> None:
        raise Trouble("hopeless")

    @app.step()
    def last() -> None:
        return

    @app.workflow()
    async def order() -> str:
        await plain()
        await waiting()
        await storing()
        try:
            await hopeless()
        except Trouble as caught:
            await last()
            return str(caught)
        return "never"

    steps = [step for step in made.run(order) if not step[0].startswith("workflow.")]
    assert made.handle.result() == "hopeless"
    expected = [
        ("plain", 1, f"Trouble: plain of {made.handle.id[:12]}…"),
        ("plain", 2, ""),
        ("waiting", 1, "Trouble: waiting"),
        ("waiting", 2, ""),
        ("storing", 1, "Trouble: storing"),
        ("storing", 2, ""),
        ("hopeless", 1, "Trouble: hopeless"),
    ]
    assert steps == expected + ([("last", 1, "")] if sample else [])
    errors = [one for one in made.spans if one.status.description]
    assert {one.attributes["error.type"] for one in errors} == {"Trouble"}
    assert all("Traceback" in one.events[0].attributes["exception.stacktrace"] for one in errors)


@pytest.mark.parametrize("sample", [0.0, 1.0])
def test_steps_gathered_in_one_event_are_spans_with_their_own_attempts(
    traced: Callable[..., Traced], sample: float
) -> None:
    made = traced(sample)
    app = made.app

    @app.step(retry=Retry(attempts=3, backoff=0.001))
    async def one(ctx: Context, n: int) -> int:
        await asyncio.sleep(0.01)
        if ctx.attempt <= n:
            raise Trouble(f"one {n}")
        return n

    @app.step(blocking=True)
    def other() -> int:
        return 9

    @app.workflow()
    async def order() -> list[int]:
        return list(await gather(one(0), one(2), other()))

    steps = made.run(order)
    assert made.handle.result() == [0, 2, 9]
    retried = [("one", 1, "Trouble: one 2"), ("one", 2, "Trouble: one 2"), ("one", 3, "")]
    if not sample:
        assert steps == retried
        return
    assert sorted(steps) == sorted(
        [*retried, ("one", 1, ""), ("other", 1, ""), ("workflow.start", 1, ""), ("workflow.gather", 1, "")]
    )


@pytest.mark.parametrize("sample", [0.0, 1.0])
@pytest.mark.parametrize("how", ["dead letter", "lines", "terminal", "caught and terminal"])
def test_the_end_of_a_workflow_that_does_not_go_well_is_told(
    traced: Callable[..., Traced], sample: float, how: str
) -> None:
    made = traced(sample, run_ahead_ms=0)
    app = made.app

    @app.step(retry=Retry(attempts=1))
    async def wrong() -> None:
        raise TerminalError("no") if how == "terminal" else Trouble("wrong")

    @app.step()
    async def right() -> None:
        return

    @app.workflow()
    async def order() -> None:
        await right()
        if how == "lines":
            raise Trouble("of the lines")
        try:
            await wrong()
        except Trouble:
            if how == "dead letter":
                raise
            raise TerminalError("it is over") from None

    steps = [step for step in made.run(order) if step[2]]
    assert made.handle.status() == ("stuck" if how in ("dead letter", "lines") else "failed")
    expected = {
        "dead letter": [("wrong", 1, "Trouble: wrong")],
        "lines": [("workflow.resume", 1, "Trouble: of the lines")],
        "terminal": [("wrong", 1, "no"), ("workflow.resume", 1, "the workflow has failed")],
        "caught and terminal": [("wrong", 1, "Trouble: wrong"), ("workflow.resume", 1, "the workflow has failed")],
    }
    assert steps == expected[how]


def test_what_a_step_of_an_unsampled_workflow_traces_is_not_recorded(traced: Callable[..., Traced]) -> None:
    made = traced(0.0)
    app = made.app

    def inside() -> None:
        with trace.get_tracer("of the user").start_as_current_span("inside"):
            pass

    @app.step()
    def plain() -> None:
        inside()

    @app.step()
    async def waiting() -> None:
        inside()

    @app.step(blocking=True)
    def blocking() -> None:
        inside()

    @app.step(transactional=True)
    def storing() -> None:
        inside()

    @app.workflow()
    async def order() -> None:
        await plain()
        await waiting()
        await blocking()
        await storing()
        await gather(waiting(), blocking())
        await sleep(0.01)
        await plain()

    assert made.run(order) == []
    assert made.handle.status() == "completed"
    assert made.exporter.get_finished_spans() == ()
