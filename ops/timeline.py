"""``timeline``: when each step of a workflow ran, for how long, and what it came to, with a bar for each."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from durable_cluster import schema, timeline_statements
from durable_cluster.ops import lookups
from durable_cluster.ops.show import checked_prefix, moment
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import Terminal, elapsed, table
from durable_cluster.timeline_statements import Moment, Timeline

ID_DIGITS = 32
CELLS = 28
LATE_S_MAX = 5.0
PRECISE_S_MAX = 1.0


def timeline(terminal: Terminal, target: Target, *, prefix: str) -> int:
    """One workflow's, by its id or the first digits of it."""
    digits = checked_prefix(prefix)
    with target.opened() as database, database.connect("timeline") as connection:
        schema.demand_installed(connection)
        ask = timeline_statements.timeline if len(digits) == ID_DIGITS else timeline_statements.timeline_by_digits
        found = ask(connection, digits)
        now = datetime.fromtimestamp(lookups.server_clock(connection), found.started_at.tzinfo)
    terminal.answer(found, _lines(found, found.finished_at or max(now, found.started_at)))
    return 0


def bar(of: Moment, since: datetime, until: datetime, cells: int = CELLS) -> str:
    """Where a moment lies between two times: ``░`` while it waited for its turn, ``█`` while it ran; nothing for marks."""
    if of.step is None:
        return ""
    begin = of.enqueued_at or of.began_at or of.ended_at
    if begin is None:
        return ""
    end = of.ended_at or until
    first, ran, last = (_cell(at, since, until, cells) for at in (begin, of.began_at or end, end))
    last = max(last, first + 1)
    ran = min(ran, last - 1) if of.began_at is not None else last
    return f"{' ' * first}{'░' * (ran - first)}{'█' * (last - ran)}".ljust(cells)


def _cell(at: datetime, since: datetime, until: datetime, cells: int) -> int:
    whole = (until - since) / timedelta(seconds=1)
    share = (at - since) / timedelta(seconds=1) / whole if whole > 0 else 0.0
    return min(cells - 1, max(0, round(share * cells)))


def _lines(of: Timeline, until: datetime) -> list[str]:
    rows = [_row(one, of.started_at, until) for one in of.moments]
    lines = [
        f"{of.id}  {of.workflow} (version {of.version})  {of.status}  {_took(until - of.started_at)}",
        f"  started  {moment(of.started_at)}",
        "",
        *table(("seq", "step", "attempt", "at", "waited", "ran", "", "came to"), rows),
    ]
    if not of.has_history:
        lines += [
            "",
            f"history is off for '{of.workflow}': declare it with history=True, or see the setting history_sample",
        ]
    if of.skips:
        lines += ["", f"there may be gaps: {of.skips} times the records were too far behind and were passed over"]
    if of.has_history and (of.lag_s or 0.0) > LATE_S_MAX:
        lines += ["", f"what happened in the last {elapsed(of.lag_s or 0.0)} may be missing: it is not projected yet"]
    return lines


def _row(of: Moment, since: datetime, until: datetime) -> Sequence[object]:
    at = of.began_at or of.ended_at or of.enqueued_at
    return (
        "" if of.seq is None or of.part else str(of.seq),
        "" if of.step is None else f"{'  ' if of.part else ''}{of.step}",
        "" if of.attempt is None else str(of.attempt),
        "" if at is None else f"+{_took(at - since)}",
        "" if of.step is None else _between(of.enqueued_at, of.began_at),
        "" if of.step is None else _between(of.began_at, of.ended_at),
        bar(of, since, until),
        _came_to(of),
    )


def _between(begin: datetime | None, end: datetime | None) -> str:
    return "" if begin is None or end is None else _took(end - begin)


def _took(duration: timedelta) -> str:
    """To the millisecond where it is short, and as people say it where it is long."""
    seconds = max(0.0, duration.total_seconds())
    return f"{seconds * 1000:.1f} ms" if seconds < PRECISE_S_MAX else elapsed(seconds)


def _came_to(of: Moment) -> str:
    more = [of.waits_for, None if of.until is None else f"until {moment(of.until)}"]
    told = ", ".join([of.outcome, *filter(None, more)])
    return f"{told}: {' '.join(of.error.split())}" if of.error else told
