"""The databases of the testing kit: copies of one that has everything installed, each for one cluster."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import secrets
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable_cluster import schema
from durable_cluster.database import connect
from durable_cluster.errors import ConnectionFailed
from durable_cluster.settings import environment
from durable_cluster.testing import statements
from durable_cluster.testing.server import server_in_memory

SHARDS = 1
COPIED_AS_FILES, COPIED_AS_LOG = "file_copy", "wal_log"
"""The first is faster where nothing is flushed, and a checkpoint of the whole server elsewhere."""


class Databases:
    """Those of this process, on a server of its own or on that of ``dsn``; all gone at ``close``."""

    def __init__(self, dsn: str | None = None) -> None:
        self._stack = ExitStack()
        self._pid = os.getpid()
        self._server = dsn or self._stack.enter_context(server_in_memory(bin_dir=environment().pg_bin))
        self._strategy = COPIED_AS_LOG if dsn else COPIED_AS_FILES
        self._prefix = f"durable_test_{self._pid}_{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._template: str | None = None
        self._spent: list[str] = []
        self._admin: psycopg.Connection[Any] | None = None

    def make(self) -> str:
        """The DSN of a new database with everything installed, and a clock that stands still. Raises DatabaseError."""
        name = f"{self._prefix}_{next(self._numbers)}"
        admin = self._administrator()
        if self._template is None:
            self._make_template(admin)
        statements.create_database(admin, name, template=self._template, strategy=self._strategy)
        return self._dsn(name)

    def give_back(self, dsn: str) -> None:
        """It is used no more. It is dropped after the next one: a server waits 100 ms for sessions that are only leaving."""
        self._drop_spent()
        self._spent.append(str(conninfo_to_dict(dsn)["dbname"]))

    def close(self) -> None:
        """Drop what is left, and end the server if it is ours; safe twice. A forked child leaves both to its parent."""
        if self._pid != os.getpid():
            return
        self._spent += [self._template] if self._template is not None else []
        with suppress(psycopg.OperationalError, ConnectionFailed):  # the server is gone, and they with it
            self._drop_spent()
        if self._admin is not None:
            self._admin.close()
        self._template = self._admin = None
        self._stack.close()

    def _make_template(self, admin: psycopg.Connection[Any]) -> None:
        name = f"{self._prefix}_template"
        statements.create_database(admin, name, template=None, strategy=COPIED_AS_LOG)
        try:
            with connect(self._dsn(name), name="durable-cluster testing") as connection:
                schema.install(connection, shards=SHARDS, with_roles=False, is_for_tests=True)
        except BaseException:
            statements.drop_database(admin, name)
            raise
        self._template = name

    def _drop_spent(self) -> None:
        while self._spent:
            statements.drop_database(self._administrator(), self._spent.pop(0))

    def _administrator(self) -> psycopg.Connection[Any]:
        if self._admin is None or self._admin.closed:
            self._admin = connect(self._server, name="durable-cluster testing")
        return self._admin

    def _dsn(self, name: str) -> str:
        return make_conninfo(self._server, dbname=name)


@functools.cache
def databases_on(dsn: str | None) -> Databases:
    """Those of this process, made when they are first asked for and closed at its end. ``dsn``: whose server, None: an own one."""
    made = Databases(dsn)
    atexit.register(made.close)
    return made
