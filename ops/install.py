"""``init`` and ``uninstall``: our schemas into a database, and out of it."""

from __future__ import annotations

from typing import Any

import msgspec
import psycopg
from psycopg.errors import InsufficientPrivilege, LockNotAvailable

from durable_cluster import schema
from durable_cluster.errors import DatabaseError, SchemaMismatch
from durable_cluster.examples.orders import northwind
from durable_cluster.ops import lookups
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import BadUsage, Terminal


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``init``. ``migrations``: those that ran now."""

    database: str
    shards: int
    migrations: list[str]
    has_examples: bool


class Uninstalled(msgspec.Struct, frozen=True):
    """The answer of ``uninstall``."""

    database: str


def init(terminal: Terminal, target: Target, *, shards: int | None, with_roles: bool, with_examples: bool) -> int:
    """Install the schema, or bring it up to this version; changes nothing that is right already."""
    with target.opened(is_made=True) as database, database.connect("init") as connection:
        known = schema.installed_shards(connection)
        if known is not None and shards not in (None, known):
            raise SchemaMismatch(
                f"{database.name} is laid out for {known} shards, not {shards}: init never changes that, reshard does;"
                f" leave out --shards, or say --shards {known}"
            )
        layout = known or shards or schema.DEFAULT_SHARDS
        try:
            ran = schema.install(connection, shards=layout, with_roles=with_roles)
        except InsufficientPrivilege as error:
            raise DatabaseError(
                f"{database.name}: {error.diag.message_primary}; nothing was installed. The role needs CREATE on the"
                " database and, for our three roles, CREATEROLE: use another, or leave the roles out with --no-roles"
            ) from error
        if with_examples:
            northwind.prepare(connection)
        done = Installed(
            database=database.name, shards=layout, migrations=ran, has_examples=has_example_tables(connection)
        )
        what = (
            f"migrations run: {', '.join(ran)}" if ran else "it was installed already; its functions are this version's"
        )
        terminal.answer(done, [f"{database.name}: ready, {layout} shards ({what})"])
    return 0


def uninstall(terminal: Terminal, target: Target, *, is_agreed: bool) -> int:
    """Remove our schemas with every workflow in them. Refused while a cluster is connected."""
    with target.opened() as database, database.connect("uninstall") as connection:
        if not is_agreed:
            agreed = f"remove the durable schema of {database.name}, with every workflow in it?"
            if not terminal.is_interactive():
                raise BadUsage(f"uninstall removes every workflow of {database.name}: say --yes if that is meant")
            if not terminal.asks(agreed):
                raise DatabaseError("nothing was removed")
        if processes := lookups.connected(connection):
            raise DatabaseError(
                f"{processes} processes of a cluster are connected to {database.name}; nothing was removed:"
                " stop it first ('durable-cluster stop')"
            )
        try:
            schema.uninstall(connection)
        except LockNotAvailable as error:
            raise DatabaseError(
                f"somebody uses the tables of {database.name}; nothing was removed: end their transactions, try again"
            ) from error
        terminal.answer(Uninstalled(database.name), [f"{database.name}: the durable schema is gone"])
    return 0


def has_example_tables(connection: psycopg.Connection[Any]) -> bool:
    """Whether the bundled examples can run here."""
    row = connection.execute("select to_regclass('orders.stock') is not null").fetchone()
    return bool(row and row[0])
