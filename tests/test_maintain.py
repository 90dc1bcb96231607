"""Maintenance by hand: what a scheduler can do while no cluster runs, what it leaves to one, and what doctor says of neither."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.rows import dict_row

from durable_cluster import App, ConfigurationError, Context, Continuation, Handle, InputError
from durable_cluster.errors import translated
from durable_cluster.ops import checks
from durable_cluster.shards import upkeep

Connection = psycopg.Connection[Any]
NOTHING = {
    "timers": 0,
    "queued_runs": 0,
    "rotated": 0,
    "timers_carried": 0,
    "chunks_carried": 0,
    "partitions": 0,
    "forgotten": 0,
    "days_dropped": 0,
    "has_work": False,
    "schedules_due": 0,
}


@pytest.fixture
def app(dsn: str, conn: Connection) -> Iterator[App]:
    conn.execute(
        "update pgque.queue set queue_switch_time = now()"
    )  # the template may be older than a rotation's period
    app = App("sleeping", dsn=dsn)
    nap, ask = app.machine("nap"), app.machine("ask")

    @nap.step(start=True)
    def lie_down(ctx: Context, duration: str) -> Continuation:
        return ctx.sleep(duration, then=get_up, state=duration)

    @nap.step()
    def get_up(ctx: Context, duration: str) -> Continuation:
        return ctx.done("awake")

    @ask.step(start=True)
    def question(ctx: Context, timeout: str) -> Continuation:
        return ctx.wait_for("answer", then=answered, state=timeout, timeout=timeout)

    @ask.step()
    def answered(ctx: Context, timeout: str) -> Continuation:
        return ctx.done("in time" if ctx.signal else "too late")

    yield app
    app.close()


def maintained(connection: Connection, *arguments: int) -> dict[str, Any]:
    """What one call did, but for what it did not."""
    with connection.cursor(row_factory=dict_row) as cursor, translated():
        row = cursor.execute(f"select * from durable.maintain({', '.join(map(str, arguments))})".encode()).fetchone()
    assert row is not None
    return {name: value for name, value in row.items() if value != NOTHING[name]}


def asleep(app: App, number: int) -> list[Handle]:
    handles = [app.named("nap").start("1h"), *(app.named("ask").start("1h") for _ in range(number - 1))]
    app.run(until_idle=True)
    return handles


def test_timers_and_timeouts_fire_and_the_answer_says_that_work_waits(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handles = asleep(app, 3)
    assert maintained(conn) == {}
    clock(3_700)
    assert maintained(conn) == {"timers": 3, "has_work": True}
    assert maintained(conn).get("timers", 0) == 0
    assert {handle.status() for handle in handles} == {"running"}, "steps need a cluster"
    app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles] == ["awake", "too late", "too late"]


def test_the_work_of_a_paused_shard_waits_for_no_cluster(app: App, conn: Connection) -> None:
    app.named("nap").start_many(["1h"] * 20)
    assert maintained(conn) == {"has_work": True}
    conn.execute("select durable.pause('shard', s.shard::text) from durable.shard s")
    assert maintained(conn) == {}


def test_with_nothing_to_do_it_writes_nothing(app: App, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        assert maintained(connection) == {}
        assert connection.execute("select pg_current_xact_id_if_assigned()").fetchone() == (None,)


def test_two_calls_at_once_fire_each_timer_once(
    app: App, dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    handles = asleep(app, 20)
    clock(3_700)

    def call() -> int:
        with psycopg.connect(dsn, autocommit=True) as connection:
            return sum(maintained(connection).get("timers", 0) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: call(), range(4))) == 20
    assert app.run(until_idle=True) == 20
    assert {handle.status() for handle in handles} == {"completed"}


def test_a_log_that_was_read_is_rotated_in_two_calls_until_it_is_empty(app: App, conn: Connection) -> None:
    asleep(app, 5)
    conn.execute("update pgque.queue set queue_rotation_period = '0'")
    size = "select sum(pg_relation_size((queue_data_pfx || '_' || n)::regclass))::int from pgque.queue, generate_series(0, 2) n"
    rotated = 0
    for _ in range(20):
        rotated += maintained(conn).get("rotated", 0)
        app.run(until_idle=True)  # the empty windows that were opened on idle shards
    assert rotated > 2
    assert conn.execute(size).fetchone() == (0,)
    assert maintained(conn) == {}


def test_a_call_that_fires_does_not_rotate(app: App, conn: Connection, clock: Callable[[float], None]) -> None:
    asleep(app, 20)
    conn.execute("update pgque.queue set queue_rotation_period = '0'")
    clock(3_700)
    assert maintained(conn) == {"timers": 20, "has_work": True}
    app.run(until_idle=True)
    assert maintained(conn)["rotated"] > 0


def test_a_call_in_a_transaction_that_has_written_leaves_half_a_rotation_as_it_is(app: App, conn: Connection) -> None:
    asleep(app, 20)
    conn.execute("update pgque.queue set queue_rotation_period = '0' where queue_name = 'durable_0'")
    half = "select count(*) > 0 from pgque.queue where queue_switch_step2 is null"
    for _ in range(9):
        if conn.execute(half).fetchone() == (True,):
            break
        maintained(conn)
        app.run(until_idle=True)
    with conn.transaction():
        conn.execute("select pg_current_xact_id()")
        assert "rotated" not in maintained(conn)
    assert conn.execute(half).fetchone() == (True,)
    assert "rotated" in maintained(conn)
    assert conn.execute(half).fetchone() == (False,)


def test_partitions_are_made_and_history_goes_only_if_it_is_said_how_old(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    ended = app.named("nap").start("0s")
    app.run(until_idle=True)
    assert ended.status() == "completed"
    clock(40 * 86_400)
    assert maintained(conn)["partitions"] > 0
    assert not upkeep.needs_partitions(conn)
    assert maintained(conn) == {}
    assert upkeep.needs_expiry(conn, days=30)
    dropped = sum(maintained(conn, 30).get("days_dropped", 0) for _ in range(20))
    assert dropped > 0
    assert not upkeep.needs_expiry(conn, days=30)
    with pytest.raises(InputError, match="retention of 0 days"):
        clock(80 * 86_400)
        maintained(conn, 0)


def test_a_reader_that_holds_on_to_a_table_does_not_stop_the_timers(
    app: App, dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    asleep(app, 2)
    clock(40 * 86_400)
    with psycopg.connect(dsn) as reader:
        reader.execute("lock table durable.started_default in access exclusive mode")
        reader.execute("lock table durable.started in access share mode")
        assert maintained(conn) == {"timers": 2, "has_work": True}
    assert maintained(conn)["partitions"] > 0


def test_queued_runs_start_and_due_schedules_are_left_to_a_cluster(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    app.schedules.create("hourly", "0 * * * *", "ask", "1d", overlap="queue", catch_up=2)
    app.schedules.create("paused", "0 * * * *", "ask", "1d")
    app.schedules.pause("paused")
    clock(3 * 3_600)
    assert maintained(conn) == {"schedules_due": 1}
    assert conn.execute("select count(*) from durable.started").fetchone() == (0,)
    app.run(until_idle=True)
    known = app.schedules.get("hourly")
    assert known.queued is not None
    assert maintained(conn) == {}
    first = known.queued - timedelta(hours=1)
    app.named("ask").get(key=f"hourly@{first.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}").signal("answer")
    conn.execute(
        "insert into durable.finished select s.id, s.day, 'completed', '1', durable.now() from durable.started s"
    )
    assert maintained(conn) == {"queued_runs": 1, "has_work": True}
    assert conn.execute("select count(*) from durable.started").fetchone() == (2,)


def test_it_demands_read_committed(conn: Connection, dsn: str) -> None:
    with psycopg.connect(dsn) as other:
        other.isolation_level = IsolationLevel.REPEATABLE_READ
        with pytest.raises(ConfigurationError, match="needs READ COMMITTED"):
            maintained(other)


def test_doctor_finds_timers_and_schedules_that_nobody_fires(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    assert checks.timers(conn).verdict == "ok"
    assert checks.schedules(conn).verdict == "ok"
    for _ in range(120):
        app.named("nap").start("1h")
    app.run(until_idle=True)
    app.schedules.create("daily", "@daily", "ask", "1d")
    clock(3 * 86_400)
    found = checks.timers(conn)
    assert found.verdict == "wrong"
    assert "the oldest timer is 3 d late: neither a cluster nor a scheduler has been here" in found.says
    assert "durable.maintain()" in found.next_step
    found = checks.schedules(conn)
    assert found.verdict == "wrong"
    assert "1 schedule is due, the longest for" in found.says
    assert maintained(conn)["timers"] == 120
    assert checks.timers(conn).verdict == "ok"
    app.run(until_idle=True)
    assert checks.schedules(conn).verdict == "ok"
    conn.execute("update durable.schedule set app = 'sleeping'")
    assert checks.schedules(conn).verdict == "note"
    assert "'daily' of app 'sleeping' is no longer in its code" in checks.schedules(conn).says


def test_the_clock_of_a_due_time_is_the_databases(app: App, conn: Connection, clock: Callable[[float], None]) -> None:
    clock(86_400 * 365)
    app.schedules.create("daily", "@daily", "ask", "1d")
    due = app.schedules.get("daily").next_due
    assert due is not None
    assert due > datetime.now(UTC) + timedelta(days=300)
