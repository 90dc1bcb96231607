"""What is said of a step that cannot go on, and the dead letter or the end of its workflow that it becomes."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from durable_cluster.codec import Where
from durable_cluster.context import short_id
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import DurableError
from durable_cluster.limits import without_permit
from durable_cluster.statements import Outcome

if TYPE_CHECKING:
    from durable_cluster.machine import Machine

TRACEBACK_CHARS_MAX = 4_000
REASON_CHARS_MAX = 1_000


class DeadLetter(msgspec.Struct, frozen=True):
    """A step that cannot go on. ``reason``: see ``durable.bury``; ``details``: what a failed workflow says too."""

    envelope: Envelope
    reason: str
    details: dict[str, Any]


def dead(envelope: Envelope, kind: str, said: dict[str, Any]) -> DeadLetter:
    """A step that is set aside until somebody takes it up again."""
    return DeadLetter(without_permit(envelope), kind, said)


def dead_letter(envelope: Envelope, kind: str, reason: str) -> DeadLetter:
    """The same. ``reason``: words of ours, which quote no values."""
    return dead(envelope, kind, said_of(envelope, reason))


def crashed(envelope: Envelope, times: int, what: str = "the process died") -> DeadLetter:
    """A step that was running alone so many times when its process died, or what else happened."""
    reason = f"{what} {times} times while step '{envelope.step}' ran alone; see the cluster's log for how"
    return dead_letter(envelope, "crashes", reason)


def failure(envelope: Envelope, said: dict[str, Any], *, memo: bytes = b"") -> Outcome:
    """The terminal record of a failed workflow."""
    return Outcome(envelope.workflow_id, "failed", encode(said).decode(), memo.decode())


def said_of(envelope: Envelope, reason: str, trace: str | None = None) -> dict[str, Any]:
    """The details of a failure, for everybody to read."""
    said: dict[str, Any] = {
        "reason": clean(without_id(reason, envelope)[:REASON_CHARS_MAX]),
        "step": envelope.step,
        "seq": envelope.seq,
        "attempt": envelope.attempt,
    }
    if trace is not None:
        said["traceback"] = clean(without_id(trace, envelope))
    return said


def said_by(machine: Machine, envelope: Envelope, error: BaseException) -> dict[str, Any]:
    """The details of what a step raised, as the database gets them."""
    return veiled(machine, envelope, said_of(envelope, reason_of(error), _trace(error)), type(error).__name__)


def veiled(machine: Machine, envelope: Envelope, said: dict[str, Any], brief: str) -> dict[str, Any]:
    """Details whose texts are a user's, as the database gets them: see ``Payloads.veiled``."""
    where = Where(envelope.workflow, "failure", envelope.workflow_id)
    return machine.app.payloads.veiled(said, brief, where)


def reason_of(error: BaseException) -> str:
    """What it says, and its class if it is not one of ours."""
    if isinstance(error, DurableError):
        return _said(error)
    return f"{type(error).__name__}: {_said(error)}"


def brief_of(machine: Machine, error: BaseException) -> str:
    """What logs and traces may say of it: where values are coded, its class alone."""
    return reason_of(error) if machine.app.payloads.codec is None else type(error).__name__


def without_id(text: str, envelope: Envelope) -> str:
    """A text for everybody, which may be a user's: the id of his workflow, a capability, is truncated in it."""
    whole = envelope.workflow_id
    if not envelope.is_of_a_workflow:
        return text
    short = f"{short_id(whole)}…"
    return text.replace(whole, short).replace(str(UUID(whole)), short)


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACEBACK_CHARS_MAX:]


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(it cannot be printed)"


def clean(text: str) -> str:
    """``text`` without what neither JSON nor Postgres can hold."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
