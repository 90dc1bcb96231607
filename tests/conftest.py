"""A real Postgres for every test: one server a run, one database a test, made from an installed template."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from databases import Databases
from psycopg.conninfo import make_conninfo

from durable_cluster import Settings, schema
from durable_cluster.shards.messages import ClusterConfig
from durable_cluster.shards.supervisor import Supervisor
from durable_cluster.testing.server import server_in_memory

SHARDS = 2
TEMPLATE = "durable_template"
E2E = frozenset(
    f"test_{name}"
    for name in (
        *("bench", "cli_local", "console_browser", "console_schemathesis", "crash_points", "deploy", "embedded"),
        *("examples", "hotpath", "idle", "linear_crashes", "locust", "lost_connections", "memory", "monitoring"),
        *("orders", "reload", "telemetry_chaos", "typing"),
    )
)
"""Modules that start programs, servers or browsers of their own, seconds a test: ``make test`` leaves them to ``make e2e``."""


def pytest_configure() -> None:
    """A shell that runs this in the background has had it ignore Ctrl-C, and all that it starts: some tests send that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest picks by markers."""
    for item in items:
        if item.path.stem in E2E:
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The DSN of a server where databases may be made: ``DURABLE_TEST_DSN``, else an embedded one of this run."""
    given = os.environ.get("DURABLE_TEST_DSN")
    if given:
        yield given
        return
    pg_bin = os.environ.get("DURABLE_PG_BIN")
    with server_in_memory(tmp_path_factory.mktemp("pg"), Path(pg_bin) if pg_bin else None) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with everything installed, for two shards."""
    name = f"{TEMPLATE}_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"drop database if exists {name}")
        admin.execute(f"create database {name}")
    with psycopg.connect(make_conninfo(server, dbname=name), autocommit=True) as connection:
        schema.install(connection, shards=SHARDS)
    yield name
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"drop database if exists {name} with (force)")


@pytest.fixture(scope="session")
def databases(server: str) -> Iterator[Databases]:
    """What lends each test its databases."""
    made = Databases(server)
    yield made
    made.close()


@pytest.fixture
def new_database(databases: Databases) -> Iterator[Callable[[str | None], str]]:
    """Gives the DSNs of databases (of a template, or empty) that are the test's alone."""
    lent: list[str] = []

    def lend(template: str | None = None) -> str:
        lent.append(databases.lend(template or "template0"))
        return databases.dsn(lent[-1])

    yield lend
    for name in lent:
        databases.take_back(name)


@pytest.fixture
def dsn(new_database: Callable[[str | None], str], template: str) -> str:
    """A fresh database with everything installed."""
    return new_database(template)


@pytest.fixture
def empty_dsn(new_database: Callable[[str | None], str]) -> str:
    """A fresh database with nothing installed."""
    return new_database(None)


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to the fresh database."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def clock(conn: psycopg.Connection) -> Callable[[float], None]:
    """From now on durable.now() is the real time plus what is set, in seconds; outside MVCC, for all sessions at once."""
    conn.execute("create sequence durable.offset_ms minvalue -9000000000000")
    conn.execute("select setval('durable.offset_ms', 0)")
    conn.execute(
        "create or replace function durable.now() returns timestamptz language sql volatile as"
        " $$ select clock_timestamp() + last_value * interval '1 ms' from durable.offset_ms $$"
    )
    return lambda offset_s: conn.execute("select setval('durable.offset_ms', %s)", (int(offset_s * 1000),)) and None


@pytest.fixture
def eventually() -> Callable[..., None]:
    """``eventually(condition, seconds=10)``: wait until it is true; fail when the deadline passes. Never a bare sleep."""

    def wait(condition: Callable[[], object], *, seconds: float = 10.0, what: str = "the condition") -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not come true within {seconds} s")
            time.sleep(0.005)

    return wait


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was explored and by which seeds, where that was asked for (``make explore``)."""
    if "DURABLE_EXPLORE_SCHEDULES" not in os.environ:
        return
    for report in terminalreporter.stats.get("passed", []):
        for name, said in report.user_properties:
            if name == "explored":
                terminalreporter.write_line(str(said))


class Cluster:
    """A supervisor in a thread of this process, with its children."""

    def __init__(self, config: ClusterConfig) -> None:
        self.error: BaseException | None = None
        self._up = threading.Event()
        self.supervisor = Supervisor(config, on_up=lambda _: self._up.set())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def demand_up(self) -> Cluster:
        assert self._up.wait(30), self.error
        return self

    def stop(self) -> None:
        self.supervisor.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.error is None

    def _run(self) -> None:
        try:
            self.supervisor.run(with_signals=False)
        except BaseException as error:
            self.error = error


@pytest.fixture
def run_cluster() -> Iterator[Callable[..., Cluster]]:
    """``run_cluster(dsn, app="module:app", settings=…)``: a cluster of real processes, ended with the test."""
    made: list[Cluster] = []

    def run(dsn: str, *, app: str, settings: Settings, shards: int = SHARDS, per_shard: int = 1) -> Cluster:
        config = ClusterConfig(dsn=dsn, app=app, shards=shards, consumers_per_shard=per_shard, settings=settings)
        made.append(Cluster(config))
        return made[-1]

    yield run
    for cluster in made:
        cluster.stop()
