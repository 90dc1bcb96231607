"""How long work stands still when whoever had it dies: a consumer by SIGKILL, or a whole host.

Every step says in a ledger who began it and when. What the dead process had is read while it is stopped: the lines left in its
windows, its detached steps. Its work goes on when somebody else begins one of those lines; a detached step, when that step
itself has begun again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec

from durable_cluster import Settings, schema, statements
from durable_cluster.database import connect
from durable_cluster.envelope import decode_page
from durable_cluster.errors import BatchLost
from durable_cluster.loadtest import measure, stage, survival_flows
from durable_cluster.loadtest.figures import Figure, say
from durable_cluster.loadtest.measure import Connection
from durable_cluster.ops.chaos import is_stopped

APP = survival_flows.__name__ + ":app"
SHARDS = 4
HOST_SHARDS = 2
WORKERS_PER_SHARD = 300  # 4 ms each: a window takes more than a second
CALLERS_PER_SHARD = 10
RECOVERY_S_MAX = 1.0
LOOK_S = 0.05
GONE_S_MAX = 120.0
SETTINGS = Settings(restarts_max=10_000, drain_grace_s=1.0)


class Window(msgspec.Struct, frozen=True):
    """A window with unfinished work: ``keys`` of the lines of its next page."""

    shard: int
    keys: list[str]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What a process had when it died: its windows, and the keys of its detached steps."""

    windows: list[Window]
    detached: list[str]

    @property
    def is_enough(self) -> bool:
        """Whether there is something of both kinds."""
        return bool(self.windows and self.detached)


class Gaps(msgspec.Struct, frozen=True):
    """Seconds from each death until somebody else went on."""

    windows_s: list[float]
    detached_s: list[float]
    adopted_s: list[float] = []


def recovery(dsn: str, *, kills: int) -> list[Figure]:
    """Kill consumers that hold a window and detached steps, one after the other, each time with all others alive."""
    gaps = Gaps([], [])
    with _working_cluster(dsn) as (cluster, connection):
        while len(gaps.windows_s) < kills:
            stage.until(lambda: len(cluster.supervisor.owners) == SHARDS, what="all consumers to be up")
            time.sleep(random.uniform(0.1, 0.3))
            cluster.demand_running()
            shard_of = {
                pid: int(name.partition("-")[2]) for name, pid in cluster.supervisor.pids.items() if name[-1].isdigit()
            }
            strike = _strike(connection, cluster.supervisor.owners)
            if strike is None:
                continue
            pid, killed_at, held = strike
            for window in held.windows:
                gaps_s = gaps.windows_s if window.shard == shard_of[pid] else gaps.adopted_s
                _add(gaps_s, _first_s(connection, window.keys, killed_at, besides=pid))
            _add(gaps.detached_s, _last_s(connection, held.detached, killed_at, besides=pid))
            last = "window {:.2f} s, detached {:.2f} s".format(
                *(some[-1] if some else 0.0 for some in (gaps.windows_s, gaps.detached_s))
            )
            last += f", of other shards so far {[round(gap_s, 2) for gap_s in gaps.adopted_s]}"
            say(f"recovery: {len(gaps.windows_s)} of {kills} kills; {last}")
    return [
        *_told(
            "recovery", f"window of a killed consumer goes on, {len(gaps.windows_s)}x", gaps.windows_s, RECOVERY_S_MAX
        ),
        *(
            _told(
                "recovery",
                f"window of a shard that it had adopted, {len(gaps.adopted_s)}x",
                gaps.adopted_s,
                RECOVERY_S_MAX,
            )
            if gaps.adopted_s
            else ()
        ),
        *_told("recovery", f"its detached steps run again, {len(gaps.detached_s)}x", gaps.detached_s, RECOVERY_S_MAX),
    ]


@contextmanager
def _working_cluster(dsn: str) -> Iterator[tuple[stage.RunningCluster, Connection]]:
    with connect(dsn, name="durable-loadtest") as connection:
        connection.execute(survival_flows.SCHEMA.encode())
        with stage.running_cluster(dsn, processes=SHARDS, shards=SHARDS, app=APP, settings=SETTINGS) as cluster:
            _begin_work(connection, SHARDS)
            yield cluster, connection


def _begin_work(connection: Connection, shards: int) -> None:
    survival_flows.worker.start_many(list(range(WORKERS_PER_SHARD * shards)), tx=connection)
    survival_flows.caller.start_many(list(range(CALLERS_PER_SHARD * shards)), tx=connection)


def _strike(connection: Connection, owners: dict[int, list[int]]) -> tuple[int, datetime, Held] | None:
    """Stop consumers until one is found that holds something of both kinds, and kill that one."""
    pids = list(owners)
    random.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        held = _held(connection, owners[pid]) if is_stopped(pid) else None
        if held is not None and held.is_enough:
            killed_at = _now(connection)
            os.kill(pid, signal.SIGKILL)
            return pid, killed_at, held
        os.kill(pid, signal.SIGCONT)
    time.sleep(LOOK_S)
    return None


def _held(connection: Connection, owners: list[int]) -> Held:
    rows = connection.execute("select shard, batch, owner from durable.win where owner = any(%s)", (owners,)).fetchall()
    windows = [Window(shard, _lines(connection, batch, owner)) for shard, batch, owner in rows]
    detached = connection.execute(
        "select durable.hex(id) || ':' || seq from durable.detached where owner = any(%s)", (owners,)
    ).fetchall()
    return Held(windows=[window for window in windows if window.keys], detached=[key for (key,) in detached])


def _lines(connection: Connection, batch: int, owner: int) -> list[str]:
    """The keys of the lines of a window's next page."""
    limits = {"lines_max": SETTINGS.page_lines_max, "bytes_max": SETTINGS.page_bytes_max}
    try:
        text = statements.page(connection, batch=batch, owner=owner, **limits)
    except BatchLost:
        return []
    page = decode_page(text) if text is not None else None
    return [] if page is None else [line.key for line in page.lines if line is not None]


def _first_s(connection: Connection, keys: list[str], killed_at: datetime, *, besides: int) -> float | None:
    """Until somebody else began one of these steps; None if a commit on its way handed all of them on."""
    begun = f"select min(at) from ({_BEGUN}) r"
    return _waited_s(connection, begun, keys, killed_at, besides)


def _last_s(connection: Connection, keys: list[str], killed_at: datetime, *, besides: int) -> float | None:
    """Until somebody else had begun the last of these steps."""
    begun = f"select case when count(*) = cardinality(%(keys)s::text[]) then max(at) end from ({_BEGUN}) r"
    return _waited_s(connection, begun, keys, killed_at, besides)


_BEGUN = (
    "select key, min(at) as at from survival.ran where at > %(killed_at)s and key = any(%(keys)s)"
    " and pid <> %(besides)s and host <> %(besides)s group by key"
)


def _waited_s(connection: Connection, query: str, keys: list[str], killed_at: datetime, besides: int) -> float | None:
    parameters = {"keys": keys, "killed_at": killed_at, "besides": besides}
    give_up_at = time.monotonic() + GONE_S_MAX
    while True:
        row = connection.execute(query.encode(), parameters).fetchone()
        if row is not None and row[0] is not None:
            return float((row[0] - killed_at).total_seconds())
        if time.monotonic() > give_up_at:
            return None
        time.sleep(stage.POLL_S)


def host(dsn: str, *, deaths: int, dead_interval_s: float) -> list[Figure]:
    """Kill a supervisor with all its children while that of another host lives: its work goes on after ``dead_interval_s``."""
    gaps = Gaps([], [])
    with connect(dsn, name="durable-loadtest") as connection, tempfile.TemporaryDirectory(prefix="durable-") as folder:
        connection.execute(survival_flows.SCHEMA.encode())
        schema.install(connection, shards=HOST_SHARDS)
        with _host(dsn, Path(folder) / "b", dead_interval_s):
            _begin_work(connection, HOST_SHARDS)
            while min(len(gaps.windows_s), len(gaps.detached_s)) < deaths:
                living = _owners(connection)
                with _host(dsn, Path(folder) / "a", dead_interval_s) as doomed:
                    killed_at, held = _kill_host(connection, doomed, living)
                for window in held.windows:
                    _add(gaps.windows_s, _first_s(connection, window.keys, killed_at, besides=doomed.pid))
                if held.detached:
                    _add(gaps.detached_s, _last_s(connection, held.detached, killed_at, besides=doomed.pid))
                say(f"host: {gaps.windows_s[-1:]} s, detached steps {gaps.detached_s[-1:]} s")
    limit_s = dead_interval_s + 1
    return [
        Figure(
            of="host",
            what=f"windows of a lost host go on, the longest of {len(gaps.windows_s)}",
            value=max(gaps.windows_s),
            unit="s",
            limit=limit_s,
        ),
        Figure(
            of="host",
            what=f"its detached steps run again, the longest of {len(gaps.detached_s)}",
            value=max(gaps.detached_s, default=float("inf")),
            unit="s",
            limit=limit_s,
        ),
    ]


@contextmanager
def _host(dsn: str, home: Path, dead_interval_s: float) -> Iterator[subprocess.Popen[str]]:
    """A supervisor and its children in a process group of their own, and under a home of their own; up."""
    home.mkdir(exist_ok=True)
    words = ["start", "--dsn", dsn, "--data", str(home), "--app", APP, "--log-level", "error", "--json"]
    options = [f"dead_interval_s={dead_interval_s}", "drain_grace_s=1", "restarts_max=10000"]
    command = [
        sys.executable,
        "-m",
        "durable_cluster.ops",
        *words,
        *(word for one in options for word in ("--set", one)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise stage.StageError("a supervisor did not come up; its error stands above")
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def _kill_host(connection: Connection, doomed: subprocess.Popen[str], living: set[int]) -> tuple[datetime, Held]:
    """Wait until the group has work of both kinds, kill all of it, and read what its owners held: those without a session now."""
    stage.until(
        lambda: _held(connection, list(_owners(connection) - living)).is_enough, what="the other host to have work"
    )
    sessions = "select count(*) from pg_stat_activity where starts_with(application_name, 'durable-cluster shard ')"
    before = _owners(connection)
    killed_at = _now(connection)
    os.killpg(doomed.pid, signal.SIGKILL)
    doomed.wait()
    stage.until(
        lambda: _is_true(connection, f"select ({sessions}) <= %s", HOST_SHARDS), what="the dead host's sessions to end"
    )
    return killed_at, _held(connection, list(before - _owners(connection)))


def _owners(connection: Connection) -> set[int]:
    """The incarnations that are connected now: their bits are the name of the session."""
    rows = connection.execute(
        "select substring(application_name from '[0-9a-f]{16}$') from pg_stat_activity"
        " where datname = current_database() and application_name ~ '^durable-cluster shard [0-9]+ c[0-9a-f]{16}$'"
    )
    return {int(bits, 16) for (bits,) in rows}


def _told(of: str, what: str, gaps_s: list[float], limit_s: float) -> list[Figure]:
    ordered = sorted(gaps_s) or [float("inf")]
    return [
        Figure(of=of, what=f"{what}: p50", value=measure.quantile(ordered, 0.5), unit="s"),
        Figure(of=of, what=f"{what}: p99", value=measure.quantile(ordered, 0.99), unit="s", limit=limit_s),
    ]


def _add(gaps_s: list[float], gap_s: float | None) -> None:
    if gap_s is not None:
        gaps_s.append(gap_s)


def _now(connection: Connection) -> datetime:
    row = connection.execute("select clock_timestamp()").fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def _is_true(connection: Connection, query: str, *arguments: object) -> bool:
    row = connection.execute(query.encode(), arguments or None).fetchone()
    return bool(row and row[0])
