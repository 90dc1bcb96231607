"""A timeline as a Gantt chart: a lane a step event, with when it waited, ran and rested, as parts of the whole time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

import msgspec

from durable_cluster.ops.console.charts import Bar, bar
from durable_cluster.timeline_statements import Moment

RESTS = ("sleeping", "waiting", "joining", "limited", "paused", "unrouted", "retrying", "stuck")
"""Outcomes after which nothing happens for a while."""
KINDS = {"failed": "failed", "stuck": "stuck", "retrying": "retry", "completed": "completed"}
SIGNS = {"continued": "completed", "retrying": "retry", "unrouted": "note", "started": "ok"}


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a lane. ``kind``: queued, ran or how it ended, rested."""

    kind: str
    bar: Bar
    told: str


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """One step event, or a step within one. ``took_s``: None where nothing ran; ``sign``: the badge of its outcome."""

    moment: Moment
    sign: str
    at: datetime | None
    took_s: float | None
    pieces: list[Piece]


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """The newest lanes; ``left_out``: so many older ones."""

    first: datetime
    last: datetime
    lanes: list[Lane]
    left_out: int

    @property
    def span_s(self) -> float:
        """From the beginning to the end, or to now."""
        return (self.last - self.first).total_seconds()


def chart(moments: Sequence[Moment], *, first: datetime, last: datetime, lanes_max: int) -> Chart:
    """Of a workflow that was started at ``first``, and ended at ``last`` or goes on."""
    steps = [one for one in moments if one.step is not None]
    # By a clock that was set back something may have ended after the end.
    latest = max([last, *(at for one in steps for at in (one.ended_at, one.began_at) if at is not None)])
    shown = steps[-lanes_max:]
    resumed: dict[int | None, datetime] = {}
    for one, after in pairwise(one for one in shown if one.part == 0):
        resumed[one.seq] = after.enqueued_at or after.began_at or latest
    lanes = [_lane(one, resumed.get(one.seq, latest), first, latest) for one in shown]
    return Chart(first=first, last=latest, lanes=lanes, left_out=len(steps) - len(shown))


def _lane(one: Moment, resumed: datetime, first: datetime, last: datetime) -> Lane:
    pieces = []

    def add(kind: str, began: datetime, ended: datetime, told: str) -> None:
        if ended > began or kind not in ("queued", "waiting"):
            pieces.append(Piece(kind=kind, bar=bar(began, max(began, ended), first=first, last=last), told=told))

    goes_on = one.ended_at is None and one.outcome in ("detached", "claimed")
    ended = one.ended_at or (last if goes_on else one.began_at)
    if one.enqueued_at is not None and one.part == 0:
        is_resting = one.began_at is None and one.outcome in RESTS
        add(
            "waiting" if is_resting else "queued",
            one.enqueued_at,
            one.began_at or one.ended_at or last,
            "stood in the queue",
        )
    if one.began_at is not None and ended is not None:
        add(KINDS.get(one.outcome, "ran"), one.began_at, ended, "ran")
    if one.outcome in RESTS and one.ended_at is not None and one.part == 0:
        add("waiting", one.ended_at, resumed, "rested")
    took_s = None if one.began_at is None or ended is None else max((ended - one.began_at).total_seconds(), 0.0)
    return Lane(
        moment=one,
        sign=SIGNS.get(one.outcome, one.outcome),
        at=one.began_at or one.enqueued_at or one.ended_at,
        took_s=took_s,
        pieces=pieces,
    )
