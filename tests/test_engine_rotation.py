"""Appending, rotation and trimming: no event is lost, nothing is kept for ever, nothing is written per batch but inserts."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import errors

Connection = psycopg.Connection[Any]
STEP1 = "select pgque.maint_rotate_tables_step1('q')"
STEP2 = "select pgque.maint_rotate_tables_step2()"
PREFIX = "select queue_data_pfx from pgque.queue where queue_name = 'q'"


def one(conn: Connection, sql: str, *args: object) -> Any:
    row = conn.execute(sql, args).fetchone()
    assert row is not None
    return row[0]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"


def queue(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'external_ticker', 'true')")
    conn.execute("select pgque.set_queue_config('q', 'rotation_period', '1 microsecond')")
    conn.execute("select pgque.register_consumer('q', 'c')")


def send(conn: Connection, data: str) -> None:
    conn.execute("select pgque.insert_event('q', 't', %s)", (data,))


def tick(conn: Connection) -> None:
    conn.execute("select pgque.ticker('q', last_tick_id + 1, clock_timestamp(), 0) from pgque.get_queue_info('q')")


def settled_tick(conn: Connection) -> None:
    """A tick past the last rotation. Writers of any database of this server hold that back; they are waited for."""
    until(
        lambda: bool(
            one(
                conn,
                "select pg_snapshot_xmin(pg_current_snapshot()) > coalesce(max(queue_switch_step2), '0') from pgque.queue",
            )
        )
    )
    tick(conn)


def read(conn: Connection) -> list[str]:
    """Everything up to the newest tick, finished."""
    found: list[str] = []
    while (batch := one(conn, "select pgque.next_batch('q', 'c')")) is not None:
        found += [data for (data,) in conn.execute("select ev_data from pgque.get_batch_events(%s)", (batch,))]
        assert one(conn, "select pgque.finish_batch(%s)", batch) == 1
    return found


def rotate(conn: Connection) -> int:
    """Both steps, each in its own transaction; what step 1 said."""
    rotated = int(one(conn, STEP1))
    conn.execute(STEP2)
    return rotated


def stored(conn: Connection) -> int:
    return int(one(conn, f"select count(*) from {one(conn, PREFIX)}"))


def test_events_go_to_known_and_open_queues_only(conn: Connection) -> None:
    queue(conn)
    assert one(conn, "select pgque.insert_event('q', 't', null)") == 1
    with pytest.raises(errors.UndefinedObject, match="queue not found: nowhere"):
        conn.execute("select pgque.insert_event('nowhere', 't', 'x')")
    conn.execute("update pgque.queue set queue_disable_insert = true where queue_name = 'q'")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="Insert into queue disallowed"):
        send(conn, "x")


def test_everything_is_delivered_once_across_rotations(conn: Connection) -> None:
    queue(conn)
    delivered = []
    rotations = 0
    for n in range(12):
        send(conn, f"{n} before")
        settled_tick(conn)
        delivered += read(conn)
        rotations += rotate(conn)
        send(conn, f"{n} after")
        tick(conn)
        if n % 3:
            delivered += read(conn)
    delivered += read(conn)
    assert delivered == [f"{n} {when}" for n in range(12) for when in ("before", "after")]
    assert rotations > 4
    assert stored(conn) < 24


def test_rotation_is_refused_before_its_period_is_over(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.set_queue_config('q', 'rotation_period', '1 hour')")
    settled_tick(conn)
    read(conn)
    assert one(conn, STEP1) == 0
    conn.execute("update pgque.queue set queue_switch_time = queue_switch_time + interval '2 hours'")
    assert one(conn, STEP1) == 1  # the clock stepped back: due, not stuck


def test_rotation_is_refused_between_the_two_steps(conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    assert one(conn, STEP1) == 1
    settled_tick(conn)
    read(conn)
    assert one(conn, STEP1) == 0
    assert one(conn, STEP2) == 1
    assert one(conn, STEP2) == 0
    settled_tick(conn)
    read(conn)
    assert one(conn, STEP1) == 1


def test_step_2_needs_a_transaction_of_its_own(dsn: str, conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    conn.execute(STEP1)
    with psycopg.connect(dsn) as session:
        session.execute("select pg_current_xact_id()")
        with pytest.raises(errors.ActiveSqlTransaction):
            session.execute(STEP2)
        session.rollback()
        assert one(session, STEP2) == 1


def test_a_slow_consumer_keeps_its_events(conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    send(conn, "unread")
    tick(conn)
    assert rotate(conn) == 1
    settled_tick(conn)
    assert rotate(conn) == 0
    assert read(conn) == ["unread"]
    assert rotate(conn) == 1


def test_an_open_batch_of_a_member_keeps_its_events_though_its_group_went_on(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.unregister_consumer('q', 'c')")
    conn.execute("select pgque.register_subconsumer('q', 'g', 'slow'), pgque.register_subconsumer('q', 'g', 'fast')")
    send(conn, "held")
    tick(conn)
    held = one(conn, "select pgque.next_batch('q', 'g', 'slow')")
    assert rotate(conn) == 0
    conn.execute("select pgque.maint()")
    for _ in range(3):
        send(conn, "passed")
        settled_tick(conn)
        assert one(conn, "select pgque.finish_batch(pgque.next_batch('q', 'g', 'fast'))") == 1
        rotate(conn)
    assert conn.execute("select ev_data from pgque.get_batch_events(%s)", (held,)).fetchall() == [("held",)]
    assert one(conn, "select pgque.finish_batch(%s)", held) == 1
    assert rotate(conn) == 1


def test_a_stalled_inserter_keeps_the_table_it_resolved_from_being_rotated_twice(dsn: str, conn: Connection) -> None:
    queue(conn)
    send(conn, "first")  # the sequence logs ahead: the next value costs, and hides, no transaction id
    settled_tick(conn)
    read(conn)
    table = one(conn, f"select pfx || '_0' from ({PREFIX}) q(pfx)")
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(dsn, autocommit=True) as inserter,
        psycopg.connect(dsn) as holder,
    ):
        holder.execute(f"lock table {table} in share mode")  # a lock that takes no transaction id
        stalled = threads.submit(send, inserter, "stalled")
        until(lambda: bool(one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", inserter.info.backend_pid)))
        assert rotate(conn) == 1  # the table is the previous one now
        for _ in range(3):
            tick(conn)
            assert (
                one(
                    conn,
                    "select pgque.finish_batch(x.batch_id) from pgque.subscription_state s, pgque.next_batch_info('q', 'c') x "
                    "where s.sub_consumer = (select co_id from pgque.consumer where co_name = 'c')",
                )
                == 1
            )
            assert rotate(conn) == 0
        holder.rollback()
        stalled.result(10)
    settled_tick(conn)
    assert read(conn) == ["stalled"]
    assert rotate(conn) == 1


def test_an_uncommitted_event_survives_attempts_to_rotate_past_it(dsn: str, conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    with psycopg.connect(dsn) as slow:
        send(slow, "slow")
        for _ in range(4):
            tick(conn)
            read(conn)
            rotate(conn)
        slow.commit()
    tick(conn)
    assert read(conn) == ["slow"]


def test_a_producer_with_a_snapshot_older_than_a_rotation_is_told_to_run_again(dsn: str, conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    for level in ("repeatable read", "serializable"):
        with psycopg.connect(dsn) as producer:
            producer.execute(f"set transaction isolation level {level}")
            send(producer, "same rotation")
            producer.commit()
            producer.execute(f"set transaction isolation level {level}")
            producer.execute("select 1 from pgque.queue")
            settled_tick(conn)
            read(conn)
            assert rotate(conn) == 1
            with pytest.raises(errors.SerializationFailure, match="was rotated"):
                send(producer, "x")
            producer.rollback()
            send(producer, "read committed")


def test_a_rotation_rolled_back_does_not_stop_such_producers_for_ever(dsn: str, conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    with psycopg.connect(dsn) as session:
        assert one(session, STEP1) == 1
        session.rollback()
        session.execute("set transaction isolation level repeatable read")
        with pytest.raises(errors.SerializationFailure):
            send(session, "x")
        session.rollback()
        conn.execute("select pgque.set_queue_config('q', 'rotation_period', '1 hour')")
        conn.execute("select pgque.maint()")
        session.execute("set transaction isolation level repeatable read")
        send(session, "y")


def test_rotation_does_not_wait_for_a_lock(dsn: str, conn: Connection) -> None:
    queue(conn)
    settled_tick(conn)
    read(conn)
    table = one(conn, f"select pfx || '_1' from ({PREFIX}) q(pfx)")
    with psycopg.connect(dsn) as reader:
        reader.execute(f"select count(*) from {table}")
        conn.execute("set statement_timeout = '5s'")
        assert one(conn, STEP1) == 0
        reader.rollback()
    assert one(conn, STEP1) == 1


def test_a_reader_does_not_lock_the_table_that_rotation_wants_next(dsn: str, conn: Connection) -> None:
    queue(conn)
    send(conn, "x")
    settled_tick(conn)
    read(conn)
    assert rotate(conn) == 1
    settled_tick(conn)
    read(conn)
    with psycopg.connect(dsn) as reader:
        send(conn, "y")
        tick(conn)
        assert read(reader) == ["y"]
        assert one(conn, STEP1) == 1
        reader.commit()


def test_the_previous_table_is_read_only_while_it_can_hold_something_unread(conn: Connection) -> None:
    queue(conn)
    tables = (
        "select array(select right(t, 1)::int from unnest(pgque.event_tables(q.queue_id, t.tick_snapshot)) t) "
        "from pgque.queue q, pgque.tick t where q.queue_name = 'q' and t.tick_queue = q.queue_id order by t.tick_id desc limit 1"
    )
    settled_tick(conn)
    read(conn)
    assert one(conn, tables) == [0]
    one(conn, STEP1)
    assert one(conn, tables) == [0, 1]
    tick(conn)
    assert one(conn, tables) == [0, 1]
    one(conn, STEP2)
    assert one(conn, tables) == [0, 1]
    settled_tick(conn)
    assert one(conn, tables) == [1]
    with pytest.raises(errors.UndefinedObject):
        conn.execute("select pgque.event_tables(-1, pg_current_snapshot())")


def test_maintenance_keeps_what_is_needed_and_trims_the_rest(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_subconsumer('q', 'g', 'a'), pgque.register_subconsumer('q', 'g', 'b')")
    tick(conn)
    held = one(conn, "select pgque.next_batch('q', 'g', 'a')")
    for n in range(50):
        send(conn, str(n))
        tick(conn)
        assert one(conn, "select pgque.finish_batch(pgque.next_batch('q', 'g', 'b'))") == 1
    late = one(conn, "select min(batch_id) from pgque.batch where batch_id <> %s", held)
    conn.execute("select pgque.maint()")
    kept = (
        "select count(*) from pgque.batch b join pgque.subscription s on s.sub_id = b.batch_sub "
        "join pgque.consumer c on c.co_id = s.sub_consumer where c.co_name = 'g'"
    )
    assert one(conn, kept) == 2
    assert (
        one(
            conn,
            "select count(*) from pgque.batch_end e where not exists (select from pgque.batch b where b.batch_id = e.batch_id)",
        )
        == 0
    )
    assert one(conn, "select pgque.finish_batch(%s)", late) == 0
    assert one(conn, "select pgque.finish_batch(%s)", held) == 1
    assert read(conn) == [str(n) for n in range(50)]  # the ticks of the slowest were kept
    assert one(conn, "select pgque.next_batch('q', 'g', 'a')") is None
    conn.execute("select pgque.maint()")
    assert (
        one(
            conn,
            "select count(*) from pgque.tick t join pgque.queue q on q.queue_id = t.tick_queue where q.queue_name = 'q'",
        )
        == 1
    )
    send(conn, "last")
    tick(conn)
    assert read(conn) == ["last"]


def test_trimming_spares_a_batch_taken_over_meanwhile(dsn: str, conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.set_queue_config('q', 'rotation_period', '1 hour')")
    conn.execute("select pgque.register_subconsumer('q', 'g', 'a'), pgque.register_subconsumer('q', 'g', 'b')")
    send(conn, "held")
    tick(conn)
    conn.execute("select pgque.next_batch('q', 'g', 'a')")
    for _ in range(2):
        tick(conn)
        conn.execute("select pgque.finish_batch(pgque.next_batch('q', 'g', 'b'))")
    read(conn)
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(dsn, autocommit=True) as trimmer,
        psycopg.connect(dsn) as holder,
    ):
        holder.execute("select from pgque.batch where batch_sub = (select min(batch_sub) from pgque.batch) for update")
        trimming = threads.submit(trimmer.execute, "select pgque.maint()")
        until(lambda: bool(one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", trimmer.info.backend_pid)))
        taken = one(conn, "select pgque.next_batch('q', 'g', 'b', '0 seconds')")
        holder.rollback()
        trimming.result(10)
    assert conn.execute("select ev_data from pgque.get_batch_events(%s)", (taken,)).fetchall() == [("held",)]
    assert one(conn, "select pgque.finish_batch(%s)", taken) == 1


def test_trimming_spares_the_tick_of_a_registration_in_flight(dsn: str, conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.unregister_consumer('q', 'c')")
    with psycopg.connect(dsn) as session:
        session.execute("select pgque.register_consumer('q', 'c')")
        send(conn, "x")
        tick(conn)
        conn.execute("select pgque.maint()")
        session.commit()
    assert read(conn) == ["x"]


def test_an_empty_queue_is_not_rotated_by_maintenance(conn: Connection) -> None:
    queue(conn)
    send(conn, "x")
    for _ in range(6):
        settled_tick(conn)
        read(conn)
        conn.execute("select pgque.maint()")
        conn.execute(STEP2)
    rotations = one(conn, "select queue_rotations from pgque.queue where queue_name = 'q'")
    assert 2 <= rotations <= 3
    assert stored(conn) == 0


def test_with_nothing_to_do_nothing_is_written(dsn: str, conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_subconsumer('q', 'g', 'm'), pgque.create_queue('own')")
    send(conn, "x")
    settled_tick(conn)
    read(conn)
    conn.execute("select pgque.finish_batch(pgque.next_batch('q', 'g', 'm'))")
    conn.execute("select pgque.set_queue_config('q', 'rotation_period', '1 hour')")
    conn.execute("select pgque.maint()")
    calls = (
        "next_batch('q', 'c')",
        "next_batch('q', 'g', 'm')",
        "next_batch('q', 'g', 'm', '1 second')",
        "ticker('own')",
        "ticker()",
        "maint()",
        "maint_rotate_tables_step2()",
    )
    with psycopg.connect(dsn) as session:
        for call in calls:
            session.execute(f"select pgque.{call}")
            assert one(session, "select pg_current_xact_id_if_assigned()::text") is None, call
            session.rollback()


def test_ticks_claims_and_finishes_update_and_delete_no_row(dsn: str, conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_subconsumer('q', 'g', 'a'), pgque.register_subconsumer('q', 'g', 'b')")
    touched = "select sum(n_tup_upd + n_tup_del), sum(n_tup_ins) from pg_stat_user_tables where schemaname = 'pgque'"
    conn.execute("select pg_stat_force_next_flush()")
    before = conn.execute(touched).fetchone()
    assert before is not None
    with psycopg.connect(dsn, autocommit=True) as worker:
        for n in range(30):
            send(worker, str(n))
            tick(worker)
            assert one(worker, "select pgque.finish_batch(pgque.next_batch('q', 'g', %s, '1 hour'))", "ab"[n % 2]) == 1
        assert len(read(worker)) == 30
        worker.execute("select pg_stat_force_next_flush()")
        worker.execute("select 1")
    until(lambda: conn.execute(touched).fetchone()[1] >= before[1] + 30 * 6)  # type: ignore[index]
    after = conn.execute(touched).fetchone()
    assert after is not None
    assert after[0] == before[0]
