"""What a linear workflow has behind it: the results of its awaits, in the order in which they came, as its step events carry them.

An entry names its await by a key: the position (the branch of the code, and a count within it) and the name of what was asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from durable_cluster.envelope import encode

CANCEL_KEY = "cancel"
"""In place of a key: from here on the workflow cleans up."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A step that failed for good. ``kind``: the full name of the exception's class; ``args``: of it, as far as they are JSON."""

    kind: str
    message: str
    args: tuple[Any, ...] = ()


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What an await came to: ``value`` (JSON), or a failure."""

    key: str
    value: msgspec.Raw
    failure: Failure | None = None


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """The await that the next step event answers. ``args``: of a step, JSON; of others nothing."""

    key: str
    args: msgspec.Raw = msgspec.Raw(b"[]")


class Carried(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={
        "input": "i",
        "entries": "m",
        "asked": "a",
        "instants": "r",
        "patches": "p",
        "spawned": "k",
        "tokens": "t",
        "run": "n",
        "is_forked": "o",
    },
):
    """The state of a linear workflow's step events.

    ``entries``: a JSON array of ``Entry``; ``instants``: what was recorded without a step, by key; ``patches``: the changes that
    this run has taken; ``spawned``: how many children were started; ``tokens``: how many waits with a token have begun;
    ``run``: how often it was continued as new. ``is_forked``: a fork or a replay begins: of the instants only those count that
    the entries lead to.
    """

    input: msgspec.Raw
    entries: msgspec.Raw = msgspec.Raw(b"[]")
    asked: Asked | None = None
    instants: dict[str, msgspec.Raw] = {}
    patches: list[str] = []
    spawned: int = 0
    tokens: int = 0
    run: int = 0
    is_forked: bool = False


_entry = msgspec.json.Decoder(Entry)
_entries = msgspec.json.Decoder(list[Entry])
_raw_entries = msgspec.json.Decoder(list[msgspec.Raw])
carried_decoder = msgspec.json.Decoder(Carried)


def decoded_entry(encoded: bytes) -> Entry:
    """One entry."""
    return _entry.decode(encoded)


def decoded_entries(entries: msgspec.Raw) -> list[tuple[Entry, bytes]]:
    """Each with the bytes it was read from."""
    return list(zip(_entries.decode(entries), map(bytes, _raw_entries.decode(entries)), strict=True))


def with_entries(carried: Carried, more: Iterable[bytes]) -> Carried:
    """The same with these entries too, and nothing asked for."""
    known = bytes(carried.entries)[1:-1]
    entries = b"[" + b",".join([*([known] if known else []), *more]) + b"]"
    return msgspec.structs.replace(carried, entries=msgspec.Raw(entries), asked=None)


def completed(key: str, value: bytes) -> bytes:
    """The entry of an await that came to ``value`` (JSON)."""
    return b'["%b",%b]' % (key.encode(), value)


def failed(key: str, failure: Failure) -> bytes:
    """The entry of a step that failed for good."""
    return encode(Entry(key, msgspec.Raw(b"null"), failure))


def cancelled(reason: str) -> bytes:
    """The entry of a cancel."""
    return encode(Entry(CANCEL_KEY, msgspec.Raw(encode(reason))))


def failed_at(state: msgspec.Raw, failure: Failure) -> bytes:
    """What was carried, and the await that it was the answer of as failed."""
    try:
        carried = carried_decoder.decode(state)
    except msgspec.DecodeError:
        return b""  # somebody put the line into the log by hand
    if carried.asked is None:
        return bytes(state)
    return encode(with_entries(carried, [failed(carried.asked.key, failure)]))


def told(key: str) -> str:
    """A key for people."""
    position, _, name = key.partition(" ")
    return f"'{name}'" + (f" at {place(position)}" if position else "")


def place(position: str) -> str:
    """A position for people."""
    branch, _, count = position.rpartition(".")
    return f"await {count}" + (f" of branch {branch}" if branch else "")
