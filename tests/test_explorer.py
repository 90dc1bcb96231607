"""Races, through the interleavings of their statements: I1 (one live continuation), I2 (handoff), I7 (resume once) after each.

A failure says the word that repeats it: ``make explore RACE=name WORD=abba``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import psycopg
import pytest
from explorer import flows, permits, races, timetables
from explorer.register import ALL_RACES, RACES
from explorer.scene import Broken, Lab
from explorer.scheduler import following
from explorer.search import explore

from durable_cluster import handoff

SEED = int(os.environ.get("DURABLE_TEST_SEED", "0")) or random.randrange(10**6)
SCHEDULES = int(os.environ.get("DURABLE_EXPLORE_SCHEDULES", "30"))
FULL_SIZE = 1_000
MODULES = (races, permits, timetables)
"""What is imported is registered."""
WORD = os.environ.get("DURABLE_EXPLORE_WORD", "")


@pytest.fixture
def lab(
    dsn: str, conn: psycopg.Connection, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    monkeypatch.setattr(handoff, "CONFLICT_PAUSE_S_MAX", 0.0)
    lab = Lab(dsn, conn, clock, flows.application(dsn))
    yield lab
    lab.close()


@pytest.mark.parametrize("race", ALL_RACES if SCHEDULES >= FULL_SIZE else RACES)
def test_no_order_of_its_statements_breaks_an_invariant(
    lab: Lab, race: str, record_property: Callable[[str, object], None]
) -> None:
    if WORD:
        print("\n  ".join([f"{race}, {WORD}:", *lab.play(ALL_RACES[race], following(WORD)).story]))
        return
    try:
        explored = explore(race, lambda choose: lab.play(ALL_RACES[race], choose), seed=SEED, schedules=SCHEDULES)
    except Broken as broken:
        raise Broken(f"{race}, seed {SEED}: {broken}") from broken
    record_property("explored", str(explored))
    assert explored.distinct > 1
