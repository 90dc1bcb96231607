"""Cron: a time of day comes once a day, also on the days that skip it or have it twice; and what cannot be read is said."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from durable_cluster import InputError
from durable_cluster.cron import Cron


def local_times(cron: str, zone: str, begin: str, end: str) -> list[str]:
    """Due times between two local times, as the clocks there show them."""
    here = ZoneInfo(zone)
    first, last = (datetime.fromisoformat(text).replace(tzinfo=here) for text in (begin, end))
    dues = Cron(cron, zone).between(first - timedelta(microseconds=1), last)
    return [due.astimezone(here).strftime("%d %H:%M%z") for due in dues]


@pytest.mark.parametrize(
    ("cron", "zone", "begin", "end", "expected"),
    [
        # 02:30 does not exist on the 29th: the first moment after the gap.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28", "2026-03-31",
         ["28 02:30+0100", "29 03:00+0200", "30 02:30+0200"]),
        # Two times that the gap makes one come once.
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-29", "2026-03-30", ["29 03:00+0200"]),
        ("30 2,3 * * *", "Europe/Berlin", "2026-03-29", "2026-03-30", ["29 03:00+0200", "29 03:30+0200"]),
        ("0 2,3 * * *", "Europe/Berlin", "2026-03-29", "2026-03-30", ["29 03:00+0200"]),
        # 02:30 exists twice on the 25th: the first.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24", "2026-10-27",
         ["24 02:30+0200", "25 02:30+0200", "26 02:30+0100"]),
        # The southern summer ends in April and begins in October.
        ("30 2 * * *", "Australia/Sydney", "2026-04-04", "2026-04-07",
         ["04 02:30+1100", "05 02:30+1100", "06 02:30+1000"]),
        ("30 2 * * *", "Australia/Sydney", "2026-10-03", "2026-10-06",
         ["03 02:30+1000", "04 03:00+1100", "05 02:30+1100"]),
        # Half an hour is skipped.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03", "2026-10-06",
         ["03 02:15+1030", "04 02:30+1100", "05 02:15+1100"]),
        # The day begins at one.
        ("0 0 * * *", "America/Santiago", "2026-09-05", "2026-09-07T12:00",
         ["05 00:00-0400", "06 01:00-0300", "07 00:00-0300"]),
        # What goes by the hours that pass, passes: neither more nor fewer.
        ("0 * * * *", "Europe/Berlin", "2026-03-29T01:00", "2026-03-29T04:00",
         ["29 01:00+0100", "29 03:00+0200", "29 04:00+0200"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25T01:00", "2026-10-25T04:00",
         ["25 01:30+0200", "25 02:30+0200", "25 02:30+0100", "25 03:30+0100"]),
    ],
)  # fmt: skip
def test_a_time_of_day_comes_once_a_day_at_both_ends_of_summer_time(
    cron: str, zone: str, begin: str, end: str, expected: list[str]
) -> None:
    assert local_times(cron, zone, begin, end) == expected


@pytest.mark.parametrize(
    "zone", ["Europe/Berlin", "Australia/Sydney", "Australia/Lord_Howe", "America/Santiago", "UTC"]
)
@pytest.mark.parametrize("cron", ["30 2 * * *", "0,15,30 1-3 * * *", "*/20 * * * *", "0 0 * * *", "0 */2 * * *"])
def test_from_wherever_one_looks_the_due_times_are_the_same(cron: str, zone: str) -> None:
    """Whoever looks begins at another moment: also in the hour that comes twice."""
    for first in (datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 4, 4, tzinfo=UTC), datetime(2026, 9, 5, tzinfo=UTC),
                  datetime(2026, 10, 3, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC)):  # fmt: skip
        known = Cron(cron, zone)
        last = first + timedelta(days=2)
        dues = list(known.between(first, last))
        assert dues == sorted(set(dues))
        for minutes in range(0, 2 * 1_440, 47):
            moment = first + timedelta(minutes=minutes, seconds=minutes % 60)
            expected = next((due for due in dues if due > moment), None)
            assert expected is None or known.after(moment) == expected, moment
            assert known.newest(3, after=first, until=moment) == [due for due in dues if due <= moment][-3:], moment


def test_the_newest_of_a_long_time_are_found_without_walking_it() -> None:
    every_minute = Cron("* * * * *", "UTC")
    until = datetime(2026, 6, 1, 12, tzinfo=UTC)
    long_ago = until - timedelta(days=3_650)
    newest = every_minute.newest(3, after=long_ago, until=until)
    assert newest == [until - timedelta(minutes=2), until - timedelta(minutes=1), until]
    seldom = Cron("0 0 29 2 *", "UTC").newest(2, after=long_ago, until=until)
    assert [due.year for due in seldom] == [2020, 2024]
    assert Cron("0 0 29 2 *", "UTC").newest(9, after=long_ago, until=until)[0].year == 2020


def test_names_for_what_is_common() -> None:
    at = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)
    found = {name: Cron(name, "UTC").after(at) for name in ("@hourly", "@daily", "@weekly", "@monthly", "@yearly")}
    assert found == {
        "@hourly": datetime(2026, 1, 15, 11, tzinfo=UTC),
        "@daily": datetime(2026, 1, 16, tzinfo=UTC),
        "@weekly": datetime(2026, 1, 18, tzinfo=UTC),
        "@monthly": datetime(2026, 2, 1, tzinfo=UTC),
        "@yearly": datetime(2027, 1, 1, tzinfo=UTC),
    }


def test_the_31st_or_a_weekday_is_read_as_either() -> None:
    dues = Cron("0 0 31 4 MON", "UTC").later(datetime(2026, 4, 1, tzinfo=UTC))
    assert [due.day for due in itertools.islice(dues, 2)] == [6, 13]


@pytest.mark.parametrize(
    ("cron", "what"),
    [
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("0 30 2 * * *", "has 6 fields"),
        ("61 * * * *", "bad minute"),
        ("0 24 * * *", "bad hour"),
        ("0 0 31 2 *", "bad day-of-month"),
        ("a * * * *", "bad minute"),
        ("*/0 * * * *", "bad minute"),
        ("0 0 * * 9", "bad day-of-week"),
        ("5-1 * * * *", "bad minute"),
        ("@reboot", "has 1 fields"),
        ("9" * 300, "at most 255 characters"),
        (None, "is no text"),
    ],
)
def test_a_cron_that_cannot_be_read_is_named(cron: str, what: str) -> None:
    with pytest.raises(InputError, match=r"^cron: ") as told:
        Cron(cron, "UTC")
    assert what in str(told.value)


@pytest.mark.parametrize("zone", ["Europe/Atlantis", "", "../etc/passwd", "/etc/localtime", "Europe", None, 7, "x\0y"])
def test_a_zone_that_is_none_is_named(zone: str) -> None:
    with pytest.raises(InputError, match=r"^zone: .* is no time zone"):
        Cron("0 3 * * *", zone)
