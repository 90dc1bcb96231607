"""Idle is quiet: nothing to do means no writes, no transaction ids, few reads; and a start is heard at once all the same."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Settings, listener, statements
from durable_cluster.consumer import Consumer
from durable_cluster.listener import POLL_S_MAX, POLL_S_MIN, Listener

QUIET_S = 3.0
READS_PER_S_MAX = 8  # two shards each, and the statistics' own
STARTED_S_MAX = 60.0

APP = """
from durable_cluster import App, Context
app = App("quiet")
machine = app.machine("quiet")

@machine.step(start=True)
def only(ctx: Context, n: int):
    return ctx.done(n)
"""

SUPERVISOR = """
import sys
from durable_cluster import Settings
from durable_cluster.shards.messages import ClusterConfig
from durable_cluster.shards.supervisor import Supervisor

if __name__ == "__main__":
    Supervisor(
        ClusterConfig(dsn=sys.argv[1], app="quiet_app:app", shards=2, consumers_per_shard=2, settings=Settings())
    ).run()
"""


def quiet_app(dsn: str) -> App:
    app = App("quiet", dsn=dsn, settings=Settings())

    @app.machine("quiet").step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return app


@contextmanager
def running_here(dsn: str) -> Iterator[None]:
    """Three apps in three threads, each reading every shard; ended by cutting their connections."""

    def run() -> None:
        with contextlib.suppress(psycopg.OperationalError):
            quiet_app(dsn).run(timeout=60)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and application_name like 'durable-cluster shard%'"
            )
        for thread in threads:
            thread.join(10)


@contextmanager
def running_cluster(dsn: str, folder: Path) -> Iterator[None]:
    """A supervisor with two consumers for each of two shards, and maintenance."""
    (folder / "quiet_app.py").write_text(APP)
    (folder / "cluster.py").write_text(SUPERVISOR)
    with subprocess.Popen([sys.executable, "cluster.py", dsn], cwd=folder) as supervisor:
        try:
            yield
        finally:
            supervisor.terminate()
            supervisor.wait(30)


@pytest.fixture(params=["in threads", "under a supervisor"])
def consumers(
    request: pytest.FixtureRequest, dsn: str, conn: psycopg.Connection, tmp_path: Path, eventually: Callable[..., None]
) -> Iterator[int]:
    """Consumers that run and have fallen asleep; how many."""
    count = 3 if request.param == "in threads" else 4
    with running_here(dsn) if request.param == "in threads" else running_cluster(dsn, tmp_path):
        asleep = (
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and application_name like 'durable-cluster shard % c%' and state = 'idle' and now() - state_change > '0.3 s'"
        )
        eventually(
            lambda: conn.execute(asleep).fetchone() == (count,),
            seconds=STARTED_S_MAX,
            what="that all consumers are asleep",
        )
        eventually(
            lambda: asleep_shards(conn) == 2,
            what="that both shards are idle",
        )
        yield count


def drained(dsn: str, app: App) -> Consumer:
    """A consumer of shard 0 that has nothing left to do."""
    consumer = Consumer(dsn, 0, app.machines, app.settings)
    while consumer.work(lambda: False, lambda: None):
        pass
    return consumer


def asleep_shards(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from durable.shard s where durable.is_asleep(s.shard)").fetchone()
    assert row is not None
    return int(row[0])


def counters(conn: psycopg.Connection) -> tuple[int, int, int]:
    """Transaction ids handed out and WAL bytes written by the server, and transactions of this database."""
    conn.execute("select pg_stat_clear_snapshot()")
    row = conn.execute(
        "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,"
        " (select xact_commit + xact_rollback from pg_stat_database where datname = current_database())"
    ).fetchone()
    assert row is not None
    return row


def test_idle_consumers_take_no_transaction_id_write_nothing_and_seldom_ask(
    consumers: int, conn: psycopg.Connection
) -> None:
    """The server has its own upkeep: one quiet stretch is the proof, and a consumer that writes at each poll leaves none."""
    if os.environ.get("DURABLE_TEST_DSN") and os.environ.get("PYTEST_XDIST_WORKER"):
        pytest.skip("the counters are the server's, and another worker's tests write to it")
    measured: list[dict[str, float]] = []
    for _ in range(5):
        begin, before = time.monotonic(), counters(conn)
        threading.Event().wait(QUIET_S)
        seconds, after = time.monotonic() - begin, counters(conn)
        rates = [(late - early) / seconds for early, late in zip(before, after, strict=True)]
        measured.append(dict(zip(("xids_per_s", "wal_bytes_per_s", "reads_per_s"), rates, strict=True)))
        # Pauses are still growing in the first seconds.
        reads_per_s = measured[-1]["reads_per_s"] / consumers
        if (
            measured[-1]["xids_per_s"] == 0
            and measured[-1]["wal_bytes_per_s"] < 1024
            and reads_per_s <= READS_PER_S_MAX
        ):
            break
    assert measured[-1]["xids_per_s"] == 0, measured
    assert measured[-1]["wal_bytes_per_s"] < 1024, measured
    assert measured[-1]["reads_per_s"] / consumers <= READS_PER_S_MAX, measured


def test_a_start_wakes_a_consumer_that_has_long_been_idle_at_once(
    consumers: int, dsn: str, conn: psycopg.Connection
) -> None:
    app = quiet_app(dsn)
    app.client.connection()
    took_s: list[float] = []
    for n in range(5):
        deadline = time.monotonic() + 20
        while asleep_shards(conn) != 2 and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        threading.Event().wait(1.2)
        begin = time.monotonic()
        assert app.named("quiet").start(n).result(timeout=10) == n
        took_s.append(time.monotonic() - begin)
    app.close()
    assert statistics.median(took_s) < 0.1, took_s


def test_a_start_notifies_nobody_while_consumers_are_awake(dsn: str, conn: psycopg.Connection) -> None:
    app = quiet_app(dsn)
    for shard in (0, 1):
        conn.execute(f"listen durable_{shard}")
    app.named("quiet").start_many(list(range(50)))
    app.run(until_idle=True)
    assert list(conn.notifies(timeout=0.2)) == []
    sleeper = psycopg.connect(dsn, autocommit=True)
    sleeper.execute("select durable.fall_asleep('{0,1}')")
    app.named("quiet").start_many(list(range(50)))
    assert {note.channel for note in conn.notifies(timeout=5, stop_after=2)} == {"durable_0", "durable_1"}
    sleeper.close()
    app.close()


def test_a_mark_is_one_sessions_and_ends_with_it_and_whoever_appends_does_not_keep_it_away(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    first, second = psycopg.connect(dsn, autocommit=True), psycopg.connect(dsn, autocommit=True)
    mark = "select durable.fall_asleep('{0}')"
    with psycopg.connect(dsn) as tx, closing(quiet_app(dsn)) as app:
        app.named("quiet").start_many(list(range(50)), tx=tx)
        assert first.execute(mark).fetchall() == [(0,)], "while a transaction that has appended is open"
    assert second.execute(mark).fetchall() == []
    assert asleep_shards(conn) == 1
    assert first.execute("select durable.is_asleep(0)").fetchone() == (False,), "nobody notifies itself"
    assert first.execute("select durable.fall_asleep('{1}')").fetchall() == [(1,)]
    first.execute("select durable.wake_up('{0,1}')")
    assert asleep_shards(conn) == 0
    assert second.execute(mark).fetchall() == [(0,)]
    second.close()
    eventually(lambda: asleep_shards(conn) == 0, what="the end of the session, and of its mark")
    assert first.execute(mark).fetchall() == [(0,)]
    first.close()


def test_a_start_in_a_snapshot_older_than_the_mark_notifies(dsn: str, conn: psycopg.Connection) -> None:
    for shard in (0, 1):
        conn.execute(f"listen durable_{shard}")
    with psycopg.connect(dsn) as tx, closing(quiet_app(dsn)) as app, psycopg.connect(dsn, autocommit=True) as sleeper:
        tx.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        tx.execute("select 1")
        sleeper.execute("select durable.fall_asleep('{0,1}')")
        app.named("quiet").start_many(list(range(50)), tx=tx)
        tx.commit()
        assert {note.channel for note in conn.notifies(timeout=5, stop_after=2)} == {"durable_0", "durable_1"}


def test_a_sibling_takes_the_mark_over_and_is_told_of_what_is_appended(
    dsn: str, conn: psycopg.Connection, eventually: Callable[..., None]
) -> None:
    app = quiet_app(dsn)
    first, second = drained(dsn, app), drained(dsn, app)
    idle_s = app.settings.busy_poll_s * 2
    assert not first.wait(idle_s)
    assert asleep_shards(conn) == 1
    first.close()
    eventually(lambda: asleep_shards(conn) == 0, what="the end of the session, and of its mark")
    assert not second.wait(idle_s)
    assert asleep_shards(conn) == 1
    app.named("quiet").start_many(list(range(50)))
    assert second.wait(60.0)
    assert second.work(lambda: False, lambda: None)
    assert asleep_shards(conn) == 0, "who is awake is not notified"
    second.close()
    app.close()


@pytest.mark.parametrize(
    ("slept_s", "commit_s", "awake_s"),
    [
        (0.001, 0.02, 0.01),
        (0.1, 0.02, 0.4),
        (0.19, 0.02, 0.76),
        (0.21, 0.02, 0.01),
        (0.9, 0.1, 1.0),
        (0.1, 0.005, 0.01),
    ],
)
def test_who_is_woken_too_soon_for_what_a_commit_takes_stays_awake_for_longer_the_next_time(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, slept_s: float, commit_s: float, awake_s: float
) -> None:
    now = 100.0
    monkeypatch.setattr(listener, "time", SimpleNamespace(monotonic=lambda: now))
    one = Listener(conn, Settings(), shards=5)
    assert one.mark([0])
    now += slept_s
    conn.execute("notify durable_0")
    assert one.pause(10.0, ()) == {0}
    one.woken(commit_s)
    assert one.awake_s == pytest.approx(awake_s)


def test_pauses_grow_from_the_newest_mark_on(conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(listener, "time", SimpleNamespace(monotonic=lambda: now))
    one = Listener(conn, Settings(), shards=5)
    assert one.pause_s(0.0) == POLL_S_MIN
    assert one.pause_s(60.0) == 1.0, "a sibling has the mark, and has had it for long"
    assert one.mark([0, 1])
    assert one.pause_s(60.0) == POLL_S_MAX, "what was appended while it was marked anew, nobody has told"
    now += 0.5
    assert one.pause_s(60.0) == pytest.approx(0.25 + POLL_S_MAX)


def test_of_a_shard_that_it_has_left_it_hears_no_more_and_is_not_woken_by_it(
    dsn: str, conn: psycopg.Connection
) -> None:
    app = quiet_app(dsn)
    consumer = drained(dsn, app)
    consumer.adopt(1)
    assert not consumer.wait(60.0)
    assert asleep_shards(conn) == 2
    consumer.release(1)
    assert not consumer.wait(60.0)
    assert (consumer.shards, asleep_shards(conn)) == ([0], 1)
    conn.execute("notify durable_1")
    assert not consumer.wait(60.0)
    consumer.close()
    app.close()


def test_a_shard_that_is_adopted_and_released_at_once_is_looked_at_in_between(
    dsn: str, conn: psycopg.Connection
) -> None:
    app = quiet_app(dsn)
    app.named("quiet").start_many(list(range(3_000)))
    dead = Consumer(dsn, 1, app.machines, app.settings)
    assert dead.work(lambda: True, lambda: None)
    consumer = drained(dsn, app)
    statements.abandon(conn, dead.owner)
    consumer.adopt(1)
    consumer.release(1)
    assert consumer.wait(60.0)
    while consumer.work(lambda: False, lambda: None):
        pass
    assert conn.execute("select count(*) from durable.finished").fetchone() == (3_000,)
    dead.close()
    consumer.close()
    app.close()


def test_a_step_that_any_process_may_take_wakes_the_sleeping(dsn: str, conn: psycopg.Connection) -> None:
    with psycopg.connect(dsn, autocommit=True) as sleeper:
        sleeper.execute("select durable.fall_asleep('{0,1}')")
        for shard in (0, 1):
            conn.execute(f"listen durable_{shard}")
        detach = "select durable.detach(0, %s, %s, '{}', '0')"
        conn.execute(detach, ("10", f"{'1' * 32}:1"))
        assert list(conn.notifies(timeout=0.1)) == []
        conn.execute(detach, ("0", f"{'2' * 32}:1"))
        assert {note.channel for note in conn.notifies(timeout=5, stop_after=2)} == {"durable_0", "durable_1"}


def test_a_probe_takes_no_lock_that_a_claim_would_wait_for_and_no_transaction_id(
    dsn: str, conn: psycopg.Connection
) -> None:
    with psycopg.connect(dsn) as tx:
        assert tx.execute("select durable.probe(0), durable.probe(0, '1 s')").fetchone() == (False, False)
        assert tx.execute("select pg_current_xact_id_if_assigned()").fetchone() == (None,)
        locks = tx.execute(
            "select distinct mode from pg_locks where pid = pg_backend_pid() and locktype in ('relation', 'tuple')"
        ).fetchall()
        assert locks == [("AccessShareLock",)]
    assert conn.execute("select durable.probe(0)").fetchone() == (False,)


def test_an_event_that_was_read_leaves_nothing_to_probe_for(dsn: str, conn: psycopg.Connection) -> None:
    app = quiet_app(dsn)
    app.named("quiet").start_many(list(range(50)))
    assert conn.execute("select durable.probe(0) and durable.probe(1)").fetchone() == (True,)
    app.run(until_idle=True)
    assert conn.execute("select durable.probe(0) or durable.probe(1)").fetchone() == (False,)
    with psycopg.connect(dsn) as tx:
        app.named("quiet").start_many(list(range(50)), tx=tx)
        assert conn.execute("select durable.probe(0) or durable.probe(1)").fetchone() == (False,)
    assert conn.execute("select durable.probe(0) and durable.probe(1)").fetchone() == (True,)
