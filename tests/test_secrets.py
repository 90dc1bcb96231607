"""A workflow's id is a capability: nothing that people or machines read by the way carries it whole."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import traceback
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, DurableError, Handle, Retry, Settings, TerminalError, statements
from durable_cluster.consumer import Consumer

WHOLE = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def leaks(text: str, ids: list[str]) -> list[str]:
    """The whole ids of ours in ``text``, in either spelling."""
    return [found for found in WHOLE.findall(text) if found.replace("-", "").lower() in ids]


class Fragile(Exception):
    """What a step of the user raises."""


@pytest.fixture
def app(dsn: str) -> App:
    app = App("secretive", dsn=dsn, settings=Settings(takeover_probe_s=0, page_window_ms=0))
    machine = app.machine("secret")
    once = Retry(attempts=1)

    @machine.step(start=True, retry=Retry(attempts=2, backoff=0))
    def begin(ctx: Context, how: str) -> Continuation:
        match how:
            case "raise":
                raise Fragile("a step of the user failed")
            case "garbage":
                return "garbage"  # type: ignore[return-value]
            case "fail":
                return ctx.fail("no luck")
            case "terminal":
                raise TerminalError("no luck at all")
            case "unknown":
                return ctx.goto("nowhere", None)
            case "large":
                return ctx.done("x" * 300_000)
            case "not json":
                return ctx.done(object())
            case "await":
                return ctx.goto(awaited, how)
        return ctx.goto(transactional, how)

    @machine.step(retry=once)
    async def awaited(ctx: Context, how: str) -> Continuation:
        raise Fragile("an awaited step failed")

    @machine.step(transactional=True, retry=once)
    def transactional(ctx: Context, how: str) -> Continuation:
        match how:
            case "sql":
                ctx.tx.execute("select 1 / 0")
            case "swallow":
                with contextlib.suppress(psycopg.Error):
                    ctx.tx.execute("select 1 / 0")
            case "commit":
                ctx.tx.commit()
        return ctx.done(how)

    return app


STUCK = ["raise", "garbage", "unknown", "large", "not json", "await", "sql", "swallow", "commit"]
HOWS = [*STUCK, "fail", "terminal", "fine"]


def start_all(app: App) -> tuple[list[Handle], list[str]]:
    handles = app.named("secret").start_many(HOWS, keys=[f"order {n}" for n in range(len(HOWS))])
    return handles, [handle.id for handle in handles]


def test_logs_of_a_run_full_of_failures_carry_no_whole_id(
    app: App, dsn: str, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("durable_cluster").setLevel(logging.DEBUG)
    _, ids = start_all(app)
    conn.execute("select pgque.insert_event('durable_0', 'steps', 'no envelope', '1', null, null, null)")
    lose_a_batch(app, dsn, conn)
    app.run(until_idle=True, timeout=20)
    formatted = "\n".join(logging.Formatter().format(record) + repr(record.args) for record in caplog.records)
    assert "lost" in formatted, "the log says something at all"
    assert leaks(formatted, ids) == []


def lose_a_batch(app: App, dsn: str, conn: psycopg.Connection) -> None:
    """A consumer whose window another one takes while it works on it."""
    zombie = Consumer(dsn, 0, app.machines, app.settings)
    heir = Consumer(dsn, 0, app.machines, app.settings)

    def take_it() -> None:
        statements.abandon(conn, zombie.owner)
        thread = threading.Thread(target=heir.work, args=(lambda: True, lambda: None))
        thread.start()
        thread.join(20)

    zombie.work(lambda: True, take_it)
    for consumer in (zombie, heir):
        statements.abandon(conn, consumer.owner)
        consumer.close()


def every_error(app: App, handles: list[Handle]) -> list[Callable[[], Any]]:
    """Calls that fail, each in its own way, around real ids."""
    unknown = handles[0].id[::-1]
    return [
        *[handle.result for handle in handles if handle.status() in ("failed", "stuck")],
        lambda: app.get(unknown),
        lambda: app.get(handles[0].id + "0"),
        lambda: app.get(handles[0].id.upper()),
        lambda: Handle(app.client, "secret", unknown).result(timeout=0),
        Handle(app.client, "secret", unknown).state,
        lambda: app.named("secret").get(key="nobody"),
        lambda: app.named("nobody"),
    ]


def test_no_error_carries_a_whole_id(app: App) -> None:
    handles, ids = start_all(app)
    app.run(until_idle=True, timeout=20)
    calls = every_error(app, handles)
    assert len(calls) == len(HOWS) - 1 + 7
    for call in calls:
        with pytest.raises(DurableError) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(vars(caught.value))
        assert leaks(shown, [*ids, ids[0][::-1]]) == []


def test_what_is_kept_of_a_failure_carries_no_whole_id(app: App, conn: psycopg.Connection) -> None:
    _, ids = start_all(app)
    app.run(until_idle=True, timeout=20)
    outputs = [output for (output,) in conn.execute("select output from durable.finished where status = 'failed'")]
    details = [details for (details,) in conn.execute("select details from durable.dead_letter")]
    assert (len(outputs), len(details)) == (2, len(STUCK))
    assert leaks("\n".join(outputs + details), ids) == []


@pytest.mark.parametrize(
    "query",
    [
        "select * from durable.list()",
        "select * from durable.list(null, 'failed')",
        "select * from durable.list(null, 'stuck')",
        "select * from durable.dead_letters()",
        "select * from durable.log(0)",
        "select * from durable.log(1)",
        "select * from durable.totals()",
        "select * from durable.shard_status()",
        "select * from durable.row_changes()",
        "select * from pgque.get_queue_info()",
        "select * from pgque.get_consumer_info()",
        "select query, application_name from pg_stat_activity where datname = current_database()",
    ],
)
def test_no_listing_carries_a_whole_id(app: App, conn: psycopg.Connection, query: str) -> None:
    handles, ids = start_all(app)
    app.run(until_idle=True, timeout=20)
    handles[0].status()
    handles[0].state()
    app.get(handles[1].id)
    start_all(app)
    rows = conn.execute(query.encode()).fetchall()
    assert rows
    assert leaks(repr(rows), ids) == []


def test_what_stands_for_a_workflow_in_a_debugger_shows_a_truncated_id(app: App) -> None:
    handle = app.named("secret").start("fine")
    seen: list[str] = []
    ids = [handle.id]
    spy = app.machine("spy")

    @spy.step(start=True)
    def look(ctx: Context, _: None) -> Continuation:
        seen.extend(
            [repr(ctx), str(ctx), ctx.short_id, ctx.idempotency_key, repr(ctx.done(1)), repr(ctx.goto(look, None))]
        )
        ids.append(ctx.workflow_id)
        return ctx.done(1)

    spied = spy.start(None)
    app.run(until_idle=True)
    assert ids == [handle.id, spied.id]
    assert len(seen) == 6
    shown = [*seen, repr(handle), str(handle), repr(spied.state()), repr(app), repr(app.client)]
    assert leaks("\n".join(shown), ids) == []


def test_a_second_end_of_a_workflow_neither_replaces_the_first_nor_shows_its_id(
    app: App, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Postgres puts the key of a violated constraint into its message; that key would be an id."""
    caplog.set_level(logging.DEBUG)
    handle = app.named("secret").start("fail")
    conn.execute(
        "insert into durable.finished (id, day, status, output, at) values (%s, durable.day_of(%s), 'completed', '1', now())",
        (handle.id, handle.id),
    )
    try:
        app.run(until_idle=True, timeout=5)
    except Exception as error:
        caplog.records.append(logging.makeLogRecord({"msg": "".join(traceback.format_exception(error))}))
    assert leaks("\n".join(record.getMessage() for record in caplog.records), [handle.id]) == []
    assert handle.result(timeout=1) == 1


def test_ids_are_random_between_the_time_at_their_begin_and_the_day_at_their_end(
    app: App, conn: psycopg.Connection
) -> None:
    time_of_day = "select floor(extract(epoch from durable.now()) * 4096 / 86400)::bigint % 4096"
    (before,) = conn.execute(time_of_day.encode()).fetchone() or ()
    ids = [handle.id for handle in app.named("secret").start_many(["fine"] * 200)]
    (today,) = conn.execute("select durable.today()").fetchone() or ()
    assert {int(one[-4:], 16) for one in ids} <= {today - 1, today}
    assert len({one[:12] for one in ids}) == 200
    (after,) = conn.execute(time_of_day.encode()).fetchone() or ()
    assert {int(one[:3], 16) for one in ids} <= {before, after}
    for position in range(3, 28):
        assert len({one[position] for one in ids}) > 8, "every digit but those of the time varies"
