"""Children and joins: started with their parent's step, counted once, read by the step that they resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    AppError,
    ChildFailed,
    Context,
    Continuation,
    Handle,
    InputError,
    Retry,
    Settings,
    coordination,
    side_statements,
    statements,
)
from durable_cluster.envelope import Envelope, encode
from durable_cluster.joins import CHILDREN_MAX, Child, Joining, Spawning
from durable_cluster.signals import Cancel, Delivery

Connection = psycopg.Connection[Any]


def application(dsn: str) -> App:
    """A parent that does as its input says, and children that end as theirs says: a number, 'fail', 'wait' or 'die'."""
    app = App("families", dsn=dsn, settings=Settings(page_window_ms=60_000))
    child = app.machine("child", state=dict)
    parent = app.machine("parent", state=dict)

    @child.step(start=True, retry=Retry(attempts=1))
    def act(ctx: Context, options: dict[str, Any]) -> Continuation:
        if options["does"] == "fail":
            return ctx.fail("as told")
        if options["does"] == "die":
            raise RuntimeError("dead")
        if options["does"] == "wait":
            return ctx.wait_for("go", then=go, state=options)
        if options["does"] == "spawn":
            return ctx.gather([child.child({"does": "wait"})], then=go, state=options)
        return ctx.done(options["does"])

    @child.step()
    def go(ctx: Context, options: dict[str, Any]) -> Continuation:
        return ctx.done(None if ctx.signal is None else ctx.signal.payload)

    @parent.step(start=True)
    def fan(ctx: Context, options: dict[str, Any]) -> Continuation:
        waves = options.get("waves", [])
        if waves:
            children = [child.child({"does": does}) for does in waves[0]]
            return ctx.spawn(children, then=fan, state={**options, "waves": waves[1:]})
        children = [child.child({"does": does}, after=options.get("after")) for does in options.get("children", [])]
        more = {key: options[key] for key in ("timeout", "cancel_rest") if key in options}
        if "timeout" in options:
            more["on_timeout"] = late if options.get("has_late") else None
        if "at_least" in options:
            return ctx.at_least(options["at_least"], children, then=collect, state=options, **more)
        if "tolerance" in options:
            return ctx.gather(children, then=collect, state=options, tolerance=options["tolerance"], **more)
        how = ctx.first if options.get("first") else ctx.gather
        return how(children, then=collect, state=options, **more)

    @parent.step()
    def collect(ctx: Context, options: dict[str, Any]) -> Continuation:
        ended = [
            [child.number, child.status, child.output if child.is_completed else child.reason] for child in ctx.results
        ]
        if options.get("again"):
            return ctx.goto(fan, options["again"])
        return ctx.done(ended)

    @parent.step()
    def late(ctx: Context, options: dict[str, Any]) -> Continuation:
        seen = [child.status for child in ctx.results]
        if options.get("waits_again"):
            return ctx.gather(then=collect, state={})
        return ctx.done({"late": seen})

    return app


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    app = application(dsn)
    yield app
    app.close()


def started(app: App, **options: Any) -> Handle:
    handle = app.named("parent").start(options)
    app.run(until_idle=True)
    return handle


def ids_of(conn: Connection, handle: Handle) -> list[str]:
    query = "select durable.hex(id) from durable.started where parent = %s order by parent_seq, number"
    return [row[0] for row in conn.execute(query, (handle.id,))]


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    return row and row[0]


def test_a_parent_goes_on_when_all_its_children_have_ended_with_their_outputs_in_order(
    app: App, conn: Connection
) -> None:
    handle = started(app, children=list(range(20)))
    assert handle.result(timeout=5) == [[n, "completed", n] for n in range(20)]
    assert one(conn, "select count(*) from durable.wait") == 0
    assert one(conn, "select count(*) from durable.finished") == 21


def test_failed_children_fill_their_place_with_why(app: App) -> None:
    handle = started(app, children=[1, "fail", 3])
    assert handle.result(timeout=5) == [[0, "completed", 1], [1, "failed", "as told"], [2, "completed", 3]]


def test_a_child_that_is_stuck_holds_its_parent_until_it_is_retried_or_purged(app: App, conn: Connection) -> None:
    handle = started(app, children=["die", 2])
    assert handle.status() == "running"
    assert [child.status for child in handle.children()] == ["stuck", "completed"]
    conn.execute("select durable.purge_dead_letter(%s)", (ids_of(conn, handle)[0],))
    app.run(until_idle=True)
    assert handle.result(timeout=5)[0] == [0, "failed", "RuntimeError: dead"]


def test_no_children_are_all_of_them(app: App) -> None:
    assert started(app).result(timeout=5) == []
    assert started(app, first=True).result(timeout=5) == []


def test_waves_are_one_group(app: App, conn: Connection) -> None:
    handle = started(app, waves=[[0, 1], [2], [3, 4, "fail"]], children=[6])
    assert [entry[0] for entry in handle.result(timeout=5)] == list(range(7))
    assert one(conn, "select total || ' ' || completed || ' ' || failed from durable.fanout") == "7 6 1"


def test_a_group_that_was_waited_for_is_over_and_the_next_begins_anew(app: App) -> None:
    handle = started(app, children=[1, 2], again={"waves": [[3]], "children": [4]})
    assert handle.result(timeout=5) == [[0, "completed", 3], [1, "completed", 4]]


def test_first_goes_on_with_one_completed_child_and_may_cancel_the_rest(app: App, conn: Connection) -> None:
    handle = started(app, first=True, cancel_rest=True, children=["wait", "fail", 7, "wait"])
    seen = handle.result(timeout=5)
    assert seen[2] == [2, "completed", 7]
    app.run(until_idle=True)
    assert [child.status for child in handle.children()] == ["cancelled", "failed", "completed", "cancelled"]
    assert one(conn, "select count(*) from durable.wait") == 0


def test_the_rest_goes_on_unless_told_otherwise(app: App, conn: Connection) -> None:
    handle = started(app, first=True, children=["wait", 7])
    assert handle.result(timeout=5) == [[0, "running", None], [1, "completed", 7]]
    app.get(ids_of(conn, handle)[0]).signal("go", 1)
    app.run(until_idle=True)
    assert next(iter(handle.children())).value == 1


@pytest.mark.parametrize(
    ("options", "is_over"),
    [
        ({"at_least": 2, "children": [1, 2, "wait"]}, True),
        ({"at_least": 2, "children": [1, "wait", "wait"]}, False),
        ({"at_least": 2, "children": [1, "fail", "fail"]}, True),
        ({"at_least": 2, "children": ["fail", "fail", "wait"]}, True),
        ({"at_least": 2, "children": ["fail", "wait", "wait"]}, False),
        ({"at_least": 3, "children": [1, "wait"]}, True),
        ({"first": True, "children": ["fail", "wait"]}, False),
        ({"first": True, "children": ["fail", "fail"]}, True),
        ({"tolerance": 1, "children": ["fail", "fail", "wait"]}, True),
        ({"tolerance": 1, "children": ["fail", 1, "wait"]}, False),
        ({"tolerance": 0, "children": [1, "fail", "wait"]}, True),
        ({"children": [1, "fail", "wait"]}, False),
    ],
)
def test_how_many_are_enough(app: App, options: dict[str, Any], is_over: bool) -> None:
    assert started(app, **options).status() == ("completed" if is_over else "running")


def test_after_its_timeout_a_parent_goes_on_and_may_wait_for_the_rest_again(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handles = [
        started(app, children=[1, "wait"], timeout="1h"),
        started(app, children=[1, "wait"], timeout="1h", has_late=True),
        started(app, children=[1, "wait"], timeout="1h", has_late=True, waits_again=True),
    ]
    clock(3601)
    app.run(until_idle=True)
    assert handles[0].result(timeout=5) == [[0, "completed", 1], [1, "running", None]]
    assert handles[1].result(timeout=5) == {"late": ["completed", "running"]}
    assert handles[2].status() == "running"
    app.get(ids_of(conn, handles[2])[1]).signal("go", 5)
    app.run(until_idle=True)
    assert handles[2].result(timeout=5) == [[0, "completed", 1], [1, "completed", 5]]


def test_a_timeout_after_the_join_wakes_nobody(app: App, conn: Connection, clock: Callable[[float], None]) -> None:
    handle = started(app, children=[1], timeout="1h", again={"children": ["wait"]})
    clock(7200)
    app.run(until_idle=True)
    assert handle.status() == "running"
    assert one(conn, "select count(*) from durable.wait where names = '{}'") == 1


def test_children_may_begin_later(app: App, clock: Callable[[float], None]) -> None:
    handle = started(app, children=[1, 2], after="2h")
    assert handle.status() == "running"
    clock(7201)
    app.run(until_idle=True)
    assert len(handle.result(timeout=5)) == 2


def test_a_signal_does_not_resume_a_join_and_is_kept(app: App, conn: Connection) -> None:
    handle = started(app, children=["wait"])
    handle.signal("go", 1)
    app.run(until_idle=True)
    assert handle.status() == "running"
    assert one(conn, "select count(*) from durable.mailbox") == 1


@pytest.mark.parametrize("cascade", [True, False])
def test_a_cancelled_parent_cancels_its_children_and_theirs_unless_told_otherwise(
    app: App, conn: Connection, cascade: bool
) -> None:
    handle = started(app, waves=[["wait"]], children=["wait", "spawn", 1])
    assert handle.cancel("enough", cascade=cascade)
    app.run(until_idle=True)
    assert handle.status() == "cancelled"
    left = "cancelled" if cascade else "running"
    assert [child.status for child in handle.children()] == [left, left, left, "completed"]
    assert one(conn, "select count(*) from durable.wait") == (0 if cascade else 4)
    if cascade:
        (grandchild,) = ids_of(conn, Handle(app.client, "child", ids_of(conn, handle)[2]))
        assert one(conn, "select status from durable.finished where id = %s", grandchild) == "cancelled"


def test_a_child_that_is_cancelled_alone_ends_its_place(app: App, conn: Connection) -> None:
    handle = started(app, children=["wait", 1])
    app.get(ids_of(conn, handle)[0]).cancel("not this one")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [[0, "cancelled", "not this one"], [1, "completed", 1]]


def test_a_whole_fan_out_in_one_step_and_its_outputs_a_thousand_at_a_time(app: App) -> None:
    handle = started(app, waves=[list(range(CHILDREN_MAX))], children=list(range(CHILDREN_MAX)))
    assert [entry[2] for entry in handle.result(timeout=5)] == [*range(CHILDREN_MAX), *range(CHILDREN_MAX)]


def test_too_many_children_are_refused_with_what_to_do(app: App, conn: Connection) -> None:
    handle = started(app, children=[0] * (CHILDREN_MAX + 1))
    assert handle.status() == "stuck"
    assert "more than 1,024 children in one step; ctx.spawn() a wave" in str(handle.state().output)
    assert one(conn, "select count(*) from durable.started") == 1


def test_bad_arguments_are_named(app: App) -> None:
    machine = app.named("parent")
    context = Context(machine, Envelope("0" * 32, 1, "parent", "fan", 1, msgspec.Raw(b"{}")))
    with pytest.raises(InputError, match=r"dict is no child; make one with machine\.child"):
        context.gather([{}], then="collect", state={})  # type: ignore[list-item]
    with pytest.raises(InputError, match="at_least\\(0\\) waits for nothing"):
        context.at_least(0, [], then="collect", state={})
    with pytest.raises(InputError, match="tolerance of -1"):
        context.gather([], then="collect", state={}, tolerance=-1)
    with pytest.raises(AppError, match="has no children to read"):
        _ = context.results
    with pytest.raises(InputError, match="on_timeout and no timeout"):
        context.gather([], then="collect", state={}, on_timeout="late")
    with pytest.raises(InputError, match="more than 16,777,216 bytes"):
        context.gather([Child("child", 1, "act", "x" * 200_000, 0.0)] * 100, then="collect", state={})


def test_the_value_of_a_child_that_has_none_says_why(app: App) -> None:
    handle = started(app, children=["fail", "wait", 3])
    failed, waiting, completed = handle.children()
    assert completed.value == 3
    with pytest.raises(ChildFailed, match="child 0 \\('child'\\) has failed: as told"):
        _ = failed.value
    with pytest.raises(ChildFailed, match="child 1 \\('child'\\) is running"):
        handle.children().values() if failed.is_completed else waiting.value


# With two sessions.


def envelope_of(workflow_id: str, seq: int, workflow: str, step: str) -> Envelope:
    return Envelope(workflow_id, seq, workflow, step, 1, msgspec.Raw(encode({})))


def parent_that_waits(app: App, conn: Connection, children: int) -> tuple[Handle, list[str]]:
    handle = started(app, children=["wait"] * children)
    return handle, ids_of(conn, handle)


def end(tx: Connection, *ids: str, status: str = "completed") -> None:
    outcomes = [statements.Outcome(one, status, "null") for one in ids]
    statements.hand_on(tx, shard=0, steps="", counts=[], outcomes=outcomes)


@contextmanager
def two_sessions(dsn: str) -> Iterator[tuple[Connection, Connection]]:
    with psycopg.connect(dsn) as one_, psycopg.connect(dsn) as other:
        yield one_, other


def at_once(
    conn: Connection,
    dsn: str,
    eventually: Callable[..., None],
    first: Callable[[Connection], None],
    then: Callable[[Connection], None],
) -> None:
    """``then`` begins in another session before ``first`` has committed, and waits for that."""
    with two_sessions(dsn) as (one_, other), ThreadPoolExecutor() as pool:
        first(one_)
        acting = pool.submit(then, other)
        eventually(blocked(conn, other))
        one_.commit()
        acting.result(5)
        other.commit()


def blocked(conn: Connection, session: Connection) -> Callable[[], bool]:
    return lambda: bool(one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", session.info.backend_pid))


@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_the_last_two_children_that_end_at_once_resume_the_parent_once(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None], how: str
) -> None:
    handle, (left, right) = parent_that_waits(app, conn, 2)
    with two_sessions(dsn) as (first, second), ThreadPoolExecutor() as pool:
        end(first, left)
        ending: Future[None] = pool.submit(end, second, right)
        eventually(blocked(conn, second))
        getattr(first, how)()
        ending.result(5)
        second.commit()
    is_over = how == "commit"
    assert one(conn, "select count(*) from durable.wait where names = '{}'") == (0 if is_over else 1)
    assert one(conn, "select completed from durable.fanout") == (2 if is_over else 1)
    if not is_over:
        with conn.transaction():
            end(conn, left)
    app.run(until_idle=True)
    assert [entry[1] for entry in handle.result(timeout=5)] == ["completed", "completed"]


def test_an_end_that_comes_twice_counts_once(app: App, conn: Connection) -> None:
    handle, (left, _) = parent_that_waits(app, conn, 2)
    for _ in range(2):
        with conn.transaction():
            end(conn, left)
    assert one(conn, "select completed from durable.fanout") == 1
    assert handle.status() == "running"


CHILD = (Child("child", 1, "act", '{"does":"wait"}', 0.0),)


def spawn(handle: Handle) -> Callable[[Connection], None]:
    spawning = Spawning(envelope_of(handle.id, 2, "parent", "fan"), 1, CHILD)
    return lambda tx: coordination.spawn(tx, [spawning])


def cancel(handle: Handle) -> Callable[[Connection], None]:
    line = envelope_of(handle.id, 1, "@cancel", "cancel")
    return lambda tx: side_statements.deliver_cancels(tx, [Cancel(line, "enough", "")])


def resumptions(conn: Connection, handle: Handle) -> int:
    """How often the step after the join stands in the log."""
    query = "select l.id || l.step from durable.shard s cross join lateral durable.log(s.shard) l"
    return conn.execute(query).fetchall().count((f"{handle.id[:12]}collect",))


@pytest.mark.parametrize("is_end_first", [True, False])
def test_the_last_child_ends_while_its_parent_begins_to_wait(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None], is_end_first: bool
) -> None:
    handle = app.named("parent").start({})
    with conn.transaction():
        spawn(handle)(conn)
    (child,) = ids_of(conn, handle)
    next_ = envelope_of(handle.id, 3, "parent", "collect")
    joining = Joining(next_, next_, 2, (), None, None, None, False)
    acts = [lambda tx: end(tx, child), lambda tx: coordination.await_children(tx, [joining])]
    at_once(conn, dsn, eventually, *(acts if is_end_first else reversed(acts)))
    assert one(conn, "select count(*) from durable.wait") == 0
    assert resumptions(conn, handle) == 1


@pytest.mark.parametrize("is_cancel_first", [True, False])
def test_what_a_parent_spawns_while_it_is_cancelled_is_cancelled_or_never_was(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None], is_cancel_first: bool
) -> None:
    handle = app.named("parent").start({})
    acts = [cancel(handle), spawn(handle)]
    at_once(conn, dsn, eventually, *(acts if is_cancel_first else reversed(acts)))
    app.run(until_idle=True)
    children = ids_of(conn, handle)
    assert len(children) == (0 if is_cancel_first else 1)
    assert all(
        one(conn, "select status from durable.finished where id = %s", child) == "cancelled" for child in children
    )
    assert handle.status() == "cancelled"


@pytest.mark.parametrize("is_cancel_first", [True, False])
def test_the_last_child_ends_while_its_parent_is_cancelled(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None], is_cancel_first: bool
) -> None:
    handle, (child,) = parent_that_waits(app, conn, 1)
    acts = [cancel(handle), lambda tx: end(tx, child)]
    at_once(conn, dsn, eventually, *(acts if is_cancel_first else reversed(acts)))
    assert resumptions(conn, handle) == 1, "resumed once, by the cancel or by the child"
    app.run(until_idle=True)
    assert handle.status() == "cancelled"


def test_a_page_that_spawns_and_is_read_again_has_spawned_once(app: App, conn: Connection, dsn: str) -> None:
    """Children are rows of the page's transaction: what was not committed was not spawned."""
    handle = app.named("parent").start({"children": ["wait"]})
    with psycopg.connect(dsn) as session:
        spawning = Spawning(envelope_of(handle.id, 2, "parent", "fan"), 1, (Child("child", 1, "act", '{"does":1}', 0),))
        coordination.spawn(session, [spawning])
        session.rollback()
    app.run(until_idle=True)
    assert len(ids_of(conn, handle)) == 1


def test_children_of_a_live_parent_outlive_their_retention(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handle, other = started(app, children=[1, "wait"]), started(app, children=[1])
    clock(60 * 86_400)
    conn.execute("select durable.add_partitions(14)")
    while one(conn, "select durable.needs_expiry(30)"):
        conn.execute("select durable.expire(30)")
    assert (
        one(conn, "select count(*) from durable.started where id = any(%s::uuid[])", [*ids_of(conn, other), other.id])
        == 0
    )
    assert one(conn, "select count(*) from durable.fanout") == 1
    app.get(ids_of(conn, handle)[1]).signal("go", 2)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [[0, "completed", 1], [1, "completed", 2]]
    clock(120 * 86_400)
    conn.execute("select durable.add_partitions(14)")
    for _ in range(70):
        conn.execute("select durable.expire(30)")
    assert one(conn, "select (select count(*) from durable.started) + (select count(*) from durable.fanout)") == 0


def deliver(handle: Handle) -> Callable[[Connection], None]:
    line = envelope_of(handle.id, 1, "@signal", "stop")
    event = '{"name":"stop","payload":null,"actor":null,"at":"2026-01-01T00:00:00+00:00"}'
    return lambda tx: side_statements.deliver(tx, [Delivery(line, event, "", None)]) and None


@pytest.mark.parametrize("is_waiting", [True, False])
@pytest.mark.parametrize("is_signal_first", [True, False])
def test_a_signal_and_the_last_child_resume_a_parent_that_waits_for_both_once(
    app: App, conn: Connection, dsn: str, eventually: Callable[..., None], is_signal_first: bool, is_waiting: bool
) -> None:
    """The one of the two that comes second, or first, meets the other; or a signal meets the beginning of the wait."""
    handle = app.named("parent").start({})
    with conn.transaction():
        spawn(handle)(conn)
    (child,) = ids_of(conn, handle)
    next_ = envelope_of(handle.id, 3, "parent", "collect")
    joining = Joining(next_, next_, 2, (), None, None, None, False, names=("stop",))

    def wait(tx: Connection) -> None:
        coordination.await_children(tx, [joining])

    if is_waiting:
        with conn.transaction():
            wait(conn)
    acts = [deliver(handle), (lambda tx: end(tx, child)) if is_waiting else wait]
    at_once(conn, dsn, eventually, *(acts if is_signal_first else reversed(acts)))
    if not is_waiting:
        with conn.transaction():
            end(conn, child)
    assert resumptions(conn, handle) == 1
    assert one(conn, "select count(*) from durable.wait") == 0
    assert one(conn, "select completed from durable.fanout") == 1
    is_kept = is_waiting and not is_signal_first
    assert one(conn, "select count(*) from durable.mailbox") == is_kept, "a signal that came too late is kept for later"
