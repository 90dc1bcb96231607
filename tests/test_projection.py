"""Projecting timelines: each record once, whoever dies or comes twice; and no log is held back for long."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Handle, Settings, timeline_statements
from durable_cluster.projection import Projection
from durable_cluster.shards import maintenance, upkeep

Connection = psycopg.Connection[Any]
STEPS = 3


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters or None).fetchone()
    return row and row[0]


def hopping(dsn: str, *, history: bool = True, settings: Settings | None = None) -> App:
    app = App("hopping", dsn=dsn, settings=settings)
    machine = app.machine("hop", state=int, history=history)

    @machine.step(start=True)
    def hop(ctx: Context, left: int) -> Continuation:
        return ctx.goto(hop, left - 1) if left else ctx.done("there")

    return app


def unprojected(app: App, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> list[Handle]:
    """Workflows that have run to their end while nobody projected."""
    with monkeypatch.context() as patch:
        patch.setattr(Projection, "tend", lambda *_, **__: 0)
        handles = list(app.named("hop").start_many([STEPS - 1] * count))
        app.run(until_idle=True)
    return handles


def rows(conn: Connection) -> int:
    return int(one(conn, "select count(*) from durable.timeline"))


def readers(conn: Connection) -> int:
    return int(one(conn, "select count(*) from pgque.consumer where co_name like '%timeline'"))


def batches(conn: Connection) -> int:
    return int(
        one(
            conn,
            "select count(*) from pgque.batch b join pgque.subscription s on s.sub_id = b.batch_sub"
            " join pgque.consumer c on c.co_id = s.sub_consumer where c.co_name like '%timeline'",
        )
    )


def rotations(conn: Connection) -> int:
    return int(one(conn, "select min(queue_rotations) from pgque.queue"))


def test_where_nothing_is_recorded_nobody_reads_nothing_is_written_and_no_day_is_made(
    dsn: str, conn: Connection
) -> None:
    app = hopping(dsn, history=False)
    app.named("hop").start(2)
    app.run(until_idle=True)
    maintenance.run_once(conn)
    assert (readers(conn), rows(conn)) == (0, 0)
    assert not any(Projection().tend(conn) for _ in range(3))
    assert one(conn, "select count(*) from pg_inherits where inhparent = 'durable.timeline'::regclass") == 1
    assert one(conn, "select count(*) from pgque.event_1 e where e.ev_type = 'history'") == 0
    assert timeline_statements.history_lag(conn) is None


def test_who_finds_nothing_to_project_takes_no_transaction_id(dsn: str, conn: Connection) -> None:
    app = hopping(dsn)
    app.named("hop").start(2)
    app.run(until_idle=True)
    projection = Projection()
    assert projection.tend(conn, is_asked=True) == 0
    before = one(conn, "select pg_snapshot_xmax(pg_current_snapshot())::text")
    for _ in range(5):
        assert projection.tend(conn, is_asked=True) == 0
        assert timeline_statements.project_timeline(conn, 0) is None
    assert one(conn, "select pg_snapshot_xmax(pg_current_snapshot())::text") == before


def test_who_dies_while_it_projects_has_projected_nothing_and_the_next_does_it_once(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    unprojected(hopping(dsn), monkeypatch, 20)
    conn.execute(
        "create function public.hang() returns trigger language plpgsql as"
        " $$ begin perform pg_advisory_xact_lock(4711); return new; end $$"
    )
    conn.execute("create trigger hang after insert on durable.timeline for each row execute function public.hang()")
    with psycopg.connect(dsn) as gate, psycopg.connect(dsn, autocommit=True) as dying:
        gate.execute("select pg_advisory_xact_lock(4711)")
        pid = dying.info.backend_pid
        thread = threading.Thread(target=_projecting, args=(dying,))
        thread.start()
        eventually(lambda: one(conn, "select exists (select from pg_locks where not granted and pid = %s)", pid))
        conn.execute("select pg_terminate_backend(%s)", (pid,))
        thread.join(10)
    conn.execute("drop function public.hang() cascade")
    eventually(lambda: Projection().tend(conn) or rows(conn) == 20 * STEPS, what="everything projected")
    assert rows(conn) == 20 * STEPS
    assert one(conn, "select count(distinct (id, seq)) from durable.timeline") == 20 * STEPS
    assert Projection().tend(conn) == 0


def _projecting(connection: Connection) -> None:
    with contextlib.suppress(psycopg.OperationalError):
        for shard in (0, 1):
            while one(connection, "select durable.project_timeline(%s)", shard) is not None:
                pass


def test_a_page_that_is_lost_is_not_in_the_timeline(dsn: str, conn: Connection) -> None:
    app = App("losing", dsn=dsn)
    machine = app.machine("lose", state=int, history=True)
    runs: list[int] = []

    @machine.step(start=True)
    def lose(ctx: Context, value: int) -> Continuation:
        runs.append(value)
        if len(runs) == 1:  # somebody has taken its window over
            conn.execute("update durable.win set owner = owner + 1, active = '-infinity'")
        return ctx.done(value)

    handle = machine.start(1)
    app.run(until_idle=True)
    assert handle.result(timeout=1) == 1 and len(runs) == 2
    assert [moment.seq for moment in handle.timeline().moments] == [None, 1, None]


def test_two_who_project_at_once_write_each_record_once(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = hopping(dsn)
    for _ in range(10):
        unprojected(app, monkeypatch, 5)
    lost: list[BaseException] = []

    def project() -> None:
        try:
            with psycopg.connect(dsn, autocommit=True) as mine:
                for _ in range(200):
                    for shard in (0, 1):
                        mine.execute("select durable.project_timeline(%s, '1 microsecond')", (shard,))
        except psycopg.Error as error:
            lost.append(error)

    threads = [threading.Thread(target=project) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    Projection().tend(conn)
    assert lost == []
    assert rows(conn) == one(conn, "select count(distinct (id, seq)) from durable.timeline") == 50 * STEPS


def test_an_event_that_somebody_put_there_by_hand_is_passed_over(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = hopping(dsn)
    unprojected(app, monkeypatch)
    good = one(
        conn,
        "select ev_data from pgque.event_1 where ev_type = 'history' union all"
        " select ev_data from pgque.event_2 where ev_type = 'history' limit 1",
    )
    bodies = [
        "",
        "nonsense",
        "12\n{",
        "x\n{}",
        good.replace('"n":', '"n":-9'),
        '1\n{"p":"\\u0000","r":[{"w":"no"}]}',
        '1\n{"p":"a","r":7}',
        good[:-20],
        "1e999\n{}",
        '1\n{"r":[{"w":"' + "f" * 32 + '","n":99999999999,"s":"a","o":"b"}]}',
        None,
    ]
    for shard in (0, 1):
        for body in bodies:
            conn.execute("select pgque.insert_event(%s, 'history', %s)", (f"durable_{shard}", body))
    handle = app.named("hop").start(STEPS - 1)
    app.run(until_idle=True)
    assert [m.seq for m in handle.timeline().moments] == [None, 1, 2, 3, None]
    assert timeline_statements.unread_timelines(conn) == []


def test_switched_on_later_and_off_again_it_reads_from_then_and_holds_nothing_back(dsn: str, conn: Connection) -> None:
    off, on = hopping(dsn, history=False), hopping(dsn)
    before = off.named("hop").start(STEPS - 1)
    off.run(until_idle=True)
    assert readers(conn) == 0
    during = on.named("hop").start(STEPS - 1)
    on.run(until_idle=True)
    assert readers(conn) == one(conn, "select count(*) from durable.shard")
    after = off.named("hop").start(STEPS - 1)
    off.run(until_idle=True)
    maintenance.run_once(conn)
    assert readers(conn) == 0 and batches(conn) == 0
    assert [len(handle.timeline().moments) for handle in (before, during, after)] == [2, STEPS + 2, 2]
    assert during.timeline().has_history and not after.timeline().has_history
    assert not upkeep.needs_timeline_upkeep(conn, days=30)


def test_a_stopped_reader_holds_rotation_back_no_longer_than_its_limit(
    dsn: str,
    conn: Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Callable[..., None],
) -> None:
    app = hopping(dsn)
    conn.execute("update pgque.queue set queue_rotation_period = '0'")

    def rotated(lag_s: float, target: int) -> bool:
        unprojected(app, monkeypatch, 4)
        upkeep.keep_up(conn, lag_s=lag_s)
        return rotations(conn) >= target

    unprojected(app, monkeypatch, 4)
    held = rotations(conn)
    for _ in range(8):
        rotated(3600, 0)
    assert rotations(conn) <= held + 2, "the reader's place is in a table that may not be emptied"
    held = rotations(conn)
    eventually(lambda: rotated(0.05, held + 4), seconds=30, what="rotation beside a reader that has stopped")
    skips = conn.execute("select shard, since, until, records from durable.timeline_skips(1000)").fetchall()
    assert {shard for shard, *_ in skips} == {0, 1}
    assert all(since < until and records is not None for _, since, until, records in skips)
    handles = app.named("hop").start_many([STEPS - 1] * 4)
    app.run(until_idle=True)
    missing = sum(records for *_, records in skips)
    run = int(one(conn, "select count(*) from durable.started")) * STEPS
    assert rows(conn) == run - missing > 0
    assert all(len(handle.timeline().moments) == STEPS + 2 for handle in handles)


def test_who_is_behind_is_told_of_and_the_gap_is_seen(
    dsn: str,
    conn: Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    eventually: Callable[..., None],
) -> None:
    (handle,) = unprojected(hopping(dsn), monkeypatch)
    eventually(lambda: (timeline_statements.history_lag(conn) or 0) > 0.02)
    with caplog.at_level(logging.WARNING):
        maintenance.run_once(conn, Settings(history_lag_max_s=0.01))
    (record,) = [record for record in caplog.records if "the timeline lacks 3 records" in record.message]
    assert record.levelno == logging.WARNING
    timeline = handle.timeline()
    assert timeline.skips == 1 and timeline.has_history and timeline.lag_s == 0
    assert [moment.outcome for moment in timeline.moments] == ["started", "completed"]
    assert timeline_statements.skip_timelines(conn, lag_s=0.001) == []


def test_days_are_made_ahead_and_go_when_they_are_expired(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    app = hopping(dsn)
    handle = app.named("hop").start(STEPS - 1)
    app.run(until_idle=True)
    today = one(conn, "select durable.today()")
    assert one(conn, f"select count(*) from durable.timeline_{today}") == STEPS
    clock(86_400 * 8)
    assert upkeep.needs_timeline_upkeep(conn, days=30)
    maintenance.run_once(conn)
    assert not upkeep.needs_timeline_upkeep(conn, days=30) and len(handle.timeline().moments) == STEPS + 2
    clock(86_400 * 40)
    for _ in range(40):
        maintenance.run_once(conn, Settings(retention_days=30))
    assert one(conn, "select to_regclass(%s)", f"durable.timeline_{today}") is None
    assert one(
        conn,
        "select min(substring(inhrelid::regclass::text from '[0-9]+$')::int) >= durable.today() - 30"
        " from pg_inherits where inhparent = 'durable.timeline'::regclass",
    )
    assert rows(conn) == 0


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_a_timeline_of_a_strange_number_of_days_is_refused(conn: Connection, days: int) -> None:
    with pytest.raises(psycopg.DatabaseError, match="out of range"):
        conn.execute("select durable.keep_timeline(%s)", (days,))


def test_what_cannot_be_written_is_said_and_tried_again_and_nothing_else_waits(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (handle,) = unprojected(hopping(dsn), monkeypatch)
    conn.execute("alter table durable.timeline add constraint none check (shard < 0) not valid")
    projection = Projection()
    with caplog.at_level(logging.WARNING):
        assert projection.tend(conn) == 0
    assert "the timeline cannot be written" in caplog.text and projection.rest_s > 1
    conn.execute("alter table durable.timeline drop constraint none")
    assert projection.tend(conn, is_asked=True) == STEPS
    assert len(handle.timeline().moments) == STEPS + 2


FLOWS = """
from durable_cluster import App, Context, Continuation

app = App("hopping")
machine = app.machine("hop", state=int, history=True)


@machine.step(start=True)
def hop(ctx: Context, left: int) -> Continuation:
    return ctx.goto(hop, left - 1) if left else ctx.done("there")
"""


def test_a_cluster_projects_and_its_maintenance_may_be_killed(
    dsn: str,
    conn: Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cluster: Callable[..., Any],
    eventually: Callable[..., None],
) -> None:
    (tmp_path / "hopping_flows.py").write_text(FLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    app = hopping(dsn)
    app.run(until_idle=True)  # which says that it is recorded
    cluster = run_cluster(dsn, app="hopping_flows:app", settings=Settings(maintenance_s=0.2)).demand_up()
    handles = list(app.named("hop").start_many([STEPS - 1] * 50))
    eventually(lambda: rows(conn) > 0, seconds=30, what="a timeline")
    os.kill(cluster.supervisor.pids["maintenance"], signal.SIGKILL)
    handles += app.named("hop").start_many([STEPS - 1] * 50)
    eventually(lambda: rows(conn) >= 100 * STEPS, seconds=30, what="all timelines")
    assert rows(conn) == one(conn, "select count(distinct (id, seq)) from durable.timeline") == 100 * STEPS
    assert all(len(handle.timeline().moments) == STEPS + 2 for handle in handles)
