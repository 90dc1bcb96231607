"""Putting the schema into a database and taking it out: one idempotent transaction under a lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import psycopg
from psycopg import sql
from psycopg.errors import AmbiguousFunction, DependentObjectsStillExist
from psycopg.pq import TransactionStatus

from durable_cluster.database import connect
from durable_cluster.errors import DatabaseError, NotInstalled, SchemaMismatch, translated
from durable_cluster.settings import checked_shards
from durable_cluster.sql import DURABLE, ENGINE, MIGRATIONS, TESTING, read

DEFAULT_SHARDS = 8
SERVER_VERSION_MIN = 150000
INSTALL_LOCK = 0x6475_7261_626C_6500  # "durable": one installer at a time
ROLES = (
    "pgque_reader",
    "pgque_writer",
    "pgque_admin",
    "durable_client",
    "durable_worker",
    "durable_operator",
    "durable_viewer",
)

OUR_FUNCTIONS = (
    "select p.oid::regprocedure::text, p.ctid::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace"
    " where n.nspname in ('durable', 'pgque')"
)
_RELATIONS = (
    "select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace"
    " where n.nspname in ('durable', 'pgque') and c.relkind"
)
CONTENTS = (
    ("routine", OUR_FUNCTIONS),
    ("view", f"{_RELATIONS} = 'v'"),
    ("table", f"{_RELATIONS} in ('r', 'p')"),
    ("sequence", f"{_RELATIONS} = 'S'"),
    ("type", f"{_RELATIONS} = 'c'"),
)

# With wal_level=minimal, what a sequence gives in the transaction that made it is not logged, and nor are the next values up to the
# 32nd: a server that crashed would give them a second time. A sequence that was set logs the next value it gives.
LOG_SEQUENCES = (
    "select setval(s.seqrelid::regclass, coalesce(pg_sequence_last_value(s.seqrelid), s.seqstart),"
    " pg_sequence_last_value(s.seqrelid) is not null)"
    " from pg_sequence s join pg_class c on c.oid = s.seqrelid join pg_namespace n on n.oid = c.relnamespace"
    " where n.nspname in ('durable', 'pgque')"
)

FUNCTIONS = [("engine", name) for name in ENGINE] + [("durable", name) for name in DURABLE]
FOR_TESTS = [*FUNCTIONS, *(("testing", name) for name in TESTING)]
"""The same with a clock that can be set."""

Connection = psycopg.Connection[Any]


def install(connection: Connection, *, shards: int, with_roles: bool = True, is_for_tests: bool = False) -> list[str]:
    """Install or upgrade; the migrations that ran. A failure leaves the database as it was.

    ``is_for_tests``: with a clock that can be set. Raises SchemaMismatch for a database of a newer version or of another number of
    shards, or one that was not made for tests and should become so; DatabaseError for an old server.
    """
    checked_shards(shards)
    if is_for_tests:
        _refuse_to_set_its_clock(connection)
    if connection.info.server_version < SERVER_VERSION_MIN:
        raise DatabaseError(
            f"PostgreSQL {connection.info.parameter_status('server_version')} is too old; 15 or later is needed"
        )
    is_outermost = connection.info.transaction_status == TransactionStatus.IDLE
    with connection.transaction():
        if is_outermost:
            connection.execute("set transaction isolation level read committed")
        connection.execute("select pg_advisory_xact_lock(%s)", (INSTALL_LOCK,))
        connection.execute("select set_config('client_min_messages', 'warning', true)")
        if not with_roles:
            connection.execute("select set_config('durable.no_roles', 'on', true)")
        ran = _migrate(connection)
        _replace_functions(connection, FOR_TESTS if is_for_tests else FUNCTIONS)
        with translated():
            connection.execute("select durable.lay_out(%s)", (shards,))
        connection.execute("select durable.add_partitions()")
        if MIGRATIONS[0] in ran:
            connection.execute(LOG_SEQUENCES)
    return ran


def install_if_needed(dsn: str) -> None:
    """What the local Postgres gets without being asked: the schema, or this version of it."""
    with connect(dsn, name="durable-cluster init") as connection:
        if not is_current(connection):
            install(connection, shards=installed_shards(connection) or DEFAULT_SHARDS)


def is_current(connection: Connection) -> bool:
    """Whether the database holds this very version: its migrations and the text of its functions."""
    if not _exists(connection, "durable.functions") or set(_applied(connection)) != set(MIGRATIONS):
        return False
    return connection.execute("select digest from durable.functions").fetchone() == (_digest_of(FUNCTIONS),)


def uninstall(connection: Connection) -> None:
    """Remove our two schemas and, where no other database uses them, our roles; nothing else.

    Raises NotInstalled, and DatabaseError naming what of the user's depends on ours.
    """
    if installed_shards(connection) is None:
        raise NotInstalled("there is no durable schema in this database; nothing was removed")
    try:
        with connection.transaction():
            connection.execute("select pg_advisory_xact_lock(%s)", (INSTALL_LOCK,))
            connection.execute("select set_config('client_min_messages', 'warning', true)")
            _drop_contents(connection)
            connection.execute("drop schema durable")
            connection.execute("drop schema pgque")
    except DependentObjectsStillExist as error:
        raise DatabaseError(
            f"something of yours depends on the durable schema; drop it first, nothing was removed: {error.diag.message_detail}"
        ) from error
    for role in reversed(ROLES):
        try:
            connection.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))
        except psycopg.Error:
            continue  # another database's grants depend on it, or it is not ours to drop


def installed_shards(connection: Connection) -> int | None:
    """How many shards the database is laid out for; None without the schema."""
    if not _exists(connection, "durable.cluster"):
        return None
    row = connection.execute("select shards from durable.cluster").fetchone()
    return row[0] if row else None


def demand_installed(connection: Connection, *, shards: int | None = None) -> int:
    """The number of shards of a database whose schema is this version's. Raises NotInstalled, SchemaMismatch."""
    known = installed_shards(connection)
    if known is None:
        raise NotInstalled("the database lacks the durable schema; run 'durable-cluster init' on it first")
    applied = _applied(connection)
    if [name for name in MIGRATIONS if name not in applied]:
        raise SchemaMismatch("the database holds an older schema; run 'durable-cluster init' to upgrade it")
    if [name for name in applied if name not in MIGRATIONS]:
        raise SchemaMismatch("the database holds a newer schema than this version knows; upgrade durable-cluster")
    if shards is not None and shards != known:
        raise SchemaMismatch(
            f"this database is laid out for {known} shards, not {shards}; start with --shards {known} (reshard changes the layout)"
        )
    return known


def _migrate(connection: Connection) -> list[str]:
    """Run the migrations that this database has not seen; they are recorded with the digest of their text."""
    if _exists(connection, "durable.migration"):
        applied = _applied(connection)
    else:
        for name in ("pgque", "durable"):
            if connection.execute("select from pg_namespace where nspname = %s", (name,)).fetchone() is not None:
                raise SchemaMismatch(f"schema '{name}' exists and is not ours; move it away or use another database")
        connection.execute(
            "create schema durable;"
            "create table durable.migration"
            " (name text primary key, digest text not null, applied_at timestamptz not null default now())"
        )
        applied = {}
    if newer := [name for name in applied if name not in MIGRATIONS]:
        raise SchemaMismatch(
            f"the database holds a newer schema ({newer[-1]}) than this version knows; upgrade durable-cluster"
        )
    ran = [name for name in MIGRATIONS if name not in applied]
    for name in ran:
        _execute(connection, "migrations", name)
        digest = sha256(read("migrations", name).encode()).hexdigest()
        connection.execute("insert into durable.migration (name, digest) values (%s, %s)", (name, digest))
    return ran


def _exists(connection: Connection, relation: str) -> bool:
    row = connection.execute("select to_regclass(%s) is not null", (relation,)).fetchone()
    return bool(row and row[0])


def _applied(connection: Connection) -> dict[str, str]:
    return dict(connection.execute("select name, digest from durable.migration order by name").fetchall())


def _refuse_to_set_its_clock(connection: Connection) -> None:
    if _exists(connection, "durable.migration") and not _exists(connection, "durable.test_clock"):
        raise SchemaMismatch(
            "this database was not made by the testing kit: its clock is the real one and stays so; let the kit make one of its own"
        )


def _digest_of(functions: Sequence[tuple[str, str]]) -> str:
    return sha256("".join(read(folder, name) for folder, name in functions).encode()).hexdigest()


def _execute(connection: Connection, folder: str, name: str) -> None:
    connection.execute(read(folder, name).encode())


def _replace_functions(connection: Connection, functions: Sequence[tuple[str, str]]) -> None:
    """Write every function again, drop those that this version no longer has, and then grant."""
    before = dict(connection.execute(OUR_FUNCTIONS).fetchall())
    try:
        with connection.transaction():
            _write_functions(connection, functions)
    except AmbiguousFunction:
        # A call, beside a function of an older version that took fewer arguments: that goes first.
        connection.execute("select set_config('check_function_bodies', 'off', true)")
        _write_functions(connection, functions)
        _drop_unwritten(connection, before)
        connection.execute("select set_config('check_function_bodies', 'on', true)")
        _write_functions(connection, functions)
    _drop_unwritten(connection, before)
    for folder, name in functions:
        if name == "grants":
            _execute(connection, folder, name)
    connection.execute(
        "insert into durable.functions (digest) values (%s)"
        " on conflict (one) do update set digest = excluded.digest, installed_at = now()",
        (_digest_of(functions),),
    )


def _write_functions(connection: Connection, functions: Sequence[tuple[str, str]]) -> None:
    for folder, name in functions:
        if name != "grants":
            _execute(connection, folder, name)


def _drop_unwritten(connection: Connection, before: Mapping[str, str]) -> None:
    for signature, place in connection.execute(OUR_FUNCTIONS).fetchall():
        if before.get(signature) == place:  # its row is where it was: nobody has written it again
            connection.execute(f"drop routine {signature}".encode())


def _drop_contents(connection: Connection) -> None:
    """Drop what is in our schemas kind by kind, without cascade: what of the user's depends on it is an error."""
    for kind, query in CONTENTS:
        names = [row[0] for row in connection.execute(query.encode())]
        if names:
            connection.execute(f"drop {kind} {', '.join(names)}".encode())
