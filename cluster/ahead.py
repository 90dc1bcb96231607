"""Quick steps of one linear workflow, run one after the other in one step event, for a few milliseconds.

A plain ``def`` step runs in its page, and is committed with it. Where the function goes on to another such step, it is run at once
too, and both are committed together: a process that dies before that runs both again, as it would have run the first.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import msgspec

from durable_cluster import memo
from durable_cluster.commands import Call
from durable_cluster.context import Asked, Context
from durable_cluster.continuation import Continuation, Goto, Retrying, Stuck
from durable_cluster.errors import NOT_RETRIED, TerminalError
from durable_cluster.failures import failure_of
from durable_cluster.notes import noted_too

if TYPE_CHECKING:
    from durable_cluster.execution import Execution, Pending

FAILURES = (Exception, SystemExit)


def run_ahead(ctx: Context, execution: Execution) -> Continuation | None:
    """Let the function go on for as long as it waits for one quick step; what a step that failed leads to, None otherwise."""
    app = execution.workflow.app
    until = time.monotonic() + app.settings.run_ahead_ms / 1000
    while not app.runs_alone and time.monotonic() < until:
        quick = _quick(execution)
        if quick is None:
            return None
        call = quick.command
        assert isinstance(call, Call)
        context = ctx
        if call.function.takes_context:
            context = _context(ctx, execution, quick)
        try:
            encoded, decoded = call.function.answer_of(call.function.run(context, msgspec.Raw(call.args)))
        except FAILURES as error:
            failed = _failed(execution, quick, error, context)
            if failed is not None:
                return failed
        else:
            execution.answer(quick.key, memo.completed(quick.key, encoded), decoded)
        if context is not ctx:
            ctx.notes = noted_too(ctx.notes, context.notes)
    return None


def _quick(execution: Execution) -> Pending | None:
    """The one quick step that it waits for, and for nothing else."""
    if len(execution.pending) != 1 or execution.children or execution.is_done:
        return None
    (only,) = execution.pending.values()
    command = only.command
    is_quick = type(command) is Call and command.function.is_quick and command.options.timeout_s is None
    return only if is_quick and not only.future.done() else None


def _context(ctx: Context, execution: Execution, pending: Pending) -> Context:
    step = pending.command.name
    context = Context(execution.workflow, msgspec.structs.replace(ctx.envelope, step=step, attempt=1, progress=None))
    context.answers(Asked(execution.carried.run, pending.key, execution.tokens + 1))
    return context


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
        return Retrying(goto, policy.pause_s(1, chance=random.random()), progress)
    execution.fail(pending.key, failure_of(error))
    if execution.is_last_failure_uncaught and not isinstance(error, TerminalError):
        return Stuck(goto, error, "given_up" if is_given_up else "attempts")
    return None
