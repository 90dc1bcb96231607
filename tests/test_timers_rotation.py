"""Rotation of the timer tables: it carries what is unfired, and loses neither a late timer nor one in flight."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.errors import DeadlockDetected, LockNotAvailable

from durable_cluster import side_statements
from durable_cluster.envelope import decode_line
from durable_cluster.shards import maintenance

Connection = psycopg.Connection[Any]
YEAR_S = 365 * 86400.0
SEED = int(os.environ.get("DURABLE_TEST_SEED", "0")) or random.randrange(10**6)


def line(number: int) -> str:
    """An envelope; its id spreads over the shards."""
    return f'{{"w":"{number * 2654435761 % 2**32:08x}{number:024x}","n":1,"f":"w","s":"s","v":1,"d":{number}}}'


def schedule(conn: Connection, delays_s: dict[int, float]) -> None:
    side_statements.schedule(conn, [decode_line(line(number)) for number in delays_s], list(delays_s.values()))


def fired(conn: Connection) -> list[int]:
    """The numbers of the lines that stand in the logs, in order."""
    rows = conn.execute(
        "select l.ev_data from pgque.event_1 l union all select l.ev_data from pgque.event_2 l"
    ).fetchall()
    return sorted(int(number) for (data,) in rows for number in re.findall(r'"d":(\d+)}', data))


def one(conn: Connection, query: str, *arguments: object) -> Any:
    row = conn.execute(query.encode(), arguments or None).fetchone()
    assert row is not None
    return row[0]


def rotate(conn: Connection) -> int:
    return int(one(conn, "select durable.rotate_timers()"))


def swept(conn: Connection) -> int:
    """Sweep until there is nothing to do."""
    total = 0
    while passed := side_statements.sweep(conn):
        total += passed
    return total


@pytest.fixture(autouse=True)
def _without_autovacuum(conn: Connection) -> None:
    """A rotation passes by a table that autovacuum is in; here it would do so in one run of a hundred."""
    for number in range(3):
        conn.execute(f"alter table durable.timer_{number} set (autovacuum_enabled = off)")


def test_timers_of_a_year_outlive_a_thousand_rotations(conn: Connection, clock: Callable[[float], None]) -> None:
    schedule(conn, {1: YEAR_S, 2: 30})
    swept(conn)
    for number in range(1000):
        assert rotate(conn) >= 0
        if number % 100 == 0:
            swept(conn)
    clock(YEAR_S - 60)
    assert (swept(conn), fired(conn)) == (1, [2])
    for _ in range(3):
        rotate(conn)
    clock(YEAR_S + 60)
    assert (swept(conn), fired(conn)) == (1, [1, 2])
    assert [rotate(conn) for _ in range(3)] == [0, 0, 0]
    assert one(conn, "select count(*) from durable.timer") == 0


def test_a_rotation_keeps_a_timer_that_was_committed_late(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    with psycopg.connect(dsn) as late:
        schedule(late, {1: 5})
        schedule(conn, {2: 6})
        clock(10)
        assert swept(conn) == 1
    assert [rotate(conn), rotate(conn)] == [0, 1]
    assert rotate(conn) == 0
    assert (swept(conn), fired(conn)) == (1, [1, 2])
    assert swept(conn) == 0


def test_a_rotation_passes_by_a_table_with_a_timer_in_flight(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    with psycopg.connect(dsn) as late:
        schedule(late, {1: 5})
        assert rotate(conn) == 0
        assert rotate(conn) == -1
        clock(10)
        swept(conn)
        assert rotate(conn) == -1
    assert rotate(conn) == 1
    assert rotate(conn) == 0
    assert (swept(conn), fired(conn)) == (1, [1])


def test_a_timer_that_is_committed_while_a_rotation_is_on_its_way_is_not_truncated_unseen(
    dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    with psycopg.connect(dsn) as late, psycopg.connect(dsn, autocommit=True) as other, ThreadPoolExecutor(1) as pool:
        schedule(late, {1: 0})
        assert rotate(conn) == 0
        rotating = pool.submit(rotate, other)
        waiting = (
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        eventually(lambda: rotating.done() or one(conn, waiting))
        late.commit()
        assert rotating.result(timeout=10) == -1
    assert (swept(conn), fired(conn)) == (1, [1])


def test_a_writer_that_knows_an_old_table_loses_nothing(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    stale = one(conn, "select current from durable.timer_control")
    rotate(conn)
    rotate(conn)
    conn.execute(
        f"insert into durable.timer_{stale} (due, workflow_id, seq, line)"
        " values (durable.timer_now() + interval '5 s', %s, 1, %s)",
        (line(1)[6:38], line(1)),
    )
    for _ in range(4):
        assert rotate(conn) >= 0
    clock(10)
    assert (swept(conn), fired(conn)) == (1, [1])


def test_a_sweep_and_a_rotation_do_not_wait_for_each_other(dsn: str, conn: Connection) -> None:
    schedule(conn, {1: 0})
    with psycopg.connect(dsn) as tx:
        assert side_statements.sweep(tx) == 1
        assert rotate(conn) == -1
    with psycopg.connect(dsn) as tx:
        assert rotate(tx) == 0
        schedule(conn, {2: 0})
        tx.rollback()
    assert swept(conn) == 1


def test_a_reader_that_holds_on_makes_a_rotation_give_up_and_nothing_is_carried_twice(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    schedule(conn, {1: 30})
    rotate(conn)
    with psycopg.connect(dsn) as reader:
        assert one(reader, "select count(*) from durable.timer") == 1
        assert rotate(conn) == -1
    assert one(conn, "select count(*) from durable.timer") == 1
    assert rotate(conn) == 1
    clock(60)
    assert (swept(conn), fired(conn)) == (1, [1])


def test_rotation_is_driven_by_what_has_fired_not_by_what_sleeps(
    conn: Connection, clock: Callable[[float], None]
) -> None:
    def needed() -> bool:
        return bool(one(conn, "select durable.needs_timer_rotation()"))

    schedule(conn, dict.fromkeys(range(12_000), YEAR_S))
    swept(conn)
    assert not needed()
    assert rotate(conn) == 0
    for begin in range(20_000, 29_000, 3000):
        schedule(conn, dict.fromkeys(range(begin, begin + 3000), 0.0))
    assert swept(conn) == 9000
    assert not needed(), "nine thousand are not worth it"
    schedule(conn, dict.fromkeys(range(30_000, 32_000), 0.0))
    assert swept(conn) == 2000
    assert not needed(), "twelve thousand sleepers would be copied for eleven thousand"
    schedule(conn, dict.fromkeys(range(32_000, 33_000), 0.0))
    assert swept(conn) == 1000
    assert needed()
    maintenance.run_once(conn)
    assert needed(), "what has fired stands in the table that was current"
    maintenance.run_once(conn)
    assert not needed()
    assert one(conn, "select count(*) from durable.timer") == 12_000


class Storm:
    """Inserters that commit late, sweeps that are rolled back, rotations and a clock that is set back: all at once, for a while."""

    INSERTERS = 4

    def __init__(self, dsn: str, *, seconds: float, set_clock: Callable[[float], None]) -> None:
        self.dsn = dsn
        self.seconds = seconds
        self.set_clock = set_clock
        self.stop = threading.Event()
        self.drain = threading.Event()
        self.lock = threading.Lock()
        self.count = 0
        self.offset_s = 0.0
        self.due_not_before: dict[int, float] = {}
        self.seen_at: dict[int, float] = {}
        self.failures: list[BaseException] = []
        self.done = dict.fromkeys(("commits", "rollbacks", "sweeps", "undone", "rotations", "steps_back"), 0)

    def run(self) -> None:
        work = [lambda n=n: self.insert(random.Random(SEED * 100 + n)) for n in range(self.INSERTERS)]
        work += [lambda n=n: self.sweep(random.Random(SEED * 100 + 10 + n)) for n in range(2)]
        work += [lambda: self.rotate(random.Random(SEED)), lambda: self.step_back(random.Random(SEED)), self.watch]
        threads = [threading.Thread(target=self.guarded, args=(act,), daemon=True) for act in work]
        for thread in threads:
            thread.start()
        self.drain.wait(self.seconds)
        self.drain.set()
        deadline = time.monotonic() + 20
        for inserter in threads[: self.INSERTERS]:
            # What the last of them commit is to be waited for too.
            inserter.join(10)
        while set(self.due_not_before) - set(self.seen_at) and time.monotonic() < deadline and not self.failures:
            self.stop.wait(0.02)
        self.stop.set()
        for thread in threads:
            thread.join(10)

    def guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            self.failures.append(error)
            self.drain.set()

    def insert(self, dice: random.Random) -> None:
        with psycopg.connect(self.dsn) as conn:
            while not self.drain.is_set():
                mine: dict[int, float] = {}
                for _ in range(dice.randint(1, 4)):
                    delay_s = dice.choice([0.0, dice.uniform(0, 0.05), dice.uniform(0, 1), dice.uniform(0, 2)])
                    with self.lock:
                        self.count += 1
                        number = self.count
                    mine[number] = time.monotonic() + delay_s
                    schedule(conn, {number: delay_s})
                    if dice.random() < 0.3:
                        self.stop.wait(dice.uniform(0, 0.3))
                if dice.random() < 0.3:
                    self.stop.wait(dice.uniform(0, 0.8))
                if dice.random() < 0.2:
                    conn.rollback()
                    self.done["rollbacks"] += 1
                    continue
                conn.commit()
                with self.lock:
                    self.due_not_before.update(mine)
                    self.done["commits"] += 1

    def sweep(self, dice: random.Random) -> None:
        with psycopg.connect(self.dsn) as conn:
            while not self.stop.is_set():
                conn.execute("select durable.sweep(%s)", (dice.choice([1, 5, 1000]),))
                if dice.random() < 0.3:
                    self.stop.wait(dice.uniform(0, 0.03))
                if dice.random() < 0.25 and not self.drain.is_set():
                    conn.rollback()
                    self.done["undone"] += 1
                else:
                    conn.commit()
                    self.done["sweeps"] += 1
                self.stop.wait(dice.uniform(0, 0.01))

    def rotate(self, dice: random.Random) -> None:
        with psycopg.connect(self.dsn) as conn:
            while not self.stop.is_set():
                try:
                    carried = rotate(conn)
                except (LockNotAvailable, DeadlockDetected):
                    carried = -1
                if dice.random() < 0.2:
                    conn.rollback()
                else:
                    conn.commit()
                    self.done["rotations"] += carried >= 0
                self.stop.wait(0.02)

    def step_back(self, dice: random.Random) -> None:
        while not self.drain.wait(dice.uniform(1, 2)):
            self.offset_s -= dice.choice([0.7, 2.5, 3600])
            self.set_clock(self.offset_s)
            self.done["steps_back"] += 1

    def watch(self) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            while not self.stop.wait(0.05):
                begin = time.monotonic()
                for number in fired(conn):
                    self.seen_at.setdefault(number, begin)


def weather(dsn: str, conn: Connection, clock: Callable[[float], None], *, seconds: float) -> None:
    print(f"seed {SEED} (DURABLE_TEST_SEED)")
    storm = Storm(dsn, seconds=seconds, set_clock=clock)
    storm.run()
    assert not storm.failures, storm.failures
    numbers = fired(conn)
    assert len(numbers) == len(set(numbers)), "twice"
    assert set(numbers) == set(storm.due_not_before), "lost, or never committed"
    early = {
        n: seen - storm.due_not_before[n] for n, seen in storm.seen_at.items() if seen + 0.01 < storm.due_not_before[n]
    }
    assert not early
    assert all(storm.done.values()), storm.done
    print(storm.done)


def test_late_commits_aborted_sweeps_rotations_and_clock_steps_lose_no_timer_and_fire_none_twice_or_early(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    weather(dsn, conn, clock, seconds=5)


@pytest.mark.slow
def test_late_commits_aborted_sweeps_rotations_and_clock_steps_for_two_minutes(
    dsn: str, conn: Connection, clock: Callable[[float], None]
) -> None:
    weather(dsn, conn, clock, seconds=120)
