"""Whose transaction a call joins: that of a psycopg connection, also of one that SQLAlchemy or Django holds. Neither is imported.

An async connection is asked by the same plain code as any other: it runs in a greenlet, whose parent awaits what a statement asks
for. ``over`` is such a parent; SQLAlchemy's ``run_sync`` is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self, TypeVar

import greenlet
import psycopg
from psycopg.adapt import AdaptersMap
from psycopg.rows import tuple_row

from durable_cluster import bridge
from durable_cluster.errors import InputError

R = TypeVar("R")
Row = tuple[Any, ...]


class Transaction(Protocol):
    """A connection of psycopg, of SQLAlchemy or of Django, plain or async; SQLAlchemy's sessions."""

    @property
    def connection(self) -> Any:
        """What it holds, or what gives it."""


class Joined:
    """A caller's connection, in whatever transaction it is. One that is in none, and commits by itself, does so."""

    def __init__(self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    def cursor(self) -> PlainCursor | AwaitedCursor:
        """One that gives tuples of the usual types, whatever rows, cursors and types the connection's owner prefers."""
        if isinstance(self._connection, psycopg.AsyncConnection):
            return AwaitedCursor(self._connection)
        return PlainCursor(self._connection, row_factory=tuple_row)


class PlainCursor(psycopg.Cursor[Row]):
    """With psycopg's own types, and not the connection's: Django has times without zones."""

    @property
    def adapters(self) -> AdaptersMap:
        return psycopg.adapters


class _AsyncCursor(psycopg.AsyncCursor[Row]):
    @property
    def adapters(self) -> AdaptersMap:
        return psycopg.adapters


class AwaitedCursor:
    """The cursor of an async connection, for plain code in a greenlet."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._cursor = _AsyncCursor(connection, row_factory=tuple_row)

    def execute(self, query: Any, params: Any = None) -> Self:
        bridge.wait(self._cursor.execute(query, params))
        return self

    def fetchone(self) -> Row | None:
        row: Row | None = bridge.wait(self._cursor.fetchone())
        return row

    def fetchall(self) -> list[Row]:
        rows: list[Row] = bridge.wait(self._cursor.fetchall())
        return rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.fetchall())


def joined(tx: Transaction) -> Joined:
    """The psycopg connection that ``tx`` is, or holds. Raises InputError for one that has to be awaited, or of another driver."""
    is_async = hasattr(tx, "run_sync")
    held = None if is_async else _held(tx)
    if is_async or (isinstance(held, psycopg.AsyncConnection) and greenlet.getcurrent().parent is None):
        raise InputError(
            f"tx: {_told(tx)} is asynchronous; await the method whose name ends with _async, such as start_async(…, tx=…)"
        )
    if isinstance(held, psycopg.Connection | psycopg.AsyncConnection):
        return Joined(held)
    what = _told(tx) if held is None else f"{_told(held)} of {_told(tx)}"
    raise InputError(
        f"tx: {what} is no psycopg connection; pass one of psycopg (version 3), of SQLAlchemy (postgresql+psycopg://) or of Django,"
        " or start it in SQL by the function durable.start"
    )


async def over(tx: Transaction, function: Callable[[Any], R]) -> R:
    """What ``function`` of a plain ``tx`` comes to, over an asynchronous one. Raises InputError for a plain one."""
    if isinstance(tx, psycopg.AsyncConnection):
        over_psycopg: R = await bridge.run(function, tx)
        return over_psycopg
    if hasattr(tx, "run_sync"):
        over_sqlalchemy: R = await tx.run_sync(function)
        return over_sqlalchemy
    raise InputError(
        f"tx: {_told(tx)} is not asynchronous and would block the event loop; call the method without _async,"
        " in the thread that uses the connection"
    )


def _held(tx: Any) -> Any:
    if isinstance(tx, psycopg.Connection | psycopg.AsyncConnection):
        return tx
    if hasattr(tx, "ensure_connection"):  # Django's, which connects at need
        tx.ensure_connection()
        return tx.connection
    if callable(getattr(tx, "connection", None)):  # SQLAlchemy's Session
        tx = tx.connection()
    held = getattr(getattr(tx, "connection", None), "driver_connection", None)
    if held is not None and not tx.in_transaction():
        tx.begin()  # as its first statement would: without this its commit() has nothing to commit
    return held


def _told(of: object) -> str:
    return f"{type(of).__module__.partition('.')[0]}'s {type(of).__name__}"
