"""Ticks: when they are due, in what order, and what the snapshots between them hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import errors

Connection = psycopg.Connection[Any]


def one(conn: Connection, sql: str, *args: object) -> Any:
    row = conn.execute(sql, args).fetchone()
    assert row is not None
    return row[0]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"


def external(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'external_ticker', 'true')")
    conn.execute("select pgque.register_consumer('q', 'c')")


def send(conn: Connection, data: str) -> None:
    conn.execute("select pgque.insert_event('q', 't', %s)", (data,))


def tick(conn: Connection, tick_id: int) -> None:
    conn.execute("select pgque.ticker('q', %s, clock_timestamp(), 0)", (tick_id,))


def windows(conn: Connection) -> list[list[str]]:
    found = []
    while (batch := one(conn, "select pgque.next_batch('q', 'c')")) is not None:
        found.append([data for (data,) in conn.execute("select ev_data from pgque.get_batch_events(%s)", (batch,))])
        assert one(conn, "select pgque.finish_batch(%s)", batch) == 1
    return found


def test_enough_new_events_make_a_tick_due(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_count', '3')")
    for count in (1, 2, 3):
        send(conn, "x")
        assert one(conn, "select pgque.ticker('q')") == (2 if count == 3 else None)
    assert one(conn, "select pgque.ticker('q')") is None


def test_one_new_event_makes_a_tick_due_after_max_lag(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_lag', '1 microsecond')")
    assert one(conn, "select pgque.ticker('q')") is None
    send(conn, "x")
    assert one(conn, "select pgque.ticker('q')") == 2


def test_an_event_numbered_before_a_tick_and_committed_after_it_makes_the_next_due(dsn: str, conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_count', '1')")
    conn.execute("select pgque.register_consumer('q', 'c')")
    with psycopg.connect(dsn) as slow:
        send(slow, "slow")
        assert one(conn, "select pgque.ticker('q')") == 2
        conn.execute("select pgque.set_queue_config('q', 'ticker_max_lag', '1 microsecond')")
        assert one(conn, "select pgque.ticker('q')") is None
        slow.commit()
    assert one(conn, "select pgque.ticker('q')") == 3
    assert windows(conn) == [[], ["slow"]]


def test_an_idle_queue_ticks_after_its_idle_period(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'ticker_idle_period', '1 microsecond')")
    assert one(conn, "select pgque.ticker('q')") == 2


def test_a_clock_stepped_back_does_not_stop_ticks(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("update pgque.tick set tick_time = tick_time + interval '1 hour'")
    send(conn, "x")
    assert one(conn, "select pgque.ticker('q')") == 2
    assert one(conn, "select pgque.ticker('q')") is None


def test_ticker_of_all_queues_leaves_out_the_paused_and_the_external(conn: Connection) -> None:
    before = one(conn, "select pgque.ticker()")
    assert before == 0
    for queue in ("a", "b", "paused", "ext"):
        conn.execute("select pgque.create_queue(%s)", (queue,))
        conn.execute("select pgque.set_queue_config(%s, 'ticker_idle_period', '1 microsecond')", (queue,))
    conn.execute("select pgque.set_queue_config('paused', 'ticker_paused', 'true')")
    conn.execute("select pgque.set_queue_config('ext', 'external_ticker', 'true')")
    assert one(conn, "select pgque.ticker()") == 2
    for queue in ("paused", "ext"):
        with pytest.raises(errors.ObjectNotInPrerequisiteState):
            conn.execute("select pgque.ticker(%s)", (queue,))
    with pytest.raises(errors.UndefinedObject, match="queue not found: nowhere"):
        conn.execute("select pgque.ticker('nowhere')")


def test_external_ticks_are_monotonic(conn: Connection) -> None:
    external(conn)
    assert one(conn, "select pgque.ticker('q', 10, clock_timestamp(), 5)") == 10
    for tick_id, seq in ((10, 5), (9, 6), (11, 4), (None, 6), (11, None)):
        with pytest.raises(errors.InvalidParameterValue, match="monotonic"):
            conn.execute("select pgque.ticker('q', %s, clock_timestamp(), %s)", (tick_id, seq))
    assert one(conn, "select pgque.ticker('q', 11, '2000-01-01', 5)") == 11


def test_external_ticks_need_an_external_queue(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        tick(conn, 2)
    with pytest.raises(errors.UndefinedObject):
        conn.execute("select pgque.ticker('nowhere', 2, clock_timestamp(), 0)")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_an_older_snapshot_is_never_stored_under_a_newer_tick(dsn: str, conn: Connection, level: str) -> None:
    external(conn)
    conn.execute("select pgque.create_queue('own')")
    conn.execute("select pgque.set_queue_config('own', 'ticker_idle_period', '1 microsecond')")
    with psycopg.connect(dsn) as session:
        for call in (
            "ticker('q', 2, clock_timestamp(), 0)",
            "ticker('own')",
            "ticker()",
            "next_batch('q', 'c')",
            "next_batch('q', 'g', 'm')",
        ):
            session.execute(f"set transaction isolation level {level}")
            with pytest.raises(errors.InvalidTransactionState, match=level.upper()):
                session.execute(f"select pgque.{call}")
            session.rollback()


def test_of_two_tickers_the_second_takes_its_snapshot_after_the_lock(dsn: str, conn: Connection) -> None:
    external(conn)
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(dsn, autocommit=True) as second,
        psycopg.connect(dsn) as holder,
    ):
        holder.execute("select from pgque.queue where queue_name = 'q' for update")
        late = threads.submit(tick, second, 3)
        until(lambda: one(conn, "select cardinality(pg_blocking_pids(%s))", second.info.backend_pid) > 0)
        send(conn, "while the second waits")
        tick(holder, 2)
        holder.commit()
        late.result(10)
    tick(conn, 4)
    assert windows(conn) == [["while the second waits"], [], []]


def test_two_busy_tickers_deliver_every_event_once(dsn: str, conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_count', '1')")
    conn.execute("select pgque.register_consumer('q', 'c')")
    sent = 300

    def ticking() -> None:
        with psycopg.connect(dsn, autocommit=True) as own:
            while one(own, "select count(*) from pgque.event_ids") < sent:
                own.execute("select pgque.ticker('q')")

    def sending(part: int) -> None:
        with psycopg.connect(dsn, autocommit=True) as own:
            for n in range(part, sent, 2):
                with own.transaction():
                    send(own, str(n))

    pfx = one(conn, "select queue_data_pfx from pgque.queue where queue_name = 'q'")
    conn.execute(f"create view pgque.event_ids as select ev_id from {pfx}")
    with ThreadPoolExecutor() as threads:
        work = [
            threads.submit(ticking),
            threads.submit(ticking),
            threads.submit(sending, 0),
            threads.submit(sending, 1),
        ]
        for future in work:
            future.result(60)
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_lag', '1 microsecond')")
    conn.execute("select pgque.ticker('q')")
    delivered = [data for window in windows(conn) for data in window]
    assert sorted(delivered, key=int) == [str(n) for n in range(sent)]


def test_an_event_in_flight_at_a_tick_is_in_the_next_window(dsn: str, conn: Connection) -> None:
    external(conn)
    with psycopg.connect(dsn) as slow, psycopg.connect(dsn) as undone:
        send(slow, "slow")
        send(undone, "undone")
        send(conn, "fast")
        tick(conn, 2)
        slow.commit()
        undone.rollback()
        tick(conn, 3)
    tick(conn, 4)
    assert windows(conn) == [["fast"], ["slow"], []]


@pytest.mark.parametrize("overtaken", [False, True])
def test_what_a_transaction_appends_around_its_own_tick_is_delivered_once(
    dsn: str, conn: Connection, overtaken: bool
) -> None:
    external(conn)
    with psycopg.connect(dsn) as session:
        send(session, "before")
        if overtaken:
            send(conn, "other")
        tick(session, 2)
        send(session, "after")
        session.commit()
    tick(conn, 3)
    assert windows(conn) == [["other"] if overtaken else [], ["before", "after"]]


def test_snap_counts_the_own_transaction_as_running(dsn: str, conn: Connection) -> None:
    with psycopg.connect(dsn) as session:
        own = one(session, "select pg_current_xact_id()::text")
        conn.execute("select pg_current_xact_id()")
        assert one(session, "select pg_visible_in_snapshot(%s::xid8, pg_current_snapshot())", own)
        assert not one(session, "select pg_visible_in_snapshot(%s::xid8, pgque.snap())", own)
        assert one(session, "select pg_snapshot_xmin(pgque.snap()) <= %s::xid8", own)
