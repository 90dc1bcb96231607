"""The hot path, measured: ``python -m durable_cluster.loadtest.hotpath --json``.

What runs is the product: a supervisor, consumer processes, a server with durable settings, on a database of its own that is
dropped afterwards. Workflows have ten trivial ``def`` steps.

Method. Five rounds, each a backlog that lasts for about a fifth of ``--seconds``. The backlog is started by ``start_many`` in one
transaction: nothing of it is visible before the commit, and with the commit the clock starts. It stops when one snapshot shows
no unread event and no open window, asked every 20 ms. Loading is outside of the clock; claims, handlers, commits, maintenance
and what the server does in the background are inside. After each round, with the consumers quiescent, P is measured (see
``measure``). Rates are medians of the five; ``p_ratio`` is the quotient of the two medians. A round before the five warms up and
is not counted; every round is sized by the one before it. After the rounds the cluster is left idle; at last one workflow runs
alone, on all that is logged by then, for the latency of a step.

Keys of the answer, beside what their names say:
    p_rows_per_s            P: INSERT … SELECT of the same lines, one a row, into a table like the log's, between the rounds
    copy_rows_per_s         the same rows into the same table by COPY from this process
    heap_rows_per_s         the same into a bare heap without an index (no log, but the least that storing them costs)
    floor_us_per_step       CPU of a bare loop that decodes such a line, runs the handler and encodes the next line
    rotations               how often a log was rotated while the rounds ran; it is set to every ten seconds here
    cpu_us_per_step         user and system time of consumers, supervisor, their backends and the server's own processes,
                            over the rounds; null if the server is on another machine
    wal_bytes_per_step      WAL written over the rounds, whatever it was written for
    payload_bytes           average length of an envelope's line as stored
    changed_rows_per_step   rows updated and deleted in every table of ours, from before the warm-up to rest after the rounds
    lone_step_ms_p50, _p99  one workflow, nothing else running: from a step's handoff to the next step's
    idle_xids_per_s         transaction ids consumed while all consumers sleep
    seconds                 the sum of the rounds
    git_commit              of the code that ran, with "-dirty" if it was changed since; null outside of a checkout
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import msgspec

from durable_cluster.database import connect
from durable_cluster.errors import DurableError
from durable_cluster.loadtest import measure, stage, workloads
from durable_cluster.loadtest.measure import Connection, Limits, Span

ROUNDS = 5
P_SHARE = 0.5
WARM_UP_WORKFLOWS_A_PROCESS = 500
LOADED_AT_ONCE = 10_000
WORKFLOWS_MIN = 100
WORKFLOWS_MAX = 500_000
LONE_STEPS_A_SECOND = 100
LONE_STEPS_MIN = 200
IDLE_SHARE = 0.5
IDLE_S_MIN = 2.0
ROTATION_S = 10.0
DEFAULT_ROTATION_S = 600.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; the module says what its fields mean."""

    steps_per_s: float
    p_rows_per_s: float
    copy_rows_per_s: float
    heap_rows_per_s: float
    p_ratio: float
    floor_us_per_step: float
    rotations: int
    cpu_us_per_step: float | None
    wal_bytes_per_step: float
    payload_bytes: float
    changed_rows_per_step: float
    lone_step_ms_p50: float
    lone_step_ms_p99: float
    idle_xids_per_s: float
    seconds: float
    processes: int
    shards: int
    synchronous_commit: str
    git_commit: str | None


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One backlog, drained."""

    steps: int
    span: Span

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.span.seconds


class Hotpath:
    """One run on one cluster: ``connection`` looks and measures, the cluster works."""

    def __init__(self, connection: Connection, cluster: stage.RunningCluster, *, processes: int, shards: int) -> None:
        self._connection = connection
        self._cluster = cluster
        self._processes = processes
        self._shards = shards
        self._workflows = 0

    def report(self, *, seconds: float) -> Report:
        """Measure everything, in about three times ``seconds``."""
        changed_before = measure.changed_rows(self._connection)
        warm_up = self.round(self._processes * WARM_UP_WORKFLOWS_A_PROCESS)
        say(f"warm-up: {warm_up.steps_per_s:,.0f} steps/s")
        payload_bytes = measure.prepare_yardstick(self._connection)
        measure.set_rotation(self._connection, period_s=ROTATION_S)
        rotations = measure.rotations(self._connection)
        rounds, limits = self._rounds(warm_up, seconds=seconds / ROUNDS)
        rotations = measure.rotations(self._connection) - rotations
        measure.set_rotation(self._connection, period_s=DEFAULT_ROTATION_S)
        changed = measure.settled_changed_rows(self._connection, finished=self._workflows) - changed_before
        changed_per_step = changed / (self._workflows * workloads.STEPS)
        idle_xids_per_s = measure.idle_xids_per_s(self._connection, seconds=max(IDLE_S_MIN, seconds * IDLE_SHARE))
        say(f"idle: {idle_xids_per_s:g} transaction ids/s")
        lone_ms = self._lone(max(LONE_STEPS_MIN, int(seconds * LONE_STEPS_A_SECOND)))
        self._cluster.demand_whole()

        steps = sum(one.steps for one in rounds)
        steps_per_s = median(one.steps_per_s for one in rounds)
        cpu_s = [one.span.cpu_s for one in rounds if one.span.cpu_s is not None]
        return Report(
            steps_per_s=round(steps_per_s, 1),
            p_rows_per_s=round(limits.p_rows_per_s, 1),
            copy_rows_per_s=round(limits.copy_rows_per_s, 1),
            heap_rows_per_s=round(limits.heap_rows_per_s, 1),
            p_ratio=round(steps_per_s / limits.p_rows_per_s, 4),
            floor_us_per_step=round(measure.floor_us_per_step(self._connection), 2),
            rotations=rotations,
            cpu_us_per_step=round(sum(cpu_s) / steps * 1e6, 2) if len(cpu_s) == len(rounds) else None,
            wal_bytes_per_step=round(sum(one.span.wal_bytes for one in rounds) / steps, 1),
            payload_bytes=round(payload_bytes, 1),
            changed_rows_per_step=round(changed_per_step, 6),
            lone_step_ms_p50=round(measure.quantile(lone_ms, 0.5), 3),
            lone_step_ms_p99=round(measure.quantile(lone_ms, 0.99), 3),
            idle_xids_per_s=round(idle_xids_per_s, 3),
            seconds=round(sum(one.span.seconds for one in rounds), 2),
            processes=self._processes,
            shards=self._shards,
            synchronous_commit=setting(self._connection, "synchronous_commit"),
            git_commit=git_commit(),
        )

    def _rounds(self, warm_up: Round, *, seconds: float) -> tuple[list[Round], Limits]:
        """Five rounds of about so many seconds each, sized by the one before, and the limits between them."""
        rounds, limits = [warm_up], []
        for number in range(1, ROUNDS + 1):
            workflows = int(rounds[-1].steps_per_s * seconds / workloads.STEPS)
            rounds.append(self.round(min(WORKFLOWS_MAX, max(WORKFLOWS_MIN, workflows))))
            limits.append(measure.limits(self._connection, seconds=seconds * P_SHARE))
            say(
                f"round {number} of {ROUNDS}: {rounds[-1].steps_per_s:,.0f} steps/s in {rounds[-1].span.seconds:.1f} s,"
                f" P {limits[-1].p_rows_per_s:,.0f} rows/s"
            )
        return rounds[1:], measure.median_limits(limits)

    def round(self, workflows: int) -> Round:
        """Load a backlog, and measure from its commit until it is drained."""
        with connect(self._connection.info.dsn, name="durable-loadtest feed") as feed:
            with feed.transaction():
                for size in chunks(workflows):
                    workloads.ten_steps.start_many(workloads.short_flows(size), tx=feed)
                begin = self._read_meters()
            stage.await_quiet(self._connection)
            end = self._read_meters()
        self._workflows += workflows
        self._demand_finished()
        return Round(steps=workflows * workloads.STEPS, span=measure.span_between(begin, end))

    def _lone(self, steps: int) -> list[float]:
        """Run one workflow of so many steps; the milliseconds of each, ascending."""
        handle = workloads.chain.start(workloads.Count(1, steps))
        handle.result(timeout=stage.WAIT_S_MAX)
        lone_ms = measure.lone_steps_ms(self._connection, handle.id)
        say(f"a lone chain of {steps:,} steps: {measure.quantile(lone_ms, 0.5):.2f} ms a step at the median")
        return lone_ms

    def _read_meters(self) -> measure.Reading:
        return measure.read_meters(self._connection, pids=self._cluster.pids, thread_id=self._cluster.thread_id)

    def _demand_finished(self) -> None:
        """What ended otherwise than completed would make the figures those of another path."""
        self._cluster.demand_whole()
        row = self._connection.execute("select count(*) from durable.finished where status = 'completed'").fetchone()
        if row is None or row[0] != self._workflows:
            raise stage.StageError(
                f"{self._workflows:,} workflows were started and {row and row[0]:,} completed: see 'durable-cluster list'"
            )


def measured(
    server: str | None, *, seconds: float, processes: int = 4, shards: int = 4, is_asynchronous: bool = False
) -> Report:
    """Measure on a database of its own on ``server``; without one, on a local Postgres of its own."""
    with stage.fresh_database(server, is_asynchronous=is_asynchronous) as dsn:
        workloads.app.client.use(dsn)
        try:
            with (
                stage.running_cluster(dsn, processes=processes, shards=shards) as cluster,
                connect(dsn, name="durable-loadtest") as connection,
            ):
                return Hotpath(connection, cluster, processes=processes, shards=shards).report(seconds=seconds)
        finally:
            workloads.app.close()


def chunks(total: int) -> list[int]:
    """``total`` in calls of start_many."""
    return [min(LOADED_AT_ONCE, total - begin) for begin in range(0, total, LOADED_AT_ONCE)]


def setting(connection: Connection, name: str) -> str:
    """What the cluster's sessions find set."""
    row = connection.execute("select current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return str(row[0])


def git_commit() -> str | None:
    """The commit of this file's checkout; None if this file is not in one (an installed copy may lie in another's)."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def as_table(report: Report) -> str:
    """The report for people: a line a field, aligned."""
    fields = {
        name: f"{value:,}" if isinstance(value, float | int) else str(value or "unknown")
        for name, value in _fields(report)
    }
    width, wide = max(map(len, fields)), max(map(len, fields.values()))
    return "\n".join(f"{name:<{width}}  {value:>{wide}}" for name, value in fields.items())


def _fields(report: Report) -> Iterable[tuple[str, object]]:
    return ((name, getattr(report, name)) for name in report.__struct_fields__)


def say(text: str) -> None:
    """Progress; the answer alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with 2 when it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m durable_cluster.loadtest.hotpath",
        description="Measure the product's hot path on a database of its own.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the measured rounds take together (20)")
    parser.add_argument("--processes", type=int, default=4, help="consumer processes (4)")
    parser.add_argument("--shards", type=int, help="shards, of which the processes are a multiple (one a process)")
    parser.add_argument("--dsn", help="a server where a database may be made (default: a local Postgres of its own)")
    parser.add_argument(
        "--asynchronous", action="store_true", help="with synchronous_commit off, for the product and for P"
    )
    options = parser.parse_args(arguments)
    options.shards = options.processes if options.shards is None else options.shards
    if options.shards < 1 or options.processes < 1 or options.processes % options.shards:
        parser.error(
            f"{options.processes} processes on {options.shards} shards: give every shard the same number of processes"
        )
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g}: give it time")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 with the error in a line on standard error."""
    options = parsed(arguments)
    try:
        report = measured(
            options.dsn,
            seconds=options.seconds,
            processes=options.processes,
            shards=options.shards,
            is_asynchronous=options.asynchronous,
        )
    except DurableError as error:
        say(f"hotpath: {error}")
        return 1
    print(msgspec.json.encode(report).decode() if options.json else as_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
