"""A connection that outlives its server: opened again when the server is back."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg

from durable_cluster.database import connect
from durable_cluster.errors import ConnectionFailed

T = TypeVar("T")

PATIENCE_S = 60.0
PAUSE_S = 0.1
LOST = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.CrashShutdown, ConnectionFailed)


class Lasting:
    """For questions, and for whatever else may be asked twice: an answer may have been lost on its way."""

    def __init__(self, dsn: str, *, name: str, patience_s: float = PATIENCE_S) -> None:
        self._dsn = dsn
        self._name = name
        self._patience_s = patience_s
        self._connection = connect(dsn, name=name)

    def ask(self, question: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Its answer. Raises what it raises, and what is in the way of a connection once that has lasted too long."""
        stop_at = time.monotonic() + self._patience_s
        while True:
            try:
                if self._connection.closed:
                    self._connection = connect(self._dsn, name=self._name)
                return question(self._connection)
            except LOST as error:
                is_lost = isinstance(error, ConnectionFailed) or self._connection.closed or self._connection.broken
                if not is_lost or time.monotonic() > stop_at:
                    raise
                self._connection.close()
                time.sleep(PAUSE_S)

    def close(self) -> None:
        """Safe twice."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
