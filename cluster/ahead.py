"""Quick steps of one linear workflow, run one after the other in one step event, for a few milliseconds.

A plain ``def`` step runs in its page, and is committed with it. Where the function goes on to another such step, it is run at once
too, and both are committed together: a process that dies before that runs both again, as it would have run the first.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from durable_cluster import memo
from durable_cluster.commands import Call
from durable_cluster.context import Context
from durable_cluster.continuation import Continuation, Goto, Retrying, Stuck
from durable_cluster.dead_letters import brief_of
from durable_cluster.errors import NOT_RETRIED, STEP_FAILURES, TerminalError
from durable_cluster.failures import failure_of
from durable_cluster.notes import noted_too

if TYPE_CHECKING:
    from durable_cluster.execution import Execution, Pending


class FirstAttemptFailed(Exception):
    """The step has to be waited for."""


class Ahead:
    """The time that one step event gives to steps which run ahead. ``ctx``: that event's."""

    def __init__(self, ctx: Context, until: float) -> None:
        self._ctx = ctx
        self._until = until
        self._failed: tuple[str, BaseException, Context] | None = None

    def may_run(self, execution: Execution, call: Call) -> bool:
        """Whether this step may run now, in place of being waited for: alone, so that the function entered anew is the same."""
        return call.options.timeout_s is None and execution.is_single and time.monotonic() < self._until

    def run(self, execution: Execution, key: str, call: Call) -> Any:
        """What the step returns. Raises FirstAttemptFailed."""
        encoded, decoded = self._answer(execution, key, call)
        execution.record_entry(key, memo.completed(key, encoded))
        return decoded

    def run_on(self, execution: Execution) -> Continuation | None:
        """Let the function go on for as long as it waits for one quick step; what a step that failed leads to, None otherwise."""
        while (pending := _quick(execution)) is not None:
            if self._failed is None or self._failed[0] != pending.key:
                if time.monotonic() > self._until:
                    return None
                with suppress(FirstAttemptFailed):
                    encoded, decoded = self._answer(execution, pending.key, pending.command)
                    execution.answer(pending.key, memo.completed(pending.key, encoded), decoded)
                    continue
            assert self._failed is not None
            _, error, context = self._failed
            failed = _failed(execution, pending, error, context)
            if failed is not None:
                return failed
        return None

    def _answer(self, execution: Execution, key: str, call: Any) -> tuple[bytes, Any]:
        function, context, workflow = call.function, self._ctx, execution.workflow
        if function.takes_context:
            context = execution.context_of(self._ctx, key, call.name)
        workflow.runs_now = call.name, 1
        try:
            answer: tuple[bytes, Any]
            if self._ctx.watch is None:  # as most: the step itself may be quicker than a context that does nothing
                answer = function.answer_of(function.run(context, msgspec.Raw(call.args)))
            else:
                with self._ctx.watch.attempt(call.name, 1):
                    answer = function.answer_of(function.run(context, msgspec.Raw(call.args)))
        except STEP_FAILURES as error:
            self._failed = key, error, context
            raise FirstAttemptFailed from error
        finally:
            workflow.runs_now = None
            if context is not self._ctx:
                self._ctx.notes = noted_too(self._ctx.notes, context.notes)
        return answer


class TimedAhead(Ahead):
    """The same where the workflow is recorded: each step that runs ahead is told of by itself."""

    def _answer(self, execution: Execution, key: str, call: Any) -> tuple[bytes, Any]:
        began = time.monotonic()
        timing = self._ctx.timing
        assert timing is not None
        try:
            answer = super()._answer(execution, key, call)
        except FirstAttemptFailed as failed:
            error = failed.__cause__ or failed
            timing.lap(call.name, began, outcome="failed", error=brief_of(execution.workflow, error))
            raise
        timing.lap(call.name, began)
        return answer


def ahead_of(ctx: Context, until: float) -> Ahead:
    """The time that a step event gives, up to the monotonic moment ``until``."""
    return (Ahead if ctx.timing is None else TimedAhead)(ctx, until)


def _quick(execution: Execution) -> Pending | None:
    """The one quick step that it waits for, and for nothing else."""
    if len(execution.pending) != 1 or execution.children or execution.is_done:
        return None
    (only,) = execution.pending.values()
    command = only.command
    is_quick = type(command) is Call and command.function.is_quick and command.options.timeout_s is None
    return only if is_quick and not only.future.done() else None


def _failed(execution: Execution, pending: Pending, error: BaseException, context: Context) -> Continuation | None:
    """The first attempt of a step has failed: another one later, or the function is told, or the step is a dead letter."""
    call = pending.command
    assert isinstance(call, Call)
    policy = call.options.retry or call.function.policy
    goto = Goto(call.name, msgspec.Raw(execution.encoded(pending.key, call.args)), call.options.retry)
    if isinstance(error, NOT_RETRIED):
        return Stuck(goto, error)
    is_given_up = isinstance(error, TerminalError) or not policy.is_retried(error)
    if not is_given_up and policy.attempts > 1:
        progress = None if context.step != call.name else context.said
        return Retrying(goto, error, policy.pause_s(1, chance=random.random()), progress)
    execution.fail(pending.key, failure_of(error))
    if execution.is_last_failure_uncaught and not isinstance(error, TerminalError):
        return Stuck(goto, error, "given_up" if is_given_up else "attempts")
    return None
