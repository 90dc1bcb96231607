"""The SQL of the testing kit."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg
from psycopg import sql
from psycopg.errors import InsufficientPrivilege, UndefinedFunction

from durable_cluster.envelope import Envelope, decode_line
from durable_cluster.errors import ConfigurationError, DatabaseError, NotInstalled, translated
from durable_cluster.statements import plain_cursor

Connection = psycopg.Connection[Any]

# A timer without a line is that of a row in wait. What is in the log moves on by itself, and is not looked for.
STANDING = (
    "select w.id, 'waits' as place, w.line, null as progress from durable.wait w"
    " union all select d.id, 'runs', d.line, d.progress from durable.detached d"
    " union all select l.id, 'is stuck', l.line, null from durable.dead_letter l"
    " union all select p.id, 'is paused', p.line, null from durable.parked p"
    " union all select q.id, 'waits for a permit', q.line, null from durable.queued q"
    " union all select t.workflow_id, 'sleeps', t.line, null from durable.timer t, durable.timer_control c"
    " where t.line is not null and (t.due, t.id) > (c.reached_due, c.reached_id)"
)


class Standing(msgspec.Struct, frozen=True):
    """A live workflow that stands still. ``place``: 'waits', 'sleeps', 'runs', 'is stuck' …; ``envelope``: its next step event."""

    place: str
    envelope: Envelope


def create_database(admin: Connection, name: str, *, template: str | None, strategy: str) -> None:
    """Make a database, as ``template`` is or empty; ``strategy``: how it is copied. Raises DatabaseError."""
    statement = sql.SQL("create database {} template {} strategy {}")
    source = sql.Identifier(template or "template0")
    try:
        admin.execute(statement.format(sql.Identifier(name), source, sql.Identifier(strategy)))
    except InsufficientPrivilege as error:
        raise DatabaseError(
            f"the testing kit makes databases of its own on the server of DURABLE_DSN, and user '{admin.info.user}' may not:"
            " let it (alter role … createdb), or unset DURABLE_DSN to test on a local Postgres"
        ) from error


def drop_database(admin: Connection, name: str) -> None:
    """Drop a database with whoever is connected to it."""
    admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def set_clock(connection: Connection, to: datetime) -> None:
    """From now on ``durable.now()`` is this. Raises InputError for a time it cannot show, ConfigurationError for a real clock."""
    try:
        with translated():
            plain_cursor(connection).execute("select durable.set_clock(%s)", (to,))
    except NotInstalled as error:
        if not isinstance(error.__cause__, UndefinedFunction):
            raise
        raise ConfigurationError(
            "the clock of this database is the real one, which nothing moves: only a database that the testing kit made has"
            " another; leave dsn= away, and it makes one"
        ) from error


def next_due(connection: Connection) -> datetime | None:
    """When the first timer or schedule is due that is not due yet."""
    row = (
        plain_cursor(connection)
        .execute(
            "select least("
            "(select t.due from durable.timer t, durable.timer_control c"
            " where (t.due, t.id) > (c.reached_due, c.reached_id) and t.due > n.now order by t.due limit 1),"
            "(select min(s.next_due) from durable.schedule s where s.paused_at is null and s.next_due > n.now))"
            " from (select durable.now() as now offset 0) n"
        )
        .fetchone()
    )
    return None if row is None else row[0]


def signals_awaited(connection: Connection, workflow_id: str) -> list[str]:
    """The names of the signals that a workflow waits for."""
    row = (
        plain_cursor(connection)
        .execute("select names from durable.wait where id = %s and names is not null", (workflow_id,))
        .fetchone()
    )
    return list(row[0]) if row else []


def standing(connection: Connection, workflows: Sequence[str], *, limit: int) -> list[Standing]:
    """So many of the live workflows of these kinds that stand still. The database role has to own the schema."""
    where = f"select place, line, progress from ({STANDING}) s where s.line::json ->> 'f' = any (%s) limit %s"
    return _standing(plain_cursor(connection).execute(where.encode(), (list(workflows), limit)).fetchall())


def standing_at(connection: Connection, workflow_id: str) -> Standing | None:
    """Where this one stands; None if it has ended, or is on its way."""
    where = f"select place, line, progress from ({STANDING}) s where s.id = %s"
    found = _standing(plain_cursor(connection).execute(where.encode(), (workflow_id,)).fetchall())
    return found[0] if found else None


def _standing(rows: Sequence[tuple[str, str, str | None]]) -> list[Standing]:
    found = []
    for place, line, progress in rows:
        envelope = decode_line(line)
        if progress is not None:
            envelope = msgspec.structs.replace(envelope, progress=msgspec.json.decode(progress))
        found.append(Standing(place, envelope))
    return found
