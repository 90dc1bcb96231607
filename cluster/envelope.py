"""One JSON line of the log, one page of them, and their only reader and writer.

An envelope carries a step event: which workflow (its whole id: the log is as secret as the table of ids), its step number, the
step to run and the state it runs with. Fields this version does not know are tolerated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from durable_cluster.retry import Policy
from durable_cluster.settings import NAME_PATTERN

SEQ_MAX = 999_999_998
"""One less than has nine digits: the step after it has nine too."""
DEPTH_MARGIN = 150
NEWLINE = ord("\n")
CODED_KEY = "$codec"
"""The first key of a value that a codec has made, and of no other: see ``codec``."""
NOT_AN_ENVELOPE = (msgspec.DecodeError, UnicodeError, RecursionError)
NO_HEX = re.compile("[^0-9a-f]")


class Envelope(
    msgspec.Struct,
    frozen=True,
    gc=False,
    omit_defaults=True,
    rename={
        "workflow_id": "w",
        "seq": "n",
        "workflow": "f",
        "step": "s",
        "version": "v",
        "state": "d",
        "attempt": "a",
        "granted": "g",
        "unrouted": "u",
        "retry": "r",
        "progress": "p",
        "event": "e",
        "cancelled": "c",
        "has_children": "j",
        "permit": "l",
        "traceparent": "t",
    },
):
    """A step event. ``workflow_id``: 32 hex digits; ``seq``: counts the workflow's steps from 1; ``state``: JSON, undecoded.

    ``granted``: attempts that were spent when a dead letter was taken up again: they count no more. ``unrouted``: how often no
    process knew the step. ``retry``: a policy for this call alone. ``progress``: what the last attempt said, as JSON.
    ``event``: the signal that the step was resumed with, undecoded; empty without one.
    ``cancelled``: why the workflow was cancelled, in the steps of its cleanup. ``has_children``: it was resumed by its children.
    ``permit``: which permits it has been given: see ``limits``. ``traceparent``: of who started the workflow, with its first step.
    """

    workflow_id: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]
    seq: Annotated[int, msgspec.Meta(ge=1, le=SEQ_MAX)]
    workflow: str
    step: str
    version: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    state: msgspec.Raw
    attempt: Annotated[int, msgspec.Meta(ge=1, le=SEQ_MAX)] = 1
    granted: Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)] = 0
    unrouted: Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)] = 0
    retry: Policy | None = None
    progress: Any = None
    event: msgspec.Raw = msgspec.Raw()
    cancelled: str = ""
    has_children: bool = False
    permit: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    traceparent: str = ""

    @property
    def has_names(self) -> bool:
        """Whether workflow and step are names at all. To be asked where no code knows them: it costs more than the decoding."""
        return all(re.fullmatch(NAME_PATTERN, name) for name in (self.workflow, self.step))

    @property
    def key(self) -> str:
        """Id and step number: what names this step wherever it is not in the log."""
        return f"{self.workflow_id}:{self.seq}"

    @property
    def is_of_a_workflow(self) -> bool:
        """Whether its id can be one: somebody may have put the line into the log by hand."""
        return NO_HEX.search(self.workflow_id) is None


class Header(msgspec.Struct, frozen=True):
    """The first line of a page's text: see ``durable.page``. ``events``: their transaction and event ids.

    ``suspects``: so many lines from here on run one by one, because a process died with one of them.
    ``cancelled``: which of their workflows are, and why. ``paused``: ids, and names of types.
    ``weights``: by id, 1 for others; ``heaviest``: of who is ready behind this page.
    """

    batch: int
    takeovers: int
    suspects: int
    done: tuple[str, int, int]
    last: bool
    events: list[tuple[str, int]]
    cancelled: dict[str, str] = {}
    paused: frozenset[str] = frozenset()
    weights: dict[str, float] = {}
    heaviest: float = 0.0


class AmbiguousPage(Exception):
    """An event holds the sign that stands between events: only a page of one event can be told apart. Not of our making."""


class Page(msgspec.Struct, frozen=True):
    """Lines of one window from its cursor on. ``lines`` holds no line that is done; a line that is no envelope is ``None``.

    ``counts``: how many lines each event has, those that are done included. ``is_plain``: nothing here is coded, see ``codec``.
    """

    header: Header
    lines: list[Envelope | None]
    counts: list[int]
    is_plain: bool = False

    def cursor(self, lines_done: int) -> str:
        """The window's cursor, in Postgres' form, after the first ``lines_done`` lines of this page."""
        txid, event_id, line = self.header.done
        if not lines_done:
            return f"({txid},{event_id},{line})"
        left = lines_done + line
        for (txid, event_id), count in zip(self.header.events, self.counts, strict=True):
            if left < count:
                return f"({txid},{event_id},{left})"
            left -= count
        return f"({txid},{event_id + 1},0)"


_header = msgspec.json.Decoder(Header)
_envelope = msgspec.json.Decoder(Envelope)
_syntax = msgspec.json.Decoder(msgspec.Raw)


def _plain(value: Any) -> Any:
    """What msgspec does not know by itself: models that dump themselves, as pydantic's do, under the names that they read."""
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")
    return dump(mode="json", by_alias=True)


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def encode(value: object) -> bytes:
    """``value`` as one line of JSON. Raises TypeError or ValueError for what JSON cannot hold."""
    encoded = _encoder.encode(value)
    _syntax.decode(encoded)  # a msgspec.Raw goes in unseen: it must be JSON too
    if len(encoded) > 2 * DEPTH_MARGIN and encoded.count(b"[") + encoded.count(b"{") > DEPTH_MARGIN:
        # Whoever reads it may stand deeper in calls.
        _syntax.decode(b"[" * DEPTH_MARGIN + encoded + b"]" * DEPTH_MARGIN)
    return encoded.replace(b"\n", b" ") if NEWLINE in encoded else encoded


def encode_part(value: object) -> bytes:
    """``value`` as JSON that goes into what ``encode`` checks as a whole. Raises TypeError or ValueError."""
    return _encoder.encode(value)


def header_of(text: str) -> Header:
    """The header of a page's text."""
    return _header.decode(text.partition("\n")[0])


def decode_page(text: str) -> Page:
    """A page from the text of ``durable.claim`` or ``durable.page``. Raises AmbiguousPage."""
    header = header_of(text)
    body = text.partition("\n")[2]
    events = body.split("\f") if len(header.events) > 1 else [body] * len(header.events)
    if len(events) != len(header.events):
        raise AmbiguousPage
    counts = [event.count("\n") + 1 for event in events]
    lines = _decoded_lines("\n".join(events), sum(counts))
    # One look at the page, and not at each line; the first half of it is the quick one.
    is_plain = "$" not in body or CODED_KEY not in body
    return Page(header, lines[header.done[2] :] if header.done[2] else lines, counts, is_plain)


def _decoded_lines(body: str, count: int) -> list[Envelope | None]:
    try:
        lines: list[Envelope | None] = list(_envelope.decode_lines(body))
    except NOT_AN_ENVELOPE:
        lines = []
    return lines if len(lines) == count else [_decoded(line) for line in body.split("\n")][:count]


def _decoded(line: str) -> Envelope | None:
    try:
        return _envelope.decode(line)
    except NOT_AN_ENVELOPE:
        return None


def encode_line(envelope: Envelope) -> str:
    """An envelope as a line of the log."""
    return _encoder.encode(envelope).decode()


def decode_line(line: str) -> Envelope:
    """The envelope of a line that this package wrote. Raises msgspec.DecodeError."""
    return _envelope.decode(line)


def encode_chunks(envelopes: Sequence[Envelope], *, bytes_max: int) -> tuple[str, list[int]]:
    """Log entries for a page's successors: their lines, a form feed between entries, and how many lines each entry has.

    No entry has more than ``bytes_max`` bytes, unless one line has.
    """
    lines = _encoder.encode_lines(envelopes)[:-1]
    if len(lines) <= bytes_max:
        return lines.decode(), [len(envelopes)] if envelopes else []
    chunks: list[list[bytes]] = [[]]
    size = 0
    for line in lines.split(b"\n"):
        if chunks[-1] and size + len(line) > bytes_max:
            chunks.append([])
            size = 0
        chunks[-1].append(line)
        size += len(line)
    return b"\f".join(map(b"\n".join, chunks)).decode(), list(map(len, chunks))
