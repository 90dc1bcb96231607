"""``demo``: a cluster of its own on a fresh database, the orders through it, and with ``--chaos`` violence while they go.

The supervisor has this process's main thread, because signals go there; the load, the watch and the books have another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import msgspec
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege, ObjectInUse

from durable_cluster import log_output, schema
from durable_cluster.database import connect
from durable_cluster.errors import DatabaseError, DurableError
from durable_cluster.examples.orders.carrier import CarrierError
from durable_cluster.examples.orders.carrier_stub import carrier_process
from durable_cluster.loading import load_app
from durable_cluster.ops.chaos import Chaos, Havoc
from durable_cluster.ops.demo import checked_times, run_demo
from durable_cluster.ops.demo_watch import Standing
from durable_cluster.ops.reconcile import Reconciliation
from durable_cluster.ops.running import registered
from durable_cluster.ops.start import EXAMPLES
from durable_cluster.ops.target import Database, Target
from durable_cluster.ops.terminal import Terminal
from durable_cluster.pidfile import read_pidfile
from durable_cluster.settings import Settings
from durable_cluster.shards.messages import ClusterConfig
from durable_cluster.shards.supervisor import Supervisor

DATABASE = "durable_demo"
LINEAR = "durable_cluster.examples.orders.linear:app"
MARK = "made by durable-cluster demo, which drops it"
LEAVE_S = 2.0
# Stopped consumers are to be replaced, and the same places killed, far more often than in anybody's life.
UNDER_CHAOS = {"dead_interval_s": 3.0, "restarts_max": 1_000}


class DemoStopped(DurableError):
    """The cluster ended before the demo was through."""


def demo(
    terminal: Terminal,
    target: Target,
    *,
    times: int,
    is_chaotic: bool,
    is_linear: bool,
    shards: int | None,
    log_level: str,
) -> int:
    """Run it; 0 only if every figure is exact. ``is_linear``: the flow as a function, else as a machine."""
    form = log_output.chosen(None)
    log_output.configure(log_level, form)
    checked_times(times)
    with registered(target.data / "demo"), target.opened(is_made=True) as database:
        layout = shards or schema.DEFAULT_SHARDS
        dsn = fresh_database(database, shards=layout)
        terminal.note(f"{database.name}: database '{DATABASE}' made anew, {layout} shards")
        settings = msgspec.structs.replace(Settings(), **UNDER_CHAOS) if is_chaotic else Settings()
        config = ClusterConfig(
            dsn=dsn,
            app=LINEAR if is_linear else EXAMPLES,
            shards=layout,
            consumers_per_shard=1,
            settings=settings,
            log_level=log_level,
            log_format=form,
        )
        with carrier_process() as carrier:
            show = Performance(terminal, config, times=times, carrier=carrier)
            if is_chaotic:
                show.let_loose(partial(postmaster_of, target, database))
            books = show.run()
    return 0 if books.is_exact else 1


def postmaster_of(target: Target, database: Database) -> int | str | None:
    """The process id of the demo's own server, None while it has none, or why it must not be killed."""
    if not database.is_local:
        return "it is not the demo's own (--dsn)"
    with database.connect("demo") as connection:
        row = connection.execute(
            "select count(*) from pg_stat_activity where backend_type = 'client backend' and datname <> %s"
            " and pid <> pg_backend_pid()",
            (DATABASE,),
        ).fetchone()
    if row is not None and row[0]:
        return f"others use the {database.name} too"
    found = read_pidfile(target.data / "pgdata")
    return None if found is None else found.pid


class Performance:
    """One run of the demo: the supervisor here, everything else in a thread beside it."""

    def __init__(self, terminal: Terminal, config: ClusterConfig, *, times: int, carrier: str) -> None:
        self._terminal = terminal
        self._dsn = config.dsn
        self._app = load_app(config.app)
        self._times = times
        self._carrier = carrier
        self._is_up = threading.Event()
        self._is_over = threading.Event()
        self._is_closing = False
        self._supervisor = Supervisor(config, on_up=lambda _: self._is_up.set())
        self._chaos: Chaos | None = None
        self._books: Reconciliation | None = None
        self._error: Exception | None = None

    def let_loose(self, postmaster: Callable[[], int | str | None]) -> None:
        """Do violence to it while it runs; see ``Chaos``."""
        self._chaos = Chaos(self._supervisor, self._dsn, postmaster)

    def run(self) -> Reconciliation:
        """The books. Raises what kept the demo from being through."""
        thread = threading.Thread(target=self._perform, name="demo", daemon=True)
        thread.start()
        try:
            self._supervisor.run()
        finally:
            self._is_over.set()
            self._is_up.set()
            thread.join(None if self._is_closing else LEAVE_S)
        if self._error is not None:
            raise self._error
        if self._books is None:
            raise DemoStopped(
                "the demo was stopped before it was through; its database stays as it is until the next one"
            )
        return self._books

    def _perform(self) -> None:
        try:
            self._is_up.wait()
            self._demand_running()
            self._books = run_demo(
                self._terminal,
                self._dsn,
                times=self._times,
                carrier=self._carrier,
                app=self._app,
                on_standing=self._stand,
                before_books=self._close,
            )
        except (DurableError, CarrierError, psycopg.Error, OSError) as error:
            self._error = error
        finally:
            if self._chaos is not None:
                self._chaos.close()
            if not self._is_over.is_set():
                self._supervisor.stop()

    def _stand(self, standing: Standing) -> None:
        self._demand_running()
        if self._chaos is not None:
            self._chaos.strike(standing.ended / max(1, standing.total), standing.elapsed_s)

    def _close(self) -> Havoc | None:
        """The books want to be still: the cluster ends before they are read."""
        self._is_closing = True
        havoc = None
        if self._chaos is not None:
            havoc = self._chaos.finish()
            self._terminal.note(havoc.told())
            self._chaos.close()
        self._supervisor.stop()
        self._is_over.wait()
        return havoc

    def _demand_running(self) -> None:
        if self._is_over.is_set():
            raise DemoStopped("the cluster was stopped before the demo was through")


def fresh_database(database: Database, *, shards: int) -> str:
    """The DSN of the demo's own database on the server, empty but for the schema; the last demo's goes.

    Raises DatabaseError for one that is not ours, or in use, or may not be made.
    """
    name = sql.Identifier(DATABASE)
    with database.connect("demo") as connection:
        row = connection.execute(
            "select shobj_description(oid, 'pg_database') from pg_database where datname = %s", (DATABASE,)
        ).fetchone()
        if row is not None and row[0] != MARK:
            raise DatabaseError(
                f"{database.name}: a database '{DATABASE}' is there and not the demo's; rename or drop it"
            )
        try:
            connection.execute(sql.SQL("drop database if exists {}").format(name))
            connection.execute(sql.SQL("create database {} template template0").format(name))
        except ObjectInUse as error:
            raise DatabaseError(
                f"{database.name}: somebody is connected to the last demo's database '{DATABASE}';"
                " end that session, or wait for that demo"
            ) from error
        except InsufficientPrivilege as error:
            raise DatabaseError(
                f"{database.name}: the demo makes a database '{DATABASE}' of its own, and this role may not"
                f" ({error.diag.message_primary}); grant it CREATEDB, or leave out --dsn for a local server"
            ) from error
        connection.execute(sql.SQL("comment on database {} is {}").format(name, sql.Literal(MARK)))
    dsn = make_conninfo(database.dsn, dbname=DATABASE)
    with connect(dsn, name="durable-cluster demo") as connection:
        schema.install(connection, shards=shards)
    return dsn
