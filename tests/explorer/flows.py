"""The workflows of the races: what a workflow does first is its input's ``do``; its output tells what happened to it."""

from __future__ import annotations

from typing import Any

from durable_cluster import App, Child, Context, Continuation, Limit

TIMEOUT_S = 100.0
SHORT_S = 5.0
EFFECTS = "create table effect (id uuid, step text); create index on effect (id)"

State = dict[str, Any]


def application(dsn: str) -> App:
    """``flow`` begins with a plain step, ``paid`` with a transactional one; else they are the same."""
    app = App("explored", dsn=dsn)
    _add_machine(app, "flow", is_transactional=False)
    _add_machine(app, "paid", is_transactional=True)
    return app


def _add_machine(app: App, name: str, *, is_transactional: bool) -> None:
    machine = app.machine(name, state=State)

    @machine.step(start=True, transactional=is_transactional)
    def begin(ctx: Context, state: State) -> Continuation:
        if is_transactional:
            _leave_effect(ctx)
        match state["do"]:
            case "wait":
                return _wait(ctx, state)
            case "sleep":
                return ctx.sleep(TIMEOUT_S, then=slept, state=state)
            case "nap":
                return ctx.sleep(SHORT_S, then=slept, state=state)
            case "work":
                return ctx.goto(work, state)
            case "go":
                return ctx.goto(worked, state)
            case "permit":
                return ctx.goto(permitted, state)
            case "join":
                return _join(ctx, state, _children(state))
            case "spawn":
                return ctx.spawn(_children(state), then=spawned, state=state)
            case do:
                return ctx.done(do)

    def _wait(ctx: Context, state: State) -> Continuation:
        if state["timeout"]:
            return ctx.wait_for("answer", then=got, state=state, timeout=TIMEOUT_S, on_timeout=late)
        return ctx.wait_for("answer", then=got, state=state)

    def _children(state: State) -> list[Child]:
        does = {"do": state["child"], "times": 1, "timeout": False, "got": []}
        return [app.named("flow").child(does) for _ in range(state["children"])]

    def _join(ctx: Context, state: State, children: list[Child]) -> Continuation:
        if state["timeout"]:
            return ctx.gather(children, then=joined, state=state, timeout=TIMEOUT_S, on_timeout=late)
        return ctx.gather(children, then=joined, state=state)

    @machine.step()
    def spawned(ctx: Context, state: State) -> Continuation:
        return ctx.wait_for("answer", then=joins, state=state)

    @machine.step()
    def joins(ctx: Context, state: State) -> Continuation:
        return _join(ctx, state, [])

    @machine.step()
    def joined(ctx: Context, state: State) -> Continuation:
        return ctx.done(f"joined {sum(child.is_completed for child in ctx.results)}")

    @machine.step(limit=Limit("explored", concurrency=1, key=lambda state: state["key"]))
    def permitted(ctx: Context, state: State) -> Continuation:
        return ctx.done("permitted")

    @machine.step()
    def got(ctx: Context, state: State) -> Continuation:
        assert ctx.signal is not None
        state["got"].append(ctx.signal.payload)
        if len(state["got"]) < state["times"]:
            return _wait(ctx, state)
        return ctx.done("got " + " ".join(map(str, state["got"])))

    @machine.step()
    def late(ctx: Context, state: State) -> Continuation:
        assert ctx.signal is None
        return ctx.done("late")

    @machine.step()
    def slept(ctx: Context, state: State) -> Continuation:
        return ctx.done("slept")

    @machine.step(blocking=True)
    def work(ctx: Context, state: State) -> Continuation:
        return ctx.goto(worked, state)

    @machine.step()
    def worked(ctx: Context, state: State) -> Continuation:
        return ctx.done("worked")

    @machine.step(on_cancel=True, transactional=True)
    def clean(ctx: Context, state: State) -> Continuation:
        _leave_effect(ctx)
        return ctx.done()


def _leave_effect(ctx: Context) -> None:
    """What a transactional step did; twice if it was handed on twice."""
    ctx.tx.execute("insert into effect (id, step) values (%s, %s)", (ctx.workflow_id, ctx.step))
