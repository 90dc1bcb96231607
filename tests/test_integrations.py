"""A call joins the transaction that its caller is in: of psycopg, SQLAlchemy or Django, plain or async; no event loop waits."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from psycopg.types.string import TextBinaryLoader, TextLoader

from durable_cluster import App, Handle, InputError, Machine, UnknownWorkflow, Workflow, wait_for

sqlalchemy = pytest.importorskip("sqlalchemy", reason="SQLALCHEMY WAS NOT TESTED: it is not installed")
pytest.importorskip("django", reason="DJANGO WAS NOT TESTED: it is not installed")

import django.conf  # noqa: E402
import django.db.transaction  # noqa: E402
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine  # noqa: E402
from sqlalchemy.orm import Session, scoped_session, sessionmaker  # noqa: E402
from sqlalchemy.pool import NullPool  # noqa: E402

Connection = psycopg.Connection[Any]
Opened = Callable[[str], Any]

if not django.conf.settings.configured:
    django.conf.settings.configure(USE_TZ=False, TIME_ZONE="Asia/Tokyo", DATABASES={"default": {"ENGINE": "…"}})
    django.setup()


# What an app's own code has in hand: the thing to pass on, and how it writes a row, commits and rolls back.


class Hand:
    """A caller in a transaction that nothing has been said in yet."""

    def __init__(
        self, tx: Any, write: Callable[[str], object], commit: Callable[[], object], rollback: Callable[[], object]
    ) -> None:
        self.tx = tx
        self.write = write
        self.commit = commit
        self.rollback = rollback


def url(dsn: str) -> Any:
    known = conninfo_to_dict(dsn)
    query = {"host": str(known["host"]), "port": str(known.get("port", 5432))}
    return sqlalchemy.URL.create(
        "postgresql+psycopg",
        username=str(known["user"]),
        password=known.get("password"),  # type: ignore[arg-type]
        database=str(known["dbname"]),
        query=query,
    )


@contextmanager
def of_psycopg(dsn: str) -> Iterator[Hand]:
    with psycopg.connect(dsn) as tx:
        yield Hand(tx, tx.execute, tx.commit, tx.rollback)


@contextmanager
def of_its_own_ways(dsn: str) -> Iterator[Hand]:
    """One with its owner's rows, cursors, types and no prepared statements, as behind a pooler of transactions."""
    with psycopg.connect(dsn, row_factory=dict_row, cursor_factory=psycopg.ClientCursor, prepare_threshold=None) as tx:

        class Loud(TextLoader):
            def load(self, data: Any) -> Any:
                return {"text": super().load(data)}

        class LoudToo(TextBinaryLoader):
            def load(self, data: Any) -> Any:
                return {"text": super().load(data)}

        tx.adapters.register_loader("text", Loud)
        tx.adapters.register_loader("text", LoudToo)
        yield Hand(tx, tx.execute, tx.commit, tx.rollback)


@contextmanager
def of_sqlalchemy(dsn: str, **how: Any) -> Iterator[Hand]:
    engine = sqlalchemy.create_engine(url(dsn), **how)
    with engine.connect() as tx:
        yield Hand(tx, tx.exec_driver_sql, tx.commit, tx.rollback)
    engine.dispose()


@contextmanager
def of_a_session(dsn: str) -> Iterator[Hand]:
    engine = sqlalchemy.create_engine(url(dsn))
    with Session(engine) as tx:
        yield Hand(tx, lambda text: tx.execute(sqlalchemy.text(text)), tx.commit, tx.rollback)
    engine.dispose()


@contextmanager
def of_a_scoped_session(dsn: str) -> Iterator[Hand]:
    engine = sqlalchemy.create_engine(url(dsn))
    tx = scoped_session(sessionmaker(engine))
    yield Hand(tx, lambda text: tx.execute(sqlalchemy.text(text)), tx.commit, tx.rollback)
    tx.remove()
    engine.dispose()


@contextmanager
def of_django(dsn: str, **more: Any) -> Iterator[Hand]:
    known = conninfo_to_dict(dsn)
    django.db.connections.databases["default"] = django.db.connections.databases["default"] | {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": known["dbname"],
        "USER": known["user"],
        "PASSWORD": known.get("password"),
        "HOST": known["host"],
        "PORT": known.get("port", 5432),
        "OPTIONS": more,
        "CONN_HEALTH_CHECKS": False,
    }
    if hasattr(django.db.connections._connections, "default"):
        del django.db.connections["default"]
    connection = django.db.connection

    def write(text: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(text)

    django.db.transaction.set_autocommit(False)
    yield Hand(connection, write, connection.commit, connection.rollback)
    connection.rollback()
    connection.close()


PLAIN: dict[str, Opened] = {
    "psycopg": of_psycopg,
    "psycopg, its own ways": of_its_own_ways,
    "sqlalchemy connection": of_sqlalchemy,
    "sqlalchemy session": of_a_session,
    "sqlalchemy scoped session": of_a_scoped_session,
    "django": of_django,
}


@asynccontextmanager
async def of_async_psycopg(dsn: str) -> AsyncIterator[Hand]:
    async with await psycopg.AsyncConnection.connect(dsn) as tx:
        yield Hand(tx, tx.execute, tx.commit, tx.rollback)


@asynccontextmanager
async def of_async_sqlalchemy(dsn: str) -> AsyncIterator[Hand]:
    engine = create_async_engine(url(dsn), poolclass=NullPool)
    async with engine.connect() as tx:
        yield Hand(tx, tx.exec_driver_sql, tx.commit, tx.rollback)
    await engine.dispose()


@asynccontextmanager
async def of_an_async_session(dsn: str) -> AsyncIterator[Hand]:
    engine = create_async_engine(url(dsn), poolclass=NullPool)
    async with AsyncSession(engine) as tx:
        yield Hand(tx, lambda text: tx.execute(sqlalchemy.text(text)), tx.commit, tx.rollback)
    await engine.dispose()


ASYNC: dict[str, Opened] = {
    "psycopg": of_async_psycopg,
    "sqlalchemy connection": of_async_sqlalchemy,
    "sqlalchemy session": of_an_async_session,
}


@pytest.fixture(params=PLAIN)
def opened(request: pytest.FixtureRequest) -> Opened:
    return PLAIN[request.param]


@pytest.fixture(params=ASYNC)
def opened_async(request: pytest.FixtureRequest) -> Opened:
    return ASYNC[request.param]


@pytest.fixture
def fulfil(dsn: str, conn: Connection) -> Iterator[Workflow[int, str]]:
    conn.execute("create table purchase (number int primary key)")
    app = App("shop", dsn=dsn)

    @app.workflow
    async def fulfil(number: int) -> str:
        approved = await wait_for("approved", bool)
        return f"{number}: {approved}"

    yield fulfil
    app.close()


def transactions(conn: Connection, workflow_id: str) -> set[tuple[str]]:
    """The transactions that wrote a purchase, and the start of a workflow."""
    return set(
        conn.execute(
            "select xmin::text from purchase union select xmin::text from durable.started where id = %s", (workflow_id,)
        ).fetchall()
    )


def exists(of: Workflow[int, str], workflow_id: str) -> bool:
    try:
        return of.app.get(workflow_id).status() == "running"
    except UnknownWorkflow:
        return False


# Plain.


def test_a_start_commits_with_its_callers_row_in_one_transaction(
    opened: Opened, fulfil: Workflow[int, str], dsn: str, conn: Connection
) -> None:
    with opened(dsn) as hand:
        handle = fulfil.start(1, tx=hand.tx)
        hand.write("insert into purchase values (1)")
        assert not exists(fulfil, handle.id)
        hand.commit()
        assert exists(fulfil, handle.id)
        assert len(transactions(conn, handle.id)) == 1


def test_a_transaction_of_a_start_alone_is_committed_by_its_caller(
    opened: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    with opened(dsn) as hand:
        handle = fulfil.start(1, tx=hand.tx)
        assert not exists(fulfil, handle.id)
        hand.commit()
    assert exists(fulfil, handle.id)


@pytest.mark.parametrize("priority", [1, 4])
def test_a_start_that_is_the_transactions_first_word_is_gone_after_its_rollback(
    opened: Opened, fulfil: Workflow[int, str], dsn: str, conn: Connection, priority: float
) -> None:
    with opened(dsn) as hand:
        one = fulfil.start(1, tx=hand.tx, priority=priority)
        many = fulfil.start_many([2, 3], tx=hand.tx, priority=priority)
        hand.write("insert into purchase values (1)")
        hand.rollback()
        assert not any(exists(fulfil, handle.id) for handle in [one, *many])
        assert conn.execute(
            "select (select count(*) from purchase), (select count(*) from durable.priority)"
        ).fetchone() == (
            0,
            0,
        )


def test_what_is_sent_to_a_workflow_is_sent_by_the_commit(opened: Opened, fulfil: Workflow[int, str], dsn: str) -> None:
    signalled, cancelled = fulfil.start_many([1, 2])
    with opened(dsn) as hand:
        for end in (hand.rollback, hand.commit):
            signalled.signal("approved", True, tx=hand.tx)
            signalled.set_attributes({"end": end.__name__}, tx=hand.tx)
            cancelled.cancel("gone", tx=hand.tx)
            end()
            fulfil.app.run(until_idle=True)
            is_sent = end == hand.commit
            assert signalled.status() == ("completed" if is_sent else "running")
            assert cancelled.status() == ("cancelled" if is_sent else "running")
            assert signalled.attributes() == ({"end": "commit"} if is_sent else {})


def test_a_refusal_of_a_signal_leaves_the_transaction_good(
    opened: Opened, fulfil: Workflow[int, str], dsn: str, conn: Connection
) -> None:
    with opened(dsn) as hand:
        hand.write("insert into purchase values (1)")
        with pytest.raises(UnknownWorkflow):
            Handle(fulfil.app.client, "fulfil", "0" * 32).signal("approved", tx=hand.tx)
        hand.commit()
    assert conn.execute("select number from purchase").fetchall() == [(1,)]


def test_a_savepoint_that_is_rolled_back_takes_its_start_with_it(fulfil: Workflow[int, str], dsn: str) -> None:
    def with_psycopg() -> tuple[Any, Any]:
        with of_psycopg(dsn) as hand:
            kept = fulfil.start(1, tx=hand.tx)
            with hand.tx.transaction(force_rollback=True):
                return kept, fulfil.start(2, tx=hand.tx)

    def with_sqlalchemy() -> tuple[Any, Any]:
        with of_a_session(dsn) as hand:
            kept = fulfil.start(1, tx=hand.tx)
            nested = hand.tx.begin_nested()
            lost = fulfil.start(2, tx=hand.tx)
            nested.rollback()
            hand.commit()
            return kept, lost

    def with_django() -> tuple[Any, Any]:
        with of_django(dsn):
            django.db.transaction.set_autocommit(True)
            with django.db.transaction.atomic():
                kept = fulfil.start(1, tx=django.db.connection)
                with django.db.transaction.atomic():
                    lost = fulfil.start(2, tx=django.db.connection)
                    django.db.transaction.set_rollback(True)
            return kept, lost

    for case in (with_psycopg, with_sqlalchemy, with_django):
        kept, lost = case()
        assert (exists(fulfil, kept.id), exists(fulfil, lost.id)) == (True, False), case.__name__


def test_a_start_is_refused_in_a_transaction_that_has_failed_and_works_after_its_rollback(
    opened: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    with opened(dsn) as hand:
        with pytest.raises(Exception, match="division by zero"):
            hand.write("select 1 / 0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            fulfil.start(1, tx=hand.tx)
        hand.rollback()
        handle = fulfil.start(2, tx=hand.tx)
        hand.commit()
    assert exists(fulfil, handle.id)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_start_and_a_signal_work_at_every_isolation_level_of_sqlalchemy(
    fulfil: Workflow[int, str], dsn: str, level: str
) -> None:
    with of_sqlalchemy(dsn, isolation_level=level) as hand:
        assert hand.tx.exec_driver_sql("show transaction_isolation").scalar() == level.lower()
        handle = fulfil.start(1, tx=hand.tx)
        handle.signal("approved", True, tx=hand.tx)
        hand.commit()
    fulfil.app.run(until_idle=True)
    assert handle.result(timeout=5) == "1: True"


def test_a_connection_that_commits_by_itself_starts_at_once(fulfil: Workflow[int, str], dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as tx:
        assert exists(fulfil, fulfil.start(1, tx=tx, priority=4).id)
    with of_sqlalchemy(dsn, isolation_level="AUTOCOMMIT") as hand:
        assert exists(fulfil, fulfil.start(1, tx=hand.tx).id)
    with of_django(dsn) as hand:
        django.db.transaction.set_autocommit(True)
        assert exists(fulfil, fulfil.start(1, tx=hand.tx).id)


def test_a_connection_that_never_prepares_is_left_without_prepared_statements(
    fulfil: Workflow[int, str], dsn: str
) -> None:
    with of_its_own_ways(dsn) as hand:
        for number in range(10):
            fulfil.start(number, tx=hand.tx)
        assert hand.tx.execute("select count(*)::int prepared from pg_prepared_statements").fetchone() == {
            "prepared": 0
        }


def test_a_server_side_cursor_of_django_is_none_of_ours(fulfil: Workflow[int, str], dsn: str) -> None:
    with of_django(dsn, server_side_binding=True) as hand:
        handle = fulfil.start(1, tx=hand.tx, attributes={"customer": "ada"})
        hand.commit()
    assert exists(fulfil, handle.id)


def test_a_schedule_is_made_in_the_callers_transaction_whatever_its_times_are(
    opened: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    schedules = fulfil.app.schedules
    with opened(dsn) as hand:
        schedules.create("nightly", "0 3 * * *", fulfil, 1, tx=hand.tx)
        schedules.change("nightly", cron="0 4 * * *", zone="Asia/Tokyo", tx=hand.tx)
        assert schedules.trigger("nightly", tx=hand.tx).outcome == "started"
        assert schedules.list() == []
        hand.commit()
    due = schedules.get("nightly").next_due
    assert due is not None
    assert due > datetime.now(UTC)


# What is no connection of psycopg's, or of the wrong kind.


def foreign_sqlalchemy() -> Any:
    return sqlalchemy.create_engine("sqlite://").connect()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (partial(sqlite3.connect, ":memory:"), "sqlite3's Connection is no psycopg connection"),
        (foreign_sqlalchemy, "sqlite3's Connection of sqlalchemy's Connection is no psycopg connection"),
        (partial(sqlalchemy.create_engine, "sqlite://"), "sqlalchemy's Engine is no psycopg connection"),
        (object, "builtins's object is no psycopg connection"),
        (dict, "builtins's dict is no psycopg connection"),
    ],
)
def test_what_is_no_psycopg_connection_is_named(
    fulfil: Workflow[int, str], make: Callable[[], Any], named: str
) -> None:
    with pytest.raises(InputError, match=f"tx: {named}; pass one of psycopg"):
        fulfil.start(1, tx=make())


def test_an_async_connection_is_not_for_a_plain_call(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    async def main() -> None:
        async with opened_async(dsn) as hand:
            with pytest.raises(InputError, match=r"is asynchronous; await .* start_async\(…, tx=…\)"):
                fulfil.start(1, tx=hand.tx)

    asyncio.run(main())


def test_a_plain_connection_is_not_for_an_async_call(opened: Opened, fulfil: Workflow[int, str], dsn: str) -> None:
    with opened(dsn) as hand, pytest.raises(InputError, match="is not asynchronous and would block the event loop"):
        asyncio.run(fulfil.start_async(1, tx=hand.tx))


# Async.


def test_an_async_start_commits_with_its_callers_row_in_one_transaction(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str, conn: Connection
) -> None:
    async def main() -> None:
        async with opened_async(dsn) as hand:
            handle = await fulfil.start_async(1, tx=hand.tx, key="1", attributes={"customer": "ada"}, priority=4)
            await hand.write("insert into purchase values (1)")
            assert not exists(fulfil, handle.id)
            await hand.commit()
            assert (await handle.state_async()).status == "running"
            assert await handle.attributes_async() == {"customer": "ada"}
            assert (await fulfil.get_async(key="1")).id == handle.id
            assert len(transactions(conn, handle.id)) == 1

    asyncio.run(main())


def test_an_async_transaction_of_a_start_alone_is_committed_by_its_caller(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    async def main() -> None:
        async with opened_async(dsn) as hand:
            handle = await fulfil.start_async(1, tx=hand.tx)
            await hand.commit()
        assert exists(fulfil, handle.id)

    asyncio.run(main())


def test_an_async_start_that_is_rolled_back_leaves_nothing(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    async def main() -> None:
        async with opened_async(dsn) as hand:
            one = await fulfil.start_async(1, tx=hand.tx, priority=4)
            many = await fulfil.start_many_async([2, 3], tx=hand.tx)
            await hand.rollback()
            assert not any(exists(fulfil, handle.id) for handle in [one, *many])

    asyncio.run(main())


def test_async_signals_cancels_and_attributes_are_sent_by_the_commit(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    async def main() -> None:
        signalled, cancelled = await fulfil.start_many_async([1, 2])
        async with opened_async(dsn) as hand:
            for end in (hand.rollback, hand.commit):
                await signalled.signal_async("approved", True, tx=hand.tx)
                await signalled.set_attributes_async({"phase": "paid"}, tx=hand.tx)
                assert await cancelled.cancel_async("gone", tx=hand.tx)
                await end()
                await asyncio.to_thread(partial(fulfil.app.run, until_idle=True))
                is_sent = end == hand.commit
                assert await signalled.status_async() == ("completed" if is_sent else "running")
                assert await cancelled.status_async() == ("cancelled" if is_sent else "running")
        assert await signalled == "1: True"
        assert {one.status for one in await fulfil.app.list_async("fulfil", attributes={"phase": "paid"})} == {
            "completed"
        }

    asyncio.run(main())


def test_a_plain_call_within_run_sync_of_sqlalchemy_joins_too(
    fulfil: Workflow[int, str], dsn: str, conn: Connection
) -> None:
    async def main() -> None:
        async with of_an_async_session(dsn) as hand:
            lost = await hand.tx.run_sync(lambda session: fulfil.start(1, tx=session))
            await hand.rollback()
            kept = await hand.tx.run_sync(lambda session: fulfil.start(2, tx=session))
            await hand.tx.run_sync(lambda session: fulfil.app.schedules.create("s", "@daily", fulfil, 1, tx=session))
            await hand.write("insert into purchase values (2)")
            await hand.commit()
            assert (exists(fulfil, lost.id), exists(fulfil, kept.id)) == (False, True)
            assert len(transactions(conn, kept.id)) == 1

    asyncio.run(main())


def test_a_refusal_over_an_async_connection_is_the_same_refusal(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    async def main() -> None:
        ended = await fulfil.start_async(1)
        await ended.cancel_async()
        await asyncio.to_thread(partial(fulfil.app.run, until_idle=True))
        async with opened_async(dsn) as hand:
            with pytest.raises(InputError, match="priority of 1000"):
                await fulfil.start_async(1, tx=hand.tx, priority=1000)
            await hand.rollback()
            with pytest.raises(UnknownWorkflow):
                await ended.signal_async("approved", tx=hand.tx)
            kept = await fulfil.start_async(1, tx=hand.tx)
            await hand.commit()
            assert exists(fulfil, kept.id)

    asyncio.run(main())


async def ticks_while(call: Coroutine[Any, Any, Any], go_on: Callable[[], object]) -> int:
    """How often the loop came round while the call was held up, at least until it has done so 50 times."""
    pending = asyncio.ensure_future(call)
    ticks = 0
    while ticks < 50:
        await asyncio.sleep(0.001)
        assert not pending.done(), pending
        ticks += 1
    go_on()
    await asyncio.wait_for(pending, 10)
    return ticks


@pytest.mark.parametrize("is_joining", [False, True])
def test_an_event_loop_goes_on_while_the_database_keeps_a_call_waiting(
    fulfil: Workflow[int, str], dsn: str, is_joining: bool
) -> None:
    """A key that another transaction has just taken is waited for."""

    async def main() -> None:
        with psycopg.connect(dsn) as other:
            fulfil.start(1, key="taken", tx=other)
            async with of_an_async_session(dsn) as hand:
                call = fulfil.start_async(1, key="taken", tx=hand.tx if is_joining else None)
                assert await ticks_while(call, other.commit) == 50

    asyncio.run(main())


def test_a_call_that_is_cancelled_leaves_its_callers_connection_usable(
    opened_async: Opened, fulfil: Workflow[int, str], dsn: str
) -> None:
    async def main() -> None:
        with psycopg.connect(dsn) as other:
            fulfil.start(1, key="taken", tx=other)
            async with opened_async(dsn) as hand:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await fulfil.start_async(1, key="taken", tx=hand.tx)
                await hand.rollback()
                handle = await fulfil.start_async(2, tx=hand.tx)
                await hand.commit()
                assert exists(fulfil, handle.id)

    asyncio.run(main())


def test_a_thousand_async_calls_at_once_take_four_connections(
    fulfil: Workflow[int, str], dsn: str, conn: Connection
) -> None:
    async def main() -> int:
        handles = await asyncio.gather(*(fulfil.start_async(n) for n in range(1000)))
        assert len({handle.id for handle in handles}) == 1000
        (found,) = conn.execute(
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and application_name = 'durable-cluster client'"
        ).fetchone() or (0,)
        return int(found)

    fulfil.app.close()
    assert 1 <= asyncio.run(main()) <= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_makes_async_calls_of_its_own(fulfil: Workflow[int, str]) -> None:
    before = asyncio.run(fulfil.start_async(1))
    pid = os.fork()
    if pid == 0:  # what is raised here ends as a wrong exit code
        code = 1
        try:
            found = asyncio.run(asyncio.wait_for(before.status_async(), 10))
            code = 0 if found == "running" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert asyncio.run(before.status_async()) == "running"


def test_each_method_that_asks_the_database_has_a_twin_that_says_so() -> None:
    for kind, names in ((Handle, "signal cancel status state progress attributes"), (Machine, "start start_many get")):
        for name in names.split():
            twin = getattr(kind, f"{name}_async")
            assert (twin.__name__, f"``{name}``" in twin.__doc__) == (f"{name}_async", True)
            assert asyncio.iscoroutinefunction(twin)
