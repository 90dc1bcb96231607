"""``audit``: who did what to workflows. Ids come truncated, or as a hash that only who has the id can match."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster import schema
from durable_cluster.errors import translated
from durable_cluster.ops.show import checked_prefix, moment
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import BadUsage, Terminal, table

EXPORTED_AT_ONCE = 5_000

Connection = psycopg.Connection[Any]


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the record. ``actor``: who did it, as they say; ``role``: as whom they were connected."""

    at: datetime
    what: str
    id: str | None
    actor: str | None
    role: str
    details: dict[str, Any]


class Exported(Happened, frozen=True, kw_only=True):
    """One row as it is written out. ``day``, ``number``: its place; ``id_hash``: what stands for the whole id."""

    day: int
    number: int
    id_hash: str | None


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``on`` and ``off``."""

    audit: bool


def switch(terminal: Terminal, target: Target, *, is_on: bool, actor: str | None) -> int:
    """Begin or end the record, for everybody and at once."""
    with target.opened() as database, database.connect("audit") as connection, translated():
        schema.demand_installed(connection)
        connection.execute("select durable.set_audit(%s, %s)", (is_on, actor))
    terminal.answer(Switched(audit=is_on), [f"the audit is {'on' if is_on else 'off'}"])
    return 0


def list_(
    terminal: Terminal,
    target: Target,
    *,
    prefix: str | None,
    actor: str | None,
    what: str | None,
    since: datetime | None,
    limit: int,
) -> int:
    """What happened, newest first."""
    digits = None if prefix is None else checked_prefix(prefix)
    with target.opened() as database, database.connect("audit") as connection:
        schema.demand_installed(connection)
        with translated(), connection.cursor(row_factory=kwargs_row(Happened)) as cursor:
            found = cursor.execute(
                "select at, what, id, actor, role, details from durable.audit_list(%s, %s, %s, %s, %s)",
                (digits, actor, what, since, limit),
            ).fetchall()
    rows = [(moment(one.at), one.what, one.id, one.actor, one.role, _told(one.details)) for one in found]
    terminal.answer(
        found, table(("at", "what", "id", "actor", "role", "details"), rows) if found else ["nothing is recorded"]
    )
    return 0


def export(
    terminal: Terminal, target: Target, *, since: datetime | None, before: datetime | None, out: Path | None
) -> int:
    """Write the record, oldest first, one JSON object a line, to a file or to standard output."""
    if since is None and before is None:
        raise BadUsage("say what: --since TIME, --before TIME, or both")
    written = 0
    with target.opened() as database, database.connect("audit") as connection:
        schema.demand_installed(connection)
        try:
            with nullcontext(sys.stdout.buffer) if out is None else out.open("xb") as file:
                for part in _exported(connection, since, before):
                    file.write(msgspec.json.Encoder().encode_lines(part))
                    written += len(part)
                file.flush()
        except FileExistsError as error:
            raise BadUsage(f"--out {out} is there already; name another file") from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise BadUsage(f"--out {out} cannot be written: {error.strerror}") from error
    terminal.note(f"{written:,} rows exported")
    return 0


def _exported(connection: Connection, since: datetime | None, before: datetime | None) -> Iterator[list[Exported]]:
    """Some rows at a time, all as of one moment: what is recorded meanwhile is not among them."""
    with connection.transaction(), translated(), connection.cursor(row_factory=kwargs_row(Exported)) as cursor:
        cursor.execute("set transaction isolation level repeatable read, read only")
        day, number = 0, 0
        while True:
            part = cursor.execute(
                "select day, number, at, what, id, id_hash, actor, role, details from durable.audit_page(%s, %s, %s, %s, %s)",
                (since, before, day, number, EXPORTED_AT_ONCE),
            ).fetchall()
            if part:
                yield part
            if len(part) < EXPORTED_AT_ONCE:
                return
            day, number = part[-1].day, part[-1].number


def _told(details: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in details.items())
