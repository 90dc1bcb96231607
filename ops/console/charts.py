"""The geometry of the charts: numbers in, what the templates draw out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

WIDTH, HEIGHT = 240.0, 48.0
HEADROOM = 4.0  # so that the stroke of the highest point is not cut
BAR_PERCENT_MIN = 0.4  # what took next to nothing is still to be seen


class Spark(msgspec.Struct, frozen=True, kw_only=True):
    """A small line over time, as points of an SVG of ``WIDTH`` by ``HEIGHT``. ``highest``: the value at its top."""

    line: str
    area: str
    highest: float


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """Where a bar begins and how long it is, in percent of the whole time."""

    x: float
    width: float


def spark(values: Sequence[float], *, slots: int) -> Spark:
    """The newest of at most ``slots`` values stands at the right edge."""
    highest = max(values, default=0.0)
    scale = (HEIGHT - HEADROOM) / highest if highest > 0 else 0.0
    step = WIDTH / (slots - 1)
    shown = values[-slots:]
    first_x = WIDTH - step * (len(shown) - 1)
    points = [(first_x + step * n, HEIGHT - 1 - value * scale) for n, value in enumerate(shown)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{first_x:.1f},{HEIGHT:.0f} {line} {WIDTH:.0f},{HEIGHT:.0f}" if points else ""
    return Spark(line=line, area=area, highest=highest)


def bar(began: datetime, ended: datetime, *, first: datetime, last: datetime) -> Bar:
    """One within a time from ``first`` to ``last``; what stands out is cut off."""
    whole_s = max((last - first).total_seconds(), 1e-6)
    x = _within((began - first).total_seconds() / whole_s * 100)
    end = _within((ended - first).total_seconds() / whole_s * 100)
    width = max(end - x, BAR_PERCENT_MIN)
    return Bar(x=round(min(x, 100 - width), 3), width=round(width, 3))


def _within(percent: float) -> float:
    return min(max(percent, 0.0), 100.0)
