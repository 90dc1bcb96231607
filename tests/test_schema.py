"""Installing, upgrading and removing: one transaction, twice the same, and nobody else's things touched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from days import on_day

from durable_cluster import App, Context, Continuation, DatabaseError, NotInstalled, SchemaMismatch, schema
from durable_cluster import sql as files
from durable_cluster.shards import upkeep

OBJECTS = """
    select 'relation', n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
    union all select 'function', p.oid::regprocedure::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
    union all select 'type', t.oid::regtype::text from pg_type t join pg_namespace n on n.oid = t.typnamespace
    where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
    union all select 'schema', nspname from pg_namespace where nspname !~ '^pg_(toast_)?temp'
    union all select 'extension', extname from pg_extension
    union all select 'event trigger', evtname from pg_event_trigger
    order by 1, 2
"""


@pytest.fixture
def empty(empty_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        yield connection


def objects(conn: psycopg.Connection) -> list[tuple[str, str]]:
    return conn.execute(OBJECTS).fetchall()


def rows_of(conn: psycopg.Connection, *tables: str) -> list[object]:
    return [sorted(map(str, conn.execute(f"select * from {table}".encode()).fetchall())) for table in tables]


def one_workflow(dsn: str) -> App:
    app = App("one", dsn=dsn)

    @app.machine("one", state=int).step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return app


def text_of(monkeypatch: pytest.MonkeyPatch, migration: str, text: str) -> None:
    """Make one file read as ``text``."""
    monkeypatch.setattr(schema, "read", lambda folder, name: text if name == migration else files.read(folder, name))


def test_a_fresh_database_gets_every_migration_and_its_shards(empty: psycopg.Connection) -> None:
    assert schema.installed_shards(empty) is None
    assert schema.install(empty, shards=3) == list(files.MIGRATIONS)
    assert schema.installed_shards(empty) == schema.demand_installed(empty) == 3
    assert empty.execute("select count(*), min(shard), max(shard) from durable.shard").fetchone() == (3, 0, 2)
    slots = empty.execute("select count(*), count(distinct shard) from durable.slot").fetchone()
    assert slots == (1024, 3)


@pytest.mark.parametrize("shards", [1, 64])
def test_the_smallest_and_the_largest_layout_work(empty_dsn: str, empty: psycopg.Connection, shards: int) -> None:
    schema.install(empty, shards=shards)
    app = one_workflow(empty_dsn)
    handles = app.named("one").start_many(list(range(200)))
    app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in handles] == list(range(200))


def test_installing_twice_changes_nothing_and_keeps_what_is_there(dsn: str, conn: psycopg.Connection) -> None:
    app = one_workflow(dsn)
    handle = app.named("one").start(1, key="k")
    tables = ("durable.migration", "durable.cluster", "durable.shard", "durable.slot", "durable.started", "pgque.queue")
    conn.execute("select durable.add_partitions()")  # the run may have begun before midnight
    before = objects(conn), rows_of(conn, *tables)
    assert schema.install(conn, shards=2) == []
    assert (objects(conn), rows_of(conn, *tables)) == before
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 1


def test_installing_again_while_workflows_run_disturbs_none(dsn: str) -> None:
    app = App("busy", dsn=dsn)
    machine = app.machine("busy", state=int)
    is_enough = threading.Event()
    ran: list[int] = []

    @machine.step(start=True)
    def again(ctx: Context, n: int) -> Continuation:
        ran.append(n)
        return ctx.done(n) if is_enough.is_set() else ctx.goto(again, n + 1)

    handles = machine.start_many([1] * 5)
    with ThreadPoolExecutor() as pool, psycopg.connect(dsn, autocommit=True) as installer:
        running = pool.submit(app.run, until_idle=True)
        installs = 0
        try:
            while installs < 3 or len(ran) < 5 * 10:
                schema.install(installer, shards=2)
                installs += 1
                assert not running.done(), running.result()
        finally:
            is_enough.set()
        steps = running.result()
    assert sum(handle.result(timeout=5) for handle in handles) == steps


@pytest.mark.parametrize("breaks_at", ["the first file", "the last file", "the layout", "the commit"])
def test_an_install_that_fails_leaves_the_database_as_it_was(
    empty: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, breaks_at: str
) -> None:
    empty.execute("create table mine (n int); create function mine() returns int language sql as 'select 1'")
    before = objects(empty)
    whole = files.read

    def broken(folder: str, name: str) -> str:
        text = whole(folder, name)
        if breaks_at == "the first file" and (folder, name) == ("migrations", files.MIGRATIONS[0]):
            return text + "; select 1 / 0"
        if (folder, name) == ("durable", files.DURABLE[-1]):
            if breaks_at == "the last file":
                return text + "; select 1 / 0"
            if breaks_at == "the layout":
                lay_out = "create or replace function durable.lay_out(i_shards int) returns void language sql as 'select 1 / 0'"
                return f"{text}; {lay_out}"
            if breaks_at == "the commit":
                return text + (
                    "; create function durable.no() returns trigger language plpgsql as $$ begin raise division_by_zero; end $$;"
                    "create constraint trigger no after insert on durable.migration initially deferred"
                    " for each row execute function durable.no(); insert into durable.migration values ('x', 'x')"
                )
        return text

    monkeypatch.setattr(schema, "read", broken)
    with pytest.raises(psycopg.errors.DivisionByZero):
        schema.install(empty, shards=2)
    assert objects(empty) == before
    monkeypatch.undo()
    assert schema.install(empty, shards=2) == list(files.MIGRATIONS)


def test_an_upgrade_that_fails_leaves_the_old_version_working(
    dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = one_workflow(dsn)
    handle = app.named("one").start(1)
    before = objects(conn)
    monkeypatch.setattr(schema, "MIGRATIONS", (*files.MIGRATIONS, "999_broken"))
    text_of(monkeypatch, "999_broken", "drop table durable.started cascade; select 1 / 0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        schema.install(conn, shards=2)
    assert objects(conn) == before
    monkeypatch.undo()
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 1


def test_an_upgrade_runs_only_what_is_new_and_once(conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MIGRATIONS", (*files.MIGRATIONS, "999_more"))
    text_of(monkeypatch, "999_more", "create table durable.more ()")
    with pytest.raises(SchemaMismatch, match="older schema"):
        schema.demand_installed(conn)
    assert schema.install(conn, shards=2) == ["999_more"]
    assert schema.install(conn, shards=2) == []
    monkeypatch.undo()
    for call in (lambda: schema.install(conn, shards=2), lambda: schema.demand_installed(conn)):
        with pytest.raises(SchemaMismatch, match="newer schema"):
            call()


def test_a_function_that_a_version_no_longer_has_is_removed(conn: psycopg.Connection) -> None:
    conn.execute("create function durable.of_an_old_version() returns int language sql as 'select 1'")
    conn.execute("create function public.of_the_user() returns int language sql as 'select 1'")
    schema.install(conn, shards=2)
    assert conn.execute(
        "select to_regproc('durable.of_an_old_version'), to_regproc('public.of_the_user')"
    ).fetchone() == (
        None,
        "of_the_user",
    )


def test_another_number_of_shards_is_refused_and_names_both(conn: psycopg.Connection) -> None:
    for call in (lambda: schema.install(conn, shards=8), lambda: schema.demand_installed(conn, shards=8)):
        with pytest.raises(SchemaMismatch, match=r"2 shards, not 8.*--shards 2"):
            call()
    assert schema.installed_shards(conn) == 2


@pytest.mark.parametrize("name", ["pgque", "durable"])
def test_a_schema_of_that_name_that_is_not_ours_is_left_alone(empty: psycopg.Connection, name: str) -> None:
    empty.execute(f"create schema {name}; create table {name}.theirs (n int); insert into {name}.theirs values (1)")
    before = objects(empty)
    with pytest.raises(SchemaMismatch, match=f"'{name}' exists and is not ours"):
        schema.install(empty, shards=2)
    with pytest.raises(NotInstalled):
        schema.uninstall(empty)
    with pytest.raises(NotInstalled):
        schema.demand_installed(empty)
    assert objects(empty) == before


def test_installs_at_the_same_time_are_one_install(empty_dsn: str, empty: psycopg.Connection) -> None:
    def install(_: int) -> list[str]:
        with psycopg.connect(empty_dsn, autocommit=True) as connection:
            return schema.install(connection, shards=2)

    with ThreadPoolExecutor(4) as pool:
        ran = list(pool.map(install, range(4)))
    assert sorted(ran) == [[], [], [], list(files.MIGRATIONS)]
    assert empty.execute("select count(*) from durable.shard").fetchone() == (2,)


def test_installs_into_several_databases_at_the_same_time_all_succeed(
    new_database: Callable[[str | None], str],
) -> None:
    """Roles are the server's, not the database's."""
    dsns = [new_database(None) for _ in range(3)]

    def install(dsn: str) -> list[str]:
        with psycopg.connect(dsn, autocommit=True) as connection:
            return schema.install(connection, shards=1)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(install, dsns)) == [list(files.MIGRATIONS)] * 3


def test_uninstalling_removes_everything_of_ours_and_nothing_else(empty: psycopg.Connection) -> None:
    empty.execute("create table public.mine (n int); create schema elsewhere; create table elsewhere.durable (n int)")
    before = objects(empty)
    schema.install(empty, shards=2)
    assert objects(empty) != before
    schema.uninstall(empty)
    assert objects(empty) == before
    with pytest.raises(NotInstalled):
        schema.uninstall(empty)
    assert schema.install(empty, shards=4) == list(files.MIGRATIONS)


def test_uninstalling_does_not_take_a_users_view_with_it(conn: psycopg.Connection) -> None:
    conn.execute("create view public.report as select * from durable.list()")
    with pytest.raises(DatabaseError, match="report"):
        schema.uninstall(conn)
    assert conn.execute("select to_regclass('public.report') is not null").fetchone() == (True,)
    conn.execute("drop view public.report")
    schema.uninstall(conn)


def test_an_install_inside_a_callers_transaction_stands_or_falls_with_it(
    empty_dsn: str, empty: psycopg.Connection
) -> None:
    with psycopg.connect(empty_dsn) as tx:
        tx.execute("create table mine (n int)")
        schema.install(tx, shards=2)
        tx.rollback()
    assert schema.installed_shards(empty) is None
    with psycopg.connect(empty_dsn) as tx:
        tx.execute("create table mine (n int)")
        schema.install(tx, shards=2)
    assert schema.demand_installed(empty) == 2
    assert schema.install(empty, shards=2) == []


def test_an_install_works_where_sessions_default_to_another_isolation_level(empty_dsn: str) -> None:
    with psycopg.connect(
        empty_dsn, autocommit=True, options="-c default_transaction_isolation=serializable"
    ) as connection:
        assert schema.install(connection, shards=2) == list(files.MIGRATIONS)


# Partitions.


def test_partitions_are_made_from_yesterday_to_a_fortnight_ahead_once(conn: psycopg.Connection) -> None:
    on_day(conn, 0)
    (today,) = conn.execute("select durable.today()").fetchone() or (0,)
    for table in ("started", "finished"):
        made = conn.execute("select count(*) from pg_inherits where inhparent = %s::regclass", (f"durable.{table}",))
        assert made.fetchone() == (17,), "sixteen days and the default"
        assert conn.execute("select to_regclass(%s)::text", (f"durable.{table}_{today + 14}",)).fetchone() != (None,)
    assert conn.execute("select durable.add_partitions()").fetchone() == (0,)
    assert not upkeep.needs_partitions(conn)
    on_day(conn, 8)
    assert upkeep.needs_partitions(conn)
    assert conn.execute("select durable.add_partitions()").fetchone() == (16,)


def test_a_workflow_of_a_day_without_a_partition_of_its_own_is_kept_and_found(
    dsn: str, conn: psycopg.Connection
) -> None:
    on_day(conn, 100)
    app = one_workflow(dsn)
    handle = app.named("one").start(1)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 1
    assert app.get(handle.id).status() == "completed"


@pytest.mark.parametrize("again", ["maintenance", "install"])
def test_a_database_that_was_left_alone_for_a_month_and_then_used_can_be_maintained_and_installed(
    dsn: str, conn: psycopg.Connection, again: str
) -> None:
    """The rows of the days without partitions lie in the default one; a partition for such a day must take them over."""
    (today,) = conn.execute("select durable.today()").fetchone() or (0,)
    conn.execute(f"drop table durable.started_{today}, durable.finished_{today}")
    app = one_workflow(dsn)
    handles = [app.named("one").start(n) for n in range(5)]
    app.run(until_idle=True)
    if again == "install":
        schema.install(conn, shards=2)
    else:
        conn.execute("select durable.add_partitions()")
    assert [handle.result(timeout=5) for handle in handles] == list(range(5))
    later = app.named("one").start(6)
    app.run(until_idle=True)
    assert later.result(timeout=5) == 6
    assert len(conn.execute("select * from durable.list()").fetchall()) == 6
