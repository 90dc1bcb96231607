"""Schedules: each due time starts one workflow, whoever looks and whatever happens meanwhile."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.errors import RaiseException

from durable_cluster import (
    App,
    AppError,
    Context,
    Continuation,
    InputError,
    Schedule,
    Settings,
    UnknownWorkflow,
    schedules,
)
from durable_cluster import schedule_statements as sql
from durable_cluster.firing import Firing, worked_out
from durable_cluster.shards import maintenance

Connection = psycopg.Connection[Any]
At = Callable[[str], None]

FLOWS = """
from durable_cluster import App, Context
app = App("reporting")

@app.machine("report").step(start=True)
def write(ctx: Context, value: object):
    return ctx.done(value)
"""


class Report(msgspec.Struct):
    city: str
    at: datetime


def application(dsn: str, name: str = "reporting") -> App:
    """``report`` ends at once; ``hold`` lives until it gets the signal ``go``."""
    app = App(name, dsn=dsn)
    report, hold = app.machine("report"), app.machine("hold")

    @report.step(start=True)
    def write(ctx: Context, value: Any) -> Continuation:
        return ctx.done(value)

    @hold.step(start=True)
    def begin(ctx: Context, value: Any) -> Continuation:
        return ctx.wait_for("go", then=end, state=value)

    @hold.step()
    def end(ctx: Context, value: Any) -> Continuation:
        return ctx.done(value)

    typed = app.machine("typed")

    @typed.step(start=True)
    def read(ctx: Context, value: Report) -> Continuation:
        return ctx.done(value.city)

    return app


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    app = application(dsn)
    yield app
    app.close()


@pytest.fixture
def at(clock: Callable[[float], None]) -> At:
    """From now on it is that time, and passes."""
    return lambda text: clock((datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds())


def fire(connection: Connection) -> None:
    """As maintenance does, until nothing is due."""
    firing = Firing()
    while firing.tend(connection, is_asked=True):
        pass


def started(conn: Connection, name: str = "nightly") -> list[str]:
    """The due times that have started a workflow."""
    rows = conn.execute(
        "select split_part(key, '@', 2) from durable.started where key like %s order by key", (f"{name}@%",)
    )
    return [row[0] for row in rows]


def inputs(conn: Connection) -> list[Any]:
    return [msgspec.json.decode(row[0]) for row in conn.execute("select input from durable.started order by key")]


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    return row and row[0]


def refuse(conn: Connection) -> None:
    """From now on every change of the schedule ``broken`` fails."""
    conn.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'the disk is full'; end $$;"
        "create trigger refuse after update on durable.schedule for each row when (new.name = 'broken') execute function refuse()"
    )


def due_now(conn: Connection) -> sql.Due:
    found = sql.due(conn, limit=1, without=[])
    assert len(found) == 1
    return found[0]


def fired(connection: Connection, due: sql.Due) -> int | None:
    dues, next_due = worked_out(due)
    return sql.fire(connection, due, dues=dues, next_due=next_due, missed=None)


# Due times.


def test_a_cluster_fires_within_a_second_of_the_due_time_also_what_was_made_while_it_slept(
    app: App, dsn: str, conn: Connection, at: At, run_cluster: Callable[..., Any], eventually: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "reporting_flows.py").write_text(FLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    at("2027-06-01T02:00:00Z")
    run_cluster(dsn, app="reporting_flows:app", settings=Settings(maintenance_s=60.0)).demand_up()
    late_s: list[float] = []
    for hour in (3, 4, 5):
        app.schedules.create(f"at-{hour}", f"0 {hour} * * *", "report")
        at(f"2027-06-01T0{hour - 1}:59:58.500Z")
        eventually(lambda hour=hour: started(conn, f"at-{hour}") == [f"2027-06-01T0{hour}:00:00Z"])
        due = f"2027-06-01T0{hour}:00:00Z"
        late_s.append(
            one(
                conn,
                "select extract(epoch from at - %s::timestamptz)::float8 from durable.started order by at desc limit 1",
                due,
            )
        )
        assert app.named("report").get(key=f"at-{hour}@{due}").result(timeout=10) is None
    assert max(late_s) < 1.0, late_s
    assert min(late_s) >= 0.0, late_s


def test_a_due_time_starts_one_workflow_which_is_told_of_it(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create(
        "nightly", "0 3 * * *", "report", {"city": "Ulm"}, zone="Europe/Berlin", due_as="at", catch_up=5
    )
    fire(conn)
    assert started(conn) == []
    assert app.schedules.get("nightly").next_due == datetime(2027, 6, 1, 1, tzinfo=UTC)
    at("2027-06-01T01:00:01Z")
    fire(conn)
    fire(conn)
    assert started(conn) == ["2027-06-01T01:00:00Z"]
    assert inputs(conn) == [{"at": "2027-06-01T03:00:00+02:00", "city": "Ulm"}]
    app.run(until_idle=True)
    handle = app.named("report").get(key="nightly@2027-06-01T01:00:00Z")
    assert handle.result(timeout=5)["city"] == "Ulm"
    known = app.schedules.get("nightly")
    assert (known.fired, known.last_id, known.running) == (1, handle.id[:12], 0)
    assert known.last_due == datetime(2027, 6, 1, 1, tzinfo=UTC)
    assert known.next_due == datetime(2027, 6, 2, 1, tzinfo=UTC)


def test_a_due_time_that_comes_while_its_schedule_is_being_made_fires(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T03:00:00.100Z")
    plan = schedules.planned(
        app, "nightly", "0 3 * * *", "report", None, zone="UTC", overlap="skip", catch_up=1, due_as=None
    )
    sql.put(conn, plan, next_due=datetime(2027, 6, 1, 3, tzinfo=UTC), app=None)
    fire(conn)
    assert started(conn) == ["2027-06-01T03:00:00Z"]


def test_a_program_that_runs_its_app_fires_its_schedules(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedule("nightly", "0 3 * * *", "report")
    app.run(until_idle=True)
    at("2027-06-01T03:00:01Z")
    app.run(until_idle=True)
    assert started(conn) == ["2027-06-01T03:00:00Z"]
    assert app.named("report").get(key="nightly@2027-06-01T03:00:00Z").status() == "completed"


@pytest.mark.parametrize(
    ("zone", "begin", "expected"),
    [
        ("Europe/Berlin", "2027-03-27T00:00:00Z", ["2027-03-27T01:30:00Z", "2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"]),
        ("Europe/Berlin", "2027-10-30T00:00:00Z", ["2027-10-30T00:30:00Z", "2027-10-31T00:30:00Z", "2027-11-01T01:30:00Z"]),
        ("Australia/Sydney", "2027-10-01T15:00:00Z", ["2027-10-01T16:30:00Z", "2027-10-02T16:00:00Z", "2027-10-03T15:30:00Z"]),
        ("Australia/Sydney", "2027-04-02T14:00:00Z", ["2027-04-02T15:30:00Z", "2027-04-03T15:30:00Z", "2027-04-04T16:30:00Z"]),
    ],
)  # fmt: skip
def test_half_past_two_fires_once_a_day_at_both_ends_of_summer_time(
    app: App, conn: Connection, at: At, zone: str, begin: str, expected: list[str]
) -> None:
    at(begin)
    app.schedules.create("nightly", "30 2 * * *", "report", zone=zone, overlap="allow")
    for minute in range(0, 3 * 1_440, 20):
        at((datetime.fromisoformat(begin) + timedelta(minutes=minute, seconds=1)).isoformat())
        fire(conn)
    assert started(conn) == expected
    assert app.schedules.get("nightly").missed_from is None


# Once.


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "rolled back"])
def test_of_two_hosts_that_see_a_due_time_one_fires_it(
    app: App, dsn: str, conn: Connection, at: At, is_committed: bool
) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report")
    at("2027-06-01T03:00:01Z")
    with psycopg.connect(dsn) as first, psycopg.connect(dsn, autocommit=True) as second:
        second.execute("set lock_timeout = '2s'")
        seen_by_first, seen_by_second = due_now(first), due_now(second)
        assert fired(first, seen_by_first) == 1
        assert fired(second, seen_by_second) is None, "nobody waits for the other"
        first.commit() if is_committed else first.rollback()
        assert fired(second, seen_by_second) == (None if is_committed else 1)
        assert sql.due(second, limit=1, without=[]) == []
    assert started(conn) == ["2027-06-01T03:00:00Z"]


def test_many_hosts_that_look_at_once_start_each_due_time_once(app: App, dsn: str, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    for n in range(20):
        app.schedules.create(f"s{n}", "0 3 * * *", "hold", overlap="allow", catch_up=3)
    at("2027-06-03T03:00:01Z")
    barrier = Barrier(4)

    def host() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            barrier.wait(10)
            fire(connection)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(host) for _ in range(4)]:
            done.result(30)
    fire(conn)
    for n in range(20):
        assert started(conn, f"s{n}") == [f"2027-06-0{day}T03:00:00Z" for day in (1, 2, 3)]
        assert app.schedules.get(f"s{n}").fired == 3


def test_a_host_that_worked_from_another_cron_does_not_fire(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report")
    at("2027-06-01T03:00:01Z")
    seen = due_now(conn)
    app.schedules.change("nightly", cron="0 4 * * *")
    assert fired(conn, seen) is None
    at("2027-06-01T04:00:01Z")
    fire(conn)
    assert started(conn) == ["2027-06-01T04:00:00Z"]


def test_a_fire_whose_transaction_fails_leaves_the_schedule_due_and_holds_up_no_other(
    app: App, conn: Connection, at: At, caplog: pytest.LogCaptureFixture
) -> None:
    at("2027-06-01T00:00:00Z")
    for name in ("broken", "nightly"):
        app.schedules.create(name, "0 3 * * *", "report")
    refuse(conn)
    at("2027-06-01T03:00:01Z")
    seen = next(one for one in sql.due(conn, limit=9, without=[]) if one.name == "broken")
    with pytest.raises(RaiseException):
        fired(conn, seen)
    with caplog.at_level(logging.WARNING):
        fire(conn)
    assert "schedule 'broken' is due and could not be fired: the disk is full; again in 1 s" in caplog.text
    assert (started(conn, "broken"), started(conn)) == ([], ["2027-06-01T03:00:00Z"])
    conn.execute("drop trigger refuse on durable.schedule")
    fire(conn)
    assert started(conn, "broken") == ["2027-06-01T03:00:00Z"]


def test_a_look_that_finds_nothing_due_takes_no_transaction_id(app: App, dsn: str, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report")
    with psycopg.connect(dsn) as looking:
        assert not Firing().tend(looking, is_asked=True)
        assert looking.execute("select pg_current_xact_id_if_assigned()").fetchone() == (None,)


# While an earlier run lives.


def holding(app: App, conn: Connection, at: At, overlap: str) -> None:
    """The runs of the 1st to the 3rd of June are due one after another, and none of them ends."""
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "hold", overlap=overlap)
    for day in (1, 2, 3):
        at(f"2027-06-0{day}T03:00:01Z")
        fire(conn)
        app.run(until_idle=True)


def end(app: App, due: str) -> None:
    app.named("hold").get(key=f"nightly@{due}").signal("go")
    app.run(until_idle=True)


def test_skip_leaves_out_what_is_due_while_a_run_lives(app: App, conn: Connection, at: At) -> None:
    holding(app, conn, at, "skip")
    assert started(conn) == ["2027-06-01T03:00:00Z"]
    assert (app.schedules.get("nightly").skipped, app.schedules.get("nightly").running) == (2, 1)
    end(app, "2027-06-01T03:00:00Z")
    assert started(conn) == ["2027-06-01T03:00:00Z"], "what was left out stays out"
    at("2027-06-04T03:00:01Z")
    fire(conn)
    assert started(conn) == ["2027-06-01T03:00:00Z", "2027-06-04T03:00:00Z"]


def test_allow_starts_it_beside_the_others(app: App, conn: Connection, at: At) -> None:
    holding(app, conn, at, "allow")
    assert started(conn) == [f"2027-06-0{day}T03:00:00Z" for day in (1, 2, 3)]
    assert app.schedules.get("nightly").running == 3


def test_of_what_is_queued_one_waits_and_begins_when_the_run_before_it_has_ended(
    app: App, conn: Connection, at: At
) -> None:
    holding(app, conn, at, "queue")
    known = app.schedules.get("nightly")
    assert started(conn) == ["2027-06-01T03:00:00Z"]
    assert (known.queued, known.skipped, known.running) == (datetime(2027, 6, 2, 3, tzinfo=UTC), 1, 1)
    app.schedules.pause("nightly")
    end(app, "2027-06-01T03:00:00Z")
    fire(conn)
    assert started(conn) == ["2027-06-01T03:00:00Z"], "it waits while the schedule is paused"
    app.schedules.resume("nightly")
    fire(conn)
    assert started(conn) == ["2027-06-01T03:00:00Z", "2027-06-02T03:00:00Z"]
    assert app.schedules.get("nightly").queued is None


def test_what_waits_begins_before_what_is_due_now(app: App, conn: Connection, at: At) -> None:
    holding(app, conn, at, "queue")
    conn.execute("delete from durable.schedule_run")
    at("2027-06-04T03:00:01Z")
    assert fired(conn, due_now(conn)) == 0
    assert started(conn) == ["2027-06-01T03:00:00Z", "2027-06-02T03:00:00Z"]
    assert app.schedules.get("nightly").queued == datetime(2027, 6, 4, 3, tzinfo=UTC)


def test_what_waits_and_cannot_be_started_holds_up_no_other(app: App, conn: Connection, at: At) -> None:
    holding(app, conn, at, "queue")
    app.schedules.create("broken", "0 3 * * *", "hold", overlap="queue")
    assert [app.schedules.trigger("broken").outcome for _ in range(2)] == ["started", "queued"]
    conn.execute("delete from durable.schedule_run")
    refuse(conn)
    assert sql.start_queued(conn) == 1
    assert started(conn) == ["2027-06-01T03:00:00Z", "2027-06-02T03:00:00Z"]
    assert app.schedules.get("broken").queued is not None
    conn.execute("drop trigger refuse on durable.schedule")
    fire(conn)
    assert len(started(conn, "broken")) == 2


def test_two_hosts_start_what_waits_once(app: App, dsn: str, conn: Connection, at: At) -> None:
    holding(app, conn, at, "queue")
    app.named("hold").get(key="nightly@2027-06-01T03:00:00Z").cancel()
    conn.execute("insert into durable.finished select id, day, 'cancelled', '{}', at from durable.started")
    with psycopg.connect(dsn) as first, psycopg.connect(dsn, autocommit=True) as second:
        second.execute("set lock_timeout = '2s'")
        assert sql.start_queued(first) == 1
        assert sql.start_queued(second) == 0
        first.commit()
        assert sql.start_queued(second) == 0
    assert started(conn) == ["2027-06-01T03:00:00Z", "2027-06-02T03:00:00Z"]


# Pause, outage, backfill, trigger.


def test_what_was_due_during_a_pause_does_not_fire_later(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report", catch_up=10)
    assert app.schedules.pause("nightly", "audit")
    assert not app.schedules.pause("nightly")
    known = app.schedules.get("nightly")
    assert (known.pause_reason, known.next_due, known.paused_at is None) == ("audit", None, False)
    at("2027-06-03T12:00:00Z")
    fire(conn)
    assert conn.execute("select durable.resume_schedule('nightly')").fetchone() == (True,)
    assert not app.schedules.resume("nightly")
    fire(conn)
    assert started(conn) == []
    known = app.schedules.get("nightly")
    assert (known.next_due, known.missed_from) == (datetime(2027, 6, 4, 3, tzinfo=UTC), None)
    at("2027-06-04T03:00:01Z")
    fire(conn)
    assert started(conn) == ["2027-06-04T03:00:00Z"]


@pytest.mark.parametrize(
    ("catch_up", "days", "missed_until"),
    [(1, [4], 4), (3, [2, 3, 4], 2), (100, [1, 2, 3, 4], None), ("33h", [3, 4], 3), ("9h", [4], 4), ("1m", [], 5)],
)
def test_after_an_outage_so_much_is_caught_up_as_was_said_and_the_rest_is_noted(
    app: App, conn: Connection, at: At, catch_up: int | str, days: list[int], missed_until: int | None
) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report", overlap="allow", catch_up=catch_up)
    at("2027-06-04T11:59:59Z")
    fire(conn)
    assert started(conn) == [f"2027-06-0{day}T03:00:00Z" for day in days]
    known = app.schedules.get("nightly")
    assert known.next_due == datetime(2027, 6, 5, 3, tzinfo=UTC)
    if missed_until is None:
        assert known.missed_from is None
    else:
        assert known.missed_from == datetime(2027, 6, 1, 3, tzinfo=UTC)
        assert known.missed_until == datetime(2027, 6, missed_until, 3, tzinfo=UTC)


def test_a_year_without_a_cluster_is_no_flood(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "* * * * *", "report", overlap="allow")
    app.schedules.create("hourly", "* * * * *", "report", overlap="allow", catch_up="365d")
    at("2028-06-01T00:00:30Z")
    fire(conn)
    assert started(conn) == ["2028-06-01T00:00:00Z"]
    assert len(started(conn, "hourly")) == schedules.CATCH_UP_MAX


def test_a_backfill_starts_each_due_time_of_its_period_once(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "hold", due_as="at")
    at("2027-06-01T03:00:01Z")
    fire(conn)
    begin, last = datetime(2027, 5, 30, 3, tzinfo=UTC), datetime(2027, 6, 1, 3, tzinfo=UTC)
    assert app.schedules.backfill("nightly", begin, last) == 2, "the first of June has been started"
    assert app.schedules.backfill("nightly", begin, last) == 0
    assert started(conn) == ["2027-05-30T03:00:00Z", "2027-05-31T03:00:00Z", "2027-06-01T03:00:00Z"]
    assert inputs(conn)[0] == {"at": "2027-05-30T03:00:00+00:00"}
    assert app.schedules.get("nightly").running == 3
    assert app.schedules.get("nightly").next_due == datetime(2027, 6, 2, 3, tzinfo=UTC)


def test_two_backfills_at_once_start_nothing_twice(
    app: App, dsn: str, conn: Connection, at: At, eventually: Callable[..., None]
) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report")
    period = datetime(2027, 5, 1, tzinfo=UTC), datetime(2027, 5, 10, tzinfo=UTC)
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        assert app.schedules.backfill("nightly", *period, tx=first) == 9
        late = pool.submit(app.schedules.backfill, "nightly", *period, tx=second)
        eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", second.info.backend_pid))
        first.commit()
        assert late.result(10) == 0
    assert len(started(conn)) == 9


def test_a_backfill_is_of_the_past_and_has_a_limit(app: App, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "* * * * *", "report")
    may, june = datetime(2027, 5, 1, tzinfo=UTC), datetime(2027, 6, 1, tzinfo=UTC)
    for begin, last, what in (
        (may, june + timedelta(days=1), "is not over"),
        (june, may, "is not over, or ends before it begins"),
        (may, june, "has more than 1,000 due times"),
        (may.replace(tzinfo=None), june, "begin: .* is no time with a time zone"),
    ):
        with pytest.raises(InputError, match=what):
            app.schedules.backfill("nightly", begin, last)
    dues = [may + timedelta(minutes=n) for n in range(1_001)]
    with pytest.raises(InputError, match="1001 due times at once"):
        sql.backfill(conn, "nightly", edition=1, dues=dues)
    with pytest.raises(InputError, match="was changed meanwhile"):
        sql.backfill(conn, "nightly", edition=2, dues=dues[:1])
    assert started(conn) == []


def test_a_trigger_runs_it_now_as_its_overlap_policy_allows(app: App, dsn: str, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "hold", {"city": "Ulm"}, due_as="at")
    with psycopg.connect(dsn) as tx:
        assert app.schedules.trigger("nightly", tx=tx).outcome == "started"
        tx.rollback()
    assert started(conn) == []
    app.schedules.pause("nightly")
    done = app.schedules.trigger("nightly")
    assert done.handle is not None
    assert (done.outcome, done.handle.status()) == ("started", "running")
    assert inputs(conn)[0]["at"].startswith("2027-06-01T00:00:0")
    assert app.schedules.trigger("nightly") == schedules.Triggered("skipped", None)
    assert app.schedules.trigger("nightly", overlap="queue").outcome == "queued"
    assert app.schedules.trigger("nightly", overlap="queue").outcome == "skipped"
    assert app.schedules.trigger("nightly", overlap="allow").outcome == "started"
    for call in (
        lambda: app.schedules.trigger("nightly", overlap="x"),
        lambda: sql.trigger(conn, "nightly", overlap="x"),
    ):
        with pytest.raises(InputError, match="overlap"):
            call()
    assert len(started(conn)) == 2


# Declared in code.


def declared(dsn: str, conn: Connection, *, name: str = "reporting", **plans: str) -> list[str]:
    """A cluster of an app starts whose code declares these: names and crons. What it says is no longer in the code."""
    app = application(dsn, name)
    for schedule, cron in plans.items():
        app.schedule(schedule, cron, app.named("report"))
    try:
        return schedules.declare(app, conn)
    finally:
        app.close()


def listed(app: App) -> dict[str, Schedule]:
    return {known.name: known for known in app.schedules.list()}


def test_what_the_code_declares_is_made_and_changed_and_what_it_leaves_out_is_told(
    app: App, dsn: str, conn: Connection, at: At
) -> None:
    at("2027-06-01T00:00:00Z")
    assert declared(dsn, conn, a="0 3 * * *", b="0 4 * * *") == []
    app.schedules.pause("b")
    app.schedules.create("c", "0 5 * * *", "report")
    assert declared(dsn, conn, b="30 4 * * *") == ["a"]
    known = listed(app)
    assert {name: (one.cron, one.is_in_code) for name, one in known.items()} == {
        "a": ("0 3 * * *", False),
        "b": ("30 4 * * *", True),
        "c": ("0 5 * * *", False),
    }
    assert known["b"].paused_at is not None, "a pause outlasts a new version of the code"
    at("2027-06-01T03:00:01Z")
    fire(conn)
    assert started(conn, "a") == ["2027-06-01T03:00:00Z"], "what nobody deleted goes on firing"
    assert declared(dsn, conn, a="0 3 * * *", b="30 4 * * *") == []
    assert listed(app)["a"].is_in_code
    app.schedules.delete("a")
    assert "a" not in listed(app)


def test_a_start_after_an_outage_forgets_nothing_that_was_missed(app: App, dsn: str, conn: Connection, at: At) -> None:
    at("2027-06-01T00:00:00Z")
    declared(dsn, conn, nightly="0 3 * * *")
    at("2027-06-03T12:00:00Z")
    declared(dsn, conn, nightly="0 3 * * *")
    fire(conn)
    assert started(conn) == ["2027-06-03T03:00:00Z"]
    declared(dsn, conn, nightly="0 4 * * *")
    fire(conn)
    assert started(conn) == ["2027-06-03T03:00:00Z"], "another cron counts from now on"


def test_apps_of_one_database_leave_each_others_schedules_alone(app: App, dsn: str, conn: Connection) -> None:
    declared(dsn, conn, a="0 3 * * *")
    assert declared(dsn, conn, name="other", b="0 4 * * *") == []
    with pytest.raises(InputError, match="schedule 'a' is there already: app 'reporting' declares it; delete it, or"):
        declared(dsn, conn, name="other", a="0 5 * * *", c="0 6 * * *")
    app.schedules.create("d", "0 7 * * *", "report")
    with pytest.raises(InputError, match="schedule 'd' is there already: it was made at run time"):
        declared(dsn, conn, d="0 8 * * *")
    assert {name: known.cron for name, known in listed(app).items()} == {
        "a": "0 3 * * *",
        "b": "0 4 * * *",
        "d": "0 7 * * *",
    }, "all or nothing"
    for name in ("a", "d"):
        with pytest.raises(InputError, match="is there already"):
            app.schedules.create(name, "0 9 * * *", "report")


def test_two_hosts_that_start_at_once_declare_the_same_once(
    app: App, dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        first.execute("select 1")  # a transaction of its own, which stays open
        assert declared(dsn, first, a="0 3 * * *") == []
        late = pool.submit(declared, dsn, second, a="0 3 * * *")
        eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", second.info.backend_pid))
        first.commit()
        assert late.result(10) == []
    assert app.schedules.get("a").edition == 1


def test_what_is_declared_is_changed_in_the_code_and_what_is_not_at_run_time(
    app: App, dsn: str, conn: Connection, at: At
) -> None:
    at("2027-06-01T00:00:00Z")
    declared(dsn, conn, a="0 3 * * *")
    with pytest.raises(InputError, match="app 'reporting' declares schedule 'a' in its code; change it there"):
        app.schedules.change("a", cron="0 4 * * *")
    app.schedules.create("nightly", "0 3 * * *", "typed", {"city": "Ulm"}, due_as="at", catch_up=7)
    app.schedules.change("nightly", value={"city": "Bonn"}, overlap="allow", catch_up="2h")
    known = app.schedules.get("nightly")
    assert (known.edition, known.overlap, known.catch_up_s, known.due_as) == (1, "allow", 7200, "at")
    app.schedules.change("nightly", zone="Europe/Berlin", catch_up=2)
    known = app.schedules.get("nightly")
    assert (known.edition, known.zone, known.catch_up_max, known.catch_up_s) == (2, "Europe/Berlin", 2, None)
    assert known.next_due == datetime(2027, 6, 1, 1, tzinfo=UTC)
    with pytest.raises(InputError, match="does not fit Report"):
        app.schedules.change("nightly", value={"town": "Bonn"})
    at("2027-06-01T01:00:01Z")
    fire(conn)
    assert inputs(conn) == [{"at": "2027-06-01T03:00:00+02:00", "city": "Bonn"}]


def test_a_schedule_begins_its_workflow_where_the_running_code_does(
    app: App, dsn: str, conn: Connection, at: At
) -> None:
    at("2027-06-01T00:00:00Z")
    app.schedules.create("nightly", "0 3 * * *", "report")
    newer = App("reporting", dsn=dsn)

    @newer.machine("report", version=2).step(start=True)
    def prepare(ctx: Context, value: Any) -> Continuation:
        return ctx.done("prepared")

    schedules.declare(newer, conn)
    at("2027-06-01T03:00:01Z")
    newer.run(until_idle=True)
    assert newer.named("report").get(key="nightly@2027-06-01T03:00:00Z").result(timeout=5) == "prepared"
    newer.close()


# Bad input.


@pytest.mark.parametrize(
    ("changed", "error", "what"),
    [
        ({"name": "Nightly"}, AppError, "schedule name 'Nightly'"),
        ({"cron": "0 25 * * *"}, InputError, "cron: '0 25"),
        ({"zone": "Europe/Atlantis"}, InputError, "zone: 'Europe/Atlantis'"),
        ({"overlap": "never"}, InputError, "overlap: 'never' is no policy"),
        ({"workflow": "unheard"}, UnknownWorkflow, "has no workflow 'unheard'"),
        ({"value": {"town": "Ulm"}}, InputError, "the input of workflow 'typed' does not fit Report"),
        ({"value": {"city": "Ulm", "at": 1}}, InputError, "due_as='at': the value has to be a dict without that field"),
        ({"value": "Ulm"}, InputError, "due_as='at'"),
        ({"due_as": "when"}, InputError, "the input of workflow 'typed'"),
        ({"value": object()}, InputError, "due_as='at'"),
        ({"value": {"city": object()}}, InputError, "is not JSON"),
        ({"catch_up": 0}, InputError, "catch_up: 0 is out of range"),
        ({"catch_up": 1_001}, InputError, "catch_up: 1001 is out of range"),
        ({"catch_up": "soon"}, InputError, "catch_up: 'soon' is no duration"),
        ({"catch_up": "0s"}, InputError, "catch_up: '0s' leaves no time"),
        ({"catch_up": 1.5}, InputError, "catch_up: 1.5 is neither"),
        ({"catch_up": True}, InputError, "catch_up: True is neither"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    app: App, conn: Connection, changed: dict[str, Any], error: type[Exception], what: str
) -> None:
    given: dict[str, Any] = {"name": "nightly", "cron": "0 3 * * *", "workflow": "typed", "value": {"city": "Ulm"}}
    given |= {"due_as": "at"} | changed
    for make in (app.schedules.create, app.schedule):
        with pytest.raises(error) as told:
            make(**given)
        assert what in str(told.value)
    assert app.declared == {}
    assert one(conn, "select count(*) from durable.schedule") == 0


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"name": "Nightly"}, "schedule name 'Nightly'"),
        ({"zone": "Europe/Atlantis"}, "zone 'Europe/Atlantis' is not known"),
        ({"overlap": "never"}, "overlap 'never' is none"),
        ({"workflow": "A B"}, "workflow name 'A B'"),
        ({"payload": "{"}, "the payload is not JSON"),
        ({"payload": "[1]"}, "due_as 'at': the input has to be an object"),
        ({"payload": '{"at": null}'}, "due_as 'at': the input has to be an object without that field"),
        ({"catch_up_max": 0}, "catch_up of 0 due times"),
        ({"catch_up_s": -1.0}, "catch_up of 1 due times, -1 s"),
        ({"cron": ""}, "the cron has 1 to 255 characters"),
    ],
)
def test_the_database_too_takes_no_schedule_that_cannot_be(
    conn: Connection, changed: dict[str, Any], what: str
) -> None:
    plan = sql.Plan(
        name="nightly", cron="0 3 * * *", zone="UTC", workflow="report", version=1, step="write", payload="{}",
        overlap="skip", due_as="at", catch_up_max=1, catch_up_s=None,
    )  # fmt: skip
    with pytest.raises(InputError) as told:
        sql.put(conn, msgspec.structs.replace(plan, **changed), next_due=None, app=None)
    assert what in str(told.value)
    assert one(conn, "select count(*) from durable.schedule") == 0


def test_who_is_unknown_is_told(app: App) -> None:
    calls: list[Callable[[], object]] = [
        lambda: app.schedules.get("none"),
        lambda: app.schedules.pause("none"),
        lambda: app.schedules.resume("none"),
        lambda: app.schedules.delete("none"),
        lambda: app.schedules.trigger("none"),
        lambda: app.schedules.change("none", overlap="allow"),
        lambda: app.schedules.backfill("none", datetime.now(UTC), datetime.now(UTC)),
    ]
    for call in calls:
        with pytest.raises(UnknownWorkflow, match="no schedule 'none'"):
            call()
    app.schedule("twice", "0 3 * * *", "report")
    with pytest.raises(AppError, match="declares a schedule 'twice' already"):
        app.schedule("twice", "0 4 * * *", "report")
    with pytest.raises(AppError, match="is no machine of app 'reporting'"):
        app.schedule("other", "0 3 * * *", App("elsewhere").machine("report"))


# Retention.


def test_a_run_that_outlives_its_day_is_still_waited_for_and_one_that_is_forgotten_is_not(
    app: App, conn: Connection, at: At
) -> None:
    at("2027-06-01T00:00:00Z")
    conn.execute("select durable.add_partitions()")
    for name in ("nightly", "brief"):
        app.schedules.create(name, "0 3 * * *", "hold" if name == "nightly" else "report")
    at("2027-06-01T03:00:01Z")
    fire(conn)
    app.run(until_idle=True)
    assert one(conn, "select count(*) from durable.schedule_run") == 2
    at("2027-08-01T00:00:00Z")
    while one(conn, "select durable.needs_expiry(30)"):
        maintenance.run_once(conn)
    assert started(conn, "brief") == []
    fire(conn)
    assert started(conn) == ["2027-06-01T03:00:00Z"], "carried, and alive"
    assert started(conn, "brief") == ["2027-07-31T03:00:00Z"]
    assert one(conn, "select count(*) from durable.schedule_run") == 2
    app.schedules.delete("nightly")
    app.schedules.delete("brief")
    assert one(conn, "select count(*) from durable.schedule_run") == 0
