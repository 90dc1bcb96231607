"""The seven steps are true: each statement is executed on an empty database, in the order of the page, by one session or the other.

And what the page claims of two sessions at once holds for its functions when two sessions are at it at once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from documents import Psql, blocks_of, compare, last_of
from psycopg.errors import UniqueViolation

PAGE = Path(__file__).parent.parent / "docs" / "seven-steps.md"
OTHER = "-- in another session\n"
AT_ONCE = 4

Session = psycopg.Connection[Any]


@pytest.fixture
def sessions(empty_dsn: str) -> Iterator[list[Session]]:
    opened = [psycopg.connect(empty_dsn, autocommit=True) for _ in range(AT_ONCE)]
    yield opened
    for one in opened:
        one.close()


def play(sessions: list[Session], text: str) -> int:
    """Run the blocks of a page, and compare; how many were compared."""
    psql = {is_other: Psql(sessions[is_other]) for is_other in (False, True)}
    compared = 0
    for block in blocks_of(text):
        is_other = block.statements[0].startswith(OTHER)
        results = [psql[is_other].run(statement) for statement in block.statements]
        if block.shown is None:
            assert all(isinstance(result, list) for result in results), results
        else:
            compare(last_of(results), block.shown)
            compared += 1
    return compared


def prepare(sessions: list[Session], before: str) -> None:
    """What the page makes before this heading, with less to measure and nothing compared."""
    text = PAGE.read_text("utf-8")
    text = text[: text.index(before)].replace("(1000)", "(1)")
    psql = {is_other: Psql(sessions[is_other]) for is_other in (False, True)}
    for block in blocks_of(text):
        for statement in block.statements:
            psql[block.statements[0].startswith(OTHER)].run(statement)


def at_once(sessions: list[Session], act: Callable[[Session], Any]) -> list[Any]:
    """What each session came to: a result, or an error of Postgres."""
    results: list[Any] = [None] * len(sessions)
    gate = threading.Barrier(len(sessions))

    def run(n: int) -> None:
        gate.wait(10)
        try:
            results[n] = act(sessions[n])
        except psycopg.Error as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def one(session: Session, query: str, *values: Any) -> Any:
    row = session.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def test_every_statement_gives_what_the_page_shows(sessions: list[Session]) -> None:
    assert play(sessions, PAGE.read_text("utf-8")) > 25


def test_the_files_that_the_page_names_are_there() -> None:
    names = re.findall(r"`((?:sql|cluster|tests)/[\w/]+\.\w+)`", PAGE.read_text("utf-8"))
    assert len(names) > 10
    assert [name for name in names if not (PAGE.parent.parent / name).exists()] == []


def test_two_workers_never_have_one_task_nor_a_customer_three(sessions: list[Session]) -> None:
    prepare(sessions, "## 3.")
    sessions[0].execute("delete from task")
    sessions[0].execute("insert into task (body) select 'mail' from generate_series(1, 100)")

    def take_and_finish(session: Session) -> list[int]:
        taken = []
        while one(session, "select count(*) from task where done_at is null"):
            task, attempt = session.execute("select id, attempt from take('ada', 2)").fetchone() or (None, None)
            if task is not None:
                running = one(session, "select count(*) from task where done_at is null and leased_until > now()")
                assert 1 <= running <= 2
                assert one(session, "select finish(%s, %s)", task, attempt)
                taken.append(task)
        return taken

    taken = at_once(sessions, take_and_finish)
    assert sorted(task for some in taken for task in some) == list(range(min(map(min, filter(None, taken))), 105))


def test_who_counts_a_customers_tasks_waits_for_who_counts_them_already(
    sessions: list[Session], eventually: Callable[..., None]
) -> None:
    prepare(sessions, "## 3.")
    sessions[0].execute("update task set done_at = now()")
    sessions[0].execute("insert into task (body) select 'mail' from generate_series(1, 9)")
    first, second, watching = sessions[:3]
    assert one(first, "select id from take('ada', 2)") is not None
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(one(second, "select id from take('ada', 2)")))
    with first.transaction():
        assert one(first, "select id from take('ada', 2)") is not None
        thread.start()
        waits = "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
        eventually(lambda: taken or one(watching, waits, second.info.backend_pid))
    thread.join(10)
    assert taken == [None]


def test_no_event_is_lost_or_read_twice_beside_writers_ticks_and_rotations(sessions: list[Session]) -> None:
    prepare(sessions, "And now lunch")
    _, rotator, *writers = sessions
    written, read, rotations = len(writers) * 150, [], []
    is_over = threading.Event()

    def act(session: Session) -> None:
        if session in writers:
            for n in range(150):
                with session.transaction():
                    session.execute("select append(jsonb_build_object('mail', %s::int))", (n,))
                    if n % 10 == 0:
                        session.execute("select pg_sleep(0.005)")
        elif session is rotator:
            while not is_over.is_set():
                rotations.append(one(session, "select rotate()"))
        else:
            while len(read) < written:
                tick = one(session, "select next_tick()")
                read.extend(id_ for (id_,) in session.execute("select id from batch_of(%s)", (tick,)))
                session.execute("insert into batch_done values (%s)", (tick,))
            is_over.set()

    stop = threading.Timer(50, lambda: (read.extend([0] * written), is_over.set()))
    stop.start()
    assert at_once(sessions, act) == [None] * AT_ONCE
    stop.cancel()
    assert len(read) == len(set(read)) == written
    assert sum(rotations) > 2


def test_of_several_that_hand_a_batch_on_at_once_one_does(sessions: list[Session]) -> None:
    prepare(sessions, "## 7.")
    sessions[0].execute("call work(null)")
    sessions[0].execute('select append(\'{"workflow": 100, "memo": {}}\')')
    tick = one(sessions[0], "select next_tick()")

    def hand_on(session: Session) -> str:
        with session.transaction():
            next_ = session.execute("select successor_of(body) from batch_of(%s)", (tick,)).fetchall()
            assert len(next_) == 1
            session.execute(
                "select hand_on(%s, array(select successor_of(body) from batch_of(%s)), '{}'), pg_sleep(0.05)",
                (tick, tick),
            )
        return "handed on"

    said = at_once(sessions, hand_on)
    assert said.count("handed on") == 1
    assert sum(isinstance(error, UniqueViolation) for error in said) == AT_ONCE - 1
    assert one(sessions[0], "select count(*) from event where body ->> 'workflow' = '100' and body ? 'call'") == 1


def test_workers_at_once_bring_each_workflow_to_one_end(sessions: list[Session]) -> None:
    prepare(sessions, "## 7.")
    sessions[0].execute(
        "select append(jsonb_build_object('workflow', n, 'memo', '{}'::jsonb)) from generate_series(1001, 1100) n"
    )

    def work(session: Session) -> None:
        while one(session, "select count(*) from ended where workflow > 1000") < 100:
            with suppress(UniqueViolation):
                session.execute("call work(null)")

    assert at_once(sessions, work) == [None] * AT_ONCE
    ends = sessions[0].execute("select workflow from ended where workflow > 1000").fetchall()
    assert len(ends) == len(set(ends)) == 100
    ran = one(sessions[0], "select count(*) from ran where workflow > 1000")
    assert ran >= 400


def test_timers_fire_once_beside_each_other(sessions: list[Session]) -> None:
    prepare(sessions, "## What is left")
    before = one(sessions[0], "select count(*) from event")

    def set_and_sweep(session: Session) -> int:
        fired = 0
        for _ in range(50):
            with session.transaction():
                session.execute('insert into timer (due, body) values (now(), \'{"workflow": 7, "memo": {}}\')')
            fired += one(session, "select sweep(now() + interval '10 days')")
        return fired

    fired = at_once(sessions, set_and_sweep)
    fired.append(one(sessions[0], "select sweep(now() + interval '10 days')"))
    assert sum(fired) == AT_ONCE * 50
    assert one(sessions[0], "select count(*) from event") - before == AT_ONCE * 50
