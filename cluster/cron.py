"""Cron: the due times of an expression in a time zone, right at both ends of summer time.

A time of day that is given in numbers ("30 2 * * *") comes once a day: the day that skips it has it at the first moment after the
gap, the day that has it twice has it the first time. An expression with ``*`` in its minute or hour goes by the hours that pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from durable_cluster.errors import InputError

CRON_CHARS_MAX = 255
ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
FIRST_LOOK_BACK = timedelta(hours=1)
LOOK_BACK_GROWTH = 4


class Cron:
    """An expression of five fields, or one of ``ALIASES``, in an IANA time zone. Raises InputError naming cron or zone."""

    def __init__(self, expression: str, zone: str) -> None:
        self.zone = _zone(zone)
        self.fields = _fields(expression)
        self._demand_due(expression)

    def after(self, moment: datetime) -> datetime | None:
        """The first due time later than ``moment``, in UTC; None if there is none in fifty years."""
        return next(self.later(moment), None)

    def between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """Due times later than ``after``, up to and with ``until``, rising."""
        for due in self.later(after):
            if due > until:
                return
            yield due

    def newest(self, count: int, *, after: datetime, until: datetime) -> list[datetime]:
        """The last ``count`` of ``between``, rising. Looks back further and further: a year of minutes is not walked."""
        span = FIRST_LOOK_BACK
        while True:
            begin = max(after, until - span)
            found = deque(self.between(begin, until), maxlen=count)
            if len(found) == count or begin == after:
                return list(found)
            span *= LOOK_BACK_GROWTH

    def later(self, moment: datetime) -> Iterator[datetime]:
        """Due times later than ``moment``, rising, in UTC."""
        # In the hour that comes twice, local times behind the second one are found ahead of it: they are past.
        last = moment
        for local in CronSim(self.fields, moment.astimezone(self.zone)):
            due = local.astimezone(UTC)
            if due > last:
                last = due
                yield due

    def _demand_due(self, expression: str) -> None:
        try:
            due = self.after(datetime.now(UTC))
        except CronSimError as error:
            raise InputError(
                f"cron: {expression!r} cannot be read: {str(error)[:1].lower()}{str(error)[1:]};"
                " write minute, hour, day of month, month and day of week, as in '0 3 * * *'"
            ) from error
        if due is None:
            raise InputError(f"cron: {expression!r} never comes")


def _fields(expression: str) -> str:
    if not isinstance(expression, str) or len(expression) > CRON_CHARS_MAX:
        raise InputError(f"cron: {str(expression)[:40]!r} is no text of at most {CRON_CHARS_MAX} characters")
    fields = ALIASES.get(expression.strip().lower(), expression)
    if len(fields.split()) != 5:
        raise InputError(
            f"cron: {expression!r} has {len(fields.split())} fields; it takes five (minute, hour, day of month, month, day of"
            f" week), or one of {', '.join(ALIASES)}"
        )
    return fields


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError) as error:
        raise InputError(f"zone: {str(name)[:80]!r} is no time zone; write it as 'UTC' or 'Europe/Berlin'") from error
