"""Payloads on their way into the database and out of it: what the codec of an App makes of them.

A coded value is ``{"$codec":"…"}``, in base64, and so tells itself apart: what was written without a codec, or by SQL, is read as
it is. Whatever the database holds of a user's values has come through ``Payloads``; what it is found and routed by has not.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from msgspec import structs

from durable_cluster.envelope import CODED_KEY, Envelope, encode, encode_part
from durable_cluster.errors import AppError, CodecError, InputError, Unreadable
from durable_cluster.joins import ChildResult

BEGINS = b'{"%b":' % CODED_KEY.encode()
TEXTS = "texts"


class Where(msgspec.Struct, frozen=True):
    """Which value it is. ``kind``: input, state, memo, result, signal, progress, heartbeat or failure.

    ``workflow_id``: whole, a capability; of an input nothing: it is coded before there is an id.
    """

    workflow: str
    kind: str
    workflow_id: str = ""

    def __repr__(self) -> str:
        return f"the {self.kind} of workflow '{self.workflow}'"

    @property
    def bound(self) -> bytes:
        """What to bind a ciphertext to, as its associated data."""
        return f"{self.workflow}\n{self.kind}\n{self.workflow_id}".encode()


class Codec(Protocol):
    """Turns payloads (one line of JSON in UTF-8) into other bytes, and back into the same.

    Called by several threads at once. Whatever it raises becomes a CodecError; the text of a CodecError of its own is shown to
    people and logged, that of other exceptions is not.
    """

    def encode(self, payload: bytes, where: Where, /) -> bytes:
        """What the database gets."""
        ...

    def decode(self, coded: bytes, where: Where, /) -> bytes:
        """The payload that ``encode`` was given."""
        ...


class _Coded(msgspec.Struct, frozen=True, rename={"made": CODED_KEY}):
    """What a codec has made; JSON has it in base64."""

    made: bytes


_coded = msgspec.json.Decoder(_Coded)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
QUOTES = 4
"""Of a coded value that has nothing beside it."""


class Payloads:
    """The values of one App, as its database holds them. ``bytes_max``: what one may have there."""

    def __init__(self, codec: Codec | None, *, bytes_max: int) -> None:
        for name in ("encode", "decode"):
            if codec is not None and not callable(getattr(codec, name, None)):
                raise AppError(f"codec: a {type(codec).__name__} has no {name}(bytes, where) that returns bytes")
        self.codec = codec
        self.bytes_max = bytes_max

    def coded(self, payload: bytes, where: Where) -> bytes:
        """What the database gets of ``payload`` (JSON). Raises CodecError."""
        if self.codec is None:
            return payload
        try:
            return encode_part(_Coded(_bytes(self.codec.encode(payload, where))))
        except Exception as error:
            raise CodecError(f"{where} cannot be coded by {self._told(error)}") from error

    def plain(self, payload: bytes | msgspec.Raw, where: Where) -> bytes:
        """What ``coded`` was given; what nobody has coded is given back. Raises CodecError."""
        payload = bytes(payload)
        if not payload.startswith(BEGINS):
            return payload
        if self.codec is None:
            raise CodecError(f"{where} is coded, and this program's App has no codec: give it the one that wrote it")
        try:
            plain = _bytes(self.codec.decode(_coded.decode(payload).made, where))
            return plain if payload.count(b'"') == QUOTES else _with_the_rest(plain, payload)
        except Exception as error:
            raise CodecError(f"{where} cannot be read by {self._told(error)}") from error

    def _told(self, error: Exception) -> str:
        """Who could not, and why: but for what says so on purpose only the class, as others quote values."""
        said = str(error) if isinstance(error, CodecError) else type(error).__name__
        return f"codec {type(self.codec).__name__}: {said}"

    def fitting(self, payload: bytes, where: Where, what: str) -> str:
        """As ``coded``, unless that is too large. Raises CodecError, and InputError naming ``what``."""
        coded = self.coded(payload, where)
        if len(coded) > self.bytes_max:
            raise InputError(
                f"{what} has {len(coded):,} bytes{self.when_coded}, the limit is {self.bytes_max:,};"
                " store it elsewhere and pass a reference"
            )
        return coded.decode()

    @property
    def when_coded(self) -> str:
        """What a size has to add."""
        return "" if self.codec is None else " when coded"

    def value(self, value: Any, where: Where) -> Any:
        """What the database holds, read from JSON or still to be (``Raw``), as plain JSON values. Raises CodecError."""
        if isinstance(value, msgspec.Raw) or is_coded(value):
            return msgspec.json.decode(self.plain(encode_part(value), where))
        return value

    def event(self, envelope: Envelope) -> Envelope:
        """A step event with its state and its signal in plain; the same where neither is coded. Raises Unreadable."""
        state = bytes(envelope.state)
        if not state.startswith(BEGINS) and not envelope.event:
            return envelope
        try:
            state = self.plain(state, state_of(envelope.workflow, envelope.workflow_id, envelope.seq, envelope.attempt))
            return structs.replace(envelope, state=msgspec.Raw(state), event=self._signal(envelope))
        except CodecError as error:
            raise Unreadable(str(error)) from error

    def _signal(self, envelope: Envelope) -> msgspec.Raw:
        if BEGINS not in bytes(envelope.event):
            return envelope.event
        signal = _fields.decode(envelope.event)
        payload = self.plain(signal["payload"], Where(envelope.workflow, "signal", envelope.workflow_id))
        return msgspec.Raw(encode_part(signal | {"payload": msgspec.Raw(payload)}))

    def veiled(self, said: dict[str, Any], brief: str, where: Where) -> dict[str, Any]:
        """What is said of a failure, with its texts coded, as they quote values; of them ``brief`` stays readable."""
        if self.codec is None:
            return said
        texts = {key: said[key] for key in ("reason", "traceback") if key in said}
        rest = {key: value for key, value in said.items() if key not in texts}
        try:
            coded = msgspec.Raw(self.coded(encode(texts), where))
        except CodecError as error:
            return rest | {"reason": f"{brief}; {error}"}
        return rest | {"reason": f"{brief} (what it says is coded)", TEXTS: coded}

    def unveiled(self, said: Any, where: Where) -> Any:
        """The same with its texts, where they can be read here; else as it is."""
        if not isinstance(said, dict) or not is_coded(said.get(TEXTS)):
            return said
        try:
            texts = self.value(said[TEXTS], where)
        except CodecError:
            return said
        return {key: value for key, value in said.items() if key != TEXTS} | texts

    def ended(self, workflow: str, workflow_id: str, status: str, said: Any) -> Any:
        """What a workflow has come to (its output, or what is said of its failure). Raises CodecError for an output."""
        if status == "completed":
            return self.value(said, Where(workflow, "result", workflow_id))
        return self.unveiled(said, Where(workflow, "failure", workflow_id))

    def child(self, child: ChildResult) -> ChildResult:
        """A child with what it has come to. Raises CodecError."""
        output = self.ended(child.workflow, child.id, child.status, child.output)
        return child if output is child.output else structs.replace(child, output=output)


def _bytes(made: Any) -> bytes:
    if not isinstance(made, bytes):
        raise CodecError(f"it returned {type(made).__name__}, and not bytes")
    return made


def _with_the_rest(plain: bytes, payload: bytes) -> bytes:
    """With what the database has put beside the coded value: the due time of a schedule."""
    rest = _fields.decode(payload)
    del rest[CODED_KEY]
    return encode(_fields.decode(plain) | rest)


def is_coded(value: Any) -> bool:
    """Whether this value, read from JSON or still to be (``Raw``), is a coded one."""
    if isinstance(value, msgspec.Raw):
        return bytes(value).startswith(BEGINS)
    return isinstance(value, dict) and next(iter(value), None) == CODED_KEY


def state_of(workflow: str, workflow_id: str, seq: int, attempt: int) -> Where:
    """A step's state; that of the first step is the input, at each of its attempts."""
    return Where(workflow, "input") if seq == attempt else Where(workflow, "state", workflow_id)
