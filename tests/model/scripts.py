"""Workflows that do what their input says, one operation after the other, and keep a trace of it."""

from __future__ import annotations

from typing import Any

from durable_cluster import App, Context, Continuation, InputError, Retry

OPERATIONS = ("step", "tx", "nap", "sleep", "wait", "timed", "token", "work", "flaky", "die")
"""``timed``: a wait with a timeout; ``work``: a step that is detached; ``flaky``: fails once; ``die``: needs an edited state."""
NAP_S = 5.0
LONG_S = 100.0
BACKOFF_S = 1.0
LATE = "late"

State = dict[str, Any]


def application(dsn: str) -> App:
    """One machine, ``script``; its state is ``{"script": what is left, "trace": what was}``, its output the trace."""
    app = App("scripts", dsn=dsn)
    machine = app.machine("script", state=State)

    def go_on(ctx: Context, state: State) -> Continuation:
        if not state["script"]:
            return ctx.done(state["trace"])
        match state["script"][0]:
            case "nap":
                return ctx.sleep(NAP_S, then=step, state=state)
            case "sleep":
                return ctx.sleep(LONG_S, then=step, state=state)
            case "wait":
                return ctx.wait_for("answer", then=got, state=state)
            case "timed":
                return ctx.wait_for("answer", then=got, state=state, timeout=LONG_S, on_timeout=late)
            case "token":
                return ctx.wait_for("answer", then=got, state=state, require_token=True)
            case operation:
                return ctx.goto(operation, state)

    def did(ctx: Context, state: State, what: object) -> Continuation:
        state["script"].pop(0)
        state["trace"].append(what)
        return go_on(ctx, state)

    @machine.step(start=True)
    def begin(ctx: Context, state: State) -> Continuation:
        return go_on(ctx, state)

    @machine.step()
    def step(ctx: Context, state: State) -> Continuation:
        return did(ctx, state, state["script"][0])

    @machine.step(transactional=True)
    def tx(ctx: Context, state: State) -> Continuation:
        _leave_effect(ctx)
        return did(ctx, state, "tx")

    @machine.step()
    def got(ctx: Context, state: State) -> Continuation:
        assert ctx.signal is not None
        return did(ctx, state, ctx.signal.payload)

    @machine.step()
    def late(ctx: Context, state: State) -> Continuation:
        assert ctx.signal is None
        return did(ctx, state, LATE)

    @machine.step(blocking=True)
    def work(ctx: Context, state: State) -> Continuation:
        return did(ctx, state, "work")

    @machine.step(retry=Retry(attempts=2, backoff=BACKOFF_S, jitter=0))
    def flaky(ctx: Context, state: State) -> Continuation:
        if ctx.attempt == 1:
            raise RuntimeError("not yet")
        return did(ctx, state, "flaky")

    @machine.step()
    def die(ctx: Context, state: State) -> Continuation:
        if not state.pop("mended", False):
            raise InputError("not with this state")
        return did(ctx, state, "die")

    @machine.step(on_cancel=True, transactional=True)
    def clean(ctx: Context, state: State) -> Continuation:
        _leave_effect(ctx)
        return ctx.done(state["trace"])

    return app


def _leave_effect(ctx: Context) -> None:
    ctx.tx.execute("insert into effect (id, step) values (%s, %s)", (ctx.workflow_id, f"{ctx.step} {ctx.seq}"))
