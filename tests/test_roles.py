"""Roles: default deny, and each role does its work through functions alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege

from durable_cluster import App, Context, Continuation, schedules, schema
from durable_cluster.consumer import Consumer
from durable_cluster.firing import Firing


@pytest.fixture
def app(dsn: str) -> App:
    app = App("echoing", dsn=dsn)
    machine = app.machine("echo", state=str)

    @machine.step(start=True)
    def echo(ctx: Context, text: str) -> Continuation:
        return ctx.done(text)

    return app


@contextmanager
def acting_as(dsn: str, role: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"set role {role}")
        yield connection


def test_a_client_starts_and_reads_by_id_and_nothing_else(app: App, dsn: str) -> None:
    with acting_as(dsn, "durable_client") as client:
        handle = app.named("echo").start("hi", tx=client)
        assert client.execute("select status from durable.state_of(%s)", (handle.id,)).fetchone() == ("running",)
        for denied in (
            "select * from durable.started",
            "select * from durable.list()",
            "select durable.abandon(1)",
            "select durable.claim(0, 'c', 1, 1, 1)",
            "select * from pgque.event_1",
            "select pgque.insert_event('durable_0', 'steps', '{}')",
            "select durable.append(0, '{}', 1)",
            "select durable.secret()",
            "select * from durable.secret",
            "select * from durable.mailbox",
            "select durable.deliver('', '', '', '', '')",
            "select * from durable.schedules()",
            "select durable.trigger_schedule('nightly')",
            "select durable.delete_schedule('nightly')",
            "select durable.maintain()",
        ):
            with pytest.raises(InsufficientPrivilege):
                client.execute(denied)
        client.execute("select durable.signal(%s, 'news')", (handle.id,))
        assert client.execute("select durable.cancel(%s)", (handle.id,)).fetchone() == (True,)


def test_a_worker_runs_steps_without_owning_a_table(app: App, dsn: str, conn: psycopg.Connection) -> None:
    handle = app.named("echo").start("hi")
    conn.execute("do $$ begin create role a_worker login; exception when duplicate_object then null; end $$")
    conn.execute("grant durable_worker to a_worker")
    shard = conn.execute(
        "select s.shard from durable.slot s where s.slot = durable.slot_of(%s)", (handle.id,)
    ).fetchone()
    assert shard is not None
    consumer = Consumer(make_conninfo(dsn, user="a_worker"), shard[0], app.machines, app.settings)
    try:
        assert consumer.work(lambda: False, lambda: None)
        assert handle.result(timeout=5) == "hi"
        assert not consumer.expects_work(0)
        with pytest.raises(InsufficientPrivilege):
            consumer.connection.execute("select * from durable.started")
    finally:
        consumer.close()


def test_a_viewer_sees_truncated_ids_and_no_payload(app: App, dsn: str) -> None:
    handle = app.named("echo").start("secret")
    with acting_as(dsn, "durable_viewer") as viewer:
        rows = viewer.execute("select * from durable.list()").fetchall()
        assert handle.id[:12] in str(rows)
        assert handle.id not in str(rows)
        assert "secret" not in str(rows)
        with pytest.raises(InsufficientPrivilege):
            viewer.execute("select * from durable.state_of(%s)", (handle.id,))


def test_an_operator_makes_and_runs_schedules_and_a_viewer_sees_them_and_neither_their_input(
    app: App, dsn: str
) -> None:
    with acting_as(dsn, "durable_operator") as operator:
        app.schedules.create("nightly", "0 3 * * *", "echo", "secret", tx=operator)
        assert app.schedules.trigger("nightly", tx=operator).outcome == "started"
        app.schedules.change("nightly", cron="0 4 * * *", tx=operator)
        app.schedules.pause("nightly", tx=operator)
        app.schedules.resume("nightly", tx=operator)
        begin, end = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC)
        assert app.schedules.backfill("nightly", begin, end, tx=operator) == 1
        for denied in (
            "select durable.schedule_input('nightly')",
            "select * from durable.schedule",
            "select durable.fire_schedule('nightly', 1, now(), '{}', now())",
            "select durable.maintain(30)",
        ):
            with pytest.raises(InsufficientPrivilege):
                operator.execute(denied)
    with acting_as(dsn, "durable_viewer") as viewer:
        rows = viewer.execute("select * from durable.schedules()").fetchall()
        assert "nightly" in str(rows)
        assert "secret" not in str(rows)
        for denied in ("select durable.pause_schedule('nightly')", "select durable.schedule_input('nightly')"):
            with pytest.raises(InsufficientPrivilege):
                viewer.execute(denied)
    with acting_as(dsn, "durable_operator") as operator:
        app.schedules.delete("nightly", tx=operator)
    app.close()


def test_a_worker_declares_fires_and_maintains(app: App, dsn: str, conn: psycopg.Connection) -> None:
    app.schedule("nightly", "0 3 * * *", "echo", "hi", catch_up=3, overlap="allow")
    with acting_as(dsn, "durable_worker") as worker:
        assert schedules.declare(app, worker) == []
        conn.execute(
            "update durable.schedule set next_due = next_due - interval '5 days', since = since - interval '9 days'"
        )
        assert worker.execute("select schedules_due from durable.maintain()").fetchone() == (1,)
        assert Firing().tend(worker, is_asked=True)
    assert app.schedules.get("nightly").fired == 3
    app.close()


def test_an_installer_that_may_not_create_roles_installs_without_them(
    new_database: Callable[[str | None], str], conn: psycopg.Connection
) -> None:
    conn.execute("do $$ begin create role an_installer login; exception when duplicate_object then null; end $$")
    dsn = new_database(None)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(
            "do $$ begin execute format('grant create on database %I to an_installer', current_database()); end $$"
        )
    with psycopg.connect(make_conninfo(dsn, user="an_installer"), autocommit=True) as installer:
        schema.install(installer, shards=1, with_roles=False)
        assert schema.demand_installed(installer) == 1
