"""Queues, their configuration, what is told about them, and who may do what."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import errors

Connection = psycopg.Connection[Any]
READER_ONLY = ("get_batch_events(1)", "finish_batch(1)", "next_batch('q', 'c')", "next_batch('q', 'c', 'm')")
ADMIN_ONLY = (
    "create_queue('other')",
    "drop_queue('q', true)",
    "ticker()",
    "ticker('q')",
    "maint()",
    "maint_rotate_tables_step2()",
)


def one(conn: Connection, sql: str, *args: object) -> Any:
    row = conn.execute(sql, args).fetchone()
    assert row is not None
    return row[0]


def need_roles(conn: Connection) -> None:
    if one(
        conn, "select to_regrole('pgque_reader') is null or not has_schema_privilege('pgque_reader', 'pgque', 'usage')"
    ):
        pytest.skip("installed without roles")


def test_create_queue_says_whether_it_created(conn: Connection) -> None:
    assert one(conn, "select pgque.create_queue('q')") == 1
    assert one(conn, "select pgque.create_queue('q')") == 0
    assert one(conn, "select last_tick_id from pgque.get_queue_info('q')") == 1


def test_queue_names_have_1_to_57_bytes(conn: Connection) -> None:
    assert one(conn, "select pgque.create_queue(%s)", "x" * 57) == 1
    for name in ("x" * 58, "ä" * 29, "", None):
        with pytest.raises(errors.InvalidName):
            conn.execute("select pgque.create_queue(%s)", (name,))


def test_two_sessions_creating_one_queue_create_it_once(dsn: str, conn: Connection) -> None:
    with psycopg.connect(dsn) as first:
        first.execute("select pgque.create_queue('q')")
        conn.execute("set lock_timeout = '10ms'")
        with pytest.raises(errors.LockNotAvailable):
            conn.execute("select pgque.create_queue('q')")
    assert one(conn, "select pgque.create_queue('q')") == 0


def test_event_text_is_never_compressed_by_pglz(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    pfx = one(conn, "select queue_data_pfx from pgque.queue where queue_name = 'q'")
    for n in range(3):
        storage, compression = conn.execute(
            "select attstorage, attcompression from pg_attribute where attrelid = %s::regclass and attname = 'ev_data'",
            (f"{pfx}_{n}",),
        ).fetchone() or ("", "")
        assert storage == "e" or compression == "l"


def test_dropping_a_queue_with_consumers_needs_force_and_leaves_nothing(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.register_consumer('q', 'plain'), pgque.register_subconsumer('q', 'group', 'm')")
    conn.execute("select pgque.set_queue_config('q', 'external_ticker', 'true')")
    conn.execute("select pgque.ticker('q', 2, clock_timestamp(), 0)")
    assert one(conn, "select pgque.next_batch('q', 'group', 'm')") is not None
    with pytest.raises(errors.DependentObjectsStillExist):
        conn.execute("select pgque.drop_queue('q')")
    pfx = one(conn, "select queue_data_pfx from pgque.queue where queue_name = 'q'")
    assert one(conn, "select pgque.drop_queue('q', true)") == 1
    assert one(conn, "select to_regclass(%s) is null and to_regclass(%s || '_0') is null", pfx, pfx)
    assert one(conn, "select to_regclass(%s || '_id_seq') is null", pfx)
    assert one(conn, "select count(*) from pgque.consumer where co_name in ('plain', 'group', 'group.m')") == 0
    with pytest.raises(errors.UndefinedObject, match="queue not found: q"):
        conn.execute("select pgque.drop_queue('q')")


def test_dropping_a_queue_without_consumers_needs_no_force(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    assert one(conn, "select pgque.drop_queue('q')") == 1


def test_configuration_is_checked_and_null_gives_the_default(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    assert one(conn, "select pgque.set_queue_config('q', 'ticker_max_count', '7')") == 1
    assert one(conn, "select queue_ticker_max_count from pgque.get_queue_info('q')") == 7
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_count', null)")
    assert one(conn, "select queue_ticker_max_count from pgque.get_queue_info('q')") == 500
    assert one(conn, "select pgque.set_queue_config('q', 'max_retries', '0')") == 1
    for param, value in (
        ("max_retries", "-1"),
        ("ticker_max_count", "0"),
        ("ticker_max_lag", "0"),
        ("ticker_idle_period", "-1 s"),
        ("rotation_period", "0"),
        ("ntables", "4"),
        ("cur_table = 0 --", "1"),
    ):
        with pytest.raises(errors.InvalidParameterValue):
            conn.execute("select pgque.set_queue_config('q', %s, %s)", (param, value))
    with pytest.raises(errors.UndefinedObject):
        conn.execute("select pgque.set_queue_config('nowhere', 'max_retries', '1')")


def test_queue_info_counts_what_is_new(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    for _ in range(3):
        conn.execute("select pgque.insert_event('q', 't', 'x')")
    assert one(conn, "select ev_new from pgque.get_queue_info('q')") == 3
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_count', '1')")
    conn.execute("select pgque.ticker('q')")
    row = conn.execute(
        "select ev_new, last_tick_id, ev_per_sec > 0, ticker_lag > '0' from pgque.get_queue_info('q')"
    ).fetchone()
    assert row == (0, 2, True, True)
    assert one(conn, "select count(*) from pgque.get_queue_info() where queue_name = 'q'") == 1
    assert one(conn, "select count(*) from pgque.get_queue_info('nowhere')") == 0


def test_every_definer_function_pins_its_search_path(conn: Connection) -> None:
    loose = conn.execute(
        """select p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'pgque'::regnamespace and p.prosecdef
           and not coalesce(p.proconfig, '{}') @> array['search_path=pg_catalog, pgque, pg_temp']"""
    ).fetchall()
    assert loose == []


def test_the_public_may_call_nothing(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    open_to_all = conn.execute(
        """select p.oid::regprocedure::text from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
           where p.pronamespace = 'pgque'::regnamespace and a.grantee = 0"""
    ).fetchall()
    assert open_to_all == []


def test_temporary_tables_and_a_hostile_search_path_do_not_reach_in(conn: Connection) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.register_consumer('q', 'c')")
    for table in ("queue", "tick", "batch", "batch_end", "subscription", "consumer"):
        conn.execute(f"create temporary table {table} (like pgque.{table})")
    conn.execute("create schema evil")
    for name, result in (
        ("pg_current_snapshot()", "pg_snapshot"),
        ("pg_current_xact_id()", "xid8"),
        ("clock_timestamp()", "timestamptz"),
    ):
        conn.execute(
            f"create function evil.{name} returns {result} language plpgsql as $$ begin raise 'hijacked'; end $$"
        )
    conn.execute("set search_path = pg_temp, evil, pg_catalog")
    conn.execute("select pgque.insert_event('q', 't', 'x')")
    conn.execute("select pgque.set_queue_config('q', 'ticker_max_count', '1')")
    assert one(conn, "select pgque.ticker('q')") == 2
    batch = one(conn, "select pgque.next_batch('q', 'c')")
    assert conn.execute("select ev_data from pgque.get_batch_events(%s)", (batch,)).fetchall() == [("x",)]
    assert one(conn, "select pgque.finish_batch(%s)", batch) == 1


def test_a_reader_consumes_and_a_writer_produces_and_neither_does_the_other(conn: Connection) -> None:
    need_roles(conn)
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.register_consumer('q', 'c')")
    conn.execute("set role pgque_writer")
    assert one(conn, "select pgque.insert_event('q', 't', 'x')") == 1
    for call in (*READER_ONLY, *ADMIN_ONLY):
        with pytest.raises(errors.InsufficientPrivilege):
            conn.execute(f"select pgque.{call}")
    conn.execute("set role pgque_reader")
    assert one(conn, "select pgque.next_batch('q', 'c')") is None
    assert one(conn, "select count(*) from pgque.queue where queue_name = 'q'") == 1
    for call in ("insert_event('q', 't', 'x')", *ADMIN_ONLY):
        with pytest.raises(errors.InsufficientPrivilege):
            conn.execute(f"select pgque.{call}")
    conn.execute("set role pgque_admin")
    assert one(conn, "select pgque.insert_event('q', 't', 'x')") == 2
    assert one(conn, "select pgque.create_queue('theirs')") == 1
    assert "durable" in one(conn, "select pgque.version()")


def test_a_reader_reads_the_event_tables_of_new_queues(conn: Connection) -> None:
    need_roles(conn)
    conn.execute("select pgque.create_queue('q')")
    pfx = one(conn, "select queue_data_pfx from pgque.queue where queue_name = 'q'")
    conn.execute("set role pgque_reader")
    assert one(conn, f"select count(*) from {pfx}") == 0
