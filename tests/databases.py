"""The databases of the tests: each test has one to itself, and what that costs is most of what the tests cost.

A database is a copy of some 700 files, so its server keeps its data in memory where there is room. It is dropped two tests
later, when its sessions are gone: a server waits 100 ms for one that is only leaving. And one to which nothing was written,
which is a test of what is refused, is handed on: the server gives a transaction a number before it lets it write, so where
no number was given, no byte has changed (a sequence takes one for its first value after a checkpoint, and a copy is one).
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

LEAVING_S_MAX = 0.5
KEPT = 2

_numbers = itertools.count(1)


class Databases:
    """The databases of one server, by the template of which they are copies."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._admin: psycopg.Connection[Any] | None = None
        self._made: dict[
            str, tuple[str, str]
        ] = {}  # name: its template, and the next transaction's number when it was lent
        self._unwritten: dict[str, str] = {}  # template: name
        self._spent: list[str] = []

    def lend(self, template: str) -> str:
        """The name of a database that is as the template is."""
        name = self._unwritten.pop(template, None)
        if name is None:
            self._drop_spent(KEPT)
            name = f"durable_test_{os.getpid()}_{next(_numbers)}"
            # A copy of files, where nothing is flushed, takes a third of the time that a logged copy takes.
            self._ask(f"create database {name} template {template} strategy file_copy")
        self._made[name] = template, self._next_transaction()
        return name

    def take_back(self, name: str) -> None:
        """A test is done with it: whoever is still connected is sent away."""
        template, before = self._made.pop(name)
        is_unwritten = template not in self._unwritten and self._next_transaction() == before
        self._send_away(name)
        # Asked again: who was sent away may have written, and is counted once it has left.
        if is_unwritten and self._is_left(name) and self._next_transaction() == before:
            self._unwritten[template] = name
            return
        self._ask(f"alter database {name} allow_connections false")  # whoever was left behind does not come back
        self._send_away(name)
        self._spent.append(name)

    def close(self) -> None:
        """Drop them all."""
        self._spent += [*self._made, *self._unwritten.values()]
        self._drop_spent(0)
        if self._admin is not None:
            self._admin.close()

    def dsn(self, name: str) -> str:
        return make_conninfo(self._server, dbname=name)

    def _send_away(self, name: str) -> None:
        self._ask(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")

    def _drop_spent(self, kept: int) -> None:
        while len(self._spent) > kept:
            self._ask(f"drop database if exists {self._spent.pop(0)} with (force)")

    def _is_left(self, name: str) -> bool:
        """Whether its sessions have ended, which takes them milliseconds."""
        deadline = time.monotonic() + LEAVING_S_MAX
        while self._ask(f"select count(*) from pg_stat_activity where datname = '{name}'") != "0":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _next_transaction(self) -> str:
        return self._ask("select pg_snapshot_xmax(pg_current_snapshot())")

    def _ask(self, statement: str) -> str:
        """The answer as text. Tests may have cut the session."""
        try:
            return self._asked(statement)
        except psycopg.OperationalError:
            if self._admin is not None:
                self._admin.close()
            self._admin = None
            return self._asked(statement)

    def _asked(self, statement: str) -> str:
        if self._admin is None or self._admin.closed:
            self._admin = psycopg.connect(self._server, autocommit=True, application_name="databases of the tests")
        cursor = self._admin.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return str(row[0]) if row else ""
