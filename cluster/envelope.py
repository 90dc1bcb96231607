"""One JSON line of the log, one page of them, and the only codec.

An envelope carries a step event: which workflow (its whole id: the log is as secret as the table of ids), its step number, the
step to run and the state it runs with. Fields this version does not know are tolerated.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Envelope(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={"workflow_id": "w", "seq": "n", "workflow": "f", "step": "s", "version": "v", "attempt": "a", "state": "d"},
):
    """A step event. ``workflow_id``: 32 hex digits; ``seq``: counts the workflow's steps from 1; ``state``: JSON, undecoded."""

    workflow_id: str
    seq: int
    workflow: str
    step: str
    version: int
    state: msgspec.Raw
    attempt: int = 1


class Header(msgspec.Struct, frozen=True):
    """The first line of a page's text: see ``durable.page``."""

    batch: int
    takeovers: int
    done: tuple[str, int, int]
    last: bool
    events: list[tuple[str, int, int]]


class Page(msgspec.Struct, frozen=True):
    """Lines of one window from its cursor on. ``lines`` holds no line that is done; a line that is no envelope is ``None``."""

    header: Header
    lines: list[Envelope | None]

    def cursor(self, lines_done: int) -> str:
        """The window's cursor, in Postgres' form, after the first ``lines_done`` lines of this page."""
        txid, event_id, line = self.header.done
        if not lines_done:
            return f"({txid},{event_id},{line})"
        left = lines_done + line
        for txid, event_id, lines in self.header.events:
            if left < lines:
                return f"({txid},{event_id},{left})"
            left -= lines
        return f"({txid},{event_id + 1},0)"


_header = msgspec.json.Decoder(Header)
_envelope = msgspec.json.Decoder(Envelope)
_encoder = msgspec.json.Encoder()


def encode(value: object) -> bytes:
    """``value`` as one line of JSON. Raises TypeError for what JSON cannot hold."""
    return _encoder.encode(value)


def decode_page(text: str) -> Page:
    """A page from the text of ``durable.claim`` or ``durable.page``."""
    head, _, body = text.partition("\n")
    header = _header.decode(head)
    try:
        lines: list[Envelope | None] = list(_envelope.decode_lines(body))
    except msgspec.DecodeError:
        lines = [_decoded(line) for line in body.split("\n")]
    return Page(header, lines[header.done[2] :] if header.done[2] else lines)


def _decoded(line: str) -> Envelope | None:
    try:
        return _envelope.decode(line)
    except msgspec.DecodeError:
        return None


def encode_chunks(envelopes: Iterable[Envelope], *, bytes_max: int) -> tuple[str, list[int]]:
    """Log entries for a page's successors: their lines, a form feed between entries, and how many lines each entry has.

    No entry has more than ``bytes_max`` bytes, unless one line has.
    """
    lines = [_encoder.encode(envelope) for envelope in envelopes]
    if sum(map(len, lines)) <= bytes_max:
        return b"\n".join(lines).decode(), [len(lines)] if lines else []
    chunks: list[list[bytes]] = [[]]
    size = 0
    for line in lines:
        if chunks[-1] and size + len(line) > bytes_max:
            chunks.append([])
            size = 0
        chunks[-1].append(line)
        size += len(line)
    return b"\f".join(map(b"\n".join, chunks)).decode(), list(map(len, chunks))
