"""One step: resolve the handler, run it, and turn what it returned or raised into what its page hands on."""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster.context import Context, short_id
from durable_cluster.continuation import Continuation, Done, Fail, Goto, Join, Retrying, Sleep, Spawn, Stuck, Wait
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import NOT_RETRIED, STEP_FAILURES, DurableError, HandlerError, StepTimeout, TerminalError
from durable_cluster.joins import ChildResult, Joining, Spawning
from durable_cluster.limits import LIMIT, OF_STEP, OF_WORKFLOW, Pump, Queued, pump_of, without_permit
from durable_cluster.notes import SETTING, Noted, Setting, setting_of
from durable_cluster.signals import CANCEL, SIGNAL, Cancel, Delivery, Waiting, message_of, token_seq_of
from durable_cluster.statements import Outcome

if TYPE_CHECKING:
    from durable_cluster.machine import Machine, Step

logger = logging.getLogger("durable_cluster.executor")

TRACEBACK_CHARS_MAX = 4_000
REASON_CHARS_MAX = 1_000
UNROUTED_PAUSE_S_MAX = 60.0
UNROUTED_DOUBLINGS = 6

FAILURES = (*STEP_FAILURES, asyncio.CancelledError)
"""What a handler may raise to fail its own step. A cancellation is none of ours, or of a step whose result nobody waits for."""


class Later(msgspec.Struct, frozen=True):
    """A step event to be delivered after ``delay_s`` seconds. ``reason``: why, if an attempt has failed."""

    envelope: Envelope
    delay_s: float
    reason: str = ""


class DeadLetter(msgspec.Struct, frozen=True):
    """A step that cannot go on. ``reason``: see ``durable.bury``; ``details``: what a failed workflow says too."""

    envelope: Envelope
    reason: str
    details: dict[str, Any]


WAITS = (Wait, Spawn, Join)
TROUBLED = (Stuck, Retrying)


class Parked(msgspec.Struct, frozen=True):
    """A step event that met a pause."""

    envelope: Envelope


OnTheWay = Delivery | Cancel | Setting | Pump
Result = Envelope | Outcome | Later | Parked | Queued | Waiting | Spawning | Joining | OnTheWay | DeadLetter | Noted


class Task(msgspec.Struct, frozen=True, gc=False):
    """A step event with the handler that will run it. ``children``: those it was resumed by, as far as its page has read them."""

    machine: Machine
    step: Step
    envelope: Envelope
    children: list[ChildResult] | None = None


def resolve(machines: Mapping[str, Machine], envelope: Envelope, *, limit_s: float) -> Task | Result | None:
    """The task for an envelope, or the signal, cancel or change of attributes that it is; None for one that nobody can have sent.

    One that this code knows no handler for waits for a process that does, for ``limit_s`` seconds in all: during a deployment
    old and new code run side by side.
    """
    try:
        machine = machines[envelope.workflow]
        if envelope.version != machine.version:
            machine = machine.of_version(envelope.version)
        return Task(machine, machine.steps[envelope.step], envelope)
    except KeyError:
        if envelope.workflow in (SIGNAL, CANCEL):
            return message_of(envelope)
        if envelope.workflow == LIMIT:
            return pump_of(envelope)
        if envelope.workflow == SETTING:
            return setting_of(envelope)
        return _unrouted(envelope, machines, limit_s)


def cancelled(machines: Mapping[str, Machine], envelope: Envelope, reason: str) -> Envelope | Outcome | None:
    """What stands in for a step of a cancelled workflow: the first step of its cleanup, or its end if it has none.

    None where the step goes on as it is: it belongs to the cleanup, is a signal, or no code here knows the workflow.
    """
    if envelope.cancelled:
        return None
    try:
        machine = machines[envelope.workflow].of_version(envelope.version)
    except KeyError:
        return None
    cleanup = machine.on_cancel
    if cleanup is None:
        return Outcome(envelope.workflow_id, "cancelled", encode(_said_of(envelope, reason, None)).decode())
    return Envelope(
        envelope.workflow_id,
        envelope.seq + 1,
        envelope.workflow,
        cleanup.name,
        envelope.version,
        machine.cleanup_state(envelope),
        cancelled=reason,
    )


def is_paused(envelope: Envelope, paused: Collection[str]) -> bool:
    """Whether a step has to wait for the end of a pause: signals and cancels do not, nor what cleans up after a cancel."""
    if envelope.cancelled or envelope.workflow.startswith("@"):
        return False
    return envelope.workflow in paused or envelope.workflow_id in paused


def queued(task: Task) -> Result | None:
    """A step that has to wait for a permit first; None for one that has it, or needs none, as what cleans up after a cancel."""
    envelope, of_workflow, of_step = task.envelope, task.machine.limit, task.step.limit
    if envelope.cancelled:
        return None
    if of_workflow is not None and envelope.seq == 1 and not envelope.permit & OF_WORKFLOW:
        limit, bit, permit_seq = of_workflow, OF_WORKFLOW, 0
    elif of_step is not None and not envelope.permit & OF_STEP:
        limit, bit, permit_seq = of_step, OF_STEP, envelope.seq
    else:
        return None
    try:
        key = limit.key_of(task.machine.counted(task.step, _state_of(task)))
    except Exception as error:
        wrong = HandlerError(f"step '{task.step.name}': the key of its limit '{limit.name}' failed: {_reason(error)}")
        return failed(task, wrong, context_of(task))
    return Queued(msgspec.structs.replace(envelope, permit=envelope.permit | bit), limit, key, permit_seq)


def call(task: Task, context: Context) -> Result:
    """Run a ``def`` step and let what it raises pass: what a transactional step did must then be rolled back."""
    result = conclude(task, task.step.handler(*_arguments(task, context)))
    return result if context.notes is None else Noted(task.envelope, result, context.notes)


def run(task: Task, context: Context) -> Result:
    """Run a ``def`` step. What the handler raises is a failed attempt of this step alone."""
    try:
        return call(task, context)
    except FAILURES as error:
        return failed(task, told_of(task, error), context)


async def run_async(task: Task, context: Context) -> Result:
    """Run an ``async def`` step, for as long as its timeout allows."""
    try:
        async with asyncio.timeout(task.step.timeout_s) as limit:
            returned = await task.step.handler(*_arguments(task, context))
        result = conclude(task, returned)
        return result if context.notes is None else Noted(task.envelope, result, context.notes)
    except FAILURES as error:
        return failed(task, timed_out(task) if limit.expired() and isinstance(error, TimeoutError) else error, context)


def context_of(task: Task, connection: psycopg.Connection[Any] | None = None) -> Context:
    """What a step is told about itself. One for each run."""
    return Context(task.machine, task.envelope, connection, None, task.children)


def told_of(task: Task, error: BaseException) -> BaseException:
    """``error`` with words: the interruption of a thread that ran too long comes without."""
    return timed_out(task) if type(error) is StepTimeout and not error.args else error


def timed_out(task: Task) -> StepTimeout:
    """The error of a step that ran too long."""
    return StepTimeout(f"step '{task.step.name}' did not end within its timeout of {task.step.timeout_s:g} s")


def conclude(task: Task, returned: Continuation) -> Result:
    """What a continuation hands on. Raises HandlerError for anything else."""
    envelope = task.envelope
    if type(returned) is Goto:
        return _successor(task, returned)
    if type(returned) is Done:
        return _completed(envelope, _encoded(task, returned.output), returned.memo)
    if type(returned) is Sleep:
        return Later(_successor(task, returned.goto), returned.seconds)
    if isinstance(returned, WAITS):
        return _waiting(task, returned)
    if type(returned) is Fail:
        return failure(envelope, str(returned.reason), memo=returned.memo)
    if isinstance(returned, TROUBLED):
        return _troubled(task, returned)
    raise HandlerError(
        f"step '{envelope.step}' returned {type(returned).__name__};"
        " return ctx.goto(step, state), ctx.sleep(duration, step, state), ctx.wait_for(signal, then=step, state=…),"
        " ctx.spawn or ctx.gather(children, then=step, state=…), ctx.done(output) or ctx.fail(reason)"
    )


def _troubled(task: Task, returned: Stuck | Retrying) -> Later | DeadLetter:
    to = _successor(task, returned.goto)
    if isinstance(returned, Stuck):
        return dead_letter(to, returned.reason, _reason(returned.error), trace=_trace(returned.error))
    again = msgspec.structs.replace(to, seq=to.seq + 1, attempt=2, progress=returned.progress)
    return Later(again, returned.pause_s, _reason(returned.error))


def _completed(envelope: Envelope, output: bytes, memo: bytes) -> Outcome:
    if not envelope.cancelled:
        return Outcome(envelope.workflow_id, "completed", output.decode(), memo.decode())
    said = _said_of(envelope, envelope.cancelled, None) | {"output": msgspec.Raw(output)}
    return Outcome(envelope.workflow_id, "cancelled", encode(said).decode(), memo.decode())


def _waiting(task: Task, returned: Wait | Spawn | Join) -> Waiting | Spawning | Joining:
    envelope = task.envelope
    if isinstance(returned, Wait):
        token_seq = returned.token_seq or token_seq_of(envelope) if returned.requires_token else None
        goto, late = _successor(task, returned.goto), _successor(task, returned.late)
        return Waiting(goto, late, returned.names, returned.timeout_s, token_seq)
    if isinstance(returned, Spawn):
        return Spawning(_successor(task, returned.goto), envelope.seq, returned.children, returned.keeps_group)
    return Joining(
        _successor(task, returned.goto, has_children=True),
        _successor(task, returned.late, has_children=True),
        envelope.seq,
        returned.children,
        returned.timeout_s,
        returned.needed,
        returned.tolerance,
        returned.cancels_rest,
        returned.keeps_group,
        returned.names,
        returned.token_seq,
    )


def failed(task: Task, error: BaseException, context: Context) -> Result:
    """What becomes of a step that raised ``error``: another attempt later, a dead letter, or the workflow's end."""
    envelope = task.envelope
    reason = _reason(error)
    policy = envelope.retry or task.step.retry
    spent = envelope.attempt - envelope.granted
    if isinstance(error, NOT_RETRIED):
        return dead_letter(envelope, "given_up", reason, trace=_trace(error))
    is_given_up = isinstance(error, TerminalError) or not policy.is_retried(error)
    if is_given_up or spent >= policy.attempts:
        if (instead := _after_failure(task, error)) is not None:
            return instead
        if isinstance(error, TerminalError):
            return failure(envelope, reason, trace=_trace(error), memo=task.machine.memo_of(envelope, error))
        return dead_letter(envelope, "given_up" if is_given_up else "attempts", reason, trace=_trace(error))
    pause_s = policy.pause_s(spent, chance=random.random())
    again = msgspec.structs.replace(
        without_permit(envelope), seq=envelope.seq + 1, attempt=envelope.attempt + 1, unrouted=0, progress=context.said
    )
    return Later(again, pause_s, reason)


def _after_failure(task: Task, error: BaseException) -> Result | None:
    """What its workflow does about it, if it does anything: lines of a user's, which may fail too; then nothing is done."""
    try:
        instead = task.machine.after_failure(task, error)
        return None if instead is None else conclude(task, instead)
    except FAILURES as problem:
        told = (task.envelope.step, short_id(task.envelope.workflow_id), _reason(problem))
        logger.warning("step '%s' of %s… failed, and its workflow could not be told: %s", *told)
        return None


def dead_letter(envelope: Envelope, kind: str, reason: str, *, trace: str | None = None) -> DeadLetter:
    """A step that is set aside until somebody takes it up again."""
    return DeadLetter(without_permit(envelope), kind, _said_of(envelope, reason, trace))


def crashed(envelope: Envelope, times: int, what: str = "the process died") -> DeadLetter:
    """A step that was running alone so many times when its process died, or what else happened."""
    reason = f"{what} {times} times while step '{envelope.step}' ran alone; see the cluster's log for how"
    return dead_letter(envelope, "crashes", reason)


def failure(envelope: Envelope, reason: str, *, trace: str | None = None, memo: bytes = b"") -> Outcome:
    """The terminal record of a failed workflow."""
    return Outcome(envelope.workflow_id, "failed", encode(_said_of(envelope, reason, trace)).decode(), memo.decode())


def _successor(task: Task, to: Goto, *, has_children: bool = False) -> Envelope:
    envelope = task.envelope
    if to.step not in task.machine.steps:
        raise HandlerError(f"step '{envelope.step}' went to {to.step!r}, which '{task.machine.name}' does not have")
    return Envelope(
        envelope.workflow_id,
        envelope.seq + 1,
        envelope.workflow,
        to.step,
        task.machine.version,
        msgspec.Raw(_encoded(task, to.state)),
        retry=to.retry,
        cancelled=envelope.cancelled,
        has_children=has_children,
    )


def _unrouted(envelope: Envelope, machines: Mapping[str, Machine], limit_s: float) -> Result:
    unknown = _unknown(envelope, machines)
    if _waited_s(envelope.unrouted) >= limit_s:
        return dead_letter(envelope, "unroutable", unknown)
    if envelope.unrouted == 0:
        logger.warning("%s; %s… waits for a process that knows it", unknown, short_id(envelope.workflow_id))
    pause_s = min(UNROUTED_PAUSE_S_MAX, 2.0 ** min(envelope.unrouted, UNROUTED_DOUBLINGS))
    return Later(msgspec.structs.replace(without_permit(envelope), unrouted=envelope.unrouted + 1), pause_s)


def _unknown(envelope: Envelope, machines: Mapping[str, Machine]) -> str:
    """What this code does not know, and what it has in its place."""
    newest = machines.get(envelope.workflow)
    if newest is None:
        return f"no workflow '{envelope.workflow}' in this app; it has {', '.join(machines) or 'none'}"
    if envelope.version > newest.version:
        return f"workflow '{envelope.workflow}' has come to version {envelope.version}; this code is of version {newest.version}"
    steps = newest.of_version(envelope.version).steps
    return f"workflow '{envelope.workflow}' has no step '{envelope.step}' in this code; it has {', '.join(steps) or 'none'}"


def _waited_s(times: int) -> float:
    """How long a step has waited that was put off so many times: 1, 2, 4 … 32 s, then a minute each."""
    return 2.0 ** min(times, UNROUTED_DOUBLINGS) - 1 + UNROUTED_PAUSE_S_MAX * max(0, times - UNROUTED_DOUBLINGS)


def _said_of(envelope: Envelope, reason: str, trace: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {
        "reason": _clean(reason[:REASON_CHARS_MAX]),
        "step": envelope.step,
        "seq": envelope.seq,
        "attempt": envelope.attempt,
    }
    if trace is not None:
        said["traceback"] = _clean(trace)
    return said


def _reason(error: BaseException) -> str:
    if isinstance(error, DurableError):
        return _said(error)
    return f"{type(error).__name__}: {_said(error)}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACEBACK_CHARS_MAX:]


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(it cannot be printed)"


def _clean(text: str) -> str:
    """``text`` without what neither JSON nor Postgres can hold."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def _arguments(task: Task, context: Context) -> tuple[Any, ...]:
    state = _state_of(task)
    return (context, state) if task.step.signature.takes_context else (state,)


def _state_of(task: Task) -> Any:
    try:
        return task.step.decoder.decode(task.envelope.state)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # older code may have written it
    try:
        return task.machine.app.upcasts.decoded(task.step.decoder, task.envelope.state)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandlerError(f"the state does not fit step '{task.step.name}': {error}") from error


def _encoded(task: Task, value: object) -> bytes:
    try:
        encoded = encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise HandlerError(f"step '{task.step.name}' handed on what is not JSON: {error}") from error
    limit = task.machine.app.settings.payload_bytes_max
    if len(encoded) > limit:
        raise HandlerError(f"step '{task.step.name}' handed on {len(encoded):,} bytes, the limit is {limit:,}")
    return encoded
