"""What ``doctor`` looks at: each check reads one thing and says what it found.

``wrong`` loses work or stops it; ``note`` is no fault but may surprise.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import psycopg

from durable_cluster import schema, timeline_statements
from durable_cluster.ops import lookups
from durable_cluster.ops.terminal import elapsed
from durable_cluster.settings import Settings
from durable_cluster.shards import upkeep

SKEW_S_MAX = 2.0
HORIZON_S_MAX = 60.0
LISTEN_S_MAX = 2.0
DAYS_AHEAD_MIN = 2
CONNECTIONS_LEFT_MIN = 10
LATE_S_MAX = 60.0
SKIPPED_S = 86_400.0
DAY_S = 86_400
EXPORT_DAYS = 7
MIB = 1 << 20

Connection = psycopg.Connection[Any]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; ``verdict`` is ok, note or wrong."""

    check: str
    verdict: str
    says: str
    next_step: str = ""


def server_version(connection: Connection) -> Finding:
    """Old servers lack what the schema needs."""
    says = f"PostgreSQL {lookups.setting(connection, 'server_version')}"
    if connection.info.server_version < schema.SERVER_VERSION_MIN:
        return _wrong("server", f"{says} is too old", "move to PostgreSQL 15 or later")
    return _ok("server", says)


def crash_safety(connection: Connection) -> Finding:
    """Without these, a crash of the server loses or tears what was committed."""
    off = [name for name in ("fsync", "full_page_writes") if lookups.setting(connection, name) != "on"]
    if off:
        return _wrong(
            "crash safety",
            f"{' and '.join(off)} off: a crash of the server can lose or corrupt everything",
            f"alter system set {off[0]} = on; select pg_reload_conf()",
        )
    return _ok("crash safety", "fsync and full_page_writes are on")


def commit_durability(connection: Connection) -> Finding:
    """An asynchronous commit can be forgotten by a crash, with the effects that it had outside."""
    value = lookups.setting(connection, "synchronous_commit")
    if value == "off":
        return _note(
            "commits",
            "synchronous_commit is off: a crash of the server forgets its last moments, and steps of them run again",
            "set it on, unless that trade is meant",
        )
    return _ok("commits", f"synchronous_commit is {value}")


def isolation(connection: Connection) -> Finding:
    """Consumers set their own; programs that start workflows get the default."""
    row = connection.execute(
        "select coalesce((select reset_val from pg_settings where name = 'default_transaction_isolation'), '')"
    ).fetchone()
    value = row[0] if row else ""
    if value == "read committed":
        return _ok("isolation", "read committed by default")
    return _note(
        "isolation",
        f"{value} by default: a start in a transaction that outlasts a log rotation fails with 40001",
        "retry those transactions, or alter database … set default_transaction_isolation = 'read committed'",
    )


def clock_skew(connection: Connection) -> Finding:
    """The database's clock decides; other clocks only label logs and traces."""
    before = time.time()
    server = lookups.server_clock(connection)
    after = time.time()
    skew_s = max(before - server, server - after, 0.0)
    if skew_s > SKEW_S_MAX:
        return _note(
            "clock",
            f"this machine and the server differ by {elapsed(skew_s)}",
            "run NTP on both: logs and traces disagree",
        )
    return _ok("clock", f"the server's agrees with this machine's to {after - before + skew_s:.3f} s")


def session(connection: Connection) -> Finding:
    """Notifications reach a session only if it is one: behind a transaction pooler each statement may have another."""
    backends = {connection.execute("select pg_backend_pid()").fetchone() for _ in range(3)}
    connection.execute("listen durable_doctor")
    connection.execute("select pg_notify('durable_doctor', 'heard')")
    heard = [said.payload for said in connection.notifies(timeout=LISTEN_S_MAX, stop_after=1)]
    connection.execute("unlisten durable_doctor")
    if heard == ["heard"] and len(backends) == 1:
        return _ok("sessions", "LISTEN works")
    return _wrong(
        "sessions",
        "notifications do not arrive: this looks like a transaction pooler, and an idle shard wakes by polling only (1 s)",
        "connect to the server itself, or let the pooler pool sessions",
    )


def horizon(connection: Connection) -> Finding:
    """An old snapshot keeps every dead row version, and rotation waits for it."""
    holders = lookups.horizon_holders(connection, older_than_s=HORIZON_S_MAX)
    if not holders and not lookups.sees_all_sessions(connection):
        says = "this role sees none held for long, but not the sessions of other roles"
        return _note("snapshots", says, "grant it pg_read_all_stats")
    if not holders:
        return _ok("snapshots", f"none is held longer than {HORIZON_S_MAX:.0f} s")
    oldest = holders[0]
    more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
    since = f" for {elapsed(oldest.age_s)}" if oldest.age_s else ""
    return _wrong(
        "snapshots",
        f"{oldest.what}{more} holds an old snapshot{since}: dead rows stay, and rotation waits",
        oldest.next_step,
    )


def connections_left(connection: Connection) -> Finding:
    """A cluster takes one for each process."""
    row = connection.execute(
        "select current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,"
        " (select count(*)::int from pg_stat_activity where backend_type = 'client backend')"
    ).fetchone()
    assert row is not None
    usable, used = row
    if usable - used < CONNECTIONS_LEFT_MIN:
        return _note(
            "connections",
            f"{used} of {usable} are taken",
            "raise max_connections before more shards or consumers are started",
        )
    return _ok("connections", f"{used} of {usable} are taken")


def log_belongs_here(connection: Connection) -> Finding:
    """A dump restored into another server keeps ticks that speak of that server's transaction ids."""
    strange = lookups.ticks_from_another_server(connection)
    if strange:
        return _wrong(
            "log",
            f"{strange} shards' logs come from a server with higher transaction ids (a restored dump?): nothing is read",
            "restore a physical backup instead (pg_basebackup), which keeps transaction ids",
        )
    return _ok("log", "its transaction ids are this server's")


def partitions(connection: Connection) -> Finding:
    """Days without a partition of their own fall into the default one, which retention cannot drop."""
    days = lookups.days_ahead(connection)
    if days < DAYS_AHEAD_MIN:
        says = "today has no partition" if days < 0 else f"made for {days} days ahead only"
        return _wrong(
            "partitions", f"{says}: no maintenance has run lately", "durable-cluster start, or durable-cluster init"
        )
    return _ok("partitions", f"made for {days} days ahead")


def retention(connection: Connection) -> Finding:
    """A day that should have gone is still there; how long days are kept is known to the cluster only."""
    days = lookups.days_back(connection)
    if days > Settings().retention_days + 1:
        return _note(
            "retention",
            f"history reaches back {days} days",
            "nothing, if retention_days says so; else start a cluster, or see 'snapshots': a reader may hold the lock",
        )
    return _ok("retention", f"history reaches back {max(days, 0)} days")


def audit(connection: Connection) -> Finding:
    """What is recorded goes after ``audit_days``: who has to keep it longer exports it."""
    is_on, oldest_s = lookups.audit_state(connection)
    says = f"{'on' if is_on else 'off'}" + ("" if oldest_s is None else f", reaches back {elapsed(oldest_s)}")
    if oldest_s is not None and oldest_s > (Settings().audit_days - EXPORT_DAYS) * DAY_S:
        return _note(
            "audit",
            f"{says}: days older than audit_days ({Settings().audit_days}) are dropped",
            "durable-cluster audit export --out FILE, if they are to be kept",
        )
    return _ok("audit", says)


def consumers(connection: Connection) -> Finding:
    """A shard that nobody reads stands still."""
    shards = lookups.shard_statuses(connection)
    unread = [one for one in shards if one.consumers == 0]
    if not unread:
        return _ok("consumers", f"{sum(one.consumers for one in shards)} connected, every shard has one")
    waiting = [one.shard for one in unread if one.has_work or one.windows]
    is_nobody = len(unread) == len(shards)
    says = "no cluster is connected" if is_nobody else f"nobody reads {_numbered([one.shard for one in unread])}"
    if waiting:
        return _wrong("consumers", f"{says}, and work waits in {_numbered(waiting)}", "durable-cluster start")
    if is_nobody:
        return _note("consumers", f"{says}; nothing waits", "durable-cluster start")
    return _wrong("consumers", says, "see the cluster's log: its consumer may be starting again")


def silent_windows(connection: Connection) -> Finding:
    """A window whose owner is silent is taken over by a sibling; one that stays silent has none."""
    silent = lookups.silent_windows(connection, dead_interval_s=2 * Settings().dead_interval_s)
    if not silent:
        return _ok("windows", "none is silent")
    shards = sorted({shard for shard, _ in silent})
    says = f"{len(silent)} silent ({_numbered(shards)}): their consumers are gone and nobody has taken them over"
    return _wrong("windows", says, "durable-cluster start")


def rotation(connection: Connection) -> Finding:
    """A log that is not rotated grows."""
    overdue = lookups.overdue_rotations(connection)
    if not overdue:
        due = " (upkeep is due now)" if upkeep.needs_upkeep(connection) else ""
        return _ok("rotation", f"on time{due}")
    queue, age_s = max(overdue, key=lambda one: one[1])
    return _wrong(
        "rotation",
        f"{len(overdue)} logs are late, {queue} by {elapsed(age_s)}: they grow",
        "durable-cluster start runs maintenance; if it runs, see 'snapshots' and 'windows' here",
    )


def timeline(connection: Connection) -> Finding:
    """What projects the records of steps holds the log back until it has read them, or has passed over them."""
    lag_s = timeline_statements.history_lag(connection)
    if lag_s is None:
        return _ok("timeline", "off: no type of workflow is recorded")
    if lag_s > LATE_S_MAX:
        return _wrong(
            "timeline",
            f"{elapsed(lag_s)} behind: nobody projects it, and after history_lag_max_s"
            f" ({Settings().history_lag_max_s:g}) it passes over what it lacks",
            "durable-cluster start; if a cluster runs, see its log: maintenance says why",
        )
    skips, since_s = lookups.timeline_skips(connection)
    if since_s is not None and since_s < SKIPPED_S:
        return _note(
            "timeline",
            f"on, {lag_s:.1f} s behind; {skips} times records were passed over, the last {elapsed(since_s)} ago",
            "select * from durable.timeline_skips() says what is missing; record less: see history_sample",
        )
    return _ok("timeline", f"on, {lag_s:.1f} s behind")


def chunks(connection: Connection) -> Finding:
    """What large memos of linear workflows take; maintenance clears away what nobody needs."""
    size = lookups.spill_bytes(connection)
    says = f"large memos of workflows take {size / MIB:,.0f} MiB"
    if upkeep.needs_spill_rotation(connection):
        return _ok("memos", f"{says}, half of it garbage or more (upkeep is due now)")
    return _ok("memos", says)


def timers(connection: Connection) -> Finding:
    """Consumers fire timers; where none runs, a scheduler may."""
    late_s = lookups.overdue(connection).timers_s or 0.0
    if late_s > LATE_S_MAX:
        return _wrong(
            "timers",
            f"the oldest timer is {elapsed(late_s)} late: neither a cluster nor a scheduler has been here",
            "durable-cluster start, or have pg_cron or another scheduler call durable.maintain()",
        )
    return _ok("timers", "none is late")


def schedules(connection: Connection) -> Finding:
    """Only a cluster fires them; what no code declares any more is somebody's to end."""
    overdue = lookups.overdue(connection)
    if (overdue.schedules_s or 0.0) > LATE_S_MAX:
        what = "1 schedule is" if overdue.schedules == 1 else f"{overdue.schedules} schedules are"
        return _wrong(
            "schedules",
            f"{what} due, the longest for {elapsed(overdue.schedules_s or 0.0)}: no cluster has been here, or it cannot fire them",
            "durable-cluster start; if a cluster runs, see its log: maintenance says why",
        )
    orphans = lookups.undeclared_schedules(connection)
    if orphans:
        name, app = orphans[0]
        more = f" (and {len(orphans) - 1} more)" if len(orphans) > 1 else ""
        return _note(
            "schedules",
            f"'{name}' of app '{app}' is no longer in its code and goes on firing{more}",
            f"durable-cluster schedules delete {name}, if it is meant to end",
        )
    return _ok("schedules", "none is late")


def _ok(check: str, says: str) -> Finding:
    return Finding(check=check, verdict="ok", says=says)


def _note(check: str, says: str, next_step: str) -> Finding:
    return Finding(check=check, verdict="note", says=says, next_step=next_step)


def _wrong(check: str, says: str, next_step: str) -> Finding:
    return Finding(check=check, verdict="wrong", says=says, next_step=next_step)


def _numbered(shards: list[int]) -> str:
    return f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}"
