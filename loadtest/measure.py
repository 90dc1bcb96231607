"""What is measured by: processor time, log bytes, changed rows, transaction ids, and two yardsticks.

P is how many rows a second one session of the same server takes by INSERT … SELECT, durably, when the rows are the very lines
the product stored, one a row, in a table with the columns and the index of the log: what a log of a row a step would cost if
nobody read it and no step ran. The heap is the same with the line as its only column and no index: the most favourable way to
store the same bytes, and not a log. Both commit every 10,000 rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psycopg

from durable_cluster.loadtest.stage import StageError, await_sleep, until
from durable_cluster.loadtest.workloads import Count, next_count

ROWS_A_COMMIT = 10_000
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
SETTLED_S = 1.2
IDLE_TRIES_MAX = 20

Connection = psycopg.Connection[Any]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the meters. ``cpu_s``: processor seconds of each process so far; empty where they cannot be read."""

    at_s: float
    wal_bytes: int
    cpu_s: dict[str, float]


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """What passed between two readings. ``cpu_s`` is None where the server's processes are not on this machine."""

    seconds: float
    wal_bytes: int
    cpu_s: float | None


def read_meters(connection: Connection, *, pids: Iterable[int], thread_id: int) -> Reading:
    """Look at the meters. ``pids``: the cluster's children; ``thread_id``: the thread of this process that supervises them."""
    tasks = [f"self/task/{thread_id}", *(str(pid) for pid in pids)]
    servers = server_pids(connection)
    cpu_s = {task: processor_s(task) for task in [*tasks, *map(str, servers)]} if servers else {}
    row = connection.execute("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    return Reading(at_s=time.perf_counter(), wal_bytes=int(row[0]), cpu_s=cpu_s)


def span_between(begin: Reading, end: Reading) -> Span:
    """The difference. A process that came in between counts from its birth; one that went is not counted."""
    cpu_s = sum(spent - begin.cpu_s.get(task, 0.0) for task, spent in end.cpu_s.items())
    return Span(
        seconds=end.at_s - begin.at_s,
        wal_bytes=end.wal_bytes - begin.wal_bytes,
        cpu_s=cpu_s if begin.cpu_s and end.cpu_s else None,
    )


def server_pids(connection: Connection) -> list[int]:
    """The cluster's backends and the server's own processes (WAL writer, checkpointer, …); none if they are elsewhere."""
    if not is_local_server(connection):
        return []
    rows = connection.execute(
        "select pid from pg_stat_activity where backend_type <> 'client backend'"
        " or datname = current_database() and application_name like 'durable-cluster %'"
    )
    return [pid for (pid,) in rows]


def is_local_server(connection: Connection) -> bool:
    """Whether the server's processes are on this machine, where they can be looked at."""
    return _comm(connection.info.backend_pid) == "postgres"


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def processor_s(task: str) -> float:
    """utime and stime of a process, or of a task of this one, in seconds; zero for one that has gone."""
    try:
        fields = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


def prepare_yardstick(connection: Connection) -> float:
    """Keep a random sample of the lines that the log holds now, for P; the average bytes of all of them."""
    prefixes = connection.execute(
        "select queue_data_pfx from pgque.queue where queue_name like 'durable\\_%'"
    ).fetchall()
    lines = " union all ".join(
        f"select l.line from {prefix} e, string_to_table(e.ev_data, E'\\n') l(line)" for (prefix,) in prefixes
    )
    connection.execute("create schema loadtest")
    connection.execute("create table loadtest.heap (line text not null) with (autovacuum_enabled = off)")
    connection.execute("create sequence loadtest.p_id")
    connection.execute(f"create table loadtest.p (like {prefixes[0][0]} including defaults including storage)".encode())
    connection.execute("alter table loadtest.p set (autovacuum_enabled = off)")
    connection.execute("create index on loadtest.p (ev_txid, ev_id)")
    connection.execute(f"create unlogged table loadtest.lines as {lines}".encode())
    row = connection.execute("select avg(octet_length(line)) from loadtest.lines").fetchone()
    connection.execute(
        "create unlogged table loadtest.sample with (autovacuum_enabled = off) as"
        " select l.line from loadtest.lines l, generate_series(1, ceil(%s::numeric / (select count(*) from loadtest.lines))::int)"
        " order by random() limit %s",
        (ROWS_A_COMMIT, ROWS_A_COMMIT),
    )
    connection.execute("drop table loadtest.lines")
    connection.execute("analyze loadtest.sample")
    assert row is not None
    return float(row[0])


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What this server takes in rows a second when nobody reads them: see the module's head, and ``copy_rows_per_s``."""

    p_rows_per_s: float
    copy_rows_per_s: float
    heap_rows_per_s: float


def limits(connection: Connection, *, seconds: float) -> Limits:
    """Each of them, measured for so many seconds."""
    return Limits(
        p_rows_per_s=p_rows_per_s(connection, seconds=seconds),
        copy_rows_per_s=copy_rows_per_s(connection, seconds=seconds),
        heap_rows_per_s=heap_rows_per_s(connection, seconds=seconds),
    )


def median_limits(some: Sequence[Limits]) -> Limits:
    """The median of each."""
    return Limits(**{name: median(getattr(one, name) for one in some) for name in Limits.__struct_fields__})


def p_rows_per_s(connection: Connection, *, seconds: float) -> float:
    """P, measured for so many seconds on an emptied table."""
    return _rows_per_s(
        connection,
        "loadtest.p",
        "insert into loadtest.p (ev_id, ev_type, ev_data, ev_extra1)"
        " select nextval('loadtest.p_id'), 'steps', line, '1' from loadtest.sample",
        seconds=seconds,
    )


def heap_rows_per_s(connection: Connection, *, seconds: float) -> float:
    """The heap, measured for so many seconds on an emptied table."""
    insert = "insert into loadtest.heap select line from loadtest.sample"
    return _rows_per_s(connection, "loadtest.heap", insert, seconds=seconds)


def copy_rows_per_s(connection: Connection, *, seconds: float) -> float:
    """P's table filled by COPY from this process, 10,000 rows a commit, for so many seconds."""
    connection.execute("truncate loadtest.p")
    lines = connection.execute("select line from loadtest.sample").fetchall()
    block = b"".join(b"%d\tsteps\t%b\t1\n" % (number, escaped(line)) for number, (line,) in enumerate(lines))
    rows = 0
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        with (
            connection.cursor() as cursor,
            cursor.copy("copy loadtest.p (ev_id, ev_type, ev_data, ev_extra1) from stdin") as copy,
        ):
            copy.write(block)
        rows += len(lines)
    return rows / spent


def escaped(line: str) -> bytes:
    """As a field of COPY's text format; a line of the log has no tabs and no newlines."""
    return line.replace("\\", "\\\\").encode()


class FloorLine(msgspec.Struct):
    """The envelope of a line, read into its types at once: what any engine in Python must do at the least."""

    w: str
    n: int
    f: str
    s: str
    v: int
    d: Count


def floor_us_per_step(connection: Connection) -> float:
    """CPU of this process to decode a line, run the handler and encode the line after it, in microseconds."""
    lines = [
        line.encode()
        for (line,) in connection.execute("select line from loadtest.sample where line like '%ten-steps%'")
    ]
    decoder, encoder = msgspec.json.Decoder(FloorLine), msgspec.json.Encoder()
    begin = time.process_time()
    for line in lines:
        at = decoder.decode(line)
        at.n += 1
        at.d = next_count(at.d)
        encoder.encode(at)
    return (time.process_time() - begin) / len(lines) * 1e6


def _rows_per_s(connection: Connection, table: str, insert: str, *, seconds: float) -> float:
    connection.execute(f"truncate {table}".encode())
    rows = 0
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        rows += connection.execute(insert.encode()).rowcount
    return rows / spent


def lone_steps_ms(connection: Connection, workflow_id: str) -> list[float]:
    """Milliseconds from each step's handoff to the next one's, by the log's own clock, ascending.

    ev_time is when the transaction began that handed a step on, and that of the next step cannot begin before this one's commit
    has been flushed, claimed and run: the difference is the whole round of one step, whichever process ran it. The start's own
    event is left out, for it was appended by the client.
    """
    row = connection.execute(
        "select q.queue_data_pfx from durable.slot l join durable.shard s using (shard) join pgque.queue q using (queue_id)"
        " where l.slot = durable.slot_of(%s::uuid)",
        (workflow_id,),
    ).fetchone()
    assert row is not None
    times = connection.execute(
        f"select e.ev_time from {row[0]} e where e.ev_extra1 = '1' and e.ev_data like %s order by e.ev_id offset 1".encode(),
        (f'{{"w":"{workflow_id}"%',),
    ).fetchall()
    return sorted((later - earlier).total_seconds() * 1000 for (earlier,), (later,) in pairwise(times))


def quantile(ascending: Sequence[float], part: float) -> float:
    """The value below which ``part`` of the values lie."""
    return ascending[min(len(ascending) - 1, int(len(ascending) * part))]


def changed_rows(connection: Connection) -> int:
    """Rows updated and deleted so far in every table of ours, as far as the server's statistics know."""
    row = connection.execute("select coalesce(sum(updated + deleted), 0) from durable.row_changes()").fetchone()
    assert row is not None
    return int(row[0])


def settled_changed_rows(connection: Connection, *, finished: int) -> int:
    """The same, once the statistics have caught up: all asleep, all ``finished`` workflows counted, two equal answers.

    A backend reports what it did a second later at the latest if it is asked anything, and sleepers ask every second.
    """
    await_sleep(connection)
    answers = [(-1, 0)]

    def is_settled() -> bool:
        time.sleep(SETTLED_S)
        row = connection.execute(
            "select sum(n_tup_ins) from pg_stat_user_tables where schemaname = 'durable' and relname like 'finished\\_%'"
        ).fetchone()
        assert row is not None
        answers.append((changed_rows(connection), int(row[0])))
        return answers[-1] == answers[-2] and answers[-1][1] >= finished

    until(is_settled, what="the server's statistics")
    return answers[-1][0]


def idle_xids_per_s(connection: Connection, *, seconds: float) -> float:
    """Transaction ids consumed a second while the cluster sleeps. A span in which autovacuum worked is measured again."""
    await_sleep(connection)
    for _ in range(IDLE_TRIES_MAX):
        begin, before = xid(connection), vacuums(connection)
        time.sleep(seconds)
        end = xid(connection)
        if vacuums(connection) == before:
            return (end - begin) / seconds
    raise StageError("autovacuum never rests on this server, so idle transaction ids cannot be told; measure again")


def set_rotation(connection: Connection, *, period_s: float) -> None:
    """Have every log rotated at most once in so many seconds."""
    connection.execute(
        "select pgque.set_queue_config(queue_name, 'rotation_period', %s) from pgque.queue where queue_name like 'durable\\_%%'",
        (f"{period_s:g} seconds",),
    )


def rotations(connection: Connection) -> int:
    """How often logs have been rotated so far."""
    sequences = connection.execute(
        "select queue_rotation_seq from pgque.queue where queue_name like 'durable\\_%'"
    ).fetchall()
    rows = (connection.execute(f"select last_value from {name}".encode()).fetchone() for (name,) in sequences)
    return sum(row[0] for row in rows if row is not None)


def xid(connection: Connection) -> int:
    """The next transaction id of the server."""
    row = connection.execute("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint").fetchone()
    assert row is not None
    return int(row[0])


def vacuums(connection: Connection) -> object:
    """What autovacuum has done; never equal while it is doing something."""
    return connection.execute(
        "select sum(autovacuum_count + autoanalyze_count),"
        " case when exists (select from pg_stat_activity where backend_type = 'autovacuum worker') then random() end"
        " from pg_stat_all_tables"
    ).fetchone()
