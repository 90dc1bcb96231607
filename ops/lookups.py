"""What people ask a database, as SQL: nothing here is on the path of a step. Ids come truncated."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg
from psycopg.rows import kwargs_row

from durable_cluster.errors import translated

PREFIXED_MAX = 3
"""So many ids that begin alike are looked for: one, none, or ambiguous."""

Connection = psycopg.Connection[Any]


class ShardStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One shard: what waits in its log, who reads it, how old its newest tick is."""

    shard: int
    has_work: bool
    windows: int
    silent_windows: int
    consumers: int
    is_idle: bool
    tick_age_s: float


class Asides(msgspec.Struct, frozen=True, kw_only=True):
    """What is not in the log, each counted up to 100,001.

    ``awaiting``: workflows that wait for a signal; ``joining``: those that wait for children;
    ``running``: detached steps that run; ``waiting``: those that wait for room;
    ``due_s``: seconds until the next timer is due.
    """

    sleeping: int
    awaiting: int
    joining: int
    running: int
    waiting: int
    dead_letters: int
    due_s: float | None


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """What is paused: a workflow (``name``: its first digits), a type or a shard. ``parked``: steps that wait, up to 100,001."""

    scope: str
    name: str
    actor: str | None
    at: datetime | None
    parked: int | None


class LimitShown(msgspec.Struct, frozen=True, kw_only=True):
    """A limit as it counts. ``rate`` so many in ``period_s``; ``keys``: counted by themselves; ``waiting``: up to 100,001."""

    name: str
    concurrency: int | None
    rate: int | None
    period_s: float | None
    is_set: bool
    keys: int
    used: int
    waiting: int


class Overdue(msgspec.Struct, frozen=True, kw_only=True):
    """How late the oldest timer is, and the oldest due time of a schedule; None: none is. ``schedules``: how many are due."""

    timers_s: float | None
    schedules_s: float | None
    schedules: int


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """So many workflows of a type are in a status."""

    workflow: str
    status: str
    workflows: int


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What the database is laid out for, and its migrations by name and moment."""

    shards: int
    payload_bytes_max: int
    mailbox_max: int
    installed_at: datetime
    migrations: list[tuple[str, datetime]]


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Something that keeps old row versions from being cleaned up."""

    what: str
    age_s: float
    next_step: str


def shard_statuses(connection: Connection) -> list[ShardStatus]:
    """Every shard, in order."""
    with translated(), connection.cursor(row_factory=kwargs_row(ShardStatus)) as cursor:
        return cursor.execute(
            "select shard, has_work, windows, silent_windows, consumers, is_idle,"
            " extract(epoch from tick_age)::float8 tick_age_s from durable.shard_status()"
        ).fetchall()


def by_prefix(connection: Connection, digits: str) -> list[str]:
    """Whole ids that begin with ``digits``, ``PREFIXED_MAX`` at the most."""
    with translated():
        rows = connection.execute("select durable.hex(i) from durable.by_prefix(%s) i", (digits,)).fetchall()
    return [row[0] for row in rows]


def pauses(connection: Connection) -> list[Pause]:
    """What is paused, the oldest first."""
    with translated():
        rows = connection.execute("select scope, name, actor, at, parked from durable.pauses()").fetchall()
    return [Pause(scope=s, name=n, actor=a, at=t, parked=p) for s, n, a, t, p in rows]


def limits(connection: Connection) -> list[LimitShown]:
    """Every limit, by name."""
    with translated():
        rows = connection.execute(
            "select name, concurrency, rate, extract(epoch from period)::float8, is_set, keys, used, waiting from durable.limits()"
        ).fetchall()
    return [
        LimitShown(name=n, concurrency=c, rate=r, period_s=p, is_set=s, keys=k, used=u, waiting=w)
        for n, c, r, p, s, k, u, w in rows
    ]


def asides(connection: Connection) -> Asides:
    """Sleepers, detached steps, dead letters."""
    with translated(), connection.cursor(row_factory=kwargs_row(Asides)) as cursor:
        found = cursor.execute(
            "select sleeping, awaiting, joining, running, waiting, dead_letters, due_s from durable.asides()"
        ).fetchone()
    assert found is not None
    return found


def overdue(connection: Connection) -> Overdue:
    """What nobody has fired."""
    with translated(), connection.cursor(row_factory=kwargs_row(Overdue)) as cursor:
        found = cursor.execute("select timers_s, schedules_s, schedules from durable.overdue()").fetchone()
    assert found is not None
    return found


def undeclared_schedules(connection: Connection) -> list[tuple[str, str]]:
    """Name and app of the schedules that no code declares any more."""
    with translated():
        return connection.execute(
            "select name, app from durable.schedules() where app is not null and not is_in_code"
        ).fetchall()


def totals(connection: Connection) -> list[Total]:
    """Workflows by type and status."""
    with translated(), connection.cursor(row_factory=kwargs_row(Total)) as cursor:
        return cursor.execute("select workflow, status, workflows from durable.totals()").fetchall()


def holds_window(connection: Connection, owners: Sequence[int]) -> bool:
    """Whether any of these incarnations of a consumer has an open window."""
    return bool(_value(connection, "select exists (select from durable.win where owner = any(%s))", list(owners)))


def connected(connection: Connection) -> int:
    """Processes of clusters that are connected to this database, on any host."""
    return int(
        _value(
            connection,
            "select count(*) from pg_stat_activity where datname = current_database() and application_name"
            " ~ '^durable-cluster (shard|maintenance|supervisor)'",
        )
    )


def days_ahead(connection: Connection) -> int:
    """Days after today that have partitions without a gap; -1 when today has none."""
    with translated():
        return int(
            _value(
                connection,
                "select coalesce(min(d), 31) - 1 from generate_series(0, 30) d"
                " where to_regclass('durable.started_' || (durable.today() + d)) is null"
                " or to_regclass('durable.finished_' || (durable.today() + d)) is null",
            )
        )


def days_back(connection: Connection) -> int:
    """How many days before today the oldest day partition is."""
    with translated():
        return int(
            _value(
                connection,
                "select coalesce(durable.today() - min(substring(c.relname from '_([0-9]+)$')::int), 0)"
                " from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = 'durable.started'::regclass",
            )
        )


def installed(connection: Connection) -> Installed:
    """The layout and what was installed when."""
    with translated():
        layout = connection.execute(
            "select shards, payload_bytes_max, mailbox_max, installed_at from durable.cluster"
        ).fetchone()
        migrations = connection.execute("select name, applied_at from durable.migration order by name").fetchall()
    assert layout is not None
    shards, payload_bytes_max, mailbox_max, installed_at = layout
    return Installed(
        shards=shards,
        payload_bytes_max=payload_bytes_max,
        mailbox_max=mailbox_max,
        installed_at=installed_at,
        migrations=migrations,
    )


def silent_windows(connection: Connection, *, dead_interval_s: float) -> list[tuple[int, float]]:
    """Shard and seconds of silence of windows that a consumer should have taken over by now."""
    with translated():
        return connection.execute(
            "select shard, case when active = '-infinity' then 0"
            " else extract(epoch from durable.now() - active)::float8 end from durable.win"
            " where active < durable.now() - make_interval(secs => %s) order by 1, 2 desc",
            (dead_interval_s,),
        ).fetchall()


def overdue_rotations(connection: Connection) -> list[tuple[str, float]]:
    """Queue and seconds since its last rotation, of logs that hold events and are two periods late."""
    with translated():
        return connection.execute(
            "select queue_name, extract(epoch from clock_timestamp() - queue_switch_time)::float8 from pgque.queue"
            " where queue_switch_time + 3 * queue_rotation_period < clock_timestamp() and exists ("
            "  select from generate_series(0, queue_ntables - 1) n"
            "  where pg_relation_size((queue_data_pfx || '_' || n)::regclass) > 0) order by 1"
        ).fetchall()


def spill_bytes(connection: Connection) -> int:
    """How large the tables are that hold what linear workflows have on record and do not carry."""
    with translated():
        return int(_value(connection, "select durable.spill_bytes()"))


def ticks_from_another_server(connection: Connection) -> int:
    """Shards whose newest tick speaks of transaction ids that this server has not reached."""
    with translated():
        return int(
            _value(
                connection,
                "select count(*) from durable.shard s cross join lateral (select t.tick_snapshot from pgque.tick t"
                " where t.tick_queue = s.queue_id order by t.tick_id desc limit 1) t"
                " where pg_snapshot_xmax(t.tick_snapshot) > pg_snapshot_xmax(pg_current_snapshot())",
            )
        )


def horizon_holders(connection: Connection, *, older_than_s: float) -> list[Holder]:
    """Sessions, prepared transactions and replication slots that hold the horizon of row versions, oldest first."""
    with connection.cursor(row_factory=kwargs_row(Holder)) as cursor:
        return cursor.execute(
            "select format('session %%s (%%s, %%s)', pid, coalesce(nullif(application_name, ''), usename, 'unknown'),"
            "  state) what, extract(epoch from clock_timestamp() - xact_start)::float8 age_s,"
            "  format('end it: select pg_terminate_backend(%%s)', pid) next_step from pg_stat_activity"
            " where backend_xmin is not null and pid <> pg_backend_pid() and backend_type <> 'autovacuum worker'"
            "  and datname = current_database() and xact_start < clock_timestamp() - make_interval(secs => %(age)s)"
            " union all select format('prepared transaction %%L', gid),"
            "  extract(epoch from clock_timestamp() - prepared)::float8,"
            "  format('end it: rollback prepared %%L', gid) from pg_prepared_xacts"
            " where prepared < clock_timestamp() - make_interval(secs => %(age)s)"
            " union all select format('replication slot %%s', slot_name), 0::float8,"
            "  format('if nobody needs it: select pg_drop_replication_slot(%%L)', slot_name) from pg_replication_slots"
            " where not active and coalesce(xmin, catalog_xmin) is not null"
            " order by age_s desc limit 5",
            {"age": older_than_s},
        ).fetchall()


def audit_state(connection: Connection) -> tuple[bool, float | None]:
    """Whether the audit is on, and the age of its oldest row in seconds."""
    with translated():
        row = connection.execute(
            "select durable.is_audited(), extract(epoch from durable.now() - durable.audit_reaches_back())::float8"
        ).fetchone()
    assert row is not None
    return row[0], row[1]


def timeline_skips(connection: Connection) -> tuple[int, float | None]:
    """How often, of late, records of steps were passed over because what projects them was behind; seconds since the last time."""
    with translated():
        row = connection.execute(
            "select count(*)::int, extract(epoch from durable.now() - max(at))::float8 from durable.timeline_skips()"
        ).fetchone()
    assert row is not None
    return row[0], row[1]


def sees_all_sessions(connection: Connection) -> bool:
    """Whether this role is told what other roles' sessions hold."""
    return bool(_value(connection, "select pg_has_role('pg_read_all_stats', 'usage')"))


def server_clock(connection: Connection) -> float:
    """The server's clock, in seconds since 1970."""
    return float(_value(connection, "select extract(epoch from clock_timestamp())::float8"))


def setting(connection: Connection, name: str) -> str:
    """A server setting as this session has it."""
    return str(_value(connection, "select current_setting(%s)", name))


def _value(connection: Connection, query: str, *arguments: object) -> Any:
    row = connection.execute(query.encode(), arguments or None).fetchone()
    assert row is not None
    return row[0]
