"""What the types of workflows cost, estimated from what is stored anyway: no step pays for being counted here.

The log still holds the step events of the last minutes: some of its pages say how many each type had, and how many bytes. What is
kept of workflows says the same of starts and results. The WAL of the server is known as a whole only: what is written between two
looks is divided by the step events that were appended meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg

from durable_cluster.errors import translated

Connection = psycopg.Connection[Any]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What a table of a shard's log says of a type, or, without one, of all: see ``durable.log_sample``."""

    workflow: str | None
    entries: float | None
    lines: float | None
    bytes: float | None
    sampled: int
    since: datetime | None
    until: datetime | None


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a type's workflows, estimated: see ``durable.kept_sample``."""

    workflow: str
    workflows: float
    living: float
    input_bytes: float
    output_bytes: float
    sampled: int


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """Step events of a type in the logs: so many of so many bytes in all; ``sampled``: what that rests on."""

    workflow: str
    lines: float
    bytes: float
    sampled: int


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """All logs together, the types with the most bytes first. ``since`` to ``until``: what they still hold."""

    types: list[Logged]
    entries: float
    lines: float
    bytes: float
    since: datetime | None
    until: datetime | None

    @property
    def seconds(self) -> float:
        """How long what they hold took to come in."""
        return 0.0 if self.since is None or self.until is None else (self.until - self.since).total_seconds()


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at what only grows: bytes of WAL of the whole server, and entries of the logs."""

    at: datetime
    wal_bytes: int
    entries: int


def log_sample(connection: Connection, shard: int) -> list[Part]:
    """What the log of one shard holds."""
    with translated():
        rows = connection.execute(
            "select workflow, entries, lines, bytes, sampled, since, until from durable.log_sample(%s::int)", (shard,)
        ).fetchall()
    return [Part(**dict(zip(Part.__struct_fields__, row, strict=True))) for row in rows]


def log_of(parts: Sequence[Part]) -> Log:
    """All logs together."""
    lines: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    sampled: dict[str, int] = defaultdict(int)
    for part in parts:
        if part.workflow is not None:
            lines[part.workflow] += part.lines or 0
            sizes[part.workflow] += part.bytes or 0
            sampled[part.workflow] += part.sampled
    wholes = [part for part in parts if part.workflow is None]
    return Log(
        types=sorted(
            (Logged(workflow=name, lines=lines[name], bytes=sizes[name], sampled=sampled[name]) for name in lines),
            key=lambda one: (-one.bytes, one.workflow),
        ),
        entries=sum(one.entries or 0 for one in wholes),
        lines=sum(lines.values()),
        bytes=sum(sizes.values()),
        since=min((one.since for one in wholes if one.since is not None), default=None),
        until=max((one.until for one in wholes if one.until is not None), default=None),
    )


def kept_sample(connection: Connection) -> list[Kept]:
    """What is kept of workflows, by type, the most first."""
    with translated():
        rows = connection.execute(
            "select workflow, workflows, living, input_bytes, output_bytes, sampled from durable.kept_sample()"
        ).fetchall()
    return [Kept(**dict(zip(Kept.__struct_fields__, row, strict=True))) for row in rows]


def reading(connection: Connection) -> Reading:
    """Look now."""
    with translated():
        row = connection.execute(
            "select clock_timestamp(), (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint, durable.log_entries()"
        ).fetchone()
    assert row is not None
    at, wal_bytes, entries = row
    return Reading(at=at, wal_bytes=wal_bytes, entries=entries)
