"""Finding workflows: every filter, pages that lose nobody, and no answer that gives an id away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Handle, InputError, TerminalError

Connection = psycopg.Connection[Any]


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    app = App("found", dsn=dsn)
    machine = app.machine("flow", state=str)

    @machine.step(start=True)
    def begin(ctx: Context, how: str) -> Continuation:
        if how == "fail":
            raise TerminalError("no luck")
        if how == "stuck":
            raise InputError("never")
        if how == "wait":
            return ctx.wait_for("go", then=begin, state="pass")
        if how == "spawn":
            return ctx.spawn([other.child(n) for n in range(3)], then=begin, state="pass")
        return ctx.done(how)

    other = app.machine("other", state=int)

    @other.step(start=True)
    def number(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    yield app
    app.close()


@pytest.fixture
def handles(app: App) -> dict[str, Handle]:
    """One workflow of each status, by how it came there."""
    made = {how: app.named("flow").start(how, attributes={"how": how}) for how in ("wait", "stuck", "pass", "fail")}
    made["cancel"] = app.named("flow").start("wait", key="c", attributes={"how": "cancel", "n": 1})
    app.run(until_idle=True)
    made["cancel"].cancel()
    app.run(until_idle=True)
    return made


def found(app: App, **which: Any) -> set[str]:
    return {one.id for one in app.list(**which)}


def short(*handles: Handle) -> set[str]:
    return {handle.id[:12] for handle in handles}


def test_each_filter_finds_its_workflows_and_no_other(app: App, handles: dict[str, Handle]) -> None:
    for status, how in (
        ("running", "wait"),
        ("stuck", "stuck"),
        ("completed", "pass"),
        ("failed", "fail"),
        ("cancelled", "cancel"),
    ):
        assert found(app, status=status) == short(handles[how])
        assert found(app, attributes={"how": how}) == short(handles[how])
        assert [one.status for one in app.list(status=status)] == [status]
    assert found(app, workflow="flow") == short(*handles.values())
    assert found(app, workflow="other") == set()
    assert found(app, key="c") == found(app, key="c", workflow="flow") == short(handles["cancel"])
    assert found(app, key="d") == found(app, key="c", workflow="other") == set()
    assert found(app, attributes={"how": "cancel", "n": 1}, status="cancelled") == short(handles["cancel"])
    assert found(app, attributes={"how": "cancel", "n": "1"}) == set()


def test_the_newest_come_first_with_what_there_is_to_know(app: App, handles: dict[str, Handle]) -> None:
    listed = app.list()
    assert [one.id for one in listed] == [handle.id[:12] for handle in reversed(handles.values())]
    assert listed[0].attributes == {"how": "cancel", "n": 1}
    assert (listed[0].key, listed[0].parent, listed[0].version) == ("c", None, 1)
    assert listed[0].finished_at is not None and listed[-1].finished_at is None


def test_children_are_found_by_the_first_digits_of_their_parent(app: App, handles: dict[str, Handle]) -> None:
    parent = app.named("flow").start("spawn")
    app.run(until_idle=True)
    children = short(*(Handle(app.client, "other", child.id) for child in parent.children()))
    assert len(children) == 3
    for digits in (parent.id, parent.id[:12], parent.id[:12].upper()):
        assert found(app, parent=digits) == children
    assert {one.parent for one in app.list(parent=parent.id)} == {parent.id[:12]}
    assert found(app, parent=handles["pass"].id) == set()


def test_a_list_has_a_beginning_and_an_end_in_time(app: App, conn: Connection, clock: Callable[[float], None]) -> None:
    started = []
    for day in range(3):
        clock(day * 86_400)
        started.append(app.named("flow").start("pass"))
    at = [one.started_at for one in reversed(app.list())]
    assert found(app, started_from=at[1]) == short(*started[1:])
    assert found(app, started_to=at[1]) == short(started[0])
    assert found(app, started_from=at[1], started_to=at[2]) == short(started[1])
    assert found(app, started_from=datetime.now(UTC) + timedelta(days=9)) == set()
    with pytest.raises(InputError, match="no time with a time zone"):
        app.list(started_from=datetime(2030, 1, 1))


def test_pages_of_workflows_that_share_a_moment_lose_none_and_repeat_none(app: App, conn: Connection) -> None:
    handles = app.named("flow").start_many(["pass"] * 20)
    conn.execute("update durable.started set at = to_timestamp(day * 86400.0 + 0.123456)")
    listed: list[str] = []
    after = None
    while page := app.list(limit=3, after=after):
        assert len(page) == 3 or len(listed) == 18
        listed += [one.id for one in page]
        after = page[-1].cursor
    assert len(listed) == 20
    assert set(listed) == short(*handles)


def test_those_of_one_moment_and_one_short_id_come_on_one_page(app: App, conn: Connection) -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    for n in range(5):
        conn.execute(
            "insert into durable.started (id, day, workflow, version, input, at)"
            " values (%s::uuid, durable.day_of(%s::uuid), 'flow', 1, '1', %s)",
            (f"{'a' * 12}{n:020x}", f"{'a' * 12}{n:020x}", at),
        )
    page = app.list(limit=2)
    assert [one.id for one in page] == ["a" * 12] * 5
    assert app.list(limit=2, after=page[-1].cursor) == []


def test_neither_a_cursor_nor_a_filter_compares_more_than_twelve_digits(app: App, conn: Connection) -> None:
    """Else a viewer finds a whole id, digit by digit, by whether a row is there."""
    parent = app.named("flow").start("spawn")
    app.run(until_idle=True)
    digits = parent.id
    wrong = digits[:12] + "".join("1" if digit == "0" else "0" for digit in digits[12:])
    assert found(app, parent=wrong) == found(app, parent=digits)
    cursor = app.list(workflow="flow")[0].cursor
    assert cursor.endswith(f"-{digits[:12]}")
    with pytest.raises(InputError, match="no cursor of a list"):
        app.list(after=f"{cursor}{digits[12:]}")
    assert digits not in repr(app.list()) and digits not in repr(app.list(parent=digits))


@pytest.mark.parametrize("after", ["", "x", "-", "1-2", "1-" + "g" * 12, "f" * 15 + "-" + "0" * 12])
def test_a_cursor_that_is_none_is_refused(app: App, after: str) -> None:
    with pytest.raises(InputError, match="no cursor of a list"):
        app.list(after=after)


def test_what_cannot_be_asked_is_refused(app: App) -> None:
    for limit in (0, -1, 10_001):
        with pytest.raises(InputError, match=r"limit of .* is out of range"):
            app.list(limit=limit)
    with pytest.raises(InputError, match="a status is running"):
        app.list(status="asleep")
    with pytest.raises(InputError, match="up to 32 hex digits"):
        app.list(parent="x")
    with pytest.raises(InputError, match="a name is of"):
        app.list(attributes={"a b": 1})


def test_a_viewer_lists_and_a_client_does_not(app: App, dsn: str, handles: dict[str, Handle]) -> None:
    with psycopg.connect(dsn, autocommit=True) as viewer:
        viewer.execute("set role durable_viewer")
        query = 'select id, attributes from durable.list(i_attributes => \'{"how": "pass"}\')'
        assert viewer.execute(query).fetchall() == [(handles["pass"].id[:12], {"how": "pass"})]
        for denied in ("select durable.attributes_of(%s)", "select * from durable.progress_of(%s)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                viewer.execute(denied, (handles["pass"].id,))
        viewer.execute("reset role; set role durable_client")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            viewer.execute("select * from durable.list()")
        assert viewer.execute("select durable.attributes_of(%s)", (handles["pass"].id,)).fetchone() == (
            {"how": "pass"},
        )


def plan_of(conn: Connection, **which: str) -> str:
    """The plan of a list's inner query."""
    names = ("workflow", "status", "after", "attributes", "from", "to", "parent", "key", "origin")
    asked = {name: which.get(name) for name in names}
    query = conn.execute(
        "select durable.list_query(%(workflow)s, %(status)s, %(after)s, %(attributes)s::jsonb, %(from)s::timestamptz,"
        " %(to)s::timestamptz, %(parent)s, %(key)s, %(origin)s)",
        asked,
    ).fetchone()
    assert query is not None
    values = [which.get("workflow"), "50", which.get("after"), which.get("attributes"), None, None, which.get("parent")]
    text = query[0]
    for number, value in [(9, which.get("status")), (8, which.get("key")), *reversed(list(enumerate(values, 1)))]:
        text = text.replace(f"${number}", "null" if value is None else f"'{value}'")
    rows = conn.execute(f"explain (format json) {text}".encode()).fetchone()
    assert rows is not None
    return json.dumps(rows[0])


def test_filters_are_served_by_indexes(app: App, conn: Connection) -> None:
    conn.execute("set search_path = pg_catalog, durable, pg_temp")
    conn.execute(
        "insert into durable.started (id, day, workflow, version, input, key, at)"
        " select i, durable.day_of(i), 'flow', 1, '1', 'k' || n, now() - n * interval '1 second'"
        " from (select n, durable.new_id() i from generate_series(1, 20000) n) q"
    )
    conn.execute("insert into durable.key select workflow, key, id from durable.started")
    conn.execute(
        "insert into durable.attribute select id, jsonb_build_object('n', version, 'key', key) from durable.started"
    )
    conn.execute(
        "insert into durable.finished (id, day, status, output, at) select id, day,"
        " case when key like '%0000' then 'failed' else 'completed' end, '1', at from durable.started"
    )
    conn.execute("analyze durable.started, durable.finished, durable.attribute, durable.key")
    assert "attribute_attributes_idx" in plan_of(conn, attributes='{"key": "k77"}')
    assert "_status_at_idx" in plan_of(conn, status="failed")
    assert "key_pkey" in plan_of(conn, workflow="flow", key="k77")
    assert "_parent_" in plan_of(conn, parent="abcdef")
    newest = plan_of(conn)
    assert "_at_idx" in newest and "Seq Scan" not in newest


def test_those_that_run_are_found_however_long_ago_they_started(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    started: list[Handle] = []
    for hours in (0, 0, 1, 9, 60, 61, 300):
        clock(hours * 3_600)
        started.append(app.named("flow").start("wait"))
        app.named("flow").start("pass")
    app.run(until_idle=True)
    newest_first = [handle.id[:12] for handle in reversed(started)]
    assert [one.id for one in app.list(status="running")] == newest_first
    listed: list[str] = []
    after = None
    while page := app.list(status="running", limit=2, after=after):
        listed += [one.id for one in page]
        after = page[-1].cursor
    assert listed == newest_first
    begin = app.list(status="running")[3].started_at
    assert [one.id for one in app.list(status="running", started_from=begin)] == newest_first[:4]
    assert [one.id for one in app.list(status="running", started_to=begin)] == newest_first[4:]
