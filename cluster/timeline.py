"""The records of a timeline: what became of the step events of a page, as the log gets it for ``durable.timeline``. No payloads."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from durable_cluster.dead_letters import DeadLetter, clean, without_id
from durable_cluster.envelope import NOT_AN_ENVELOPE, Envelope, Page
from durable_cluster.executor import Later, Parked
from durable_cluster.joins import Joining
from durable_cluster.limits import Queued
from durable_cluster.side_results import Detached
from durable_cluster.signals import Waiting
from durable_cluster.statements import Outcome
from durable_cluster.timing import Timed

ERROR_CHARS_MAX = 200


class Record(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    gc=False,
    omit_defaults=True,
    rename={
        "workflow_id": "w",
        "seq": "n",
        "part": "k",
        "step": "s",
        "attempt": "a",
        "began_us": "b",
        "ended_us": "e",
        "outcome": "o",
        "error": "x",
        "waits_for": "f",
        "until_s": "u",
        "txid": "t",
        "event_id": "i",
    },
):
    """A row of the timeline: see ``durable.timeline_of``. ``began_us``, ``ended_us``: so long ago; ``until_s``: from now on.

    ``txid``, ``event_id``: the event of the log in which it stood.
    """

    workflow_id: str
    seq: int
    step: str
    outcome: str
    part: int = 0
    attempt: int = 1
    began_us: int | None = None
    ended_us: int | None = None
    error: str = ""
    waits_for: str = ""
    until_s: float | None = None
    txid: str = ""
    event_id: int = 0


class Body(msgspec.Struct, frozen=True, rename={"process": "p", "records": "r"}):
    """The records of one transaction of one process."""

    process: str
    records: Sequence[Record]


class Came(msgspec.Struct, frozen=True):
    """What a step event came to."""

    outcome: str
    error: str = ""
    waits_for: str = ""
    until_s: float | None = None


class _Said(msgspec.Struct, frozen=True):
    reason: str = ""


_said = msgspec.json.Decoder(_Said)


def encoded(
    timed: Mapping[int, Timed], results: Sequence[Any], page: Page | None = None, begin: int = 0
) -> tuple[str, int]:
    """The records of these step events and their number. ``results``: what was made of them in the end, by the same index.

    ``page``, ``begin``: of which they are lines, and its line with the index 0.
    """
    now = time.monotonic()
    sources = [] if page is None else _sources(page)[begin:]
    records: list[Record] = []
    for index, one in timed.items():
        txid, event_id = sources[index] if sources else ("", 0)
        came = _came(one.envelope, results[index])
        if came is not None:
            records += _records(one, came, now, txid, event_id)
    body = Body(f"{socket.gethostname()}:{os.getpid()}", records)
    return msgspec.json.encode(body).decode(), len(records)


def _records(one: Timed, came: Came, now: float, txid: str, event_id: int) -> Iterator[Record]:
    envelope = one.envelope
    ended = now if one.began is None and came.outcome != "detached" else one.ended
    yield Record(
        workflow_id=envelope.workflow_id,
        seq=envelope.seq,
        step=envelope.step,
        attempt=envelope.attempt,
        began_us=_ago_us(one.began, now),
        ended_us=_ago_us(ended, now),
        outcome=came.outcome,
        error=_short(came.error, envelope),
        waits_for=came.waits_for,
        until_s=came.until_s,
        txid=txid,
        event_id=event_id,
    )
    for part, lap in enumerate(one.laps, 1):
        yield Record(
            workflow_id=envelope.workflow_id,
            seq=envelope.seq,
            part=part,
            step=lap.step,
            attempt=lap.attempt,
            began_us=_ago_us(lap.began, now),
            ended_us=_ago_us(lap.ended, now),
            outcome=lap.outcome,
            error=_short(lap.error, envelope),
        )


def _came(envelope: Envelope, result: Any) -> Came | None:
    """None for one that was put back as it was, and for one that nobody can have sent."""
    tell = TOLD.get(type(result))
    return None if tell is None or result is envelope else tell(envelope, result)


def _later(envelope: Envelope, later: Later) -> str:
    if later.reason:
        return "retrying"
    return "unrouted" if later.envelope.unrouted > envelope.unrouted else "sleeping"


def _children(count: int) -> str:
    return f"{count} {'child' if count == 1 else 'children'}" if count else "children"


def _ended(_: Envelope, outcome: Outcome) -> Came:
    return Came(outcome.status, "" if outcome.status == "completed" else _reason_in(outcome.output))


def _reason_in(said: str) -> str:
    try:
        return _said.decode(said).reason
    except NOT_AN_ENVELOPE:
        return ""


TOLD: Mapping[type, Callable[[Envelope, Any], Came]] = {
    Envelope: lambda *_: Came("continued"),
    Outcome: _ended,
    Later: lambda envelope, later: Came(_later(envelope, later), later.reason, until_s=later.delay_s),
    Waiting: lambda _, to: Came("waiting", waits_for=f"signal {', '.join(to.names)}", until_s=to.timeout_s),
    Joining: lambda _, to: Came("joining", waits_for=_children(len(to.children)), until_s=to.timeout_s),
    DeadLetter: lambda _, letter: Came("stuck", str(letter.details.get("reason", ""))),
    Detached: lambda *_: Came("detached"),
    Queued: lambda _, queued: Came("limited", waits_for=f"limit {queued.limit.name}"),
    Parked: lambda *_: Came("paused"),
}
"""What is told of each kind of result, and of the step event that it is of."""


def _short(error: str, envelope: Envelope) -> str:
    return clean(without_id(error, envelope)[:ERROR_CHARS_MAX]) if error else ""


def _ago_us(moment: float | None, now: float) -> int | None:
    return None if moment is None else round((now - moment) * 1e6)


def _sources(page: Page) -> list[tuple[str, int]]:
    """The event of each line that is not done."""
    events = zip(page.header.events, page.counts, strict=True)
    return [event for event, count in events for _ in range(count)][page.header.done[2] :]
