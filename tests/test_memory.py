"""Whatever the backlog between two ticks, a process holds one page of it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from durable_cluster.envelope import decode_page

BURST = 30_000
PEAK_MIB_MAX = 150
MILLION_S_MAX = 120

CONSUMER = """
import re
import sys
from pathlib import Path

from durable_cluster import App, Context, Settings
from durable_cluster.consumer import Consumer

app = App("burst", settings=Settings())
machine = app.machine("burst")

@machine.step(start=True)
def only(ctx: Context, state):
    return ctx.done(len(str(state)))

consumer = Consumer(sys.argv[1], int(sys.argv[2]), app.machines, app.settings)
while consumer.work(lambda: False, lambda: None):
    pass
consumer.close()
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(consumer.steps, peak_kib // 1024)
"""


def table_of(conn: psycopg.Connection, shard: int) -> str:
    """Where the log of a shard is written to now."""
    (table,) = conn.execute(
        "select queue_data_pfx || '_' || queue_cur_table from pgque.queue where queue_name = durable.queue_of(%s)",
        (shard,),
    ).fetchone() or ("",)
    return table


def burst(conn: psycopg.Connection, events: int, *, shards: tuple[int, ...] = (0, 1), state: str = "0") -> None:
    """So many single-row events, in one transaction, spread over shards: one window each."""
    for shard in shards:
        conn.execute(
            f"insert into {table_of(conn, shard)} (ev_type, ev_data, ev_extra1)"
            " select 'steps', durable.line(durable.new_id(), 1, 'burst', 'only', 1, %s), '1' from generate_series(1, %s)",
            (state, events // len(shards)),
        )


def drain(dsn: str, folder: Path, consumers: int) -> list[tuple[int, int]]:
    """Let so many consumer processes run until nothing is ready; steps and peak MiB of each."""
    script = folder / "consumer.py"
    script.write_text(CONSUMER)
    processes = [
        subprocess.Popen([sys.executable, str(script), dsn, str(n % 2)], stdout=subprocess.PIPE, text=True)
        for n in range(consumers)
    ]
    answers = [process.communicate(timeout=300)[0].split() for process in processes]
    return [(int(steps), int(peak)) for steps, peak in answers]


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_a_burst_between_two_ticks_is_drained_within_the_memory_of_a_page(
    dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    """A window of 60 MB: whoever read it whole would need several times that."""
    burst(conn, BURST, shards=(0,), state=f'"{"x" * 2000}"')
    told = drain(dsn, tmp_path, consumers=1)
    print(f"{BURST:,} events: steps and peak MiB of each process {told}")
    assert sum(steps for steps, _ in told) == BURST
    assert max(peak for _, peak in told) < PEAK_MIB_MAX / 2
    assert conn.execute("select count(*) from durable.finished").fetchone() == (BURST,)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_a_million_events_between_two_ticks_are_drained_within_two_minutes(
    dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    burst(conn, 1_000_000)
    begin = time.monotonic()
    told = drain(dsn, tmp_path, consumers=4)
    seconds = time.monotonic() - begin
    print(f"1,000,000 events in {seconds:.1f} s: steps and peak MiB of each process {told}")
    assert sum(steps for steps, _ in told) == 1_000_000
    assert max(peak for _, peak in told) < PEAK_MIB_MAX
    assert seconds < MILLION_S_MAX


@pytest.mark.parametrize(("lines_max", "bytes_max"), [(1000, 1 << 20), (10, 1 << 20), (1000, 20_000)])
def test_a_page_of_a_large_window_holds_no_more_than_its_limits(
    conn: psycopg.Connection, lines_max: int, bytes_max: int
) -> None:
    burst(conn, 10_000, shards=(0,))
    conn.execute("select durable.join_shard(0, 'm')")
    claim = "select durable.claim(0, 'm', 1, %s::int, %s::int)"
    (text,) = conn.execute(claim, (lines_max, bytes_max)).fetchone() or ("",)
    page = decode_page(text)
    assert not page.header.last
    assert 0 < len(page.lines) <= lines_max
    body_bytes = len(text.partition("\n")[2])
    assert body_bytes <= bytes_max + len(page.lines)
    assert len(page.lines) == lines_max or body_bytes > bytes_max - 300, "and no less than fits"


def test_a_single_large_event_is_a_page_of_its_own(conn: psycopg.Connection) -> None:
    line = "durable.line(durable.new_id(), 1, 'burst', 'only', 1, to_json(repeat('x', 5000))::text)"
    for _ in range(3):
        conn.execute(f"select pgque.insert_event('durable_0', 'steps', {line}, '1', null, null, null)".encode())
    conn.execute("select durable.join_shard(0, 'm')")
    (text,) = conn.execute("select durable.claim(0, 'm', 1, 1000, 100)").fetchone() or ("",)
    page = decode_page(text)
    assert len(page.lines) == 1
    assert not page.header.last


def test_a_page_deep_inside_a_large_window_reads_about_as_much_as_the_first(conn: psycopg.Connection) -> None:
    """A keyset, not an offset: the buffers a page touches do not grow with its place."""
    burst(conn, 15_000, shards=(0,))
    conn.execute(f"vacuum analyze {table_of(conn, 0)}".encode())
    conn.execute("select durable.join_shard(0, 'm')")
    (text,) = conn.execute("select durable.claim(0, 'm', 1, 100, 1048576)").fetchone() or ("",)
    first = decode_page(text)
    events = conn.execute("select txid, event_id from durable.log(0) order by txid, event_id").fetchall()

    def buffers() -> int:
        plan = conn.execute(
            "explain (analyze, buffers, format json) select durable.page(%s, 1, 100, 1048576)", (first.header.batch,)
        ).fetchone()
        assert plan is not None
        return plan[0][0]["Plan"]["Shared Hit Blocks"] + plan[0][0]["Plan"]["Shared Read Blocks"]

    at_first = min(buffers() for _ in range(3))
    txid, event_id = events[14_000]
    conn.execute("update durable.win set done = row(%s, %s, 0)", (txid, event_id))
    deep = min(buffers() for _ in range(3))
    assert deep < 2 * at_first + 100, (at_first, deep)
