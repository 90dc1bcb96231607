"""Attributes: set at the start, with a step's handoff or by a client; as transactional as what they come with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    Context,
    Continuation,
    Handle,
    InputError,
    Retry,
    UnknownWorkflow,
    noting,
    side_statements,
)
from durable_cluster.envelope import Envelope
from durable_cluster.notes import SETTING, Setting

Connection = psycopg.Connection[Any]


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    """Each step sets what its input says for it: a list of changes, one a step."""
    app = App("marked", dsn=dsn)
    plain = app.machine("plain", state=list)

    @plain.step(start=True, retry=Retry(attempts=2, backoff=0, jitter=0))
    def mark(ctx: Context, changes: list[Any]) -> Continuation:
        return said(ctx, changes, mark)

    beside = app.machine("beside", state=list)

    @beside.step(start=True)
    async def mark_beside(ctx: Context, changes: list[Any]) -> Continuation:
        return said(ctx, changes, mark_beside)

    transactional = app.machine("transactional", state=list)

    @transactional.step(start=True, transactional=True)
    def mark_within(ctx: Context, changes: list[Any]) -> Continuation:
        ctx.tx.execute("insert into noted values (%s)", (len(changes),))
        return said(ctx, changes, mark_within)

    waiting = app.machine("waiting", state=dict)

    @waiting.step(start=True)
    def wait(ctx: Context, change: dict[str, Any]) -> Continuation:
        ctx.set_attributes(change)
        return ctx.wait_for("go", then=end, state=change)

    @waiting.step()
    def end(ctx: Context, change: dict[str, Any]) -> Continuation:
        return ctx.done()

    yield app
    app.close()


def said(ctx: Context, changes: list[Any], then: Callable[..., Any]) -> Continuation:
    if not changes:
        return ctx.done()
    change, *rest = changes
    if change == "raise":
        ctx.set_attributes({"failed": True})
        raise RuntimeError("not yet") if ctx.attempt == 1 else KeyError("never")
    ctx.set_attributes(change)
    return ctx.goto(then, rest)


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    return row and row[0]


def test_attributes_of_a_start_are_there_with_it_and_null_leaves_none(app: App, conn: Connection) -> None:
    machine = app.named("plain")
    handle = machine.start([], attributes={"customer": "ada", "total": 12.5, "paid": True, "none": None})
    assert handle.attributes() == {"customer": "ada", "total": 12.5, "paid": True}
    assert machine.start([]).attributes() == {}
    assert machine.start([], attributes={"none": None}).attributes() == {}
    assert one(conn, "select count(*) from durable.attribute") == 1


def test_many_starts_have_attributes_of_their_own_or_the_same(app: App, conn: Connection) -> None:
    machine = app.named("plain")
    own = machine.start_many([[], [], []], attributes=[{"n": 0}, None, {"n": 2}])
    assert [handle.attributes() for handle in own] == [{"n": 0}, {}, {"n": 2}]
    same = machine.start_many([[], []], attributes={"n": "same"})
    assert [handle.attributes() for handle in same] == [{"n": "same"}] * 2
    with pytest.raises(InputError, match="1 attributes for 2 values"):
        machine.start_many([[], []], attributes=[{"n": 0}])
    with pytest.raises(psycopg.Error, match="2 attributes for 3 inputs"):
        conn.execute("select durable.start_many('w', 1, 's', E'1\n2\n3', i_attributes => E'{}\n{}')")


def test_children_have_the_attributes_that_they_are_spawned_with(app: App) -> None:
    plain, parent = app.named("plain"), app.machine("parent", state=int)

    @parent.step(start=True)
    def spawn(ctx: Context, n: int) -> Continuation:
        children = [plain.child([], attributes={"n": n, "gone": None}), plain.child([]), plain.child([], attributes={})]
        return ctx.gather(
            [*children, plain.child([{"said": 1}], after="0s", attributes={"n": "last"})], then=end, state=n
        )

    @parent.step()
    def end(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    handle, alone = parent.start(7), parent.start(8)
    app.run(until_idle=True)
    for of, n in ((handle, 7), (alone, 8)):
        found = [plain_handle(app, child.id).attributes() for child in of.children()]
        assert found == [{"n": n}, {}, {}, {"n": "last", "said": 1}]
    assert len(app.list("plain", attributes={"n": 7})) == 1
    with pytest.raises(InputError, match="attributes are a mapping"):
        plain.child([], attributes=[("n", 1)])  # type: ignore[arg-type]


def plain_handle(app: App, workflow_id: str) -> Handle:
    return Handle(app.client, "plain", workflow_id)


def test_a_start_with_a_known_key_changes_nothing(app: App) -> None:
    machine = app.named("plain")
    first = machine.start([], key="k", attributes={"n": 1})
    again = machine.start([], key="k", attributes={"n": 2, "m": 2})
    (many,) = machine.start_many([[]], keys=["k"], attributes={"n": 3})
    assert first.id == again.id == many.id
    assert first.attributes() == {"n": 1}


@pytest.mark.parametrize("workflow", ["plain", "beside", "transactional"])
def test_steps_change_attributes_with_their_handoff(app: App, conn: Connection, workflow: str) -> None:
    conn.execute("create table noted (n int)")
    changes = [{"a": 1, "b": "x"}, {"b": None, "c": False}, {"a": 2}]
    handle = app.named(workflow).start(changes, attributes={"z": 0})
    app.run(until_idle=True)
    assert handle.status() == "completed"
    assert handle.attributes() == {"z": 0, "a": 2, "c": False}


def test_an_attempt_that_fails_changes_nothing(app: App) -> None:
    handle = app.named("plain").start([{"a": 1}, "raise"])
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    assert handle.attributes() == {"a": 1}


def test_a_page_that_rolls_back_writes_nothing(app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = app.named("waiting").start({"a": 1})
    seen: list[Any] = []

    def refused(tx: Connection, waiting: Any) -> None:
        seen.append(one(tx, "select attributes from durable.attribute"))
        raise KeyboardInterrupt

    monkeypatch.setattr(side_statements, "await_signals", refused)
    with pytest.raises(KeyboardInterrupt):
        app.run(until_idle=True)
    assert seen == [{"a": 1}]
    assert handle.attributes() == {}
    monkeypatch.undo()
    conn.execute("select durable.abandon(owner) from durable.win")
    app.run(until_idle=True)
    assert handle.attributes() == {"a": 1}


@pytest.mark.parametrize("workflow", ["plain", "beside", "transactional"])
def test_a_step_that_would_set_too_many_is_a_dead_letter_and_its_neighbours_go_on(
    app: App, conn: Connection, workflow: str
) -> None:
    conn.execute("create table noted (n int)")
    full = {f"n{n}": n for n in range(30)}
    handles = [app.named(workflow).start([{"a": 1, "b": 2, "c": n}], attributes=full) for n in range(3)]
    fitting = [app.named(workflow).start([{"a": n, "b": 2, "n0": None}], attributes=full) for n in range(3)]
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"stuck"}
    assert [handle.attributes() for handle in handles] == [full] * 3
    assert "more than 32 attributes" in one(conn, "select details from durable.dead_letter limit 1")
    assert {handle.status() for handle in fitting} == {"completed"}
    assert fitting[2].attributes()["a"] == 2
    if workflow == "transactional":
        assert one(conn, "select count(*) from noted where n = 1") == 3, "what the refused wrote is rolled back"


def test_a_client_changes_attributes_of_who_waits_and_of_who_has_ended(app: App) -> None:
    waiting, ended = app.named("waiting").start({"a": 1, "b": 1}), app.named("plain").start([])
    app.run(until_idle=True)
    waiting.set_attributes({"b": None, "c": "x"}, actor="ada")
    waiting.set_attributes({"c": "y", "d": 2.5})
    ended.set_attributes({"reviewed": True})
    app.run(until_idle=True)
    assert waiting.attributes() == {"a": 1, "c": "y", "d": 2.5}
    assert ended.attributes() == {"reviewed": True}
    assert (waiting.status(), ended.status()) == ("running", "completed")


def test_a_client_s_change_is_sent_with_its_transaction_and_holds_up_no_page(
    app: App, dsn: str, conn: Connection
) -> None:
    handle = app.named("waiting").start({"a": 1}, attributes={"z": 1})
    conn.execute("set lock_timeout = '2s'")
    with psycopg.connect(dsn) as tx:
        handle.set_attributes({"a": 2}, tx=tx)
        assert side_statements.merge_attributes(conn, {handle.id: '{"y":1}'}) == set()
        app.run(until_idle=True)
        assert handle.attributes() == {"a": 1, "y": 1, "z": 1}
        tx.rollback()
        app.run(until_idle=True)
        handle.set_attributes({"a": 3}, tx=tx)
    app.run(until_idle=True)
    assert handle.attributes() == {"a": 3, "y": 1, "z": 1}


def test_a_client_s_change_that_is_too_much_by_the_time_it_arrives_is_dropped(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    handle = app.named("plain").start([], attributes={f"n{n}": n for n in range(31)})
    for name in ("a", "b"):
        handle.set_attributes({name: 1})
        if name == "a":
            app.run(until_idle=True)
            with pytest.raises(InputError, match="would have more than 32"):
                handle.set_attributes({"b": 1})
            handle.set_attributes({"n0": None})
            app.run(until_idle=True)
    handle.set_attributes({"c": 1, "n1": None})
    app.run(until_idle=True)
    assert len(handle.attributes()) == 32
    assert "were dropped" not in caplog.text


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"a b": 1}, "a name is of"),
        ({"": 1}, "a name is of"),
        ({"x" * 58: 1}, "a name is of"),
        ({"a": [1]}, "no text, number"),
        ({"a": {}}, "no text, number"),
        ({"a": float("nan")}, "no text, number"),
        ({"a": 10**301}, "no text, number"),
        ({"a": "\x00"}, "no text, number"),
        ({"a": "\ud800"}, "no text, number"),
        ({f"n{n}": n for n in range(33)}, "33 attributes are too many"),
        ({"a": "x" * 4_096}, "the limit is 4,096"),
        ([1], "a mapping"),
    ],
)
def test_what_is_no_attribute_is_refused_before_anything_is_written(
    app: App, conn: Connection, attributes: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        app.named("plain").start([], attributes=attributes)
    assert one(conn, "select count(*) from durable.started") == 0


@pytest.mark.parametrize(
    "attributes",
    [
        "[]",
        "null",
        "1",
        '{"a b":1}',
        '{"a":[]}',
        '{"a":"\\u0000"}',
        '{"a":1e999999}',
        '{"a":1e300}',
        "{",
        '{"a":1e-5000}',
    ],
)
def test_the_database_refuses_them_too(conn: Connection, attributes: str) -> None:
    known = one(conn, "select id from durable.start('w', 1, 's', '1')")
    for query, parameters in (
        ("select durable.start('w', 1, 's', '1', i_attributes => %s)", (attributes,)),
        ("select durable.start_many('w', 1, 's', '1', i_attributes => %s)", (attributes,)),
        ("select durable.set_attributes(%s, %s)", (known, attributes)),
    ):
        with pytest.raises(psycopg.Error, match="attributes") as refused:
            conn.execute(query, parameters)
        assert refused.value.sqlstate == "DC002"


def test_an_unknown_workflow_takes_none_and_a_line_by_hand_leaves_none(app: App, conn: Connection) -> None:
    with pytest.raises(UnknownWorkflow, match="no workflow with the id 000000000000…"):
        Handle(app.client, "plain", "0" * 32).set_attributes({"a": 1})
    for state in ('{"a":1}', '{"a":[1]}', '{"a b":1}', "1", '{"a":"\\u0000"}'):
        for workflow_id in ("0" * 32, "x" * 32):
            line = f'{{"w":"{workflow_id}","n":1,"f":"@attributes","s":"set","v":0,"d":{state}}}'
            conn.execute("select durable.append(0, %s, 1)", (line,))
    handle = app.named("plain").start([{"a": 1}])
    app.run(until_idle=True)
    assert handle.attributes() == {"a": 1}
    assert one(conn, "select count(*) from durable.attribute") == 1


@pytest.mark.parametrize("has_row", [True, False])
def test_two_pages_that_change_one_workflow_lose_neither_change(
    app: App, dsn: str, conn: Connection, eventually: Callable[..., None], has_row: bool
) -> None:
    handle = app.named("plain").start([], attributes={"a": 0, "z": 0} if has_row else None)
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor(1) as pool:
        side_statements.merge_attributes(first, {handle.id: '{"a":1,"b":1}'})
        acting = pool.submit(side_statements.merge_attributes, second, {handle.id: '{"b":null,"c":2}'})
        eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", second.info.backend_pid))
        first.commit()
        acting.result(timeout=10)
        second.commit()
    assert handle.attributes() == {"a": 1, "c": 2} | ({"z": 0} if has_row else {})


def test_changes_of_one_page_count_in_their_order(app: App, conn: Connection) -> None:
    handle = app.named("plain").start([])
    changes = [b'{"a":1,"b":1}', b'{"a":null}', b'{"b":2}']
    slots: list[Any] = [
        Setting(
            Envelope(handle.id, 1, SETTING, "set", 0, msgspec.Raw(change)),
            msgspec.json.decode(change, type=dict[str, msgspec.Raw]),
        )
        for change in changes
    ]
    assert noting.write(conn, slots) == {}
    assert slots == [None] * 3
    assert handle.attributes() == {"b": 2}


def test_a_page_without_attributes_does_not_ask_for_them(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = app.machine("without", state=int)

    @plain.step(start=True)
    def pass_(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    monkeypatch.setattr(side_statements, "merge_attributes", None)
    monkeypatch.setattr(side_statements, "publish", None)
    handle = plain.start(1)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 1


def test_retention_forgets_attributes_and_progress_of_workflows_that_are_gone(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    gone, alive = app.named("plain").start([{"a": 1}]), app.named("waiting").start({"a": 2})
    app.run(until_idle=True)
    side_statements.publish(conn, {gone.id: "1", alive.id: "2"})
    clock(40 * 86_400)
    while one(conn, "select durable.expire(30)"):
        pass
    assert conn.execute("select attributes from durable.attribute").fetchall() == [({"a": 2},)]
    assert conn.execute("select progress from durable.progress").fetchall() == [("2",)]
