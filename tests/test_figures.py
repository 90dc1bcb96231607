"""What the database says of itself to monitors: exact where little waits, at once where much does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege

from durable_cluster import App, Context, Continuation, Limit, Retry, figures, statements
from durable_cluster.figures import Figures, Reader

LINES = 40_000


@pytest.fixture
def app(dsn: str) -> App:
    app = App("watched", dsn=dsn)
    quick = app.machine("quick", state=str)
    asking = app.machine("asking", state=str)
    napping = app.machine("napping", state=str)
    parent = app.machine("parent", state=str)
    bad = app.machine("bad", state=str)
    limited = app.machine("limited", state=str)

    @quick.step(start=True)
    def quickly(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    @asking.step(start=True)
    def ask(ctx: Context, text: str) -> Continuation:
        return ctx.wait_for("answer", then=answered, state=text)

    @asking.step()
    def answered(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    @napping.step(start=True)
    def nap(ctx: Context, text: str) -> Continuation:
        return ctx.sleep("1h", then=woken, state=text)

    @napping.step()
    def woken(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    @parent.step(start=True)
    def bear(ctx: Context, text: str) -> Continuation:
        return ctx.gather([asking.child(text)], then=grown, state=text)

    @parent.step()
    def grown(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    @bad.step(start=True, retry=Retry(attempts=1))
    def fail(ctx: Context, text: str) -> Continuation:
        raise PermissionError(text)

    @limited.step(start=True, limit=Limit("none", concurrency=0))
    def never(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    return app


def look(conn: psycopg.Connection[Any]) -> Figures:
    return figures.read(conn)


def blocks(conn: psycopg.Connection[Any], query: str) -> int:
    """How many blocks the server looks at for it, whatever else it does meanwhile."""
    row = conn.execute(f"explain (analyze, buffers, format json) {query}".encode()).fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def lag(conn: psycopg.Connection[Any]) -> int:
    return sum(one.lag_events for one in look(conn).shards)


def test_an_empty_database_waits_for_nothing(conn: psycopg.Connection[Any]) -> None:
    found = look(conn)
    assert [(one.shard, one.lag_events, one.lag_s, one.consumers, one.rotation_age_s) for one in found.shards] == [
        (0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0),
    ]
    assert found.aside.wal_bytes is not None
    assert found.aside.history_lag_s is None
    assert {name: value for name, value in vars_of(found).items() if value} == {}
    assert {"durable.started", "durable.timer", "pgque.event", "durable.win"} <= found.dead_tuples.keys()
    assert not [name for name in found.dead_tuples if name[-1].isdigit()], "partitions are one table"


def vars_of(found: Figures) -> dict[str, float]:
    """What waits aside."""
    return {
        name: getattr(found.aside, name)
        for name in found.aside.__struct_fields__
        if not name.startswith(("wal", "history"))
    }


def test_what_waits_is_counted_by_what_it_waits_for(app: App, conn: psycopg.Connection[Any]) -> None:
    for name, many in {"asking": 3, "napping": 4, "parent": 2, "bad": 5, "limited": 6}.items():
        app.named(name).start_many(["x"] * many)
    held = app.named("quick").start_many(["x"] * 7)
    for one in held:
        one.pause()
    app.run(until_idle=True)
    found = look(conn)
    assert vars_of(found) == {
        **dict.fromkeys(("timers_due", "timer_lag_s", "schedule_lag_s", "detached_waiting"), 0),
        "sleeping": 4,
        "waits": 3 + 2,  # with the children
        "joins": 2,
        "queued": 6,
        "parked": 7,
        "stuck": 5,
    }
    assert sum(one.lag_events for one in found.shards) == 0
    assert all(one.rotation_age_s > 0 and one.log_bytes > 0 for one in found.shards)


def test_timers_that_nobody_fires_are_due_and_late(
    app: App, conn: psycopg.Connection[Any], clock: Callable[[float], None]
) -> None:
    app.named("quick").start_many(["x"] * 3, after="20s")
    assert look(conn).aside.timers_due == 0
    clock(50)
    found = look(conn).aside
    assert found.timers_due == 3
    assert found.timer_lag_s == pytest.approx(30, abs=2)


def test_the_lag_counts_lines_that_nobody_has_begun(app: App, conn: psycopg.Connection[Any]) -> None:
    app.named("quick").start_many(["x"] * 500)
    app.named("quick").start("x")
    assert lag(conn) == 501
    assert 0 < max(one.lag_s for one in look(conn).shards) < 60
    app.run(until_idle=True)
    assert lag(conn) == 0


def test_what_is_recorded_for_timelines_is_no_lag(app: App, conn: psycopg.Connection[Any]) -> None:
    conn.execute("select durable.record_steps(s.shard, '{}', 3) from durable.shard s")
    assert [(one.lag_events, one.lag_s) for one in look(conn).shards] == [(0, 0), (0, 0)]


def test_the_lag_counts_the_rest_of_a_window_that_is_being_read(app: App, conn: psycopg.Connection[Any]) -> None:
    app.named("quick").start_many(["x"] * 40)
    app.named("quick").start_many(["x"] * 40)
    before = {one.shard: one.lag_events for one in look(conn).shards}
    statements.join_shard(conn, 0, "reader")
    text = statements.claim(
        conn, 0, member="reader", owner=7, dead_interval=None, is_expected=True, lines_max=1000, bytes_max=1 << 20
    )
    assert text is not None
    app.named("quick").start_many(["x"] * 20)  # behind the window
    after = {one.shard: one.lag_events for one in look(conn).shards}
    assert sum(after.values()) == 100
    assert after[0] >= before[0]
    conn.execute(
        "update durable.win w set done = (select row(e.ev_txid, e.ev_id, 3)::durable.cursor from pgque.event_1 e"
        " order by e.ev_txid, e.ev_id limit 1)"
    )
    assert sum(one.lag_events for one in look(conn).shards) == 97


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_long_backlog_is_estimated_at_once(app: App, conn: psycopg.Connection[Any], is_recorded: bool) -> None:
    """Beside the entries of recorded workflows stand those for their timelines, which nobody waits for."""
    app.named("quick").start("x")
    shard = next(one.shard for one in look(conn).shards if one.lag_events)
    line = '{"w":"' + "0" * 32 + '","n":1,"f":"quick","s":"quickly","v":1,"d":"x"}'
    conn.execute(
        "select count(pgque.insert_event(durable.queue_of(%s), case when %s and n %% 2 = 0 then 'history' else 'steps' end, %s,"
        " '1', null, null, null)) from generate_series(2, %s) n",
        (shard, is_recorded, line, LINES),
    )
    assert lag(conn) == pytest.approx(LINES / (1 + is_recorded), rel=0.01)
    assert blocks(conn, "select * from durable.shard_figures()") < 200, "a thousand entries, and not the backlog"


def test_a_hundred_thousand_sleepers_are_estimated_at_once(conn: psycopg.Connection[Any]) -> None:
    conn.execute(
        "insert into durable.wait (id, seq, line, due, since, names)"
        " select gen_random_uuid(), 1, repeat('x', 400), now(), now(), case when n % 10 = 0 then array['a'] end"
        " from generate_series(1, 100000) n"
    )
    found = look(conn).aside
    assert blocks(conn, "select * from durable.figures()") < 3_000
    assert found.sleeping == pytest.approx(90_000, rel=0.1)
    assert found.waits == pytest.approx(10_000, rel=0.1)


def test_viewers_and_workers_read_them_and_nobody_gets_to_ask_in_sql_of_their_own(dsn: str) -> None:
    for role in ("durable_viewer", "durable_operator", "durable_worker"):
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"set role {role}")
            assert len(look(connection).shards) == 2
            with pytest.raises(InsufficientPrivilege):
                connection.execute("select durable.estimated('durable.secret', 'true')")


def test_a_reader_asks_once_for_all_who_want_it_at_the_same_time(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    really = figures.read

    def counted(connection: psycopg.Connection[Any]) -> Figures:
        asked.append(1)
        assert connection.execute("show application_name").fetchone() == ("durable-cluster metrics",)
        assert connection.execute("show default_transaction_read_only").fetchone() == ("on",)
        return really(connection)

    monkeypatch.setattr(figures, "read", counted)
    reader = Reader(dsn)
    assert {reader.latest().is_up for _ in range(3)} == {True}
    assert len(asked) == 1


def test_a_database_that_is_away_or_does_not_answer_is_told_within_a_second(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(dsn)
    good = reader.latest()
    assert good.is_up
    monkeypatch.setattr(reader, "_dsn", make_conninfo(dsn, host=str(tmp_path)))
    monkeypatch.setattr(reader, "_fresh_until", 0.0)
    away = reader.latest()
    assert not away.is_up
    assert away.figures == good.figures  # the last that were good

    monkeypatch.setattr(reader, "_dsn", dsn)
    monkeypatch.setattr(reader, "_fresh_until", 0.0)
    monkeypatch.setattr(figures, "read", lambda connection: connection.execute("select pg_sleep(60)"))
    began = time.monotonic()
    assert not reader.latest().is_up
    assert time.monotonic() - began < 1.0
