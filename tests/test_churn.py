"""Append-only: a step updates and deletes nothing; control rows change by the page, not by the step."""

from __future__ import annotations

import time

import psycopg
import pytest

from durable_cluster import App, Context, Continuation

STEPS = 10
WORKFLOWS = 1000
APPENDED = ("durable.started", "durable.finished", "durable.key", "pgque.event", "pgque.tick")


@pytest.fixture
def app(dsn: str) -> App:
    app = App("churn", dsn=dsn)
    machine = app.machine("chain", state=int)

    @machine.step(start=True)
    def link(ctx: Context, n: int) -> Continuation:
        return ctx.goto(link, n + 1) if n < STEPS else ctx.done(n)

    return app


def row_changes(conn: psycopg.Connection) -> dict[str, int]:
    """Rows updated or deleted so far in each table of ours, without zeros."""
    conn.execute("select pg_stat_clear_snapshot()")
    rows = conn.execute("select relation, updated + deleted from durable.row_changes()").fetchall()
    return {relation: changed for relation, changed in rows if changed}


def flushed(conn: psycopg.Connection) -> None:
    """Statistics of the consumers' sessions are all in: a session hands them over before it leaves the list; and this one's."""
    consumers = "select from pg_stat_activity where datname = current_database() and application_name like '% shard %'"
    deadline = time.monotonic() + 10
    while conn.execute(consumers).fetchone() is not None:
        assert time.monotonic() < deadline, "a consumer's session does not end"
        time.sleep(0.005)
    conn.execute("select pg_stat_force_next_flush()")
    conn.execute("select 1")


def test_pages_of_a_thousand_steps_change_one_row_in_a_hundred_steps_at_most(
    app: App, conn: psycopg.Connection
) -> None:
    app.named("chain").start_many([1] * WORKFLOWS)
    flushed(conn)
    before = sum(row_changes(conn).values())
    steps = app.run(until_idle=True)
    flushed(conn)
    changes = row_changes(conn)
    assert steps == WORKFLOWS * STEPS
    assert (sum(changes.values()) - before) / steps <= 0.01, changes


def test_lifecycle_rows_keys_and_the_log_are_never_updated_and_never_deleted(
    app: App, conn: psycopg.Connection
) -> None:
    machine = app.named("chain")
    machine.start_many([1] * 100, keys=[f"key {n}" for n in range(100)])
    machine.start(1, key="key 1")
    app.run(until_idle=True)
    flushed(conn)
    assert [name for name in row_changes(conn) if name.startswith(APPENDED)] == []


def test_pages_of_transactional_steps_change_rows_by_the_group(dsn: str, conn: psycopg.Connection) -> None:
    app = App("groups", dsn=dsn)
    machine = app.machine("chain", state=int)

    @machine.step(start=True, transactional=True)
    def link(ctx: Context, n: int) -> Continuation:
        return ctx.goto(link, n + 1) if n < STEPS else ctx.done(n)

    machine.start_many([1] * WORKFLOWS)
    steps = app.run(until_idle=True)
    flushed(conn)
    assert steps == WORKFLOWS * STEPS
    assert (
        sum(row_changes(conn).values()) / steps <= 0.05
    )  # groups of a hundred steps; half of them at the edges of shards


def test_a_lone_step_changes_a_handful_of_rows_of_a_fixed_set_of_tables(app: App, conn: psycopg.Connection) -> None:
    app.run(until_idle=True)
    flushed(conn)
    before = row_changes(conn)
    app.named("chain").start(1)
    steps = app.run(until_idle=True)
    flushed(conn)
    after = row_changes(conn)
    changed = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    assert steps == STEPS
    assert not [name for name in changed if name.startswith(APPENDED)]
    assert sum(changed.values()) <= 3 * STEPS, changed
