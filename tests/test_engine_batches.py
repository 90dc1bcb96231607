"""Batches: normal consumers, cooperative members, takeover, and the races between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import errors

Connection = psycopg.Connection[Any]
CLAIM = "select batch_id, prev_tick_id, next_tick_id from pgque.next_batch_custom('q', 'g', %s, null, null, null, %s)"


def one(conn: Connection, sql: str, *args: object) -> Any:
    row = conn.execute(sql, args).fetchone()
    assert row is not None
    return row[0]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"


def is_blocked(conn: Connection, session: Connection) -> bool:
    return bool(one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", session.info.backend_pid))


def queue(conn: Connection, *members: str) -> None:
    conn.execute("select pgque.create_queue('q')")
    conn.execute("select pgque.set_queue_config('q', 'external_ticker', 'true')")
    for member in members:
        conn.execute("select pgque.register_subconsumer('q', 'g', %s)", (member,))


def send_and_tick(conn: Connection, *events: str, seq: int = 0) -> None:
    for event in events:
        conn.execute("select pgque.insert_event('q', 't', %s)", (event,))
    conn.execute(
        "select pgque.ticker('q', last_tick_id + 1, clock_timestamp(), %s) from pgque.get_queue_info('q')", (seq,)
    )


def claim(conn: Connection, member: str, dead: str | None = None) -> int | None:
    row = conn.execute(CLAIM, (member, dead)).fetchone()
    assert row is not None
    return row[0]


def finish(conn: Connection, batch: int | None) -> int:
    return int(one(conn, "select pgque.finish_batch(%s)", batch))


def events_of(conn: Connection, batch: int | None) -> list[str]:
    return [data for (data,) in conn.execute("select ev_data from pgque.get_batch_events(%s)", (batch,))]


def silence(conn: Connection) -> None:
    """Everybody has been silent for an hour."""
    conn.execute("update pgque.batch set batch_opened = batch_opened - interval '1 hour'")
    conn.execute("update pgque.subscription set sub_active = sub_active - interval '1 hour'")


def test_a_normal_consumer_gets_one_batch_until_it_finishes_it(conn: Connection) -> None:
    queue(conn)
    assert one(conn, "select pgque.register_consumer('q', 'c')") == 1
    assert one(conn, "select pgque.register_consumer('q', 'c')") == 0
    assert one(conn, "select pgque.next_batch('q', 'c')") is None
    send_and_tick(conn, "a", "b")
    send_and_tick(conn, "c")
    batch = one(conn, "select pgque.next_batch('q', 'c')")
    assert one(conn, "select pgque.next_batch('q', 'c')") == batch
    assert events_of(conn, batch) == ["a", "b"]
    assert finish(conn, batch) == 1
    second = one(conn, "select pgque.next_batch('q', 'c')")
    assert events_of(conn, second) == ["c"]
    assert finish(conn, second) == 1
    assert one(conn, "select pgque.next_batch('q', 'c')") is None


def test_every_normal_consumer_sees_every_event_from_its_registration_on(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_consumer('q', 'early')")
    send_and_tick(conn, "a")
    conn.execute("select pgque.register_consumer('q', 'late')")
    send_and_tick(conn, "b")
    for consumer, expected in (("early", ["a"]), ("late", ["b"])):
        batch = one(conn, "select pgque.next_batch('q', %s)", consumer)
        assert events_of(conn, batch) == expected


def test_all_columns_of_an_event_come_back(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_consumer('q', 'c')")
    event_id = one(conn, "select pgque.insert_event('q', 'type', 'data', '1', '2', '3', '4')")
    send_and_tick(conn)
    batch = one(conn, "select pgque.next_batch('q', 'c')")
    row = conn.execute("select * from pgque.get_batch_events(%s)", (batch,)).fetchone()
    assert row is not None
    assert row[0] == event_id
    assert isinstance(row[2], int)
    assert row[3:] == (None, "type", "data", "1", "2", "3", "4")


def test_finishing_twice_or_the_unknown_gives_0_and_a_warning(conn: Connection) -> None:
    queue(conn, "m")
    send_and_tick(conn, "a")
    batch = claim(conn, "m")
    warnings: list[str | None] = []
    conn.add_notice_handler(lambda notice: warnings.append(notice.severity))
    assert [finish(conn, batch), finish(conn, batch), finish(conn, 10**9), finish(conn, None)] == [1, 0, 0, 0]
    assert warnings == ["WARNING"] * 3
    with pytest.raises(errors.UndefinedObject, match="batch not found"):
        events_of(conn, batch)


def test_custom_batches_reach_the_size_or_the_interval_asked_for(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_consumer('q', 'c')")
    for seq in (2, 4, 6):
        send_and_tick(conn, "x", seq=seq)
    conn.execute("update pgque.tick set tick_time = tick_time + (tick_id - 4) * interval '1 hour'")
    custom = (
        "select batch_id, prev_tick_id, cur_tick_id "
        "from pgque.next_batch_custom('q', 'c', %s::interval, %s::int, %s::interval)"
    )
    for asked, reached in (
        ((None, 7, None), None),
        ((None, None, "4 hours"), None),
        (("4 hours", None, None), None),
        (("30 minutes", 6, None), None),
        ((None, 4, None), 3),
        ((None, None, "90 minutes"), 3),
        ((None, 6, "30 minutes"), 2),
        (("30 minutes", 4, None), 3),
    ):
        with conn.transaction(force_rollback=True):
            row = conn.execute(custom, asked).fetchone()
            assert row is not None
            assert row[1:] == ((None, None) if reached is None else (1, reached)), asked
    info = conn.execute("select * from pgque.next_batch_info('q', 'c')").fetchone()
    assert info is not None
    assert info[1:3] == (2, 1)
    assert info[5:] == (2, 0)


def test_members_share_the_windows_of_their_group(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    send_and_tick(conn, "2")
    first, second = claim(conn, "a"), claim(conn, "b")
    assert claim(conn, "a") == first
    assert (events_of(conn, first), events_of(conn, second)) == (["1"], ["2"])
    assert finish(conn, first) == 1
    assert claim(conn, "a") is None
    assert claim(conn, "b") == second


def test_a_member_is_registered_by_its_first_claim(conn: Connection) -> None:
    queue(conn)
    assert one(conn, "select pgque.next_batch('q', 'g', 'new')") is None
    send_and_tick(conn, "1")
    assert events_of(conn, one(conn, "select pgque.next_batch('q', 'g', 'new')")) == ["1"]


def test_registering_members_is_idempotent_and_conversion_is_asked_for(conn: Connection) -> None:
    queue(conn)
    conn.execute("select pgque.register_consumer('q', 'g')")
    send_and_tick(conn, "1")
    batch = one(conn, "select pgque.next_batch('q', 'g')")
    with pytest.raises(errors.ObjectInUse, match="normal consumer"):
        conn.execute("select pgque.register_subconsumer('q', 'g', 'm')")
    with pytest.raises(errors.ObjectInUse, match="open batch"):
        conn.execute("select pgque.register_subconsumer('q', 'g', 'm', convert_normal := true)")
    finish(conn, batch)
    assert one(conn, "select pgque.register_subconsumer('q', 'g', 'm', true)") == 1
    assert one(conn, "select pgque.register_subconsumer('q', 'g', 'm')") == 0
    send_and_tick(conn, "2")
    assert events_of(conn, claim(conn, "m")) == ["2"]


def test_cooperative_names_have_no_dots(conn: Connection) -> None:
    queue(conn)
    for consumer, member in (("a.b", "c"), ("a", "b.c"), ("", "c"), ("a", None)):
        with pytest.raises(errors.InvalidName):
            conn.execute("select pgque.register_subconsumer('q', %s, %s)", (consumer, member))


def test_a_group_is_no_normal_consumer_and_neither_is_a_member(conn: Connection) -> None:
    queue(conn, "m")
    for name in ("g", "g.m"):
        with pytest.raises(errors.ObjectInUse, match="cooperative"):
            conn.execute("select pgque.next_batch('q', %s)", (name,))
        with pytest.raises(errors.ObjectInUse, match="cooperative"):
            conn.execute("select pgque.unregister_consumer('q', %s)", (name,))
    with pytest.raises(errors.ObjectInUse):
        conn.execute("select pgque.register_consumer('q', 'g.m')")
    with pytest.raises(errors.UndefinedObject, match="not registered"):
        conn.execute("select pgque.next_batch('q', 'nobody')")


def test_a_member_with_a_batch_is_not_unregistered(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    batch = claim(conn, "a")
    with pytest.raises(errors.ObjectInUse, match="holds batch"):
        conn.execute("select pgque.unregister_subconsumer('q', 'g', 'a')")
    with pytest.raises(errors.FeatureNotSupported, match="retry queue"):
        conn.execute("select pgque.unregister_subconsumer('q', 'g', 'a', 1)")
    with pytest.raises(errors.InvalidParameterValue):
        conn.execute("select pgque.unregister_subconsumer('q', 'g', 'a', 2)")
    assert finish(conn, batch) == 1
    assert one(conn, "select pgque.unregister_subconsumer('q', 'g', 'a')") == 1
    assert one(conn, "select pgque.unregister_subconsumer('q', 'g', 'a')") == 0
    assert one(conn, "select pgque.unregister_subconsumer('q', 'g', 'b', 1)") == 1


def test_the_position_outlives_the_member_that_moved_it(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    finish(conn, claim(conn, "a"))
    conn.execute("select pgque.unregister_subconsumer('q', 'g', 'a')")
    conn.execute("select pgque.maint()")
    assert claim(conn, "b") is None
    conn.execute("select pgque.unregister_subconsumer('q', 'g', 'b')")
    assert one(conn, "select pgque.next_batch('q', 'g')") is None
    send_and_tick(conn, "2")
    assert events_of(conn, one(conn, "select pgque.next_batch('q', 'g')")) == ["2"]
    assert one(conn, "select pgque.unregister_consumer('q', 'g')") == 1
    assert one(conn, "select pgque.unregister_consumer('q', 'g')") == 0


def test_a_silent_members_batch_goes_to_a_sibling_under_a_fresh_id(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    lost = claim(conn, "a")
    assert claim(conn, "b", "1 minute") is None
    silence(conn)
    assert claim(conn, "b") is None
    taken = claim(conn, "b", "1 minute")
    assert taken is not None
    assert taken != lost
    assert events_of(conn, taken) == ["1"]
    assert claim(conn, "a", "1 minute") is None
    assert finish(conn, lost) == 0
    assert finish(conn, taken) == 1


def test_a_heartbeat_keeps_the_batch(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    batch = claim(conn, "a")
    silence(conn)
    assert one(conn, "select pgque.touch_subconsumer('q', 'g', 'a')") == 1
    assert one(conn, "select pgque.touch_subconsumer('q', 'g', 'nobody')") == 0
    assert claim(conn, "b", "1 minute") is None
    silence(conn)
    assert claim(conn, "a") == batch  # asking again is a sign of life
    assert claim(conn, "b", "1 minute") is None


def test_a_clock_stepped_back_does_not_make_a_batch_immortal(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    claim(conn, "a")
    conn.execute("update pgque.batch set batch_opened = batch_opened + interval '1 hour'")
    assert claim(conn, "b", "1 minute") is not None


def test_a_free_window_comes_after_a_silent_siblings(conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    claim(conn, "a")
    send_and_tick(conn, "2")
    silence(conn)
    taken = claim(conn, "b", "1 minute")
    assert events_of(conn, taken) == ["1"]
    finish(conn, taken)
    assert events_of(conn, claim(conn, "b", "1 minute")) == ["2"]


def test_a_takeover_never_waits_for_a_finish_in_flight(dsn: str, conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    batch = claim(conn, "a")
    silence(conn)
    conn.execute("set lock_timeout = '2s'")
    with psycopg.connect(dsn) as finisher:
        assert finish(finisher, batch) == 1
        assert claim(conn, "b", "1 minute") is None
        finisher.rollback()
        assert claim(conn, "b", "1 minute") is not None
        assert finish(finisher, batch) == 0


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_finish_waits_for_a_takeover_in_flight_and_obeys_its_outcome(
    dsn: str, conn: Connection, is_taken: bool
) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    batch = claim(conn, "a")
    silence(conn)
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(dsn, autocommit=True) as finisher,
        psycopg.connect(dsn) as taker,
    ):
        assert claim(taker, "b", "1 minute") is not None
        finishing = threads.submit(finish, finisher, batch)
        until(lambda: is_blocked(conn, finisher))
        if is_taken:
            taker.commit()
        else:
            taker.rollback()
        assert finishing.result(10) == (0 if is_taken else 1)


def test_a_finish_racing_a_takeover_has_exactly_one_winner(dsn: str, conn: Connection) -> None:
    queue(conn, "a", "b")
    with ThreadPoolExecutor() as threads, psycopg.connect(dsn, autocommit=True) as other:
        for _ in range(100):
            send_and_tick(conn, "x")
            batch = claim(conn, "a")
            taking = threads.submit(claim, other, "b", "0 seconds")
            finished = finish(conn, batch)
            taken = taking.result(10)
            assert (finished == 1) != (taken is not None)
            if taken is not None:
                assert finish(conn, taken) == 1


def test_two_takers_of_one_batch_get_it_once(dsn: str, conn: Connection) -> None:
    queue(conn, "a", "b", "c")
    send_and_tick(conn, "1")
    claim(conn, "a")
    silence(conn)
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(dsn, autocommit=True) as second,
        psycopg.connect(dsn) as first,
    ):
        assert claim(first, "b", "1 minute") is not None
        waiting = threads.submit(claim, second, "c", "1 minute")
        until(lambda: is_blocked(conn, second))
        first.commit()
        assert waiting.result(10) is None


def test_of_two_claims_at_once_the_second_gets_the_next_window(dsn: str, conn: Connection) -> None:
    queue(conn, "a", "b")
    send_and_tick(conn, "1")
    send_and_tick(conn, "2")
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(dsn, autocommit=True) as second,
        psycopg.connect(dsn) as first,
    ):
        window = claim(first, "a")
        waiting = threads.submit(claim, second, "b")
        until(lambda: is_blocked(conn, second))
        first.commit()
        assert events_of(conn, window) == ["1"]
        assert events_of(conn, waiting.result(10)) == ["2"]


def test_no_window_is_ever_given_to_two_members(dsn: str, conn: Connection) -> None:
    members = ("a", "b", "c", "d")
    queue(conn, *members)
    for n in range(100):
        send_and_tick(conn, str(n))

    def drain(member: str) -> list[str]:
        seen: list[str] = []
        with psycopg.connect(dsn, autocommit=True) as own:
            while (batch := claim(own, member)) is not None:
                seen += events_of(own, batch)
                assert finish(own, batch) == 1
        return seen

    with ThreadPoolExecutor() as threads:
        seen = [event for events in threads.map(drain, members) for event in events]
    assert sorted(seen, key=int) == [str(n) for n in range(100)]


def test_batches_and_consumers_are_described_while_they_are_open(conn: Connection) -> None:
    queue(conn, "m")
    conn.execute("select pgque.register_consumer('q', 'c')")
    send_and_tick(conn, "1", seq=1)
    send_and_tick(conn, "2", seq=2)
    batch = claim(conn, "m")
    info = conn.execute(
        "select queue_name, consumer_name, prev_tick_id, tick_id, seq_start, seq_end, batch_start <= batch_end, lag > '0' "
        "from pgque.get_batch_info(%s)",
        (batch,),
    ).fetchone()
    assert info == ("q", "g.m", 1, 2, 0, 1, True, True)
    consumers = conn.execute(
        "select consumer_name, last_tick, current_batch, next_tick, pending_events from pgque.get_consumer_info('q')"
    ).fetchall()
    assert consumers == [("c", 1, None, None, 2), ("g", 2, None, None, 1), ("g.m", 1, batch, 2, 2)]
    assert one(conn, "select count(*) from pgque.get_consumer_info('q', 'c')") == 1
    assert one(conn, "select count(*) from pgque.get_consumer_info() where queue_name = 'q'") == 3
    assert one(conn, "select bool_and(last_seen < interval '1 minute') from pgque.get_consumer_info(null, 'g.m')")
    finish(conn, batch)
    assert conn.execute("select queue_name, tick_id from pgque.get_batch_info(%s)", (batch,)).fetchall() == [
        (None, None)
    ]
