"""Where a measurement takes place: a fresh database, and a real cluster running on it."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from durable_cluster import Settings, schema
from durable_cluster.database import connect
from durable_cluster.embedded import EmbeddedPostgres
from durable_cluster.errors import DurableError
from durable_cluster.shards.messages import ClusterConfig
from durable_cluster.shards.supervisor import Supervisor

APP = "durable_cluster.loadtest.workloads:app"
POLL_S = 0.02
WAIT_S_MAX = 600.0

_numbers = itertools.count(1)

Connection = psycopg.Connection[Any]


class StageError(DurableError):
    """A measurement cannot go on."""


@contextmanager
def fresh_database(server: str | None, *, is_asynchronous: bool) -> Iterator[str]:
    """The DSN of a new, empty database on ``server``, dropped afterwards; without one, on a local Postgres of its own."""
    with some_server(server) as admin_dsn, database_on(admin_dsn, is_asynchronous=is_asynchronous) as dsn:
        yield dsn


def some_server(dsn: str | None, *, bin_dir: Path | None = None) -> AbstractContextManager[str]:
    """The DSN of the server that is given; without one, of a local Postgres of its own, with the binaries in ``bin_dir``."""
    return nullcontext(dsn) if dsn is not None else _local_server(bin_dir)


@contextmanager
def database_on(admin_dsn: str, *, is_asynchronous: bool = False) -> Iterator[str]:
    """The DSN of a new, empty database there, dropped afterwards."""
    name = f"durable_loadtest_{os.getpid()}_{next(_numbers)}"
    with connect(admin_dsn, name="durable-loadtest admin") as admin:
        admin.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        if is_asynchronous:
            admin.execute(sql.SQL("alter database {} set synchronous_commit = off").format(sql.Identifier(name)))
    try:
        yield make_conninfo(admin_dsn, dbname=name)
    finally:
        with connect(admin_dsn, name="durable-loadtest admin") as admin:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@contextmanager
def _local_server(bin_dir: Path | None) -> Iterator[str]:
    """A Postgres with the product's own settings, on disk: /tmp may be memory, where an fsync costs nothing."""
    on_disk = Path("/var/tmp")
    home = Path(tempfile.mkdtemp(prefix="durable-loadtest-", dir=on_disk if on_disk.is_dir() else None))
    try:
        with EmbeddedPostgres(home, bin_dir) as embedded:
            yield embedded.dsn
        until(lambda: not (home / "pgdata" / "postmaster.pid").exists(), what="the local Postgres to stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


class RunningCluster:
    """A supervisor in a thread of this process; its consumers are processes of their own."""

    def __init__(
        self, dsn: str, *, processes: int, shards: int, app: str = APP, settings: Settings | None = None
    ) -> None:
        config = ClusterConfig(
            dsn=dsn,
            app=app,
            shards=shards,
            consumers_per_shard=processes // shards,
            settings=settings or Settings(),
        )
        self._is_up = threading.Event()
        self._error: BaseException | None = None
        self.supervisor = Supervisor(config, on_up=lambda _: self._is_up.set())
        self._thread = threading.Thread(target=self._run, name="supervisor")

    @property
    def pids(self) -> list[int]:
        """The process ids of the children."""
        return list(self.supervisor.pids.values())

    @property
    def thread_id(self) -> int:
        """The kernel's id of the supervisor's thread."""
        return self._thread.native_id or 0

    def start(self) -> None:
        """Return when all consumers are up. Raises what kept them from it."""
        self._thread.start()
        until(lambda: self._is_up.is_set() or self._error is not None, what="the cluster to come up")
        self.demand_running()

    def demand_running(self) -> None:
        """Raise if the cluster stopped."""
        if self._error is not None:
            raise StageError(f"the cluster stopped: {self._error}") from self._error

    def demand_whole(self) -> None:
        """Raise if the cluster stopped, or had to start a process again: what was measured then is not its path."""
        self.demand_running()
        if self.supervisor.restarts:
            raise StageError("a consumer died while it was measured; see its error above, and measure again")

    def stop(self) -> None:
        """Drain the cluster and wait for its end; safe twice, and before start."""
        if self._thread.is_alive():
            self.supervisor.stop()
            self._thread.join()

    def _run(self) -> None:
        try:
            self.supervisor.run(with_signals=False)
        except BaseException as error:
            self._error = error


@contextmanager
def running_cluster(
    dsn: str, *, processes: int, shards: int, app: str = APP, settings: Settings | None = None
) -> Iterator[RunningCluster]:
    """Install the schema, and run a cluster for as long as the block lasts."""
    with connect(dsn, name="durable-loadtest install") as connection:
        schema.install(connection, shards=shards)
    cluster = RunningCluster(dsn, processes=processes, shards=shards, app=app, settings=settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def await_quiet(connection: Connection) -> None:
    """Return when nothing is left to run: no event without a window and no window open, in one snapshot."""
    until(
        lambda: _is_true(
            connection,
            "select not exists (select from durable.win) and not bool_or(durable.has_events(s.queue_id)) from durable.shard s",
        ),
        what="the cluster to finish its work",
    )


def await_sleep(connection: Connection) -> None:
    """Return when the consumers of every shard have fallen asleep."""
    until(
        lambda: _is_true(connection, "select bool_and(durable.is_asleep(s.shard)) from durable.shard s"),
        what="the consumers to fall asleep",
    )


def until(condition: Callable[[], bool], *, what: str) -> None:
    """Wait for ``condition``, asking every 20 ms. Raises StageError after ten minutes."""
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        if time.monotonic() > deadline:
            raise StageError(
                f"waited {WAIT_S_MAX:.0f} s for {what}; stop what else runs here, or measure for fewer --seconds"
            )
        time.sleep(POLL_S)


def _is_true(connection: Connection, query: str) -> bool:
    row = connection.execute(query.encode()).fetchone()
    return bool(row and row[0])
