"""Who is connected to the database, what they hold and run, and what the server is, as SQL, for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.errors import translated

Connection = psycopg.Connection[Any]


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A session of ours, or an owner of something without one (role ``gone``): see ``durable.processes``."""

    role: str
    home: int | None
    pid: int | None
    address: str | None
    since: datetime | None
    state: str | None
    seconds: float | None
    waits_for: str | None
    shards: list[int]
    windows: int
    slow_steps: int


class SlowStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step beside the pages. ``crashes``: how many processes died with it."""

    id: str
    workflow: str
    step: str
    seq: int
    shard: int
    is_running: bool
    crashes: int
    since: datetime


def processes(connection: Connection) -> list[Process]:
    """By role and shard."""
    with translated(), connection.cursor(row_factory=kwargs_row(Process)) as cursor:
        return cursor.execute(
            "select role, home, pid, address, since, state, seconds, waits_for, shards, windows, slow_steps"
            " from durable.processes()"
        ).fetchall()


def untold_to(connection: Connection) -> str | None:
    """The role that ``durable.processes`` looks with, if it is not told what other roles' sessions do; else None.

    That is whoever installed the functions, not who asks here.
    """
    with translated():
        row = connection.execute(
            "select quote_ident(pg_get_userbyid(p.proowner)) from pg_proc p where p.oid = 'durable.processes()'::regprocedure"
            " and not pg_has_role(p.proowner, 'pg_read_all_stats', 'usage')"
        ).fetchone()
    return row[0] if row else None


def slow_steps(connection: Connection, *, limit: int) -> list[SlowStep]:
    """The longest first."""
    with translated(), connection.cursor(row_factory=kwargs_row(SlowStep)) as cursor:
        return cursor.execute(
            "select id, workflow, step, seq, shard, is_running, crashes, since from durable.slow_steps(%s::int)",
            (limit,),
        ).fetchall()
