"""Every metric by its name, and the values that processes and the database give them. ``docs/telemetry.md`` lists the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from durable_cluster.figures import Reading
from durable_cluster.meters import SECONDS, STEPS, Histogram, OfShard, Totals, summed

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


class Metric(msgspec.Struct, frozen=True):
    """``unit``: seconds, bytes, or what is counted. ``bounds``: of a histogram's buckets."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()


class Family(msgspec.Struct, frozen=True):
    """A metric and its values, by the values of its labels."""

    metric: Metric
    values: dict[tuple[str, ...], float | Histogram]


_TABLE = """
durable_build_info                | gauge     |           | version        | Always 1.
durable_steps_total               | counter   | steps     | shard workflow | Step events that handed their workflow on, or ended it.
durable_retries_total             | counter   | attempts  | shard workflow | Attempts that failed and are repeated.
durable_dead_letters_total        | counter   | steps     | shard workflow | Steps that were set aside as dead letters.
durable_workflows_ended_total     | counter   | workflows | shard workflow status | Workflows that ended, by status.
durable_unroutable_total          | counter   | steps     | shard          | Step events put off because no code here can run them.
durable_pages_total               | counter   | pages     | shard          | Pages that were run and committed.
durable_page_steps                | histogram | steps     | shard          | Step events and messages a page.
durable_page_duration_seconds     | histogram | seconds   | shard          | How long the steps of a page ran.
durable_claim_duration_seconds    | histogram | seconds   | shard          | How long a claim took that found work.
durable_commit_duration_seconds   | histogram | seconds   | shard          | How long a commit of a page took.
durable_fenced_commits_total      | counter   | commits   | shard          | Commits refused: somebody else has the window.
durable_detached_steps            | gauge     | steps     | shard          | Detached steps that run in this host's processes.
durable_processes                 | gauge     | processes | role           | Processes that are up.
durable_processes_expected        | gauge     | processes | role           | Processes that should be up.
durable_process_restarts_total    | counter   | processes | role shard     | Processes that ended unasked, to be started again.
durable_process_memory_bytes      | gauge     | bytes     | role shard     | Resident memory.
durable_process_cpu_seconds_total | counter   | seconds   | role shard     | Processor time, of dead processes too.
durable_step_cpu_seconds_total    | counter   | seconds   | workflow       | Processor time that was seen to go into steps.
durable_spans_dropped_total       | counter   | spans     |                | Spans that a full queue or the exporter lost.
durable_database_up               | gauge     |           |                | 1 if the database answered the last read in time.
durable_lag_events                | gauge     | steps     | shard          | Step events in the log that are not done.
durable_lag_seconds               | gauge     | seconds   | shard          | Age of the oldest step event that is not done, else 0.
durable_shard_consumers           | gauge     | processes | shard          | Consumers that are connected, from all hosts.
durable_rotation_age_seconds      | gauge     | seconds   | shard          | Since the log was rotated; 0 while it is empty.
durable_log_bytes                 | gauge     | bytes     | shard          | The log's tables with their indexes.
durable_timers_due                | gauge     | timers    |                | Timers that are due and have not fired, up to 10,001.
durable_timer_lag_seconds         | gauge     | seconds   |                | How late the oldest timer is that is due, else 0.
durable_schedule_lag_seconds      | gauge     | seconds   |                | How late the schedule is that is due longest, else 0.
durable_sleeping_workflows        | gauge     | workflows |                | Workflows that sleep for more than a minute.
durable_waits_open                | gauge     | workflows |                | Workflows that wait for a signal.
durable_joins_open                | gauge     | workflows |                | Workflows that wait for children.
durable_detached_waiting          | gauge     | steps     |                | Detached steps that no process runs yet.
durable_queued_steps              | gauge     | steps     |                | Steps that wait for a permit of a limit.
durable_parked_steps              | gauge     | steps     |                | Steps that wait for the end of a pause.
durable_stuck_workflows           | gauge     | workflows |                | Dead letters that nobody has retried or purged.
durable_dead_tuples               | gauge     | rows      | relation       | Dead row versions, as the server estimates.
durable_wal_bytes_total           | counter   | bytes     |                | WAL that the server has written, for everybody.
durable_history_lag_seconds       | gauge     | seconds   |                | How far the timelines are behind the log.
"""
"""Name, type, unit, labels and meaning."""


def _metrics() -> Iterator[Metric]:
    for line in _TABLE.strip().splitlines():
        name, kind, unit, labels, help = (cell.strip() for cell in line.split("|"))
        bounds = () if kind != HISTOGRAM else SECONDS if unit == "seconds" else STEPS
        yield Metric(name, kind, unit, tuple(labels.split()), help, bounds)


METRICS = {metric.name: metric for metric in _metrics()}


class Families:
    """Collects values by the metrics' names. Each metric is there, with or without values."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float | Histogram]] = {name: {} for name in METRICS}

    def put(self, name: str, value: float | Histogram, *labels: object) -> None:
        """One value; ``labels``: of its labels, in order. Those of the same labels are summed."""
        values = self._values[name]
        key = tuple(map(str, labels))
        known = values.get(key, 0.0)
        values[key] = value if isinstance(value, Histogram) or isinstance(known, Histogram) else known + value

    def __iter__(self) -> Iterator[Family]:
        return (Family(metric, self._values[name]) for name, metric in METRICS.items())


def put_build(to: Families) -> None:
    """What runs here."""
    from importlib.metadata import version  # dear, and most programs never ask

    to.put("durable_build_info", 1, version("durable-cluster"))


def put_totals(to: Families, several: Sequence[Totals], shards: int) -> None:
    """What processes have counted; of each of so many shards, also where that is nothing."""
    empty: Totals = {shard: OfShard() for shard in range(shards)}
    for shard, of in sorted(summed([empty, *several]).items()):
        to.put("durable_pages_total", of.pages, shard)
        to.put("durable_fenced_commits_total", of.fenced, shard)
        to.put("durable_unroutable_total", of.unroutable, shard)
        to.put("durable_page_steps", of.page_steps, shard)
        to.put("durable_page_duration_seconds", of.page_s, shard)
        to.put("durable_claim_duration_seconds", of.claim_s, shard)
        to.put("durable_commit_duration_seconds", of.commit_s, shard)
        for name, mine in sorted(of.workflows.items()):
            to.put("durable_step_cpu_seconds_total", 0.0, name)  # whoever has run is there, seen or not
            to.put("durable_steps_total", mine.steps, shard, name)
            to.put("durable_retries_total", mine.retries, shard, name)
            to.put("durable_dead_letters_total", mine.dead_letters, shard, name)
            for status in ("completed", "failed", "cancelled"):
                to.put("durable_workflows_ended_total", getattr(mine, status), shard, name, status)


def put_step_cpu(to: Families, several: Sequence[Mapping[str, float]]) -> None:
    """The processor time that processes have seen to go into steps, by type of workflow."""
    for step_cpu_s in several:
        for name, seconds in step_cpu_s.items():
            to.put("durable_step_cpu_seconds_total", seconds, name)


def put_detached(to: Families, several: Sequence[Mapping[int, int]], shards: int) -> None:
    """The detached steps that processes run now, by shard."""
    for detached in (dict.fromkeys(range(shards), 0), *several):
        for shard, steps in detached.items():
            to.put("durable_detached_steps", steps, shard)


OF_SHARDS = {
    "durable_lag_events": "lag_events",
    "durable_lag_seconds": "lag_s",
    "durable_shard_consumers": "consumers",
    "durable_rotation_age_seconds": "rotation_age_s",
    "durable_log_bytes": "log_bytes",
}
ASIDE = {
    "durable_timers_due": "timers_due",
    "durable_timer_lag_seconds": "timer_lag_s",
    "durable_schedule_lag_seconds": "schedule_lag_s",
    "durable_sleeping_workflows": "sleeping",
    "durable_waits_open": "waits",
    "durable_joins_open": "joins",
    "durable_detached_waiting": "detached_waiting",
    "durable_queued_steps": "queued",
    "durable_parked_steps": "parked",
    "durable_stuck_workflows": "stuck",
    "durable_wal_bytes_total": "wal_bytes",
    "durable_history_lag_seconds": "history_lag_s",
}


def put_database(to: Families, reading: Reading) -> None:
    """What the database said of itself."""
    to.put("durable_database_up", reading.is_up)
    if reading.figures is None:
        return
    for of in reading.figures.shards:
        for name, field in OF_SHARDS.items():
            to.put(name, getattr(of, field), of.shard)
    for name, field in ASIDE.items():
        if (value := getattr(reading.figures.aside, field)) is not None:
            to.put(name, value)
    for relation, dead in reading.figures.dead_tuples.items():
        to.put("durable_dead_tuples", dead, relation)
