"""The console's way to the database: a few connections, each lent for one short transaction.

What is looked at is read in a read-only transaction. All limits are of the transaction and none of the session, so that they stay
with it where a pooler stands between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import IsolationLevel
from psycopg_pool import ConnectionPool
from starlette.requests import Request

from durable_cluster.app import App
from durable_cluster.database import CONNECT_TIMEOUT_S, server_name

CONNECTIONS_MAX = 4
WAIT_S = 3.0
RECONNECT_S = 5.0
"""So long a connection is tried for before whoever comes next tries anew: longer, and the pauses between would grow to minutes."""
STATEMENT_MS = 3_000
PAGE_MS = 8_000
LOCK_MS = 2_000
SERVER_WITH_TRANSACTION_TIMEOUT = 17_00_00

Connection = psycopg.Connection[Any]


class Access:
    """One database; ``name`` is fit for pages. ``app``: whose codec reads payloads and whose types inputs have to fit, if any."""

    def __init__(self, dsn: str, *, app: App | None = None) -> None:
        self.app = app
        self.name = server_name(dsn)
        self._pool = ConnectionPool(
            dsn,
            min_size=1,
            max_size=CONNECTIONS_MAX,
            timeout=WAIT_S,
            reconnect_timeout=RECONNECT_S,
            name="console",
            open=False,
            check=ConnectionPool.check_connection,
            kwargs={
                "application_name": "durable-cluster console",
                "connect_timeout": CONNECT_TIMEOUT_S,
                "prepare_threshold": None,
            },
        )

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """To look at something: a read-only transaction, in which no statement runs longer than some seconds.

        Let go of it before the page is made of what was read. Raises psycopg.OperationalError when none is to be had.
        """
        with self._lent(is_read_only=True, actor=None) as connection:
            yield connection

    @contextmanager
    def acting(self, actor: str | None) -> Iterator[Connection]:
        """To do something, on behalf of ``actor``: a transaction that is committed at the end of the block."""
        with self._lent(is_read_only=False, actor=actor) as connection:
            yield connection

    @contextmanager
    def _lent(self, *, is_read_only: bool, actor: str | None) -> Iterator[Connection]:
        with self._pool.connection() as connection:
            connection.read_only = is_read_only
            connection.isolation_level = IsolationLevel.READ_COMMITTED
            limits = {
                "statement_timeout": STATEMENT_MS,
                "lock_timeout": LOCK_MS,
                "idle_in_transaction_session_timeout": PAGE_MS,
                "jit": "off",
            }
            if connection.info.server_version >= SERVER_WITH_TRANSACTION_TIMEOUT:
                limits["transaction_timeout"] = PAGE_MS
            if actor is not None:
                limits["durable.actor"] = actor
            calls = ", ".join(["set_config(%s, %s, true)"] * len(limits))
            connection.execute(f"select {calls}".encode(), [str(word) for limit in limits.items() for word in limit])
            yield connection

    def open(self) -> None:
        """Begin to connect, in the background: a database that is away keeps no console from starting. Safe twice."""
        self._pool.open()

    def close(self) -> None:
        """Safe twice."""
        self._pool.close()


def access_of(request: Request) -> Access:
    """The database of the application that got this request."""
    found: Access = request.app.state.access
    return found


def may(connection: Connection, function: str) -> bool:
    """Whether the database's role may call a function, such as ``durable.locate(uuid)``: asked before, so that nothing fails."""
    row = connection.execute("select has_function_privilege(%s, 'execute')", (function,)).fetchone()
    return bool(row and row[0])
