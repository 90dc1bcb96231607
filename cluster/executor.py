"""One step: resolve the handler, run it, and turn what it returned into a successor or a terminal record."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster.context import Context
from durable_cluster.continuation import Continuation, Done, Fail, Goto
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import DurableError, HandlerError
from durable_cluster.statements import Outcome

if TYPE_CHECKING:
    from durable_cluster.app import Machine, Step

TRACEBACK_CHARS_MAX = 4_000
REASON_CHARS_MAX = 1_000

Result = Envelope | Outcome
FAILURES = (Exception, asyncio.CancelledError)
"""What a handler may raise to fail its own workflow. A cancellation is none of ours: nothing here cancels a step."""


class Task(msgspec.Struct, frozen=True):
    """A step event with the handler that will run it."""

    machine: Machine
    step: Step
    envelope: Envelope


def resolve(machines: Mapping[str, Machine], envelope: Envelope) -> Task | Outcome:
    """The task for an envelope, or the failure of a workflow whose name or step this code does not know."""
    machine = machines.get(envelope.workflow)
    if machine is None:
        return failure(
            envelope, f"no workflow '{envelope.workflow}' in this app; it has {', '.join(machines) or 'none'}"
        )
    step = machine.steps.get(envelope.step)
    if step is None:
        return failure(envelope, f"workflow '{envelope.workflow}' has no step '{envelope.step}' in this code")
    return Task(machine, step, envelope)


def call(task: Task, connection: psycopg.Connection[Any] | None = None) -> Result:
    """Run a ``def`` step and let what it raises pass: what a transactional step did must then be rolled back."""
    return conclude(task, task.step.handler(*_arguments(task, connection)))


def run(task: Task) -> Result:
    """Run a ``def`` step. What the handler raises is a failed step of this workflow alone."""
    try:
        return call(task)
    except FAILURES as error:
        return failed(task.envelope, error)


async def run_async(task: Task) -> Result:
    """Run an ``async def`` step."""
    try:
        return conclude(task, await task.step.handler(*_arguments(task, None)))
    except FAILURES as error:
        return failed(task.envelope, error)


def conclude(task: Task, returned: Continuation) -> Result:
    """A continuation as the workflow's next envelope or its terminal record. Raises HandlerError for anything else."""
    envelope = task.envelope
    if type(returned) is Goto:
        if returned.step not in task.machine.steps:
            raise HandlerError(
                f"step '{envelope.step}' went to {returned.step!r}, which '{task.machine.name}' does not have"
            )
        state = _encoded(task, returned.state)
        return Envelope(
            envelope.workflow_id,
            envelope.seq + 1,
            envelope.workflow,
            returned.step,
            task.machine.version,
            msgspec.Raw(state),
        )
    if type(returned) is Done:
        return Outcome(envelope.workflow_id, "completed", _encoded(task, returned.output).decode())
    if type(returned) is Fail:
        return failure(envelope, str(returned.reason))
    raise HandlerError(
        f"step '{envelope.step}' returned {type(returned).__name__};"
        " return ctx.goto(step, state), ctx.done(output) or ctx.fail(reason)"
    )


def failed(envelope: Envelope, error: BaseException) -> Outcome:
    """The terminal record of a workflow whose step raised ``error``."""
    reason = _said(error) if isinstance(error, DurableError) else f"{type(error).__name__}: {_said(error)}"
    trace = "".join(traceback.format_exception(error))[-TRACEBACK_CHARS_MAX:]
    return failure(envelope, reason, trace=trace)


def failure(envelope: Envelope, reason: str, *, trace: str | None = None) -> Outcome:
    """The terminal record of a failed workflow."""
    said = {
        "reason": _clean(reason[:REASON_CHARS_MAX]),
        "step": envelope.step,
        "seq": envelope.seq,
        "attempt": envelope.attempt,
    }
    if trace is not None:
        said["traceback"] = _clean(trace)
    return Outcome(envelope.workflow_id, "failed", encode(said).decode())


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(it cannot be printed)"


def _clean(text: str) -> str:
    """``text`` without what neither JSON nor Postgres can hold."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _arguments(task: Task, connection: psycopg.Connection[Any] | None) -> tuple[Any, ...]:
    try:
        state = task.step.decoder.decode(task.envelope.state)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandlerError(f"the state does not fit step '{task.step.name}': {error}") from error
    if task.step.signature.takes_context:
        return Context(task.machine, task.envelope, connection), state
    return (state,)


def _encoded(task: Task, value: object) -> bytes:
    try:
        encoded = encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise HandlerError(f"step '{task.step.name}' handed on what is not JSON: {error}") from error
    limit = task.machine.app.settings.payload_bytes_max
    if len(encoded) > limit:
        raise HandlerError(f"step '{task.step.name}' handed on {len(encoded):,} bytes, the limit is {limit:,}")
    return encoded
