"""Timers: each fires once, when it is due and not before, whoever commits late, crashes, or sets the clock."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

from durable_cluster import (
    App,
    ConfigurationError,
    Context,
    Continuation,
    InputError,
    Machine,
    side_statements,
    statements,
)
from durable_cluster.envelope import decode_line

Connection = psycopg.Connection[Any]
HOUR_S = 3600.0


def line(number: int, seq: int = 1) -> str:
    """An envelope; its id spreads over the shards."""
    return f'{{"w":"{number * 2654435761 % 2**32:08x}{number:024x}","n":{seq},"f":"w","s":"s","v":1,"d":{number}}}'


def schedule(conn: Connection, delays_s: dict[int, float]) -> None:
    side_statements.schedule(conn, [decode_line(line(number)) for number in delays_s], list(delays_s.values()))


def fired(conn: Connection) -> list[int]:
    """The numbers of the lines that stand in the logs, in order."""
    return sorted(
        int(re.findall(r'"d":(\d+)}', body)[0])
        for shard in (0, 1)
        for (data,) in conn.execute(f"select ev_data from pgque.event_{queue_id(conn, shard)}")
        for body in data.split("\n")
    )


def queue_id(conn: Connection, shard: int) -> int:
    return one(conn, "select queue_id from durable.shard where shard = %s", shard)


def one(conn: Connection, query: str, *arguments: object) -> Any:
    row = conn.execute(query.encode(), arguments or None).fetchone()
    assert row is not None
    return row[0]


def sweep(conn: Connection) -> int:
    return side_statements.sweep(conn)


def swept(conn: Connection) -> int:
    """Sweep until there is nothing to do."""
    total = 0
    while passed := sweep(conn):
        total += passed
    return total


def test_a_timer_fires_once_and_only_when_it_is_due(conn: Connection, clock: Callable[[float], None]) -> None:
    schedule(conn, {1: 0, 2: 30, 3: 59.5})
    assert swept(conn) == 1
    assert fired(conn) == [1]
    clock(29)
    assert (swept(conn), fired(conn)) == (0, [1])
    clock(30.1)
    assert (swept(conn), fired(conn)) == (1, [1, 2])
    clock(HOUR_S)
    assert (swept(conn), fired(conn)) == (1, [1, 2, 3])
    assert (swept(conn), side_statements.next_due(conn)) == (0, None)


def test_a_timer_that_is_committed_after_its_due_time_fires(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    with psycopg.connect(dsn) as late, psycopg.connect(dsn) as rolled_back:
        schedule(late, {1: 5})
        schedule(rolled_back, {2: 5})
        schedule(conn, {3: 6})
        clock(10)
        assert (swept(conn), fired(conn)) == (1, [3])
        schedule(conn, {4: 5})
        clock(20)
        assert (swept(conn), fired(conn)) == (1, [3, 4])
        rolled_back.rollback()
    due_s = side_statements.next_due(conn)
    assert due_s is not None and due_s <= 0
    assert (swept(conn), fired(conn)) == (1, [1, 3, 4])
    assert (swept(conn), fired(conn)) == (0, [1, 3, 4])


def test_a_timer_set_in_the_transaction_of_a_sweep_fires_in_the_next_one(dsn: str, conn: Connection) -> None:
    with psycopg.connect(dsn) as tx:
        schedule(tx, {2: 0})
        schedule(conn, {1: 0})  # a younger transaction: the snapshot reaches past the own one
        assert sweep(tx) == 1
    assert (swept(conn), fired(conn)) == (1, [1, 2])


def test_two_sweeps_at_once_fire_each_timer_once(dsn: str, conn: Connection) -> None:
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second:
        for number in range(20):
            schedule(conn, {2 * number: 0, 2 * number + 1: 0})
            assert sweep(first) == 2
            assert sweep(second) == 0
            first.commit()
            assert sweep(second) == 0
            second.commit()
    assert fired(conn) == list(range(40))


def test_sweeps_of_many_sessions_fire_each_timer_once(dsn: str, conn: Connection) -> None:
    def sweep_on(_: int) -> int:
        with psycopg.connect(dsn, autocommit=True) as mine:
            until, total = time.monotonic() + 1.0, 0
            while time.monotonic() < until:
                total += one(mine, "select durable.sweep(7)")
            return total

    with ThreadPoolExecutor(4) as pool:
        sweeping = [pool.submit(sweep_on, n) for n in range(4)]
        for number in range(200):
            schedule(conn, {number: number % 5 / 1000})
        totals = [one.result() for one in sweeping]
    swept(conn)
    assert fired(conn) == list(range(200))
    assert sum(totals) <= 200


def test_a_sweep_that_waits_its_turn_remembers_no_older_snapshot_than_the_one_before(
    dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        first.execute("select from durable.timer_control for update")
        schedule(conn, {1: 0})
        sweeping = pool.submit(sweep, second)
        waiting = (
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        eventually(lambda: sweeping.done() or one(conn, waiting))
        schedule(conn, {2: 0})
        assert sweep(first) == 2
        first.commit()
        assert sweeping.result(timeout=10) == 0
        second.commit()
    assert (swept(conn), fired(conn)) == (0, [1, 2])


def test_a_sweep_that_is_rolled_back_fires_again(dsn: str, conn: Connection) -> None:
    schedule(conn, {1: 0, 2: 0})
    with psycopg.connect(dsn) as tx:
        assert sweep(tx) == 2
        tx.rollback()
    assert fired(conn) == []
    assert (swept(conn), fired(conn)) == (2, [1, 2])


def test_timers_go_on_while_the_clock_is_set_back_an_hour_and_none_is_early(
    conn: Connection, clock: Callable[[float], None]
) -> None:
    schedule(conn, {1: 0, 2: 30})
    assert swept(conn) == 1
    clock(-HOUR_S)
    schedule(conn, {3: 30})
    due_s = side_statements.next_due(conn)
    assert due_s is not None and due_s <= 0, "the skew is to be mended"
    assert (swept(conn), fired(conn)) == (0, [1])
    clock(-HOUR_S + 25)
    assert (swept(conn), fired(conn)) == (0, [1])
    clock(-HOUR_S + 36)
    assert (swept(conn), fired(conn)) == (2, [1, 2, 3])
    schedule(conn, {4: 30})
    clock(70)
    assert (swept(conn), fired(conn)) == (1, [1, 2, 3, 4])
    assert one(conn, "select skew = '0' from durable.timer_control"), "a clock that was set forward again takes over"


def test_a_clock_that_stays_back_is_caught_up_with_by_timers_that_run_a_tenth_slow(
    conn: Connection, clock: Callable[[float], None]
) -> None:
    schedule(conn, {1: 0})
    swept(conn)
    clock(-600)
    sweep(conn)
    before, skew_s = one(conn, "select durable.timer_now()"), 600.0
    for minutes in range(2, 121, 2):
        clock(-600 + minutes * 60)
        assert sweep(conn) == 0
        now = one(conn, "select durable.timer_now()")
        assert timedelta(seconds=105 if skew_s > 120 else 0) <= now - before <= timedelta(seconds=121)
        before, skew_s = now, one(conn, "select extract(epoch from skew)::float8 from durable.timer_control")
    assert skew_s == 0
    assert transactions(conn, lambda: sweep(conn)) == 0


def transactions(conn: Connection, act: Callable[[], object]) -> int:
    """Transaction ids that ``act`` took."""
    before = one(conn, "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    act()
    return int(one(conn, "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")) - before


def test_an_idle_look_consumes_no_transaction_id(conn: Connection) -> None:
    schedule(conn, dict.fromkeys(range(3), 30) | dict.fromkeys(range(10, 13), 2 * HOUR_S))
    swept(conn)

    def looks() -> None:
        for _ in range(20):
            assert sweep(conn) == 0
            due_s = side_statements.next_due(conn)
            assert due_s is not None and 0 < due_s <= 30

    assert transactions(conn, looks) == 0


def test_many_new_sleepers_are_looked_through_once(conn: Connection) -> None:
    seen = "select seen::text from durable.timer_control"
    schedule(conn, dict.fromkeys(range(500), HOUR_S))
    before = one(conn, seen)
    assert sweep(conn) == 0
    after = one(conn, seen)
    assert after != before
    due_s = side_statements.next_due(conn)
    assert due_s is not None and HOUR_S - 60 < due_s <= HOUR_S
    assert transactions(conn, lambda: sweep(conn)) == 0
    assert one(conn, seen) == after


def test_ten_thousand_due_at_once_are_fired_in_few_sweeps_and_entries_of_a_thousand_lines(conn: Connection) -> None:
    began = time.monotonic()
    schedule(conn, dict.fromkeys(range(10_000), 0.0))
    sweeps = 0
    while sweep(conn):
        sweeps += 1
    assert sweeps <= 6
    assert time.monotonic() - began < 10
    assert fired(conn) == list(range(10_000))
    sizes = [
        int(n)
        for shard in (0, 1)
        for (n,) in conn.execute(f"select ev_extra1 from pgque.event_{queue_id(conn, shard)}")
    ]
    assert max(sizes) <= 1000
    assert len(sizes) <= 4 * sweeps


def test_entries_hold_about_a_mebibyte(conn: Connection) -> None:
    state = '"' + "x" * 200_000 + '"'
    lines = [line(number).replace(f'"d":{number}', f'"d":{state}') for number in range(30)]
    side_statements.schedule(conn, [decode_line(one) for one in lines], [0.0] * 30)
    assert sweep(conn) == 30
    sizes = [
        size
        for shard in (0, 1)
        for (size,) in conn.execute(f"select octet_length(ev_data) from pgque.event_{queue_id(conn, shard)}")
    ]
    assert sum(sizes) > 6_000_000
    assert max(sizes) < 1_300_000


def test_a_sleep_over_a_minute_is_a_wait_and_a_timer_without_a_line(
    conn: Connection, clock: Callable[[float], None]
) -> None:
    schedule(conn, {1: 60, 2: 60.5, 3: HOUR_S})
    assert conn.execute("select line, due > since from durable.wait order by due").fetchall() == [
        (line(2), True),
        (line(3), True),
    ]
    assert conn.execute("select line from durable.timer order by due").fetchall() == [(line(1),), (None,), (None,)]
    clock(HOUR_S - 1)
    assert (swept(conn), fired(conn)) == (2, [1, 2])
    clock(HOUR_S + 1)
    assert (swept(conn), fired(conn)) == (1, [1, 2, 3])
    assert one(conn, "select count(*) from durable.wait") == 0


def test_a_timer_whose_wait_is_gone_wakes_nobody(conn: Connection, clock: Callable[[float], None]) -> None:
    schedule(conn, {1: HOUR_S, 2: HOUR_S})
    conn.execute("delete from durable.wait where line = %s", (line(1),))
    clock(2 * HOUR_S)
    swept(conn)
    assert fired(conn) == [2]
    assert (swept(conn), side_statements.next_due(conn)) == (0, None)


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_wait_that_somebody_else_is_resuming_is_resumed_once_and_holds_up_no_other_timer(
    dsn: str, conn: Connection, clock: Callable[[float], None], is_committed: bool
) -> None:
    schedule(conn, {1: HOUR_S, 2: HOUR_S})
    clock(2 * HOUR_S)
    with psycopg.connect(dsn) as other:
        other.execute("delete from durable.wait where line = %s", (line(1),))
        assert swept(conn) == 2
        assert fired(conn) == [2]
        if is_committed:
            other.commit()
        else:
            other.rollback()
    clock(2 * HOUR_S + 2)
    assert swept(conn) == 1
    assert fired(conn) == ([2] if is_committed else [1, 2])
    assert one(conn, "select count(*) from durable.wait") == 0
    assert (swept(conn), side_statements.next_due(conn)) == (0, None)


def test_who_comes_after_a_sweep_finds_no_wait(dsn: str, conn: Connection, clock: Callable[[float], None]) -> None:
    schedule(conn, {1: HOUR_S})
    clock(2 * HOUR_S)
    with psycopg.connect(dsn) as tx, ThreadPoolExecutor(1) as pool:
        assert sweep(tx) == 1
        deleting = pool.submit(lambda: conn.execute("delete from durable.wait").rowcount)
        assert not deleting.done()
        tx.commit()
        assert deleting.result(timeout=10) == 0
    assert fired(conn) == [1]


def test_a_timer_is_never_updated_and_never_deleted(conn: Connection, clock: Callable[[float], None]) -> None:
    schedule(conn, dict.fromkeys(range(300), 5.0) | dict.fromkeys(range(300, 400), HOUR_S))
    clock(2 * HOUR_S)
    assert swept(conn) == 400
    assert one(conn, "select durable.rotate_timers()") == 0
    conn.execute("select pg_stat_force_next_flush()")
    conn.execute("select 1")
    changed = dict(conn.execute("select relation, updated + deleted from durable.row_changes()").fetchall())
    assert [changed[f"durable.timer_{n}"] for n in range(3)] == [0, 0, 0]
    assert changed["durable.wait"] == 100
    assert changed["durable.timer_control"] <= 4


def test_next_due_tells_when(dsn: str, conn: Connection, clock: Callable[[float], None]) -> None:
    assert side_statements.next_due(conn) is None
    schedule(conn, {1: 40, 2: 2 * HOUR_S})
    due_s = side_statements.next_due(conn)
    assert due_s is not None and 35 < due_s <= 40
    clock(41)
    due_s = side_statements.next_due(conn)
    assert due_s is not None and -6 < due_s <= 0
    swept(conn)
    due_s = side_statements.next_due(conn)
    assert due_s is not None and 2 * HOUR_S - 60 < due_s < 2 * HOUR_S - 35


def test_a_shard_asleep_is_notified_of_what_is_due_soon_and_of_nothing_else(dsn: str, conn: Connection) -> None:
    for shard in (0, 1):
        conn.execute(f"listen durable_{shard}")
    schedule(conn, {1: 1})
    assert list(conn.notifies(timeout=0.1)) == []
    sleeper = psycopg.connect(dsn, autocommit=True)
    sleeper.execute("select durable.fall_asleep('{0,1}')")
    schedule(conn, {1: HOUR_S})
    assert list(conn.notifies(timeout=0.1)) == []
    schedule(conn, {1: 1})
    sleeper.close()
    shard = one(conn, "select shard from durable.slot where slot = durable.slot_of(%s)", line(1)[6:38])
    assert [note.channel for note in conn.notifies(timeout=5, stop_after=1)] == [f"durable_{shard}"]


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE], ids=lambda x: x.name)
@pytest.mark.parametrize("function", ["sweep", "rotate_timers"])
def test_a_sweep_and_a_rotation_refuse_older_snapshots(dsn: str, function: str, level: IsolationLevel) -> None:
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        with pytest.raises(psycopg.Error, match="READ COMMITTED") as caught:
            tx.execute(f"select durable.{function}()")
        assert caught.value.sqlstate == "DC004"
        tx.rollback()
        if function == "sweep":
            with pytest.raises(ConfigurationError):
                sweep(tx)


@pytest.mark.parametrize(
    ("lines", "delays", "named"),
    [
        ("no envelope", "1", "line 1 of 1"),
        (f"{line(1)}\n{line(2)[:30]}", "1\n1", "line 2 of 2"),
        (line(1).replace('"n":1', '"n":-1'), "1", "line 1 of 1"),
        (line(1).replace('"n":1', '"n":9999999999'), "1", "line 1 of 1"),
        (line(1).replace('{"w":"0', '{"w":"g').replace('{"w":"9', '{"w":"g'), "1", "line 1 of 1"),
        (line(1), "1\n2", "2 delays for 1 lines"),
        (line(1), "", "0 delays for 1 lines"),
        (line(1), "-1", "-1 ms is out of range"),
        (line(1), "nan", "NaN ms is out of range"),
        (line(1), "1e300", "1e.300 ms is out of range"),
        (line(1), "soon", "soon"),
        (line(1), "1e999", "1e999"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_and_nothing_is_written(
    conn: Connection, lines: str, delays: str, named: str
) -> None:
    with pytest.raises(psycopg.Error, match=named) as caught:
        conn.execute("select durable.schedule(%s, %s)", (lines, delays))
    assert caught.value.sqlstate == "DC002"
    assert "w" * 20 not in str(caught.value)
    assert one(conn, "select count(*) from durable.timer") == 0


@pytest.fixture
def machine(dsn: str) -> Machine:
    machine = App("later", dsn=dsn).machine("one", state=int)

    @machine.step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return machine


@pytest.mark.parametrize("after", ["30s", timedelta(days=2), HOUR_S])
def test_a_start_after_a_while_is_known_at_once_and_delivered_then(
    conn: Connection, clock: Callable[[float], None], machine: Machine, after: Any
) -> None:
    handle = machine.start(1, key="one", after=after)
    assert machine.start(1, key="one").id == handle.id
    assert handle.status() == "running"
    clock(29)
    assert (swept(conn), fired_ids(conn)) == (0, [])
    clock(3 * 86400)
    assert (swept(conn), fired_ids(conn)) == (1, [handle.id])
    machine.app.close()


def fired_ids(conn: Connection) -> list[str]:
    return sorted(
        body[6:38]
        for shard in (0, 1)
        for (data,) in conn.execute(f"select ev_data from pgque.event_{queue_id(conn, shard)}")
        for body in data.split("\n")
    )


def test_a_start_at_a_time_is_delivered_then_and_one_in_the_past_at_once(
    conn: Connection, clock: Callable[[float], None], machine: Machine
) -> None:
    now = datetime.now(UTC)
    past, soon = machine.start(1, at=now - timedelta(days=1)), machine.start(2, at=now + timedelta(hours=1))
    assert fired_ids(conn) == [past.id]
    clock(HOUR_S - 5)
    assert swept(conn) == 0
    clock(HOUR_S + 5)
    assert swept(conn) == 1
    assert fired_ids(conn) == sorted([past.id, soon.id])
    machine.app.close()


def test_many_are_started_after_a_while_and_known_keys_start_nothing(
    conn: Connection, clock: Callable[[float], None], machine: Machine
) -> None:
    known = machine.start(0, key="0")
    handles = machine.start_many(list(range(50)), keys=[str(n) for n in range(50)], after="2m")
    assert handles[0].id == known.id
    assert one(conn, "select count(*) from durable.started") == 50
    assert one(conn, "select count(*) from durable.wait") == 49
    clock(130)
    assert swept(conn) == 49
    assert fired_ids(conn) == sorted(handle.id for handle in handles)
    machine.app.close()


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE], ids=lambda x: x.name)
def test_a_start_after_a_while_joins_a_transaction_of_any_level_even_one_older_than_two_rotations(
    dsn: str, conn: Connection, clock: Callable[[float], None], machine: Machine, level: IsolationLevel
) -> None:
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        tx.execute("select 1 from durable.started")
        for _ in range(2):
            assert one(conn, "select durable.rotate_timers()") == 0
        handles = [machine.start(1, tx=tx, after="5s"), *machine.start_many([2, 3], tx=tx, after="2m")]
        clock(10)
        assert swept(conn) == 0
    assert one(conn, "select durable.rotate_timers()") >= 0
    assert swept(conn) == 1
    clock(130)
    for _ in range(3):
        assert one(conn, "select durable.rotate_timers()") >= 0
    assert swept(conn) == 2
    assert fired_ids(conn) == sorted(handle.id for handle in handles)
    machine.app.close()


@pytest.mark.parametrize(
    "when",
    [
        {"after": -1},
        {"after": "200y"},
        {"after": "10000000d"},
        {"at": datetime(2030, 1, 1)},
        {"after": 1, "at": datetime.now(UTC)},
    ],
)
def test_a_beginning_that_cannot_be_starts_nothing(conn: Connection, machine: Machine, when: dict[str, Any]) -> None:
    for start in (lambda: machine.start(1, **when), lambda: machine.start_many([1], **when)):
        with pytest.raises(InputError, match=r"^(after|at)"):
            start()
    assert one(conn, "select count(*) from durable.started") == 0
    machine.app.close()


def test_sql_starts_without_a_delay_as_before_and_refuses_a_negative_one(conn: Connection) -> None:
    assert one(conn, "select is_new from durable.start('w', 1, 's', '1', 'a')") is True
    assert len(fired_ids(conn)) == 1
    for call in ("start('w', 1, 's', '1', null, %s)", "start_many('w', 1, 's', '1', null, %s)"):
        with pytest.raises(psycopg.Error, match="out of range") as caught:
            conn.execute(f"select * from durable.{call}", ("-1 s",))
        assert caught.value.sqlstate == "DC002"


def test_a_client_may_start_after_a_while_and_may_not_sweep(
    conn: Connection, clock: Callable[[float], None], machine: Machine
) -> None:
    conn.execute("grant select on durable.offset_ms to durable_client")
    conn.execute("set role durable_client")
    statements.start(conn, "w", version=1, step="s", payload="1", key=None, begin=timedelta(seconds=5))
    statements.start(
        conn, "w", version=1, step="s", payload="1", key=None, begin=datetime.now(UTC) + timedelta(hours=1)
    )
    for call in ("sweep()", "rotate_timers()", "schedule('', '')", "next_due()"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute(f"select durable.{call}")
    conn.execute("set role durable_worker")
    clock_free = one(conn, "select durable.next_due()")
    assert 0 < clock_free <= 5
    conn.execute("reset role")
    machine.app.close()
