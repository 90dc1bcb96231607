"""Opening connections: one way in, the same session settings everywhere, errors that name the server and not its password."""

from __future__ import annotations

import re
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import ReadOnlySqlTransaction

from durable_cluster.errors import ConfigurationError, ConnectionFailed, HandlerError
from durable_cluster.settings import Settings, environment

CONNECT_TIMEOUT_S = 10
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVES = 3
ENDS_A_TRANSACTION = re.compile(
    r"^\s*(?:commit|end|abort|begin|start\s+transaction|prepare\s+transaction|rollback(?!\s+(?:work\s+|transaction\s+)?to\b))\b",
    re.IGNORECASE,
)
IDLE_IN_TRANSACTION_OF_DEAD_INTERVAL = 0.8
CONNECTION_LOST = (psycopg.OperationalError, psycopg.InterfaceError, ReadOnlySqlTransaction)
"""A server that is gone, shuts down, or after a failover only reads: another connection may find a better one."""


def server_name(dsn: str) -> str:
    """Host and database of ``dsn``, fit for messages."""
    known = conninfo_to_dict(dsn)
    return f"{known.get('host') or 'localhost'}:{known.get('port') or 5432}/{known.get('dbname') or known.get('user') or ''}"


def connect(
    dsn: str, *, name: str, kind: type[psycopg.Connection[Any]] = psycopg.Connection
) -> psycopg.Connection[Any]:
    """An autocommit connection called ``name`` in pg_stat_activity. Raises ConnectionFailed or ConfigurationError."""
    try:
        return kind.connect(
            dsn,
            autocommit=True,
            application_name=name,
            connect_timeout=CONNECT_TIMEOUT_S,
            keepalives_idle=KEEPALIVE_IDLE_S,
            keepalives_interval=KEEPALIVE_INTERVAL_S,
            keepalives_count=KEEPALIVES,
        )
    except psycopg.ProgrammingError:
        # Neither the DSN nor what libpq says of it may be repeated: both can hold a password.
        raise ConfigurationError("the DSN cannot be read; write it as postgresql://user@host/database") from None
    except psycopg.OperationalError as error:
        raise ConnectionFailed(f"cannot connect to {server_name(dsn)}: {_first_line(error)}") from error


def connect_client(dsn: str, *, name: str, actor: str | None = None) -> psycopg.Connection[Any]:
    """As ``connect``, for programs and commands: the audit is told on whose behalf they act, ``actor`` or ``DURABLE_ACTOR``."""
    connection = connect(dsn, name=name)
    actor = actor or environment().actor
    if actor is not None:
        connection.execute("select set_config('durable.actor', %s, false)", (actor,))
    return connection


class StepCursor(psycopg.Cursor[Any]):
    """The cursor of a worker's connection: a step must not end the transaction that hands its neighbours on."""

    def execute(self, query: Any, *args: Any, **options: Any) -> Self:
        text = query if isinstance(query, str) else query.decode() if isinstance(query, bytes) else ""
        if ENDS_A_TRANSACTION.search(text):
            raise HandlerError(
                f"a step must not run '{text.strip()[:20]}': its transaction is the page's; use savepoints"
            )
        return super().execute(query, *args, **options)


class WorkerConnection(psycopg.Connection[Any]):
    """A worker's connection: the step that is given it must not close it, also not by ``with ctx.tx``."""

    is_of_a_step = False

    def close(self) -> None:
        if self.is_of_a_step:
            raise HandlerError(
                "a step must not close ctx.tx: the connection is the page's; use 'with ctx.tx.transaction()'"
            )
        super().close()


def connect_worker(dsn: str, *, name: str, settings: Settings) -> psycopg.Connection[Any]:
    """As ``connect``, for processes whose transactions must not hold others up.

    A transaction that sits idle ends before its window would be taken over; a lock that is not had in time is an error.
    The server finds out as soon as we do when the other side has vanished: what the session holds is free then.
    Settings are made by SET rather than by start-up options, which poolers drop.
    """
    connection = connect(dsn, name=name, kind=WorkerConnection)
    connection.cursor_factory = StepCursor
    idle_ms = int(settings.dead_interval_s * 1000 * IDLE_IN_TRANSACTION_OF_DEAD_INTERVAL)
    connection.execute(
        "select set_config('lock_timeout', %s, false), set_config('idle_in_transaction_session_timeout', %s, false),"
        " set_config('statement_timeout', %s, false), set_config('jit', 'off', false),"
        " set_config('default_transaction_isolation', 'read committed', false), set_config('tcp_keepalives_idle', %s, false),"
        " set_config('tcp_keepalives_interval', %s, false), set_config('tcp_keepalives_count', %s, false)",
        (
            *(str(settings.lock_timeout_ms), str(idle_ms), str(int(settings.step_timeout_s * 1000) or 1)),
            *(str(KEEPALIVE_IDLE_S), str(KEEPALIVE_INTERVAL_S), str(KEEPALIVES)),
        ),
    )
    return connection


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
