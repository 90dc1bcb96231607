"""The audit: what is recorded, of whom, and what it does not say; on and off, kept and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.errors import InsufficientPrivilege

from durable_cluster import (
    App,
    ConfigurationError,
    Context,
    Continuation,
    Handle,
    InputError,
    Settings,
    UnknownWorkflow,
    side_statements,
)
from durable_cluster.shards import maintenance, upkeep

Connection = psycopg.Connection[Any]


@pytest.fixture
def app(dsn: str, conn: Connection) -> Iterator[App]:
    """A workflow that waits, dies, or spawns, as its input says; the audit is on."""
    conn.execute("select durable.set_audit(true, 'the owner')")
    app = App("watched", dsn=dsn)
    machine = app.machine("flow", state=str)
    tokens = app.machine("token", state=str)
    child = app.machine("child", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, how: str) -> Continuation:
        if how == "die":
            raise InputError("secret payload")
        if how == "spawn":
            return ctx.gather([child.child(1), child.child(2)], then=end, state=how)
        return ctx.wait_for("go", then=end, state=how, timeout="1h")

    @machine.step()
    def end(ctx: Context, how: str) -> Continuation:
        return ctx.done(how)

    @tokens.step(start=True)
    def ask(ctx: Context, how: str) -> Continuation:
        return ctx.wait_for("go", then=answered, state=how, require_token=True)

    @tokens.step()
    def answered(ctx: Context, how: str) -> Continuation:
        return ctx.done(how)

    @child.step(start=True)
    def count(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    yield app
    app.close()


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    return row and row[0]


def recorded(conn: Connection, of: Handle | None = None) -> list[tuple[str, str | None, dict[str, Any]]]:
    """What, who and details, oldest first."""
    query = "select what, actor, details from durable.audit_list(%s, i_limit => 1000)"
    return list(reversed(conn.execute(query, (None if of is None else of.id,)).fetchall()))


def test_what_happens_to_a_workflow_is_recorded_with_who_did_it(app: App, conn: Connection) -> None:
    handle = app.named("flow").start("wait", attributes={"a": "private"})
    app.run(until_idle=True)
    handle.set_attributes({"b": "private", "c": None}, actor="bob")
    handle.signal("go", {"n": "private"}, actor="ada")
    app.run(until_idle=True)
    assert recorded(conn, handle) == [
        ("start", None, {"workflow": "flow"}),
        ("set_attributes", "bob", {"keys": ["b", "c"]}),
        ("signal", "ada", {"signal": "go"}),
        ("resume", None, {"signal": "go"}),
    ]
    assert "private" not in repr(conn.execute("select * from durable.audit").fetchall())


def test_a_signal_that_came_first_resumes_too(app: App, conn: Connection) -> None:
    handle = app.named("flow").start("wait")
    handle.signal("go")
    app.run(until_idle=True)
    assert [what for what, _, _ in recorded(conn, handle)] == ["start", "signal", "resume"]


def test_timeouts_cancels_children_and_dead_letters_are_recorded(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    machine = app.named("flow")
    late, cancelled, retried, purged = (machine.start(how) for how in ("wait", "wait", "die", "die"))
    parent = machine.start("spawn")
    app.run(until_idle=True)
    cancelled.cancel("no more", actor="ada")
    retried.retry()
    conn.execute("set durable.actor = 'carl'")
    conn.execute("select durable.purge_dead_letter(%s)", (purged.id,))
    app.run(until_idle=True)
    clock(7200)
    app.run(until_idle=True)
    assert recorded(conn, late)[1:] == [("timeout", None, {})]
    assert recorded(conn, cancelled)[1:] == [("cancel", "ada", {"reason": "no more"})]
    assert recorded(conn, retried)[1:] == [("retry", None, {"edited": False})]
    assert recorded(conn, purged)[1:] == [("purge", "carl", {})]
    assert recorded(conn, parent)[1:] == [("resume", None, {"children": True})]
    spawned = {child.id: recorded(conn, Handle(app.client, "child", child.id)) for child in parent.children()}
    assert list(spawned.values()) == [[("spawn", None, {"parent": parent.id[:12], "workflow": "child"})]] * 2


def test_many_starts_and_many_dead_letters_are_each_recorded(app: App, conn: Connection) -> None:
    handles = app.named("flow").start_many(["die"] * 3, keys=["a", "b", "c"])
    app.named("flow").start_many(["die"] * 3, keys=["a", "b", "c"])
    app.run(until_idle=True)
    assert one(conn, "select durable.retry_dead_letters()") == 3
    app.run(until_idle=True)
    assert one(conn, "select durable.purge_dead_letters()") == 3
    for handle in handles:
        assert [what for what, _, _ in recorded(conn, handle)] == ["start", "retry", "purge"]


def refusals(app: App, conn: Connection) -> dict[str, tuple[Handle, str | None]]:
    """Signals that are refused: whose, and with which token."""
    machine = app.named("token")
    handle, other, ended = machine.start("a"), machine.start("b"), app.named("flow").start("spawn")
    app.run(until_idle=True)
    token = one(conn, "select durable.token_of(%s, 1, (select secret from durable.secret))", handle.id)
    handle.signal("go", token=token)
    return {
        "used": (handle, token),
        "wrong": (other, token),
        "none": (other, None),
        "unknown": (Handle(app.client, "token", "0" * 32), None),
        "ended": (ended, None),
    }


@pytest.mark.parametrize("why", ["used", "wrong", "none", "unknown", "ended"])
def test_a_refused_signal_is_recorded_although_the_sender_gets_an_error(app: App, conn: Connection, why: str) -> None:
    handle, token = refusals(app, conn)[why]
    app.run(until_idle=True)
    with pytest.raises(UnknownWorkflow, match="no workflow takes signal 'go'"):
        handle.signal("go", "private", token=token, actor="mallory")
    refused = ("signal_refused", "mallory", {"signal": "go"})
    assert recorded(conn, handle)[-1] == refused
    assert token is None or token not in repr(conn.execute("select * from durable.audit").fetchall())


def test_a_refusal_within_a_transaction_stands_or_falls_with_it(app: App, dsn: str, conn: Connection) -> None:
    nobody = Handle(app.client, "token", "0" * 32)
    with psycopg.connect(dsn) as tx:
        with pytest.raises(UnknownWorkflow):
            nobody.signal("go", tx=tx)
        assert one(tx, "select 1") == 1, "the transaction is as good as it was"
        tx.rollback()
        assert recorded(conn, nobody) == []
        with pytest.raises(UnknownWorkflow):
            nobody.signal("go", tx=tx)
        tx.commit()
    assert len(recorded(conn, nobody)) == 1
    with pytest.raises(psycopg.Error, match="no workflow takes signal") as raised:
        conn.execute("select durable.signal(%s, 'go')", (nobody.id,))
    assert raised.value.sqlstate == "DC003"
    assert len(recorded(conn, nobody)) == 1, "what raises takes its row with it"


def test_a_row_is_matched_by_who_has_the_id_and_does_not_tell_it(app: App, conn: Connection, dsn: str) -> None:
    handle, other = app.named("flow").start("wait"), app.named("flow").start("wait")
    rows = conn.execute("select * from durable.audit_page(null, null, 0, 0, 100)").fetchall()
    assert handle.id not in repr(rows) and handle.id[:13] not in repr(rows)
    assert len(recorded(conn, handle)) == len(recorded(conn, other)) == 1
    near = Handle(app.client, "flow", f"{handle.id[:12]}{other.id[12:]}")
    assert recorded(conn, near) == [], "its first digits are another's, its hash is not"
    assert one(conn, "select count(*) from durable.audit_list(%s)", handle.id[:12]) == 1
    assert one(conn, "select count(*) from durable.audit_list(%s)", f"{handle.id[:12]}{other.id[12:20]}") == 1
    plain = one(conn, "select count(*) from durable.audit where id_hash = sha256(convert_to(%s, 'UTF8'))", handle.id)
    assert plain == 0


def test_the_role_is_the_session_s_and_nobody_writes_or_changes_rows(app: App, conn: Connection, dsn: str) -> None:
    conn.execute("do $$ begin create role an_auditee login; exception when duplicate_object then null; end $$")
    conn.execute("grant durable_client, durable_worker to an_auditee")
    with psycopg.connect(make_conninfo(dsn, user="an_auditee"), autocommit=True) as client:
        client.execute("set durable.actor = 'eve'")
        handle = app.named("flow").start("wait", tx=client)
        for denied in (
            "select durable.set_audit(false)",
            "select durable.record('start', array[gen_random_uuid()])",
            "insert into durable.audit (day, at, what, role, details) values (1, now(), 'x', 'x', '{}')",
            "delete from durable.audit",
            "update durable.audit set actor = 'ada'",
            "update durable.cluster set audit = false",
        ):
            with pytest.raises(InsufficientPrivilege):
                client.execute(denied)
    rows = conn.execute("select what, actor, role from durable.audit_list(%s)", (handle.id,)).fetchall()
    assert rows == [("start", "eve", "an_auditee")]


def test_it_is_off_at_first_and_both_ends_are_recorded(dsn: str, conn: Connection) -> None:
    def start() -> None:
        conn.execute("select durable.start('w', 1, 's', '1')")

    start()
    conn.execute("select durable.set_audit(true, 'ada')")
    start()
    conn.execute("select durable.set_audit(false, 'bob')")
    start()
    assert [(what, actor) for what, actor, _ in recorded(conn)] == [
        ("audit_on", "ada"),
        ("start", None),
        ("audit_off", "bob"),
    ]


def test_a_start_that_is_rolled_back_was_none(app: App, dsn: str, conn: Connection) -> None:
    with psycopg.connect(dsn) as tx:
        handle = app.named("flow").start("wait", tx=tx)
        tx.rollback()
    assert recorded(conn, handle) == []


def days(conn: Connection) -> list[int]:
    """Partitions of the audit, in days from today."""
    rows = conn.execute(
        "select substring(c.relname from '_([0-9]+)$')::int - durable.today() from pg_inherits i join pg_class c on"
        " c.oid = i.inhrelid where i.inhparent = 'durable.audit'::regclass and c.relname ~ '[0-9]$' order by 1"
    ).fetchall()
    return [day for (day,) in rows]


def test_days_are_made_ahead_and_dropped_once_they_are_too_old(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    settings = Settings(audit_days=10)
    assert days(conn) == list(range(15))
    first = app.named("flow").start("wait")
    conn.execute(
        "insert into durable.audit (day, at, what, role, details) values (durable.today() - 5, now(), 'x', 'x', '{}')"
    )
    clock(8 * 86_400)
    maintenance.run_once(conn, settings)
    assert days(conn) == list(range(-8, 15))
    assert not upkeep.needs_audit_upkeep(conn, days=10)
    assert len(recorded(conn, first)) == 1
    clock(10 * 86_400 + 86_399)
    while upkeep.needs_audit_upkeep(conn, days=10):
        maintenance.run_once(conn, settings)
    assert days(conn)[0] == -10
    assert days(conn)[-1] == 14
    assert recorded(conn, first) == []
    assert one(conn, "select count(*) from durable.audit_default") == 0


def test_days_of_the_past_go_also_while_it_is_off_and_no_new_ones_come(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    conn.execute("select durable.set_audit(false)")
    clock(40 * 86_400)
    while upkeep.needs_audit_upkeep(conn, days=10):
        maintenance.run_once(conn, Settings(audit_days=10))
    assert days(conn) == []


@pytest.mark.parametrize("value", [0, 36_501, 1.5])
def test_how_long_it_is_kept_is_whole_days(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"audit_days: .* choose 1 to 36500"):
        Settings(audit_days=value)


def test_what_it_is_told_is_one_short_line(app: App, conn: Connection) -> None:
    handle = app.named("flow").start("wait")
    for actor in ("", "a\nb", "x" * 256):
        with pytest.raises(InputError, match="the actor has 1 to 255 characters"):
            handle.set_attributes({"a": 1}, actor=actor)
    side_statements.set_attributes(conn, handle.id, '{"a":1}', actor="x" * 255)
