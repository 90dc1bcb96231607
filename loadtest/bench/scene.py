"""Where one system is measured: a database and a directory of its own, both gone afterwards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from durable_cluster.loadtest.bench import meters
from durable_cluster.loadtest.bench.meters import Connection
from durable_cluster.loadtest.bench.work import Flow, Ledger, Stamp
from durable_cluster.loadtest.peers.base import System, Workers
from durable_cluster.loadtest.stage import StageError, database_on, until

LOOK_S = 0.005  # a stamp carries its own time: to look more often would only take processor time from who is measured
HELD = "held snapshot"


class Scene:
    """One system, installed, without workers yet; the harness's own session and ledger."""

    def __init__(self, system: System, connection: Connection) -> None:
        self.system = system
        self.connection = connection
        self.ledger = Ledger(system.directory)
        self.flows_made = 0
        self._is_closed = False

    def flows(self, count: int, like: Flow) -> list[Flow]:
        """So many new flows, numbered on."""
        first = self.flows_made + 1
        self.flows_made += count
        return [
            Flow(number, like.step, like.of, like.pause_ms, like.is_told, like.ballast)
            for number in range(first, self.flows_made + 1)
        ]

    def read(self, workers: Workers) -> meters.Reading:
        """Look at the meters."""
        return meters.read(self.connection, pids=workers.pids, thread_id=workers.thread_id)

    def close(self) -> None:
        """Have the system let go of its client's connections; safe twice."""
        if not self._is_closed:
            self._is_closed = True
            self.system.close()

    def await_end_of_sessions(self) -> None:
        """Close the client, and return once all sessions of the system have ended and so told the statistics what they did."""
        self.close()
        others = (
            "select not exists (select from pg_stat_activity where datname = current_database()"
            " and backend_type = 'client backend' and application_name <> %s)"
        )

        def have_ended() -> bool:
            row = self.connection.execute(others.encode(), (meters.SESSION,)).fetchone()
            return bool(row and row[0])

        until(have_ended, what="the system's sessions to end")

    def await_stamp(self, workers: Workers, flow: Flow, *, timeout_s: float) -> Stamp:
        """The stamp of the flow's last step. Raises StageError if it does not come in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for stamp in self.ledger.new_stamps():
                if (stamp.number, stamp.step) == (flow.number, flow.of):
                    return stamp
            time.sleep(LOOK_S)
        workers.demand_running()
        raise StageError(f"a flow has not ended after {timeout_s:g} s")

    def await_steps(self, workers: Workers, steps: int, *, timeout_s: float) -> None:
        """Return once so many steps have run since the beginning."""
        deadline = time.monotonic() + timeout_s
        while self.ledger.steps() < steps:
            if time.monotonic() > deadline:
                workers.demand_running()
                raise StageError(f"{self.ledger.steps():,} of {steps:,} steps have run after {timeout_s:g} s")
            time.sleep(LOOK_S)


@contextmanager
def scene(kind: type[System], server: str) -> Iterator[Scene]:
    """A system on a fresh database of ``server``."""
    with database_on(server) as dsn, tempfile.TemporaryDirectory(prefix="durable-bench-") as directory:
        system = kind(dsn, Path(directory))
        with meters.session(dsn) as connection:
            here = Scene(system, connection)
            try:
                system.install()
                yield here
            finally:
                here.close()


@contextmanager
def held_snapshot(dsn: str) -> Iterator[None]:
    """A REPEATABLE READ transaction that has looked once and stays open, as a long report or a forgotten psql does."""
    with meters.session(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with connection.transaction():
            connection.execute("select count(*) from pg_class")
            yield
