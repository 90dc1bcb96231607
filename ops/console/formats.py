"""How values are told on pages: the filters of the templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from durable_cluster.ops.console.redaction import truncated
from durable_cluster.ops.terminal import pretty

MINUTE_S, HOUR_S, DAY_S = 60, 3_600, 86_400
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
SHOWN_CHARS_MAX = 65_536
LARGE_CHARS = 2_000
LINE_CHARS_MAX = 120


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """A value as a page shows it. ``note``: what has to be said of it; ``is_large``: it is folded at first."""

    text: str
    note: str = ""
    is_large: bool = False


def payload(value: Any) -> Payload:
    """JSON for people; what is longer than a page can bear is cut."""
    text = pretty(value)
    note = f"{len(text):,} characters" if len(text) > LARGE_CHARS else ""
    if len(text) > SHOWN_CHARS_MAX:
        note = f"the first {SHOWN_CHARS_MAX:,} of {len(text):,} characters"
        text = f"{text[:SHOWN_CHARS_MAX]}…"
    return Payload(text=text, note=note, is_large=len(text) > LARGE_CHARS)


def line(value: Any, limit: int = LINE_CHARS_MAX) -> str:
    """JSON on one line that fits, without whole ids; a text is told without its quotes."""
    text = value if isinstance(value, str) else json(value)
    text = truncated(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def json(value: Any) -> str:
    """As it is written."""
    return msgspec.json.encode(value).decode()


def pair(name: str) -> tuple[str, str]:
    """A choice that is called what it is."""
    return name, name


def iso(at: datetime) -> str:
    """For machines, in UTC."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc(at: datetime) -> str:
    """For people, in UTC; console.js tells it in their zone."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """3 ms, 4.2 s, 3 min 5 s, 2 h 4 min, 3 d 4 h."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 or not seconds else "under 1 ms"
    if seconds < MINUTE_S - 0.05:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, part, part_name in (
        (DAY_S, "d", HOUR_S, "h"),
        (HOUR_S, "h", MINUTE_S, "min"),
        (MINUTE_S, "min", 1, "s"),
    ):
        if whole >= unit:
            count, rest = divmod(whole, unit)
            return f"{count:,} {name}" if not rest // part else f"{count:,} {name} {rest // part} {part_name}"
    return f"{whole} s"


def about(seconds: float) -> str:
    """The same in its largest unit alone, for where there is little room."""
    return " ".join(duration(seconds).split(" ")[:2])


def size(amount: float) -> str:
    """12 B, 4.0 KiB, 3.1 GiB."""
    unit = 0
    while abs(amount) >= 1024 and unit < len(SIZES) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:,.0f} {SIZES[unit]}" if not unit else f"{amount:,.1f} {SIZES[unit]}"


def number(value: float) -> str:
    """1,234; 12.5; 0.02."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 1 else f"{value:.2g}"


FILTERS: Mapping[str, Callable[..., object]] = {
    "iso": iso,
    "json": json,
    "pair": pair,
    "moment": datetime.fromisoformat,
    "utc": utc,
    "duration": duration,
    "about": about,
    "size": size,
    "number": number,
    "line": line,
}
