"""READ COMMITTED is demanded where an older snapshot would deliver twice; starting works at every level."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import IsolationLevel

from durable_cluster import App, ConfigurationError, Context, Continuation, Machine, statements
from durable_cluster.errors import DurableError

OLDER = [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE]
CURSOR = "(0,0,0)"
REFUSED: dict[str, Callable[[psycopg.Connection], object]] = {
    "claim": lambda tx: statements.claim(tx, 0, member="m", owner=1, lines_max=10, bytes_max=1000),
    "fence": lambda tx: statements.fence(tx, batch=1, owner=1, done=CURSOR),
    "commit of a plain page": lambda tx: statements.commit_page(
        tx, is_fenced=False, shard=0, batch=1, owner=1, done=CURSOR, next_cursor=CURSOR, is_last=True,
        steps="", counts=[], outcomes=[],
    ),
    "tick of an idle shard": lambda tx: tx.execute("select durable.tick_idle(0)"),
    "tick": lambda tx: tx.execute("select pgque.ticker('durable_0', 2, now(), 0)"),
    "next batch": lambda tx: tx.execute("select pgque.next_batch('durable_0', 'durable_0', 'm')"),
    "fire of a schedule": lambda tx: tx.execute("select durable.fire_schedule('x', 1, now(), '{}', now())"),
    "start of what is queued": lambda tx: tx.execute("select durable.start_queued()"),
    "maintenance by hand": lambda tx: tx.execute("select durable.maintain()"),
    "rotation": lambda tx: tx.execute("select pgque.maint_rotate_tables_step1('durable_0')"),
}  # fmt: skip


@pytest.fixture
def machine(dsn: str) -> Machine:
    machine = App("levels", dsn=dsn).machine("one", state=int)

    @machine.step(start=True)
    def only(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    return machine


@pytest.mark.parametrize("level", OLDER, ids=lambda level: level.name)
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_the_newest_commits_is_refused_under_an_older_snapshot_and_says_what_to_do(
    dsn: str, conn: psycopg.Connection, call: Callable[[psycopg.Connection], object], level: IsolationLevel
) -> None:
    statements.join_shard(conn, 0, "m")
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        with pytest.raises((DurableError, psycopg.Error), match=f"(?s)READ COMMITTED.*{level.name.replace('_', ' ')}"):
            call(tx)
    assert conn.execute("select count(*) from durable.win").fetchone() == (0,)


@pytest.mark.parametrize("level", OLDER, ids=lambda level: level.name)
def test_our_own_refusals_are_errors_of_our_own(dsn: str, conn: psycopg.Connection, level: IsolationLevel) -> None:
    statements.join_shard(conn, 0, "m")
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        with pytest.raises(ConfigurationError, match="READ COMMITTED"):
            REFUSED["claim"](tx)


@pytest.mark.parametrize("level", [*OLDER, IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED])
def test_workflows_start_at_every_level(dsn: str, machine: Machine, level: IsolationLevel) -> None:
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        one = machine.start(1, key="one", tx=tx)
        many = machine.start_many([2, 3], keys=["two", "one"], tx=tx)
    assert many[1].id == one.id
    machine.app.run(until_idle=True)
    assert [handle.result(timeout=5) for handle in (one, *many)] == [1, 2, 1]


@pytest.mark.parametrize("level", OLDER, ids=lambda level: level.name)
def test_a_key_taken_since_the_snapshot_is_a_serialization_failure_and_no_second_workflow(
    dsn: str, conn: psycopg.Connection, machine: Machine, level: IsolationLevel
) -> None:
    with psycopg.connect(dsn) as tx:
        tx.isolation_level = level
        tx.execute("select 1")
        first = machine.start(1, key="one")
        with pytest.raises(psycopg.errors.SerializationFailure):
            machine.start(2, key="one", tx=tx)
        tx.rollback()
        assert machine.start(2, key="one", tx=tx).id == first.id
    assert conn.execute("select count(*) from durable.started").fetchone() == (1,)


def test_workflows_run_in_a_database_whose_sessions_default_to_serializable(
    dsn: str, conn: psycopg.Connection, machine: Machine
) -> None:
    (name,) = conn.execute("select current_database()").fetchone() or ()
    conn.execute(f"alter database {name} set default_transaction_isolation = 'serializable'")
    handle = machine.start(1)
    machine.app.run(until_idle=True)
    assert handle.result(timeout=5) == 1
