"""What a linear workflow has behind it: the results of its awaits, in the order in which they came, as its step events carry them.

An entry names its await by a key: the position (the branch of the code, and a count within it) and the name of what was asked.

What is large, or old, stands in the database (``durable.spill``): a chain of chunks, of which the step events carry the name of the
last. ``recorded`` makes them; their bytes go out and come in through ``chunks``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from durable_cluster.envelope import encode

CANCEL_KEY = "cancel"
"""In place of a key: from here on the workflow cleans up."""
BELOW = "~"
"""What follows the position of a loop or a scope in the positions of the awaits in it."""
NOTHING = msgspec.Raw(b"")
NO_ENTRIES = msgspec.Raw(b"[]")


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


class Chain(msgspec.Struct, frozen=True, array_like=True):
    """What of a memo stands in the database: ``ref`` names the last of so many chunks, which have ``size`` bytes in all."""

    ref: int
    chunks: int
    size: int


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
        "chain": "c",
        "forgotten": "f",
        "is_forked": "o",
    },
):
    """The state of a linear workflow's step events.

    ``entries``: a JSON array of ``Entry``; ``instants``: what was recorded without a step, by key; ``patches``: the changes that
    this run has taken; ``spawned``: how many children were started; ``tokens``: how many waits with a token have begun;
    ``run``: how often it was continued as new. ``is_forked``: a fork or a replay begins: of the instants only those count that
    the entries lead to. ``chain``: what was recorded before these entries, and the input, if there is none here; ``forgotten``:
    positions of which nothing in the chain counts any more.
    """

    input: msgspec.Raw = NOTHING
    entries: msgspec.Raw = NO_ENTRIES
    asked: Asked | None = None
    instants: dict[str, msgspec.Raw] = {}
    patches: list[str] = []
    spawned: int = 0
    tokens: int = 0
    run: int = 0
    is_forked: bool = False
    chain: Chain | None = None
    forgotten: list[str] = []


class Chunk(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={"before": "b", "input": "i", "entries": "m", "instants": "r", "forgotten": "f"},
):
    """A part of a memo that stands in the database. ``before``: the ref of the chunk before it, 0: it is the first."""

    before: int
    input: msgspec.Raw = NOTHING
    entries: msgspec.Raw = NO_ENTRIES
    instants: dict[str, msgspec.Raw] = {}
    forgotten: list[str] = []


class Stored(msgspec.Struct, frozen=True):
    """A chunk as it was read. ``size``: bytes."""

    ref: int
    size: int
    chunk: Chunk


class Spilled(msgspec.Struct, frozen=True, gc=False):
    """A row of ``durable.spill``: what the workflow's memo has as its chunk of this number, from 0; later ones count no more.

    ``text``: the chunk; empty: the memo has none of this number any more.
    """

    workflow_id: str
    number: int
    ref: int = 0
    text: str = ""


def rows_of(spilled: Iterable[Spilled]) -> str | None:
    """What ``durable.put_chunks`` takes; None for nothing."""
    return "\n".join([f"{row.workflow_id}{row.number:08x}{row.ref:016x}{row.text}" for row in spilled]) or None


class Part(msgspec.Struct, frozen=True):
    """What still counts of a chunk, or of what the step event carries: each entry with the bytes it was read from."""

    entries: list[tuple[Entry, bytes]]
    instants: dict[str, msgspec.Raw]


_entry = msgspec.json.Decoder(Entry)
_entries = msgspec.json.Decoder(list[Entry])
_raw_entries = msgspec.json.Decoder(list[msgspec.Raw])
carried_decoder = msgspec.json.Decoder(Carried)


def is_below(key: str, positions: set[str]) -> bool:
    """Whether an await belongs to one of these positions, which end with the sign of a loop or a scope."""
    at = key.find(BELOW) if positions else -1
    while at >= 0:
        if key[: at + 1] in positions:
            return True
        at = key.find(BELOW, at + 1)
    return False


def decoded_entry(encoded: bytes) -> Entry:
    """One entry."""
    return _entry.decode(encoded)


def decoded_entries(entries: msgspec.Raw) -> list[tuple[Entry, bytes]]:
    """Each with the bytes it was read from."""
    return list(zip(_entries.decode(entries), map(bytes, _raw_entries.decode(entries)), strict=True))


def encoded_entries(entries: Iterable[bytes]) -> msgspec.Raw:
    """What ``decoded_entries`` reads."""
    return msgspec.Raw(b"[" + b",".join(entries) + b"]")


def with_entries(carried: Carried, more: Iterable[bytes]) -> Carried:
    """The same with these entries too, and nothing asked for."""
    known = bytes(carried.entries)[1:-1]
    entries = encoded_entries([*([known] if known else []), *more])
    return msgspec.structs.replace(carried, entries=entries, asked=None)


def completed(key: str, value: bytes) -> bytes:
    """The entry of an await that came to ``value`` (JSON)."""
    return b'["%b",%b]' % (key.encode(), value)


def failed(key: str, failure: Failure) -> bytes:
    """The entry of a step that failed for good."""
    return encode(Entry(key, msgspec.Raw(b"null"), failure))


def cancelled(reason: str) -> bytes:
    """The entry of a cancel."""
    return encode(Entry(CANCEL_KEY, msgspec.Raw(encode(reason))))


def told(key: str) -> str:
    """A key for people."""
    position, _, name = key.partition(" ")
    return f"'{name}'" + (f" at {place(position)}" if position else "")


def place(position: str) -> str:
    """A position for people."""
    branch, _, count = position.rpartition(".")
    return f"await {count}" + (f" of branch {branch}" if branch else "")
