"""A cluster with real processes: adoption, bounded restarts, drain, lost connections, and an end that takes all with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable_cluster import App, Settings
from durable_cluster.errors import ConnectionFailed, DurableError, SchemaMismatch
from durable_cluster.loading import load_app
from durable_cluster.shards.messages import ClusterConfig
from durable_cluster.shards.supervisor import ClusterStopped, Supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

Eventually = Callable[..., None]
SHARDS = 2
FLOWS = '''
"""What the supervisor's tests run."""
import os
import time
from pathlib import Path

from durable_cluster import App, Context, Continuation

app = App("tests")
count = app.machine("count", state=dict)
stuck = app.machine("stuck", state=str)
slow = app.machine("slow", state=float)
deadly = app.machine("deadly", state=int)


@count.step(start=True, transactional=True)
def counted(ctx: Context, to: dict) -> Continuation:
    ctx.tx.execute("insert into effect values (%s, %s)", (ctx.short_id, ctx.seq))
    return ctx.done(ctx.seq) if ctx.seq >= to["steps"] else ctx.goto(counted, to)


@stuck.step(start=True)
def held(ctx: Context, directory: str) -> Continuation:
    """Whoever comes first holds its window until it is killed; the next one is through at once."""
    mark = Path(directory) / "pid"
    if mark.exists():
        return ctx.done(os.getpid())
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    while True:
        time.sleep(1)


@slow.step(start=True)
def slept(ctx: Context, seconds: float) -> Continuation:
    time.sleep(seconds)
    return ctx.done(os.getpid())


@deadly.step(start=True)
def died(ctx: Context, code: int) -> Continuation:
    os._exit(code)
'''
SETTINGS = Settings(dead_interval_s=30.0, drain_grace_s=10.0)  # whatever takes 15 s here is a fault


class Cluster:
    """A supervisor in a thread of this process, with its children."""

    def __init__(
        self, dsn: str, *, shards: int = SHARDS, per_shard: int = 1, app: str = "", settings: Settings
    ) -> None:
        config = ClusterConfig(
            dsn=dsn, app=app or "flows_of_tests:app", shards=shards, consumers_per_shard=per_shard, settings=settings
        )
        self.up = threading.Event()
        self.error: BaseException | None = None
        self.supervisor = Supervisor(config, on_up=lambda _: self.up.set())
        self._thread = threading.Thread(target=self._run)

    def start(self) -> Cluster:
        self._thread.start()
        return self

    def started(self) -> Cluster:
        self.start()
        assert self.up.wait(30), self.error
        return self

    def stop(self) -> None:
        self.supervisor.stop()
        self.join()

    def join(self, seconds: float = 30.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.supervisor.run(with_signals=False)
        except DurableError as error:
            self.error = error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on ``sys.path``, which the children inherit, with the app's module."""
    made = tmp_path_factory.mktemp("flows")
    (made / "flows_of_tests.py").write_text(FLOWS)
    sys.path.insert(0, str(made))
    yield made
    sys.path.remove(str(made))


@pytest.fixture(scope="module")
def shared_dsn(server: str, template: str) -> Iterator[str]:
    """The database of the tests that share a cluster."""
    name = f"durable_supervisor_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} template {template}")
    dsn = make_conninfo(server, dbname=name)
    _make_effect(dsn)
    yield dsn
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"drop database {name} with (force)")


@pytest.fixture(scope="module")
def cluster(shared_dsn: str, folder: Path) -> Iterator[Cluster]:
    """Two shards, up; for tests that leave it so."""
    made = Cluster(shared_dsn, settings=SETTINGS).started()
    yield made
    made.stop()
    assert made.error is None


@pytest.fixture
def app(cluster: Cluster, shared_dsn: str) -> Iterator[App]:
    with _app(shared_dsn) as found:
        yield found


@contextlib.contextmanager
def _app(dsn: str) -> Iterator[App]:
    found = load_app("flows_of_tests:app")
    found.client.use(dsn)
    yield found
    found.close()


def _make_effect(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table effect (id text, seq int, primary key (id, seq))")


def _start_counts(app: App, workflows: int, steps: int) -> list[Any]:
    return list(app.named("count").start_many([{"steps": steps}] * workflows))


def _demand_exact(dsn: str, handles: list[Any], steps: int, *, timeout: float = 30.0) -> None:
    """Every workflow completed with all its effects, each once (the table's key refuses a second, which fails the step)."""
    deadline = time.monotonic() + timeout
    assert {one.result(timeout=max(0.1, deadline - time.monotonic())) for one in handles} == {steps}
    with psycopg.connect(dsn) as connection:
        ids = [one.id[:12] for one in handles]
        row = connection.execute("select count(*) from effect where id = any(%s)", (ids,)).fetchone()
    assert row == (len(handles) * steps,)


def _windows(dsn: str, condition: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(f"select count(*) from durable.win where {condition}").fetchone()
    assert row is not None
    return int(row[0])


def _holder(directory: Path, eventually: Eventually) -> int:
    mark = directory / "pid"
    eventually(mark.exists, what="a consumer holding its window")
    return int(mark.read_text())


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_cluster_is_a_consumer_for_each_shard_and_maintenance(cluster: Cluster, app: App, shared_dsn: str) -> None:
    assert set(cluster.supervisor.pids) == {"shard-0", "shard-1", "maintenance"}
    _demand_exact(shared_dsn, _start_counts(app, 50, 5), 5)


def test_the_work_of_a_killed_consumer_is_done_by_its_sibling_before_the_replacement_is_up(
    cluster: Cluster, app: App, tmp_path: Path, eventually: Eventually
) -> None:
    handle = app.named("stuck").start(str(tmp_path))
    victim = _holder(tmp_path, eventually)
    siblings = set(cluster.supervisor.pids.values()) - {victim}
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    doer = handle.result(timeout=10)
    seconds = time.monotonic() - killed_at
    assert doer in siblings, f"process {doer} did it after {seconds:.2f} s"
    eventually(lambda: victim not in cluster.supervisor.pids.values() and len(cluster.supervisor.pids) == 3)


def test_after_a_kill_both_shards_have_their_own_consumer_again(
    cluster: Cluster, app: App, shared_dsn: str, eventually: Eventually
) -> None:
    before = cluster.supervisor.pids["shard-1"]
    os.kill(before, signal.SIGKILL)
    handles = _start_counts(app, 50, 5)
    _demand_exact(shared_dsn, handles, 5)

    def is_whole() -> bool:
        with psycopg.connect(shared_dsn) as connection:
            rows = connection.execute("select consumers from durable.shard_status()").fetchall()
        return rows == [(1,), (1,)] and cluster.supervisor.pids.get("shard-1") != before

    eventually(is_whole, seconds=15, what="a consumer for each shard")


def test_consumers_whose_connections_are_cut_connect_again_and_nothing_is_lost_or_done_twice(
    cluster: Cluster, app: App, shared_dsn: str, eventually: Eventually
) -> None:
    pids = cluster.supervisor.pids
    handles = _start_counts(app, 300, 20)
    with psycopg.connect(shared_dsn, autocommit=True) as admin:
        for _ in range(3):
            last = admin.execute("select count(*) from effect").fetchone()
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                " and application_name ~ '^durable-cluster (shard|maintenance|supervisor)'"
            )
            eventually(lambda seen=last: admin.execute("select count(*) from effect").fetchone() != seen)
    _demand_exact(shared_dsn, handles, 20)
    assert cluster.supervisor.pids == pids  # nobody died of it


def test_a_child_that_cannot_import_its_app_stops_the_cluster_with_its_error(dsn: str, folder: Path) -> None:
    (folder / "broken_flows.py").write_text("import a_module_that_is_not_there\n")
    cluster = Cluster(dsn, app="broken_flows:app", settings=SETTINGS).start()
    cluster.join()
    assert isinstance(cluster.error, ClusterStopped)
    assert "cannot start" in str(cluster.error)
    assert "No module named 'a_module_that_is_not_there'" in str(cluster.error)
    assert cluster.supervisor.pids == {}


def test_a_child_that_ends_while_it_starts_stops_the_cluster(dsn: str, folder: Path) -> None:
    (folder / "exiting_flows.py").write_text("import os\nos._exit(7)\n")
    cluster = Cluster(dsn, app="exiting_flows:app", settings=SETTINGS).start()
    cluster.join()
    assert isinstance(cluster.error, ClusterStopped)
    assert "ended while it started (exit code 7)" in str(cluster.error)


def test_a_step_that_kills_every_consumer_stops_the_cluster_after_so_many_restarts(dsn: str, folder: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, restarts_max=2, max_crashes=100)
    cluster = Cluster(dsn, shards=SHARDS, settings=settings).started()
    with _app(dsn) as app:
        app.named("deadly").start(9)
    cluster.join(60)
    assert isinstance(cluster.error, ClusterStopped)
    assert "died 3 times in 60 s (last: exit code 9)" in str(cluster.error)
    assert cluster.supervisor.restarts <= 2 * SHARDS
    assert _windows(dsn, "active > '-infinity'") == 0  # what it held is free for the next cluster


def test_a_drained_cluster_hands_its_windows_back_and_the_next_one_goes_on_at_once(
    dsn: str, folder: Path, eventually: Eventually
) -> None:
    _make_effect(dsn)
    with _app(dsn) as app:
        naps = app.named("slow").start_many([0.2] * 20)
        first = Cluster(dsn, settings=SETTINGS).started()
        eventually(lambda: _windows(dsn, "true") > 0, what="an open window")
        first.stop()
        assert first.error is None
        assert _windows(dsn, "active > '-infinity'") == 0
        assert any(one.status() == "running" for one in naps), "the drain waited for the whole window"
        began = time.monotonic()
        second = Cluster(dsn, settings=SETTINGS).started()
        for one in naps:
            one.result(timeout=12)
        assert time.monotonic() - began < 12
        second.stop()


def test_a_stop_is_safe_before_the_run_and_twice_after_it(dsn: str, folder: Path) -> None:
    cluster = Cluster(dsn, settings=SETTINGS)
    cluster.supervisor.stop()
    cluster.start()
    cluster.join()
    cluster.supervisor.stop()
    cluster.supervisor.stop()
    assert cluster.error is None
    assert cluster.supervisor.pids == {}


def test_a_second_stop_ends_children_that_would_not(
    dsn: str, folder: Path, tmp_path: Path, eventually: Eventually
) -> None:
    cluster = Cluster(dsn, settings=SETTINGS).started()
    with _app(dsn) as app:
        app.named("stuck").start(str(tmp_path))
    victim = _holder(tmp_path, eventually)
    cluster.supervisor.stop()
    assert _is_running(victim)
    cluster.supervisor.stop()
    cluster.join(5)
    assert not _is_running(victim)
    assert _windows(dsn, "active > '-infinity'") == 0


def test_two_consumers_share_a_shard_without_loss_or_double(dsn: str, folder: Path) -> None:
    _make_effect(dsn)
    cluster = Cluster(dsn, per_shard=2, settings=SETTINGS).started()
    assert set(cluster.supervisor.pids) == {"shard-0.0", "shard-0.1", "shard-1.0", "shard-1.1", "maintenance"}
    with _app(dsn) as app:
        handles = [one for _ in range(20) for one in _start_counts(app, 20, 10)]
        os.kill(cluster.supervisor.pids["shard-0.1"], signal.SIGKILL)
        _demand_exact(dsn, handles, 10)
    cluster.stop()
    assert cluster.error is None


def test_a_killed_supervisor_takes_its_children_with_it(
    dsn: str, folder: Path, tmp_path: Path, eventually: Eventually
) -> None:
    command = [sys.executable, "-m", "durable_cluster.ops", "start", "--json", "--dsn", dsn, "--app", "flows_of_tests"]
    with subprocess.Popen([*command, "--data", str(tmp_path)], cwd=folder, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        up = msgspec.json.decode(supervisor.stdout.readline())
        children = [
            int(pid) for task in Path(f"/proc/{up['pid']}/task").glob("*/children") for pid in task.read_text().split()
        ]
        assert len(children) >= SHARDS + 1
        supervisor.kill()
        eventually(lambda: not any(map(_is_running, children)), seconds=15, what="the end of every child")


def test_a_database_of_another_layout_is_refused_and_nothing_is_started(dsn: str, folder: Path) -> None:
    with pytest.raises(SchemaMismatch, match=r"laid out for 2 shards, not 3.*reshard"):
        Cluster(dsn, shards=3, settings=SETTINGS)


def test_a_server_that_refuses_is_named(folder: Path) -> None:
    with pytest.raises(ConnectionFailed, match="cannot connect to localhost:1/nowhere"):
        Cluster("host=localhost port=1 dbname=nowhere password=hunter2", settings=SETTINGS)
