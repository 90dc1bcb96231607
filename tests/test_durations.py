"""Durations: what is one, in seconds, and what is refused by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable_cluster import InputError
from durable_cluster.durations import DURATION_S_MAX, beginning, seconds

NAIVE = datetime(2030, 1, 1)
TIME = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "in_seconds"),
    [
        (0, 0.0),
        (1.5, 1.5),
        (timedelta(minutes=2), 120.0),
        ("250ms", 0.25),
        ("90s", 90.0),
        ("1.5h", 5400.0),
        ("1h30m", 5400.0),
        (" 1 h 30 m ", 5400.0),
        ("7d", 7 * 86400.0),
        ("2w", 14 * 86400.0),
        (DURATION_S_MAX, DURATION_S_MAX),
    ],
)
def test_a_duration_is_seconds_a_timedelta_or_numbers_with_units(given: Any, in_seconds: float) -> None:
    assert seconds(given, what="after") == in_seconds


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (-1, "out of range"),
        (timedelta(seconds=-1), "out of range"),
        (DURATION_S_MAX * 2, "out of range"),
        (timedelta.max, "out of range"),
        ("9999999w", "out of range"),
        (float("nan"), "out of range"),
        (float("inf"), "out of range"),
        (True, "no duration"),
        (None, "no duration"),
        ([], "no duration"),
        ("3 fortnights", "unknown unit 'fortnights'"),
        ("5M", "no duration"),
        ("", "no duration"),
        ("-5s", "no duration"),
        ("5", "no duration"),
        ("1h and a half", "no duration"),
    ],
)
def test_what_is_no_duration_is_refused_naming_what_and_the_value(given: Any, why: str) -> None:
    with pytest.raises(InputError) as caught:
        seconds(given, what="the answer's timeout")
    said = str(caught.value)
    assert said.startswith("the answer's timeout: ")
    assert repr(given) in said
    assert why in said


def test_a_workflow_begins_at_once_after_a_while_or_at_a_time() -> None:
    assert beginning(after=None, at=None) is None
    assert beginning(after="90s", at=None) == timedelta(seconds=90)
    assert beginning(after=None, at=TIME) == TIME


@pytest.mark.parametrize(
    ("after", "at", "named"),
    [
        ("1h", TIME, ["after='1h'", "at="]),
        (-1, None, ["after", "-1"]),
        ("200000w", None, ["after", "200000w"]),
        (None, NAIVE, ["at", repr(NAIVE), "time zone"]),
        (None, "2030-01-01T00:00:00Z", ["at", "2030-01-01T00:00:00Z"]),
        (None, datetime(9999, 1, 1, tzinfo=UTC), ["at", "9999-01-01", "100 years"]),
    ],
)
def test_a_beginning_that_cannot_be_is_refused_naming_the_field_and_the_value(
    after: Any, at: Any, named: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        beginning(after=after, at=at)
    assert [word for word in named if word not in str(caught.value)] == []
