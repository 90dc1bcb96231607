"""A process that dies at a point of a step's path, without a process that dies.

What a death takes is taken: the page that is not committed, the answers of steps beside it, and every function that is kept in
memory. Once it is dead no other step begins, and its next statement on its connection is its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

import msgspec

from durable_cluster.app import App
from durable_cluster.context import Context
from durable_cluster.database import WorkerConnection
from durable_cluster.errors import AppError
from durable_cluster.functions import StepFunction
from durable_cluster.handoff import Answer, Handoff
from durable_cluster.linear import Workflow
from durable_cluster.machine import Machine, Step
from durable_cluster.side_results import Detached

Point = Literal["before", "after", "committed"]
AnyStep = StepFunction[..., Any] | Callable[..., Any] | str


class Died(BaseException):
    """Where the code of a process that has died would have gone on."""

    def __str__(self) -> str:
        return "the process has died here; only cluster.run(), advance() and result() go on with another"


class Crash:
    """Where a process of ``app`` dies, ``times`` times. ``happened``: how often it has."""

    def __init__(self, app: App, point: Point, step: AnyStep, times: int) -> None:
        self.happened = 0
        self._app = app
        self._point = point
        self._times = times
        self._step, self._machines = _found(app, step)
        self._ran: set[str] = set()
        self._is_dead = self._has_stopped = False

    def __repr__(self) -> str:
        return f"<crash {self._point} step '{self._step}', {self.happened} of {self._times}>"

    @contextmanager
    def armed(self) -> Iterator[Crash]:
        """Meanwhile it may happen. Raises AssertionError at the end if it has not happened as often as it should."""
        with ExitStack() as stack:
            for machine in self._machines:
                inner = machine.steps[self._step]
                stack.callback(machine.steps.__setitem__, self._step, inner)
                machine.steps[self._step] = self._around(inner)
            stack.enter_context(patch.object(StepFunction, "run", self._around_run(StepFunction.run)))
            stack.enter_context(patch.object(WorkerConnection, "wait", self._around_wait(WorkerConnection.wait)))
            stack.enter_context(patch.object(Handoff, "commit", self._around_commit(Handoff.commit)))
            stack.enter_context(patch.object(Handoff, "complete", self._around_complete(Handoff.complete)))
            yield self
        if self.happened < self._times:
            raise AssertionError(
                f"the process died {self.happened} times {self._point} step '{self._step}' and not {self._times}: the step was not"
                " run so often in this block"
            )

    def stop(self) -> None:
        """Whatever is sent from now on is what others do about the death."""
        self._has_stopped = True

    def revive(self) -> None:
        """The next process."""
        self._is_dead = self._has_stopped = False
        self._ran.clear()

    def _reach(self, point: Point) -> None:
        """Die, if this is the point and it has not happened often enough."""
        if point == self._point and self.happened < self._times:
            self.happened += 1
            self._is_dead = True
            raise Died

    @contextmanager
    def _passing(self, ctx: Context) -> Iterator[None]:
        """The step runs inside of this."""
        self._reach("before")
        try:
            yield
        except Exception:
            self._reach("after")
            raise
        self._reach("after")
        self._ran.add(ctx.envelope.key)

    def _around(self, step: Step) -> Step:
        """A machine's step that passes the points."""
        handler, takes_context = step.handler, step.signature.takes_context

        def run(ctx: Context, state: Any) -> Any:
            with self._passing(ctx):
                return handler(ctx, state) if takes_context else handler(state)

        async def run_async(ctx: Context, state: Any) -> Any:
            with self._passing(ctx):
                return await (handler(ctx, state) if takes_context else handler(state))

        signature = msgspec.structs.replace(step.signature, takes_context=True)
        wrapped = run_async if signature.is_async else run
        return msgspec.structs.replace(step, handler=wrapped, signature=signature)

    def _around_run(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """``StepFunction.run``: what every step of a linear workflow goes through."""

        async def awaited(function: StepFunction[..., Any], ctx: Context, args: msgspec.Raw) -> Any:
            with self._passing(ctx):
                return await inner(function, ctx, args)

        def run(function: StepFunction[..., Any], ctx: Context, args: msgspec.Raw) -> Any:
            if function.app is not self._app:
                return inner(function, ctx, args)
            if self._is_dead:
                raise Died
            if self._machines or function.name != self._step:
                return inner(function, ctx, args)
            if function.is_async:
                return awaited(function, ctx, args)
            with self._passing(ctx):
                return inner(function, ctx, args)

        return run

    def _around_wait(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A consumer's connection: the first statement after the death is not sent. What follows it is the end of the process."""

        def wait(connection: WorkerConnection, *args: Any, **options: Any) -> Any:
            if self._is_dead and not self._has_stopped:
                self._has_stopped = True
                raise Died
            return inner(connection, *args, **options)

        return wait

    def _around_commit(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A page with the step's result in it."""

        def commit(handoff: Handoff, window: Any, page: Any, slots: Any, *, first: int = 0, **options: Any) -> Any:
            results = inner(handoff, window, page, slots, first=first, **options)
            lines = page.lines[first : first + len(results)]
            committed = {
                line.key for line, slot in zip(lines, results, strict=True) if line and not isinstance(slot, Detached)
            }
            self._die_if_among(committed)
            return results

        return commit

    def _around_complete(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The same for steps that have outlasted their page."""

        def complete(handoff: Handoff, owner: int, answers: list[Answer]) -> Any:
            ours = inner(handoff, owner, answers)
            self._die_if_among({answer.envelope.key for answer in answers})
            return ours

        return complete

    def _die_if_among(self, committed: set[str]) -> None:
        if self._ran & committed:
            self._ran -= committed
            self._reach("committed")


def _found(app: App, step: AnyStep) -> tuple[str, list[Machine]]:
    """The step's name, and the machines that have it; none for one of linear workflows. Raises AppError."""
    every = [machine for newest in app.machines.values() for machine in newest.versions.values()]
    machines = [machine for machine in every if not isinstance(machine, Workflow)]
    if isinstance(step, str):
        if step in app.steps:
            return step, []
        of_machines = [machine for machine in machines if step in machine.steps]
        if of_machines:
            return step, of_machines
    elif isinstance(step, StepFunction):
        if step.app is app:
            return step.name, []
    else:
        for machine in machines:
            for known in machine.steps.values():
                if known.handler is step:
                    return known.name, [machine]
    names = sorted({*app.steps, *(name for machine in machines for name in machine.steps)})
    raise AppError(
        f"app '{app.name}' has no step {getattr(step, '__name__', step)!r}; it has {', '.join(names) or 'none'}"
    )
