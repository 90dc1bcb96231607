"""How long: seconds, a timedelta, or text such as "90s", "1h30m" and "7d"; always checked, always as seconds."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

from durable_cluster.errors import InputError

Duration = float | timedelta | str
"""Seconds, a timedelta, or numbers with units: ms, s, m, h, d, w."""

DAY_S = 86_400.0
DURATION_S_MAX = 100 * 365 * DAY_S
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": DAY_S, "w": 7 * DAY_S}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*")


def seconds(duration: Duration, *, what: str) -> float:
    """``duration`` in seconds, from 0 to 100 years. Raises InputError naming ``what`` and the value."""
    if isinstance(duration, timedelta):
        value = duration.total_seconds()
    elif isinstance(duration, str):
        value = _parsed(duration, what)
    elif isinstance(duration, int | float) and not isinstance(duration, bool):
        value = float(duration)
    else:
        raise InputError(
            f"{what}: {duration!r} is no duration; give seconds, a timedelta, or text such as '90s' or '7d'"
        )
    if math.isnan(value) or not 0 <= value <= DURATION_S_MAX:
        raise InputError(f"{what}: {duration!r} is out of range; a duration is from 0 to 100 years")
    return value


def beginning(*, after: Duration | None, at: datetime | None) -> timedelta | datetime | None:
    """When a workflow begins: after how long, at what time, or at once. Raises InputError for both, and for what cannot be."""
    if at is None:
        return None if after is None else timedelta(seconds=seconds(after, what="after"))
    if after is not None:
        raise InputError(
            f"after={after!r} and at={at!r}: a workflow begins after a while or at a time; give one of them"
        )
    if not isinstance(at, datetime) or at.utcoffset() is None:
        raise InputError(f"at: {at!r} is no time with a time zone; give one such as datetime(2030, 1, 1, tzinfo=UTC)")
    if (at - datetime.now(UTC)).total_seconds() > DURATION_S_MAX:
        raise InputError(f"at: {at.isoformat()} is out of range; it is more than 100 years ahead")
    return at


def _parsed(text: str, what: str) -> float:
    total, at = 0.0, 0
    while at < len(text) or not text:
        part = _PART.match(text, at)
        if part is None:
            raise InputError(f"{what}: {text[:40]!r} is no duration; write it as '90s', '1h30m' or '7d'")
        number, unit = part.groups()
        if unit not in UNITS_S:
            raise InputError(
                f"{what}: {text[:40]!r} has an unknown unit '{unit[:10]}'; the units are {', '.join(UNITS_S)}"
            )
        total += float(number) * UNITS_S[unit]
        at = part.end()
    return total
