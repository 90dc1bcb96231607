"""Which database a command works on: ``--dsn``, what the app says of itself, ``DURABLE_DSN``, or the local one under ``--data``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from psycopg.conninfo import conninfo_to_dict

from durable_cluster.app import App
from durable_cluster.database import connect, connect_client, server_name
from durable_cluster.embedded import EmbeddedPostgres
from durable_cluster.errors import DatabaseError
from durable_cluster.ops.terminal import BadUsage
from durable_cluster.premises import wheel_binaries
from durable_cluster.settings import environment

LOCK_TIMEOUT_MS = 10_000


class Database(msgspec.Struct, frozen=True, kw_only=True):
    """A database that can be connected to. ``name`` is fit for messages: it holds no password."""

    dsn: str
    name: str
    is_local: bool
    bin_dir: Path | None

    def connect(self, purpose: str, *, actor: str | None = None) -> psycopg.Connection[Any]:
        """An autocommit connection that does not wait for locks for ever. ``actor``: on whose behalf, for the audit."""
        connection = connect_client(self.dsn, name=f"durable-cluster {purpose}", actor=actor)
        connection.execute("select set_config('lock_timeout', %s, false)", (str(LOCK_TIMEOUT_MS),))
        return connection


class Target(msgspec.Struct, frozen=True):
    """What the command line said about the database."""

    dsn: str | None
    data_option: Path | None

    @property
    def data(self) -> Path:
        """The directory of the local Postgres and of the running cluster's pid file."""
        return self.data_option or environment().data

    @contextlib.contextmanager
    def opened(self, *, app: App | None = None, is_made: bool = False) -> Iterator[Database]:
        """The database, while it is needed; a local server runs for as long. ``app`` is told to use it.

        ``is_made``: make the local one if there is none; else that is a DatabaseError, which costs no server.
        """
        dsn = _readable("--dsn", self.dsn) or _readable("DURABLE_DSN, or the app's own dsn,", _outer_dsn(app))
        if dsn is not None:
            connect(dsn, name="durable-cluster check").close()
            yield self._told(app, Database(dsn=dsn, name=server_name(dsn), is_local=False, bin_dir=None))
            return
        if not is_made and not (self.data / "pgdata").exists():
            raise DatabaseError(
                f"there is no local database in {self.data}: 'durable-cluster start' makes one;"
                " or name a database with --dsn or DURABLE_DSN, or another directory with --data"
            )
        bin_dir = environment().pg_bin
        with EmbeddedPostgres(self.data, bin_dir) as server:
            name = f"local Postgres in {self.data}"
            yield self._told(
                app, Database(dsn=server.dsn, name=name, is_local=True, bin_dir=bin_dir or wheel_binaries())
            )

    def _told(self, app: App | None, database: Database) -> Database:
        if app is not None:
            app.client.use(database.dsn)
        return database


def _outer_dsn(app: App | None) -> str | None:
    """What the app's own code names (``App(dsn=…)``), else ``DURABLE_DSN``."""
    if app is None:
        return environment().dsn
    return None if app.client.is_embedded else app.client.dsn


def _readable(source: str, dsn: str | None) -> str | None:
    """``dsn`` if it can be read. The message never repeats it: there may be a password in it."""
    if dsn is None:
        return None
    if not dsn.strip():
        raise BadUsage(f"{source} is empty; leave it out for the local database")
    try:
        conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as error:
        raise BadUsage(
            f"{source} cannot be read as a connection string: write it as postgresql://user@host/database,"
            " or as 'host=… dbname=…'"
        ) from error
    return dsn
