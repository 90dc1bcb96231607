"""What a held snapshot costs, as the benchmark tells it: nothing of what it loads itself, nor of what the machine loses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest

from durable_cluster.loadtest.bench import meters, throughput
from durable_cluster.loadtest.bench.throughput import Look

Second = tuple[int, float, float, bool]
"""Of one second: steps, processor time of Postgres and of the workers in s, whether more was loaded in it."""


def looks(seconds: Sequence[Second]) -> list[Look]:
    """One a second, and the first."""
    steps = [0, *accumulate(second[0] for second in seconds)]
    server_s = [0.0, *accumulate(second[1] for second in seconds)]
    workers_s = [0.0, *accumulate(second[2] for second in seconds)]
    fed = [False, *(second[3] for second in seconds)]
    return [(float(at), steps[at], reading(server_s[at], workers_s[at]), is_fed) for at, is_fed in enumerate(fed)]


def reading(server_s: float, workers_s: float) -> meters.Reading:
    counts = ("at_s", "wal_bytes", "xids", "commits", "inserted", "updated", "deleted", "dead", "autovacuums")
    return meters.Reading(
        server_s={1: server_s}, workers_s={2: workers_s}, **dict.fromkeys((*counts, "table_bytes", "index_bytes"), 0)
    )


def drifts(free: Sequence[Second], held: Sequence[Second]) -> dict[str, float | None]:
    """The cells of a run: so many seconds alone, and then beside the snapshot."""
    told = throughput._Told("ours", "held", 1)
    cells = told.rates(looks([*free, *held]), free_s=len(free), held_s=len(held))
    return {cell.metric: cell.value for cell in cells if "drift" in cell.metric}


QUICK: Second = (100, 0.4, 1.0, False)
LOADED: Second = (60, 1.2, 1.0, True)


def test_a_second_in_which_more_was_loaded_counts_for_nothing() -> None:
    assert drifts([QUICK, QUICK, QUICK], [QUICK, QUICK, QUICK, QUICK, LOADED, QUICK]) == {
        "drift": pytest.approx(0),
        "CPU of Postgres drift": pytest.approx(0),
    }


def test_a_machine_that_slows_down_costs_throughput_but_is_no_cost_of_the_snapshot() -> None:
    slow: Second = (50, 0.4, 1.0, False)
    assert drifts([QUICK] * 3, [slow] * 6) == {"drift": pytest.approx(50), "CPU of Postgres drift": pytest.approx(0)}


def test_what_postgres_takes_more_while_the_workers_do_not_is_one() -> None:
    dearer: Second = (100, 0.5, 1.0, False)
    assert drifts([QUICK] * 3, [dearer] * 6)["CPU of Postgres drift"] == pytest.approx(25)
