"""The criteria that the product must keep, and what a run says of each."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from durable_cluster.loadtest.bench.cells import Results
from durable_cluster.loadtest.bench.plan import OURS
from durable_cluster.loadtest.bench.scene import HELD
from durable_cluster.loadtest.hotpath import Report

# Of a step nothing may be updated or deleted in these: the log, the timers, what was started and what has finished.
APPEND_ONLY = (
    "pgque.event_",
    "durable.timer_0",
    "durable.timer_1",
    "durable.timer_2",
    "durable.started",
    "durable.finished",
)


TIMES = ("µs", "ms", "s", "% of a core")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One criterion. ``gate``: what must be kept, ``goal``: what is aimed at; the least where ``is_least``, else the most."""

    what: str
    unit: str
    value: float | None
    gate: float | None
    goal: float
    is_least: bool = False

    @property
    def is_portable(self) -> bool:
        """Whether any machine must keep the gate: a ratio or a count, not a time."""
        return self.gate is not None and self.unit not in TIMES

    @property
    def is_kept(self) -> bool | None:
        """Whether the gate is; None if there is none, or nothing was measured."""
        return None if self.gate is None else self._reaches(self.gate)

    @property
    def is_reached(self) -> bool | None:
        """Whether the goal is."""
        return self._reaches(self.goal)

    def _reaches(self, limit: float) -> bool | None:
        if self.value is None:
            return None
        return self.value >= limit if self.is_least else self.value <= limit

    @property
    def told(self) -> str:
        """The verdict in a word or two."""
        if self.value is None:
            return "not measured"
        if self.is_kept is False:
            return "**gate missed**"
        return "goal reached" if self.is_reached else "kept, goal missed" if self.is_kept else "goal missed"


def verdicts(durable: Report, asynchronous: Report | None, results: Results) -> list[Verdict]:
    """Every criterion, in the order of a report."""

    def least(what: str, unit: str, value: float | None, gate: float | None, goal: float) -> Verdict:
        return Verdict(what=what, unit=unit, value=value, gate=gate, goal=goal, is_least=True)

    def most(what: str, unit: str, value: float | None, gate: float | None, goal: float) -> Verdict:
        return Verdict(what=what, unit=unit, value=value, gate=gate, goal=goal)

    def ours(workload: str, metric: str, condition: str = "") -> float | None:
        return results.value(OURS, workload, metric, condition)

    postgres_idle, changed = ours("W7", "Postgres"), append_only_changes(results)
    return [
        least("steps/s, durable, four processes, with rotation", "P", durable.p_ratio, 0.6, 1.0),
        least("the same with asynchronous commit", "P", asynchronous.p_ratio if asynchronous else None, 0.8, 1.5),
        most("CPU a step, Postgres and Python", "µs", durable.cpu_us_per_step, 8, 5),
        most("WAL a step", "× payload", durable.wal_bytes_per_step / durable.payload_bytes, 1.3, 1.1),
        most("updated and deleted rows a step, all tables", "rows", durable.changed_rows_per_step, 0.01, 0.002),
        most("updated and deleted rows in log, timers, started, finished", "rows", changed, 0, 0),
        most("throughput lost beside a held snapshot", "%", ours("W1", "drift", HELD), 15, 5),
        most(
            "CPU of Postgres gained there, against the workers'",
            "%",
            ours("W1", "CPU of Postgres drift", HELD),
            15,
            5,
        ),
        most("lone step's p50 gained beside a held snapshot", "%", ours("W2", "drift", HELD), 15, 5),
        most("lone chain, a step, p50", "ms", durable.lone_step_ms_p50, 1.5, 1.0),
        most("lone chain, a step, p99", "ms", durable.lone_step_ms_p99, None, 3.0),
        most("idle: transaction ids", "/s", durable.idle_xids_per_s, 0, 0),
        most("idle: Postgres", "% of a core", postgres_idle, 1, 1),
        most("W2 lone ten-step flow, p50", "ms", ours("W2", "ten steps p50"), None, 6),
        most("W4 sleepers due at once, the last late by", "s", ours("W4", "the last late by"), None, 0.5),
        most("W5 fan-out with join", "s", ours("W5", "joined after"), None, 0.1),
        most("W6 recovery from kill -9, the longest gap", "s", ours("W6", "longest gap"), None, 1.0),
        least("W8 starts, one by one", "/s", ours("W8", "single"), None, 5_000),
        least("W8 starts, in batches", "/s", ours("W8", "batch"), None, 200_000),
    ]


def append_only_changes(results: Results) -> float | None:
    """Rows updated or deleted in the tables that must have none, in W1; None if it was not run."""
    found = list(_changes(results))
    return sum(found) if found else None


def _changes(results: Results) -> Iterable[float]:
    for cell in results.cells:
        is_change = cell.metric.startswith(APPEND_ONLY) and cell.metric.endswith((" updated", " deleted"))
        if cell.system == OURS and cell.workload == "W3" and is_change:
            yield cell.value or 0.0
