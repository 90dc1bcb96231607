"""What a step says beside its result: attributes that its workflow is found by, and progress for whoever looks on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from durable_cluster.codec import Payloads, Where
from durable_cluster.envelope import NOT_AN_ENVELOPE, Envelope, encode
from durable_cluster.errors import InputError
from durable_cluster.memo import Spilled

if TYPE_CHECKING:
    from durable_cluster.executor import Result

ATTRIBUTES_MAX = 32
ATTRIBUTES_BYTES_MAX = 4_096
PROGRESS_BYTES_MAX = 8_192
ATTRIBUTE_KEY = re.compile("[a-zA-Z0-9_.-]{1,57}")
NOT_OF_TEXT = re.compile("[\x00\ud800-\udfff]")
NUMBER_MAX = 1e300

SETTING = "@attributes"
"""What the line of a client's change has in place of a workflow's name, which cannot begin with this character."""

Scalar = str | int | float | bool | None
Attributes = Mapping[str, Scalar]


class Notes(msgspec.Struct):
    """What a step has said so far. ``progress``: JSON. ``spilled``: what its workflow has recorded and does not carry any more."""

    attributes: dict[str, Scalar] | None = None
    progress: msgspec.Raw | None = None
    spilled: Sequence[Spilled] = ()


def noted_too(notes: Notes | None, more: Notes | None) -> Notes | None:
    """Both; the later word counts."""
    if notes is None or more is None:
        return notes or more
    attributes = {**(notes.attributes or {}), **(more.attributes or {})} or None
    return Notes(attributes, more.progress or notes.progress, [*notes.spilled, *more.spilled])


class Noted(msgspec.Struct, frozen=True, gc=False):
    """The result of a step that said something besides. ``envelope``: its own."""

    envelope: Envelope
    result: Result
    notes: Notes

    @property
    def attributes(self) -> Attributes | None:
        """What it changes."""
        return self.notes.attributes

    @property
    def children(self) -> Sequence[Any]:
        """The children that its step spawns."""
        return getattr(self.result, "children", ())


def noted(envelope: Envelope, result: Result, notes: Notes | None) -> Result:
    """A step's result, with what it said besides, if it did."""
    return result if notes is None else Noted(envelope, result, notes)


class Setting(msgspec.Struct, frozen=True):
    """Attributes that a client sets, on their way. ``attributes``: their values as JSON."""

    envelope: Envelope
    attributes: Mapping[str, msgspec.Raw]


_values = msgspec.json.Decoder(dict[str, Scalar])
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


def setting_of(envelope: Envelope) -> Setting | None:
    """What a line carries; None for one that ``durable.set_attributes`` did not write."""
    try:
        checked_attributes(_values.decode(envelope.state))
        return Setting(envelope, _raw.decode(envelope.state))
    except (*NOT_AN_ENVELOPE, InputError):
        return None


def checked_attributes(attributes: Attributes) -> dict[str, Scalar]:
    """``attributes`` if a workflow can have them; None takes one away. Raises InputError."""
    if not isinstance(attributes, Mapping):
        raise InputError(f"attributes are a mapping of names to values, not {type(attributes).__name__}")
    if len(attributes) > ATTRIBUTES_MAX:
        raise InputError(f"{len(attributes)} attributes are too many; a workflow has {ATTRIBUTES_MAX} at most")
    for key, value in attributes.items():
        if not isinstance(key, str) or not ATTRIBUTE_KEY.fullmatch(key):
            raise InputError(f"attribute {str(key)[:80]!r}: a name is of [a-zA-Z0-9_.-], 1 to 57 characters")
        if not _is_scalar(value):
            raise InputError(
                f"attribute '{key}': {str(value)[:40]!r} is no text, number, boolean or None that a database can hold"
            )
    size = len(encode(dict(attributes)))
    if size > ATTRIBUTES_BYTES_MAX:
        raise InputError(f"the attributes have {size:,} bytes, the limit is {ATTRIBUTES_BYTES_MAX:,}")
    return dict(attributes)


def encoded_attributes(attributes: Attributes) -> str:
    """``attributes`` as JSON. Raises InputError."""
    return encode(checked_attributes(attributes)).decode()


def encoded_each(attributes: Attributes | Sequence[Attributes | None], count: int) -> list[str]:
    """As JSON: those of each of so many workflows, or one for all. Raises InputError."""
    if isinstance(attributes, Mapping):
        return [encoded_attributes(attributes)]
    if len(attributes) != count:
        raise InputError(f"{len(attributes)} attributes for {count} values; give a mapping a piece, or one for all")
    return [encoded_attributes(of or {}) for of in attributes]


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return not NOT_OF_TEXT.search(value)
    return value is None or (isinstance(value, int | float) and abs(value) < NUMBER_MAX)


def checked_progress(progress: Any, payloads: Payloads, where: Where, *, step: str) -> msgspec.Raw:
    """``progress`` as the database gets it, if it is small enough to be published. Raises InputError, CodecError."""
    try:
        encoded = payloads.coded(encode(progress), where)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the progress that step '{step}' publishes is not JSON: {error}") from error
    if len(encoded) > PROGRESS_BYTES_MAX:
        raise InputError(
            f"the progress that step '{step}' publishes has {len(encoded):,} bytes{payloads.when_coded},"
            f" the limit is {PROGRESS_BYTES_MAX:,}"
        )
    return msgspec.Raw(encoded)
