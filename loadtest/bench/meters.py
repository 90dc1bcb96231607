"""What a system costs while it is measured: processor time, WAL, transaction ids, changed and dead rows, sizes, memory.

Of any system: its worker processes are known by pid, its backends by their database. Sessions of the harness are told apart by
their name and are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from durable_cluster.database import connect
from durable_cluster.loadtest import measure

SESSION = "durable-bench"
KIB = 1024

Connection = psycopg.Connection[Any]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look. Times in seconds, sizes in bytes; counters since the database was made, ``wal_bytes`` and ``xids`` of the server.

    ``server_s`` is None where the server's processes are not on this machine.
    """

    at_s: float
    server_s: dict[int, float] | None
    workers_s: dict[int, float]
    wal_bytes: int
    xids: int
    commits: int
    inserted: int
    updated: int
    deleted: int
    dead: int
    autovacuums: int
    table_bytes: int
    index_bytes: int


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """The difference of two readings."""

    seconds: float
    server_s: float | None
    workers_s: float
    wal_bytes: int
    xids: int
    commits: int
    changed: int
    dead: int
    autovacuums: int
    table_bytes: int
    index_bytes: int


class Relation(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the system, as the server's statistics know it."""

    table: str
    inserted: int
    updated: int
    deleted: int
    dead: int
    table_bytes: int
    index_bytes: int


TOTALS = """
select pg_current_wal_insert_lsn() - '0/0'::pg_lsn, pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
    (select xact_commit from pg_stat_database where datname = current_database()),
    sum(n_tup_ins)::bigint, sum(n_tup_upd)::bigint, sum(n_tup_del)::bigint, sum(n_dead_tup)::bigint,
    sum(autovacuum_count)::bigint, sum(pg_table_size(relid))::bigint, sum(pg_indexes_size(relid))::bigint
from pg_stat_user_tables
"""

RELATIONS = """
select schemaname || '.' || relname, n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup, pg_table_size(relid), pg_indexes_size(relid)
from pg_stat_user_tables where n_tup_ins + n_tup_upd + n_tup_del > 0 order by 1
"""


def session(dsn: str) -> Connection:
    """A session of the harness, whose own work is not counted."""
    return connect(dsn, name=SESSION)


def read(connection: Connection, *, pids: Iterable[int], thread_id: int = 0) -> Reading:
    """Look now. ``pids``: the workers'; ``thread_id``: a thread of this process that belongs to the system."""
    row = connection.execute(TOTALS.encode()).fetchone()
    assert row is not None
    server = server_pids(connection)
    workers_s = {pid: measure.processor_s(str(pid)) for pid in pids}
    if thread_id:
        workers_s[0] = measure.processor_s(f"self/task/{thread_id}")
    wal, xids, commits, *rest = (int(value or 0) for value in row)
    inserted, updated, deleted, dead, autovacuums, table_bytes, index_bytes = rest
    return Reading(
        at_s=time.perf_counter(),
        server_s=None if server is None else {pid: measure.processor_s(str(pid)) for pid in server},
        workers_s=workers_s,
        wal_bytes=wal,
        xids=xids,
        commits=commits,
        inserted=inserted,
        updated=updated,
        deleted=deleted,
        dead=dead,
        autovacuums=autovacuums,
        table_bytes=table_bytes,
        index_bytes=index_bytes,
    )


def between(begin: Reading, end: Reading) -> Cost:
    """What passed. ``dead`` and sizes are growths; a process that came in between counts from its birth."""
    server_s = None
    if begin.server_s is not None and end.server_s is not None:
        server_s = _spent(begin.server_s, end.server_s)
    return Cost(
        seconds=end.at_s - begin.at_s,
        server_s=server_s,
        workers_s=_spent(begin.workers_s, end.workers_s),
        wal_bytes=end.wal_bytes - begin.wal_bytes,
        xids=end.xids - begin.xids,
        commits=end.commits - begin.commits,
        changed=end.updated + end.deleted - begin.updated - begin.deleted,
        dead=end.dead - begin.dead,
        autovacuums=end.autovacuums - begin.autovacuums,
        table_bytes=end.table_bytes - begin.table_bytes,
        index_bytes=end.index_bytes - begin.index_bytes,
    )


def relations(connection: Connection) -> list[Relation]:
    """Every table that was written to."""
    return [
        Relation(
            table=table,
            inserted=inserted,
            updated=updated,
            deleted=deleted,
            dead=dead,
            table_bytes=table_bytes,
            index_bytes=index_bytes,
        )
        for table, inserted, updated, deleted, dead, table_bytes, index_bytes in connection.execute(RELATIONS.encode())
    ]


def server_pids(connection: Connection) -> list[int] | None:
    """The backends of this database that are not the harness's, and the server's own processes; None if they are elsewhere."""
    if not measure.is_local_server(connection):
        return None
    rows = connection.execute(
        "select pid from pg_stat_activity where backend_type <> 'client backend'"
        " or datname = current_database() and application_name <> %s",
        (SESSION,),
    )
    return [pid for (pid,) in rows]


def peak_bytes(pids: Iterable[int]) -> int:
    """The most memory that one of the processes ever held at once."""
    return max((_peak(pid) for pid in pids), default=0)


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * KIB for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _spent(begin: dict[int, float], end: dict[int, float]) -> float:
    return sum(spent_s - begin.get(pid, 0.0) for pid, spent_s in end.items())
