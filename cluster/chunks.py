"""The chunks of one workflow's memo on their way into the database and out of it: what ``memo`` calls a chain, as rows of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from durable_cluster import side_statements
from durable_cluster.codec import Where
from durable_cluster.envelope import encode
from durable_cluster.errors import CodecError, HandlerError, Unreadable
from durable_cluster.memo import (
    NOTHING,
    Carried,
    Chain,
    Chunk,
    Entry,
    Part,
    Stored,
    decoded_entries,
    encoded_entries,
    is_below,
)

if TYPE_CHECKING:
    from durable_cluster.app import App

_chunk = msgspec.json.Decoder(Chunk)


class Chunks:
    """Those of one workflow, coded by the codec of its App, if that has one."""

    def __init__(self, app: App, workflow: str, workflow_id: str) -> None:
        self.app = app
        self.workflow = workflow
        self.workflow_id = workflow_id

    @property
    def _where(self) -> Where:
        return Where(self.workflow, "memo", self.workflow_id)

    def spilled(self, chunk: Chunk) -> str:
        """A chunk as it goes into the database. Raises TypeError, ValueError, RecursionError, CodecError."""
        return self.app.payloads.coded(encode(chunk), self._where).decode()

    def unspilled(self, text: str) -> Chunk:
        """A chunk that comes from there. Raises Unreadable."""
        try:
            return _chunk.decode(self.app.payloads.plain(text.encode(), self._where))
        except CodecError as error:
            raise Unreadable(str(error)) from error

    def read(self, ref: int) -> list[tuple[int, str]]:
        """Ref and text of the chunks up to this one, in order. A statement of the client's, outside of all transactions."""
        return side_statements.chunks_of(self.app.client.connection(), self.workflow_id, ref)

    def of(self, chain: Chain | None) -> list[Stored]:
        """The chunks of a chain, in order. Raises HandlerError if they are not there (any more), Unreadable."""
        if chain is None:
            return []
        found: list[Stored] = []
        for _ in range(2):  # what a rotation has just moved, a statement whose snapshot is older does not see
            rows = self.read(chain.ref)
            found = [Stored(ref, len(text.encode()), self.unspilled(text)) for ref, text in rows]
            refs = [0, *(one.ref for one in found)]
            if [one.chunk.before for one in found] == refs[:-1] and (refs[-1], len(found)) == (chain.ref, chain.chunks):
                return found
        raise HandlerError(
            f"what this state says is recorded is not there: of {chain.chunks} chunks {len(found)} were found; it is not the"
            " workflow's newest state, or rows of durable.spill were removed"
        )

    def whole(self, carried: Carried) -> Carried:
        """The same with all that is recorded in it, and no chain: however many bytes that are. Raises HandlerError, Unreadable."""
        if carried.chain is None:
            return carried
        chunks = [one.chunk for one in self.of(carried.chain)]
        parts = parts_of(carried, chunks)
        instants: dict[str, msgspec.Raw] = {}
        for part in parts:
            instants |= part.instants
        return structs.replace(
            carried,
            input=input_of(carried, chunks),
            entries=encoded_entries([encoded for part in parts for _, encoded in part.entries]),
            instants=instants,
            chain=None,
            forgotten=[],
        )

    def all_entries(self, carried: Carried) -> list[tuple[Entry, bytes]]:
        """What a workflow has recorded of its awaits, in order, each with its bytes. Raises HandlerError, Unreadable."""
        return decoded_entries(self.whole(carried).entries)


def parts_of(carried: Carried, chunks: Sequence[Chunk]) -> list[Part]:
    """What counts of each chunk, and last of what is carried."""
    below: set[str] = set()
    newer: set[str] = set()
    parts: list[Part] = []
    of: list[Carried | Chunk] = [*chunks, carried]
    for one in reversed(of):
        entries = [pair for pair in decoded_entries(one.entries) if not is_below(pair[0].key, below)]
        instants = {key: value for key, value in one.instants.items() if key not in newer and not is_below(key, below)}
        parts.append(Part(entries, instants))
        newer.update(instants)
        below.update(one.forgotten)
    return parts[::-1]


def input_of(carried: Carried, chunks: Sequence[Chunk]) -> msgspec.Raw:
    """The function's input: it is carried, or stands in one of the chunks."""
    return next((of for of in (carried.input, *(chunk.input for chunk in chunks)) if bytes(of)), NOTHING)
