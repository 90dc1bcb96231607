"""Retention: what has been finished for long goes by whole days, what lives stays findable, and nobody waits for either."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from days import on_day
from psycopg.errors import LockNotAvailable

from durable_cluster import (
    App,
    ConfigurationError,
    Context,
    Continuation,
    Handle,
    InputError,
    Settings,
    UnknownWorkflow,
    statements,
)
from durable_cluster.errors import translated
from durable_cluster.ops import checks
from durable_cluster.shards import maintenance, upkeep

Connection = psycopg.Connection[Any]
DAYS = 30
END = (
    "insert into durable.finished (id, day, status, output, at)"
    " values (%(id)s, durable.day_of(%(id)s), 'completed', '7', durable.now()) on conflict do nothing"
)
"""The end of a workflow as a page's commit writes it."""


@pytest.fixture(autouse=True)
def today(conn: Connection) -> None:
    """No test meets a midnight."""
    on_day(conn, 0)


@pytest.fixture
def app(dsn: str) -> App:
    app = App("kept", dsn=dsn)
    machine = app.machine("one", state=int)

    @machine.step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return app


@pytest.fixture
def ended(app: App) -> Handle:
    """A workflow that started and ended today."""
    handle = app.named("one").start(1, key="ended")
    app.run(until_idle=True)
    assert handle.status() == "completed"
    return handle


@pytest.fixture
def alive(app: App, ended: Handle) -> Handle:
    """A workflow that started today, beside one that has ended, and waits for a consumer."""
    return app.named("one").start(2, key="alive")


def one(conn: Connection, query: str, *arguments: object) -> Any:
    row = conn.execute(query.encode(), arguments or None).fetchone()
    assert row is not None
    return row[0]


def days_kept(conn: Connection) -> list[int]:
    """Days with partitions, both alike."""
    kept = [
        [
            day
            for (day,) in conn.execute(
                "select substring(c.relname from '[0-9]+$')::int as day from pg_inherits i join pg_class c on c.oid = i.inhrelid"
                " where i.inhparent = %s::regclass and c.relname !~ 'default' order by day",
                (f"durable.{name}",),
            )
        ]
        for name in ("started", "finished")
    ]
    assert kept[0] == kept[1]
    return kept[0]


def rows_of(conn: Connection, handle: Handle) -> tuple[int, int, int]:
    """How many rows the workflow has in started, finished and key."""
    return tuple(
        one(conn, f"select count(*) from durable.{name} where id = %s::uuid", handle.id)
        for name in ("started", "finished", "key")
    )


def expire_all(conn: Connection, days: int = DAYS) -> None:
    rounds = 0
    while upkeep.needs_expiry(conn, days=days):
        upkeep.expire(conn, days=days)
        rounds += 1
        assert rounds < 100, "there is no end to what expires"


def waits_for_a_lock(conn: Connection, pid: int) -> bool:
    return bool(one(conn, "select coalesce(wait_event_type = 'Lock', false) from pg_stat_activity where pid = %s", pid))


# What goes, and when.


def test_a_day_stays_until_it_is_over_by_the_retention_and_then_goes_whole(
    app: App, ended: Handle, conn: Connection
) -> None:
    today = one(conn, "select durable.today()")
    on_day(conn, DAYS)
    assert days_kept(conn)[0] == today - 1
    expire_all(conn)
    assert days_kept(conn)[0] == today
    assert ended.result(timeout=1) == 1
    on_day(conn, DAYS + 1)
    assert upkeep.needs_expiry(conn, days=DAYS)
    assert upkeep.expire(conn, days=DAYS) == 1
    assert days_kept(conn)[0] == today + 1
    assert not upkeep.needs_expiry(conn, days=DAYS)
    assert rows_of(conn, ended) == (0, 0, 0)


def test_what_has_gone_is_unknown_by_id_and_by_key_and_its_key_is_free(
    app: App, ended: Handle, conn: Connection
) -> None:
    on_day(conn, DAYS + 1)
    expire_all(conn)
    with pytest.raises(UnknownWorkflow):
        app.get(ended.id)
    with pytest.raises(UnknownWorkflow):
        ended.status()
    assert statements.find(conn, "one", "ended") is None
    again = app.named("one").start(3, key="ended")
    app.run(until_idle=True)
    assert again.id != ended.id
    assert again.result(timeout=5) == 3


def test_a_live_workflow_outlives_its_day_and_is_found_by_id_and_key_and_ends_and_goes_after_its_end(
    app: App, ended: Handle, alive: Handle, conn: Connection
) -> None:
    on_day(conn, DAYS + 1)
    maintenance.run_once(conn)
    expire_all(conn)
    assert rows_of(conn, ended) == (0, 0, 0)
    assert rows_of(conn, alive) == (1, 0, 1)
    assert app.get(alive.id).status() == "running"
    assert app.named("one").start(5, key="alive").id == alive.id
    app.run(until_idle=True)
    assert alive.result(timeout=5) == 2
    on_day(conn, 2 * DAYS)
    expire_all(conn)
    assert alive.status() == "completed"
    assert alive.result(timeout=1) == 2
    on_day(conn, 2 * DAYS + 2)
    maintenance.run_once(conn)
    expire_all(conn)
    assert rows_of(conn, alive) == (0, 0, 0)
    assert statements.find(conn, "one", "alive") is None


def test_a_result_stays_for_the_whole_retention_however_long_its_workflow_took(
    app: App, alive: Handle, conn: Connection
) -> None:
    on_day(conn, DAYS)
    app.run(until_idle=True)
    on_day(conn, DAYS + 1)
    expire_all(conn)
    assert alive.result(timeout=1) == 2
    assert rows_of(conn, alive) == (1, 1, 1)
    on_day(conn, 2 * DAYS - 1)
    expire_all(conn)
    assert alive.result(timeout=1) == 2
    on_day(conn, 2 * DAYS + 1)
    expire_all(conn)
    assert rows_of(conn, alive) == (0, 0, 0)


def test_a_day_of_the_future_and_a_day_without_partitions_are_not_expired_before_their_time(
    app: App, conn: Connection
) -> None:
    on_day(conn, 100)
    late = app.named("one").start(4, key="late")
    app.run(until_idle=True)
    on_day(conn, 0)
    assert not upkeep.needs_expiry(conn, days=DAYS)
    on_day(conn, 100 + DAYS - 1)
    expire_all(conn)
    assert late.result(timeout=1) == 4
    on_day(conn, 100 + DAYS + 1)
    expire_all(conn)
    assert rows_of(conn, late) == (0, 0, 0)


def test_a_key_that_stands_for_another_workflow_by_now_stays(app: App, ended: Handle, conn: Connection) -> None:
    conn.execute("delete from durable.key where key = 'ended'")
    on_day(conn, 5)
    newer = app.named("one").start(6, key="ended")
    on_day(conn, DAYS + 1)
    expire_all(conn)
    assert rows_of(conn, ended) == (0, 0, 0)
    assert statements.find(conn, "one", "ended") == newer.id


def test_a_day_of_many_keys_goes_in_several_short_rounds(app: App, alive: Handle, conn: Connection) -> None:
    app.named("one").start_many(list(range(5)), keys=[f"key {n}" for n in range(5)])
    app.run(until_idle=True)
    on_day(conn, DAYS + 2)
    conn.execute("select durable.expire(%s)", (DAYS,))  # yesterday's, which is empty
    dropped = [one(conn, "select durable.expire(%s, 3)", DAYS) for _ in range(3)]
    assert dropped == [0, 0, 1]
    assert one(conn, "select count(*) from durable.key") == 0


# Beside others.


def test_an_end_that_commits_while_its_day_waits_to_go_is_kept_once(
    app: App, alive: Handle, dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    on_day(conn, DAYS + 1)
    upkeep.expire(conn, days=DAYS)
    with (
        psycopg.connect(dsn) as page,
        psycopg.connect(dsn, autocommit=True) as keeper,
        ThreadPoolExecutor() as pool,
    ):
        page.execute(END, {"id": alive.id})
        going = pool.submit(keeper.execute, "select durable.expire(30)")
        eventually(lambda: waits_for_a_lock(conn, keeper.info.backend_pid), what="retention waiting for the page")
        page.commit()
        going.result(timeout=10)
    expire_all(conn)
    assert rows_of(conn, alive) == (1, 1, 1)
    assert alive.result(timeout=1) == 7


def test_an_end_that_waits_while_its_day_goes_finds_its_place(
    app: App, alive: Handle, dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    on_day(conn, DAYS + 2)
    upkeep.expire(conn, days=DAYS)
    with (
        psycopg.connect(dsn, autocommit=True) as page,
        psycopg.connect(dsn) as keeper,
        ThreadPoolExecutor() as pool,
    ):
        page.execute("set plan_cache_mode = force_generic_plan")
        page.execute(END, {"id": "0" * 32}, prepare=True)
        assert one(keeper, "select durable.expire(30)") == 1
        ending = pool.submit(page.execute, END, {"id": alive.id}, prepare=True)
        eventually(lambda: waits_for_a_lock(conn, page.info.backend_pid), what="the page waiting for retention")
        keeper.commit()
        ending.result(timeout=10)
    assert rows_of(conn, alive) == (1, 1, 1)
    assert alive.result(timeout=1) == 7


def test_a_start_that_has_not_committed_when_its_day_goes_is_not_lost(
    app: App, ended: Handle, dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    with (
        psycopg.connect(dsn) as caller,
        psycopg.connect(dsn, autocommit=True) as keeper,
        ThreadPoolExecutor() as pool,
    ):
        on_day(conn, DAYS)
        expire_all(conn)  # yesterday
        on_day(conn, 0)
        handle = app.named("one").start(9, key="open", tx=caller)
        on_day(conn, DAYS + 1)
        going = pool.submit(expire_all, keeper)
        eventually(
            lambda: waits_for_a_lock(conn, keeper.info.backend_pid) or going.done(), what="retention at the lock"
        )
        caller.commit()
        try:
            going.result(timeout=10)
        except LockNotAvailable:
            expire_all(conn)
    assert rows_of(conn, handle) == (1, 0, 1)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 9


def test_a_reader_that_holds_on_leaves_everything_as_it_was_and_the_next_round_does_it(
    app: App, ended: Handle, alive: Handle, dsn: str, conn: Connection
) -> None:
    on_day(conn, DAYS + 1)
    expire_all(conn, DAYS + 1)
    before = days_kept(conn)
    with psycopg.connect(dsn) as reader:
        reader.execute("select count(*) from durable.list()")
        with pytest.raises(LockNotAvailable):
            upkeep.expire(conn, days=DAYS)
        maintenance.run_once(conn)
        assert days_kept(conn) == before
        assert rows_of(conn, ended) == (1, 1, 1)
        assert ended.result(timeout=1) == 1
        assert alive.status() == "running"
        started = threading.Event()
        newcomer = threading.Thread(target=lambda: (app.named("one").start(8), started.set()))
        newcomer.start()
        assert started.wait(5), "a start goes through while the reader holds on"
        newcomer.join()
    maintenance.run_once(conn)
    assert days_kept(conn)[0] > before[0]
    expire_all(conn)
    assert rows_of(conn, ended) == (0, 0, 0)
    assert rows_of(conn, alive) == (1, 0, 1)


def test_one_host_at_a_time_does_it(ended: Handle, dsn: str, conn: Connection) -> None:
    on_day(conn, DAYS + 1)
    with psycopg.connect(dsn) as other:
        assert one(other, "select durable.try_maintenance('expire')")
        assert upkeep.expire(conn, days=DAYS) == 0
        assert rows_of(conn, ended) == (1, 1, 1)
    assert upkeep.expire(conn, days=DAYS) == 1


@pytest.mark.parametrize("many", [False, True], ids=["start", "start_many"])
def test_a_key_that_retention_takes_while_it_is_asked_for_starts_a_new_workflow(
    many: bool, app: App, ended: Handle, dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    conn.execute(
        "create function public.halt() returns trigger language plpgsql as"
        " $$ begin perform pg_advisory_xact_lock(77); return null; end $$;"
        " create trigger halt after insert on durable.key for each statement execute function public.halt()"
    )
    query = (
        "select durable.hex(id), is_new from durable.start_many('one', 1, 'only', E'1\\n2', E'ended\\nother')"
        if many
        else "select durable.hex(id), is_new from durable.start('one', 1, 'only', '1', 'ended')"
    )
    with (
        psycopg.connect(dsn, autocommit=True) as client,
        psycopg.connect(dsn) as keeper,
        ThreadPoolExecutor() as pool,
    ):
        keeper.execute("select pg_advisory_xact_lock(77)")
        starting = pool.submit(lambda: client.execute(query).fetchall())
        eventually(lambda: waits_for_a_lock(conn, client.info.backend_pid), what="the start between its two statements")
        conn.execute("delete from durable.key where key = 'ended'")
        keeper.commit()
        rows = starting.result(timeout=10)
    assert rows[0][1] is True
    assert rows[0][0] == statements.find(conn, "one", "ended") != ended.id
    assert len(rows) == (2 if many else 1)


# The layout stays as it is meant.


def test_partitions_are_made_ahead_beside_what_was_carried_and_never_for_days_that_have_gone(
    app: App, alive: Handle, conn: Connection
) -> None:
    on_day(conn, DAYS + 1)
    for _ in range(40):
        maintenance.run_once(conn, Settings(retention_days=1))
    today = one(conn, "select durable.today()")
    assert days_kept(conn) == list(range(today - 1, today + 15))
    assert not upkeep.needs_partitions(conn)
    assert not upkeep.needs_expiry(conn, days=1)
    assert alive.status() == "running"
    assert upkeep.add_partitions(conn) == 0
    assert days_kept(conn) == list(range(today - 1, today + 15))
    app.run(until_idle=True)
    assert alive.result(timeout=5) == 2


def test_a_clock_that_is_set_back_into_days_that_have_gone_loses_nothing(
    app: App, alive: Handle, conn: Connection
) -> None:
    on_day(conn, DAYS + 1)
    expire_all(conn)
    on_day(conn, 0)
    conn.execute("select durable.add_partitions()")
    assert alive.status() == "running"
    app.run(until_idle=True)
    assert alive.result(timeout=5) == 2
    assert rows_of(conn, alive) == (1, 1, 1)


def test_rows_of_day_partitions_are_never_updated_and_never_deleted(
    app: App, ended: Handle, alive: Handle, conn: Connection
) -> None:
    on_day(conn, DAYS + 1)
    newer = app.named("one").start(3, key="newer")
    expire_all(conn)
    app.run(until_idle=True)
    conn.execute("select pg_stat_force_next_flush()")
    assert (
        one(
            conn,
            "select coalesce(sum(updated + deleted), 0) from durable.row_changes()"
            " where relation ~ 'durable[.](started|finished)_[0-9]+$'",
        )
        == 0
    )
    assert newer.result(timeout=5) == 3


@pytest.mark.parametrize("table", ["started", "finished"])
def test_a_look_up_by_id_reads_one_partition_before_its_day_has_gone_and_after(
    table: str, alive: Handle, conn: Connection
) -> None:
    def read() -> set[str]:
        plan = one(
            conn,
            f"explain (format json) select from durable.{table}"
            f" where id = '{alive.id}'::uuid and day = durable.day_of('{alive.id}'::uuid)",
        )
        node = plan[0]["Plan"]
        assert "Plans" not in node, "more than one partition"
        return {node["Relation Name"]}

    today = one(conn, "select durable.today()")
    assert read() == {f"{table}_{today}"}
    on_day(conn, DAYS + 1)
    expire_all(conn)
    assert read() == {f"{table}_default"}


# The setting, and who looks.


@pytest.mark.parametrize("days", [0, -1, 36_501, 0.5])
def test_a_retention_that_cannot_be_is_refused_and_told_the_range(days: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"retention_days: .* choose 1 to 36500"):
        Settings(retention_days=days)


@pytest.mark.parametrize("days", ["0", "36501", "null"])
def test_the_database_refuses_it_too(days: str, conn: Connection) -> None:
    with pytest.raises(InputError, match="choose 1 to 36500"), translated():
        conn.execute(f"select durable.expire({days})".encode())


def test_the_longest_retention_is_further_back_than_any_day(ended: Handle, conn: Connection) -> None:
    on_day(conn, 10_000)
    assert not upkeep.needs_expiry(conn, days=Settings(retention_days=36_500).retention_days)
    assert upkeep.expire(conn, days=36_500) == 0


def test_nothing_due_takes_no_transaction_id(conn: Connection) -> None:
    with conn.transaction():
        assert not upkeep.needs_expiry(conn, days=DAYS)
        assert one(conn, "select pg_current_xact_id_if_assigned()::text") is None


def test_doctor_notes_days_that_should_have_gone(conn: Connection) -> None:
    assert checks.retention(conn).verdict == "ok"
    on_day(conn, DAYS + 5)
    found = checks.retention(conn)
    assert found.verdict == "note"
    assert f"{DAYS + 6} days" in found.says
    expire_all(conn)
    assert checks.retention(conn).verdict == "ok"
