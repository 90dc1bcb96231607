"""One step: resolve the handler, run it, and turn what it returned or raised into what its page hands on."""

from __future__ import annotations

import asyncio
import logging
import random
from asyncio import timeout
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster.codec import Where
from durable_cluster.context import Context, short_id
from durable_cluster.continuation import Continuation, Done, Fail, Goto, Join, Retrying, Sleep, Spawn, Stuck, Wait
from durable_cluster.dead_letters import (
    DeadLetter,
    brief_of,
    dead,
    dead_letter,
    failure,
    reason_of,
    said_by,
    said_of,
    veiled,
)
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import (
    NOT_RETRIED,
    STEP_FAILURES,
    CodecError,
    HandlerError,
    TerminalError,
    Unreadable,
)
from durable_cluster.failures import timed_out, told_of
from durable_cluster.joins import ChildResult, Joining, Spawning
from durable_cluster.limits import LIMIT, OF_STEP, OF_WORKFLOW, Pump, Queued, pump_of, without_permit
from durable_cluster.notes import SETTING, Noted, Setting, noted, setting_of
from durable_cluster.signals import CANCEL, SIGNAL, Cancel, Delivery, Waiting, message_of, token_seq_of
from durable_cluster.statements import Outcome

if TYPE_CHECKING:
    from durable_cluster.machine import Machine, Step

logger = logging.getLogger("durable_cluster.executor")

UNROUTED_PAUSE_S_MAX = 60.0
UNROUTED_DOUBLINGS = 6

FAILURES = (*STEP_FAILURES, asyncio.CancelledError)
"""What a handler may raise to fail its own step. A cancellation is none of ours, or of a step whose result nobody waits for."""


class Later(msgspec.Struct, frozen=True):
    """A step event to be delivered after ``delay_s`` seconds. ``reason``: why, if an attempt has failed."""

    envelope: Envelope
    delay_s: float
    reason: str = ""


WAITS = (Wait, Spawn, Join)
TROUBLED = (Stuck, Retrying)


class Parked(msgspec.Struct, frozen=True):
    """A step event that met a pause."""

    envelope: Envelope


OnTheWay = Delivery | Cancel | Setting | Pump
Result = Envelope | Outcome | Later | Parked | Queued | Waiting | Spawning | Joining | OnTheWay | DeadLetter | Noted


class Task(msgspec.Struct, frozen=True, gc=False):
    """A step event with the handler that will run it. ``children``: those it was resumed by, as far as its page has read them.

    ``is_plain``: it is known that nothing of it is coded.
    """

    machine: Machine
    step: Step
    envelope: Envelope
    children: list[ChildResult] | None = None
    is_plain: bool = False


def resolve(
    machines: Mapping[str, Machine], envelope: Envelope, *, limit_s: float, is_plain: bool = False
) -> Task | Result | None:
    """The task for an envelope, or the signal, cancel or change of attributes that it is; None for one that nobody can have sent.

    One that this code knows no handler for waits for a process that does, for ``limit_s`` seconds in all: during a deployment
    old and new code run side by side.
    """
    try:
        machine = machines[envelope.workflow]
        if envelope.version != machine.version:
            machine = machine.of_version(envelope.version)
        return Task(machine, machine.steps[envelope.step], envelope, None, is_plain)
    except KeyError:
        if envelope.workflow in (SIGNAL, CANCEL):
            return message_of(envelope)
        if envelope.workflow == LIMIT:
            return pump_of(envelope)
        if envelope.workflow == SETTING:
            return setting_of(envelope)
        return _put_off(envelope, _unknown(envelope, machines), limit_s=limit_s)


def cancelled(machines: Mapping[str, Machine], envelope: Envelope, reason: str) -> Envelope | Outcome | None:
    """What stands in for a step of a cancelled workflow: the first step of its cleanup, or its end if it has none.

    None where the step goes on as it is: it belongs to the cleanup, is a signal, or no code here knows or can read it.
    """
    if envelope.cancelled:
        return None
    try:
        machine = machines[envelope.workflow].of_version(envelope.version)
    except KeyError:
        return None
    cleanup = machine.on_cancel
    if cleanup is None:
        return Outcome(envelope.workflow_id, "cancelled", encode(said_of(envelope, reason)).decode())
    payloads = machine.app.payloads
    try:
        state = bytes(machine.cleanup_state(payloads.event(envelope)))
        state = payloads.coded(state, Where(envelope.workflow, "state", envelope.workflow_id))
    except CodecError:
        return None
    return Envelope(
        envelope.workflow_id,
        envelope.seq + 1,
        envelope.workflow,
        cleanup.name,
        envelope.version,
        msgspec.Raw(state),
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
    context = context_of(task)
    try:
        key = limit.key_of(task.machine.counted(task.step, _state_of(task, context)))
    except Unreadable as error:
        return failed(task, error, context)
    except Exception as error:
        wrong = HandlerError(f"step '{task.step.name}': the key of its limit '{limit.name}' failed: {reason_of(error)}")
        return failed(task, wrong, context)
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


async def call_async(task: Task, context: Context) -> Result:
    """Run an ``async def`` step, for as long as its timeout allows, and let what it raises pass."""
    try:
        async with timeout(task.step.timeout_s) as limit:
            returned = await task.step.handler(*_arguments(task, context))
    except TimeoutError as error:
        if limit.expired():
            raise timed_out(task.step.name, task.step.timeout_s) from error
        raise
    return noted(task.envelope, conclude(task, returned), context.notes)


async def run_async(task: Task, context: Context) -> Result:
    """Run an ``async def`` step. What the handler raises is a failed attempt of this step alone."""
    try:
        return await call_async(task, context)
    except FAILURES as error:
        return failed(task, error, context)


def tell(envelope: Envelope, why: str) -> None:
    """Of a step that ends without having run, or not as it seemed to its own code: nobody hears it here."""


def context_of(task: Task, connection: psycopg.Connection[Any] | None = None) -> Context:
    """What a step is told about itself. One for each run."""
    return Context(task.machine, task.envelope, connection, None, task.children)


def conclude(task: Task, returned: Continuation) -> Result:
    """What a continuation hands on. Raises HandlerError for anything else."""
    envelope = task.envelope
    if type(returned) is Goto:
        return _successor(task, returned)
    if type(returned) is Done:
        return _completed(envelope, _encoded(task, returned.output, "result"), returned.memo)
    if type(returned) is Sleep:
        return Later(_successor(task, returned.goto), returned.seconds)
    if isinstance(returned, WAITS):
        return _waiting(task, returned)
    if type(returned) is Fail:
        said = veiled(task.machine, envelope, said_of(envelope, str(returned.reason)), "failed")
        return failure(envelope, said, memo=returned.memo)
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
        return dead(to, returned.reason, said_by(task.machine, to, returned.error))
    again = msgspec.structs.replace(to, seq=to.seq + 1, attempt=2, progress=returned.progress)
    return Later(again, returned.pause_s, brief_of(task.machine, returned.error))


def _completed(envelope: Envelope, output: bytes, memo: bytes) -> Outcome:
    if not envelope.cancelled:
        return Outcome(envelope.workflow_id, "completed", output.decode(), memo.decode())
    said = said_of(envelope, envelope.cancelled) | {"output": msgspec.Raw(output)}
    return Outcome(envelope.workflow_id, "cancelled", encode(said).decode(), memo.decode())


def _waiting(task: Task, returned: Wait | Spawn | Join) -> Waiting | Spawning | Joining:
    envelope = task.envelope
    if isinstance(returned, Wait):
        token_seq = returned.token_seq or token_seq_of(envelope) if returned.requires_token else None
        goto, late = _both(task, returned, has_children=False)
        return Waiting(goto, late, returned.names, returned.timeout_s, token_seq)
    if isinstance(returned, Spawn):
        return Spawning(_successor(task, returned.goto), envelope.seq, returned.children, returned.keeps_group)
    return Joining(
        *_both(task, returned, has_children=True),
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


def _both(task: Task, returned: Wait | Join, *, has_children: bool) -> tuple[Envelope, Envelope]:
    """Where a wait goes on, and where when its time is over: most often the same, which is then made once."""
    goto = _successor(task, returned.goto, has_children=has_children)
    if returned.late is returned.goto:
        return goto, goto
    return goto, _successor(task, returned.late, has_children=has_children)


def failed(task: Task, error: BaseException, context: Context) -> Result:
    """What becomes of a step that raised ``error``: another attempt later, a dead letter, or the workflow's end.

    One that nobody here can read has not run: it waits for a process that can.
    """
    envelope = task.envelope
    policy = envelope.retry or task.step.retry
    spent = envelope.attempt - envelope.granted
    if isinstance(error, Unreadable):
        return _put_off(
            envelope, f"step '{envelope.step}': {error}", limit_s=task.machine.app.settings.unroutable_limit_s
        )
    if isinstance(error, NOT_RETRIED):
        return dead(envelope, "given_up", said_by(task.machine, envelope, error))
    is_given_up = isinstance(error, TerminalError) or not policy.is_retried(error)
    if is_given_up or spent >= policy.attempts:
        if (instead := _after_failure(task, error)) is not None:
            return instead
        said = said_by(task.machine, envelope, error)
        if isinstance(error, TerminalError):
            return failure(envelope, said, memo=task.machine.memo_of(envelope, error))
        return dead(envelope, "given_up" if is_given_up else "attempts", said)
    pause_s = policy.pause_s(spent, chance=random.random())
    again = msgspec.structs.replace(
        without_permit(envelope), seq=envelope.seq + 1, attempt=envelope.attempt + 1, unrouted=0, progress=context.said
    )
    return Later(again, pause_s, brief_of(task.machine, error))


def _after_failure(task: Task, error: BaseException) -> Result | None:
    """What its workflow does about it, if it does anything: lines of a user's, which may fail too; then nothing is done."""
    context = context_of(task)
    try:
        instead = task.machine.after_failure(task, error, context)
        return None if instead is None else noted(task.envelope, conclude(task, instead), context.notes)
    except FAILURES as problem:
        told = (task.envelope.step, short_id(task.envelope.workflow_id), brief_of(task.machine, problem))
        logger.warning("step '%s' of %s… failed, and its workflow could not be told: %s", *told)
        return None


def _successor(task: Task, to: Goto, *, has_children: bool = False) -> Envelope:
    envelope = task.envelope
    if to.step not in task.machine.steps:
        raise HandlerError(f"step '{envelope.step}' went to {to.step!r}, which '{task.machine.name}' does not have")
    return Envelope(
        envelope.workflow_id,
        envelope.seq + 1,
        task.machine.name,
        to.step,
        task.machine.version,
        msgspec.Raw(_encoded(task, to.state, "state")),
        retry=to.retry,
        cancelled=envelope.cancelled,
        has_children=has_children,
    )


def _put_off(envelope: Envelope, what: str, *, limit_s: float) -> Later | DeadLetter:
    """A step that no code here can run waits for a process that can. ``what``: is missing."""
    if waited_s(envelope.unrouted) >= limit_s:
        return dead_letter(envelope, "unroutable", what)
    if envelope.unrouted == 0:
        logger.warning("%s; %s… waits for a process that can run it", what, short_id(envelope.workflow_id))
    pause_s = min(UNROUTED_PAUSE_S_MAX, 2.0 ** min(envelope.unrouted, UNROUTED_DOUBLINGS))
    return Later(msgspec.structs.replace(without_permit(envelope), unrouted=envelope.unrouted + 1), pause_s)


def _unknown(envelope: Envelope, machines: Mapping[str, Machine]) -> str:
    """What this code does not know, and what it has in its place."""
    newest = machines.get(envelope.workflow)
    if newest is None:
        return f"no workflow '{envelope.workflow}' in this app; it has {', '.join(machines) or 'none'}"
    if envelope.version > newest.version:
        return f"workflow '{envelope.workflow}' has come to version {envelope.version}; this code is of version {newest.version}"
    steps = ", ".join(newest.of_version(envelope.version).steps) or "none"
    return f"workflow '{envelope.workflow}' has no step '{envelope.step}' in this code; it has {steps}"


def waited_s(times: int) -> float:
    """How long a step has waited that was put off so many times: 1, 2, 4 … 32 s, then a minute each."""
    return 2.0 ** min(times, UNROUTED_DOUBLINGS) - 1 + UNROUTED_PAUSE_S_MAX * max(0, times - UNROUTED_DOUBLINGS)


def _arguments(task: Task, context: Context) -> tuple[Any, ...]:
    state = _state_of(task, context)
    return (context, state) if task.step.signature.takes_context else (state,)


def _state_of(task: Task, context: Context) -> Any:
    state = task.envelope.state if task.is_plain else context.read().state
    try:
        return task.step.decoder.decode(state)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # older code may have written it
    try:
        return task.machine.app.upcasts.decoded(task.step.decoder, state)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HandlerError(f"the state does not fit step '{task.step.name}': {error}") from error


def _encoded(task: Task, value: object, kind: str) -> bytes:
    try:
        encoded = encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise HandlerError(f"step '{task.step.name}' handed on what is not JSON: {error}") from error
    payloads = task.machine.app.payloads
    if payloads.codec is not None:
        encoded = payloads.coded(encoded, Where(task.envelope.workflow, kind, task.envelope.workflow_id))
    limit = task.machine.state_bytes_max if kind == "state" else payloads.bytes_max
    if len(encoded) > limit:
        many = f"{len(encoded):,} bytes{payloads.when_coded}"
        raise HandlerError(f"step '{task.step.name}' handed on {many}, the limit is {limit:,}")
    return encoded
