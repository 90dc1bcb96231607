"""Signals and cancels: what a step is told of one, what waits, and the line of the log that carries one to its workflow."""

from __future__ import annotations

import re
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, TypeVar

import msgspec

from durable_cluster.decoding import decoder_of, sentence
from durable_cluster.envelope import NOT_AN_ENVELOPE, SEQ_MAX, Envelope, encode
from durable_cluster.errors import InputError
from durable_cluster.settings import NAME_PATTERN
from durable_cluster.upcasts import Upcasts

SIGNAL = "@signal"
CANCEL = "@cancel"
"""What the lines of signals and cancels have in place of a workflow's name, which cannot begin with this character."""
TOKEN_DIGITS = 32
NOT_OF_A_LINE = re.compile(r"[\x00-\x1f\x7f]")

T = TypeVar("T")


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """A signal that a workflow got. ``payload``: plain JSON values; ``actor``: who sent it, as the sender says; ``at``: when."""

    name: str
    payload: Any = None
    actor: str | None = None
    at: datetime

    def __repr__(self) -> str:
        return f"<Signal '{self.name}' of {self.at:%Y-%m-%d %H:%M:%S}>"

    def payload_as(self, type_: type[T], upcasts: Upcasts | None = None) -> T:
        """The payload as ``type_``; ``upcasts``: of the app. Raises InputError naming the path of what does not fit."""
        encoded, decoder = encode(self.payload), decoder_of(type_, f"the type of signal '{self.name}'")
        try:
            typed: T = decoder.decode(encoded) if upcasts is None else upcasts.decoded(decoder, encoded)
        except msgspec.ValidationError as error:
            raise InputError(f"the payload of signal '{self.name}' does not fit: {sentence(error, encoded)}") from error
        return typed


class Waiting(msgspec.Struct, frozen=True):
    """A workflow that waits for a signal of one of ``names``. ``envelope``: its step then; ``late``: its step after ``timeout_s``.

    ``token_seq``: which token the signal must bring; None: none.
    """

    envelope: Envelope
    late: Envelope
    names: tuple[str, ...]
    timeout_s: float | None
    token_seq: int | None


class Delivery(msgspec.Struct, frozen=True):
    """A signal on its way. ``envelope``: its line; ``event``: what the step is told, as JSON."""

    envelope: Envelope
    event: str
    key: str
    token_seq: int | None


class Cancel(msgspec.Struct, frozen=True):
    """A cancel on its way. ``envelope``: its line; ``actor``: who cancels, or nothing; ``cascades``: to the children too."""

    envelope: Envelope
    reason: str
    actor: str
    cascades: bool = True


class _Reason(msgspec.Struct, frozen=True):
    reason: Annotated[str, msgspec.Meta(min_length=1)]
    actor: str | None = None
    cascade: bool = True


class _Sent(msgspec.Struct, frozen=True):
    event: msgspec.Raw
    key: str | None = None
    token: Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)] | None = None


_sent = msgspec.json.Decoder(_Sent)
_reason = msgspec.json.Decoder(_Reason)
_signal = msgspec.json.Decoder(Signal)


def message_of(envelope: Envelope) -> Delivery | Cancel | None:
    """What a line carries to its workflow; None for a line that neither ``durable.signal`` nor ``durable.cancel`` wrote."""
    return _cancel_of(envelope) if envelope.workflow == CANCEL else _delivery_of(envelope)


def _cancel_of(envelope: Envelope) -> Cancel | None:
    try:
        sent = _reason.decode(envelope.state)
    except NOT_AN_ENVELOPE:
        return None
    actor = sent.actor or ""
    return None if NOT_OF_A_LINE.search(sent.reason + actor) else Cancel(envelope, sent.reason, actor, sent.cascade)


def _delivery_of(envelope: Envelope) -> Delivery | None:
    try:
        sent = _sent.decode(envelope.state)
        signal = _signal.decode(sent.event)
    except NOT_AN_ENVELOPE:
        return None
    key = sent.key or ""
    if signal.name != envelope.step or not re.fullmatch(NAME_PATTERN, signal.name) or NOT_OF_A_LINE.search(key):
        return None
    return Delivery(envelope, bytes(sent.event).decode(), key, sent.token)


def signal_of(envelope: Envelope) -> Signal | None:
    """The signal that a step was resumed with, if it was."""
    return _signal.decode(envelope.event) if envelope.event else None


def token_seq_of(envelope: Envelope) -> int:
    """The number of the token of this step's wait: that of its first attempt, so that all attempts have one token."""
    return envelope.seq - envelope.attempt + 1


def token(workflow_id: str, seq: int, secret: bytes) -> str:
    """The token of a wait, as ``durable.token_of`` makes it."""
    inner = sha256(secret + f"{workflow_id}:{seq}".encode()).digest()
    return f"{seq}-{sha256(secret + inner).hexdigest()[:TOKEN_DIGITS]}"
