"""Signals: kept in order, taken once, refused where nobody lives; and their races with waits, timeouts and each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import App, AppError, Context, Continuation, Handle, InputError, UnknownWorkflow, side_statements
from durable_cluster.envelope import Envelope, encode
from durable_cluster.signals import Delivery, Waiting

Connection = psycopg.Connection[Any]


@pytest.fixture
def tokens() -> list[str]:
    return []


@pytest.fixture
def app(dsn: str, tokens: list[str]) -> Iterator[App]:
    """One workflow that waits as its input says, and completes with what it got."""
    app = App("waiting", dsn=dsn)
    machine = app.machine("wait", state=dict)

    @machine.step(start=True)
    def ask(ctx: Context, options: dict[str, Any]) -> Continuation:
        tokens.append(ctx.token)
        options = {"names": ["answer"], "got": [], "times": 1, **options}
        late = "late" if options.get("has_late") else None
        return ctx.wait_for(
            *options["names"],
            then=got,
            state=options,
            timeout=options.get("timeout"),
            on_timeout=late,
            require_token=bool(options.get("require_token")),
        )

    @machine.step()
    def got(ctx: Context, options: dict[str, Any]) -> Continuation:
        signal = ctx.signal
        options["got"].append(None if signal is None else [signal.name, signal.payload, signal.actor])
        if len(options["got"]) < options["times"]:
            return ctx.wait_for(*options["names"], then=got, state=options)
        return ctx.done(options["got"])

    @machine.step()
    def late(ctx: Context, options: dict[str, Any]) -> Continuation:
        assert ctx.signal is None
        return ctx.done("late")

    yield app
    app.close()


def started(app: App, **options: Any) -> Handle:
    return app.named("wait").start(options)


def waiting(app: App, **options: Any) -> Handle:
    """A workflow that waits already."""
    handle = started(app, **options)
    app.run(until_idle=True)
    assert handle.status() == "running"
    return handle


def one(conn: Connection, query: str, *parameters: object) -> Any:
    row = conn.execute(query.encode(), parameters).fetchone()
    return row and row[0]


def left_behind(conn: Connection) -> tuple[int, int]:
    return one(conn, "select count(*) from durable.wait"), one(conn, "select count(*) from durable.mailbox")


@pytest.mark.parametrize("is_early", [True, False])
def test_a_workflow_that_waits_goes_on_with_the_signal(app: App, conn: Connection, is_early: bool) -> None:
    handle = started(app) if is_early else waiting(app)
    handle.signal("answer", {"n": 1}, actor="ada")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", {"n": 1}, "ada"]]
    assert left_behind(conn) == (0, 0)


def test_signals_are_kept_in_their_order_and_each_is_taken_once(app: App, conn: Connection) -> None:
    handle = started(app, times=5)
    for n in range(5):
        handle.signal("answer", n)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", n, None] for n in range(5)]
    assert left_behind(conn) == (0, 0)


def test_of_several_names_the_first_signal_wins_and_others_stay_for_later_waits(app: App, conn: Connection) -> None:
    handle = waiting(app, names=["yes", "no"])
    handle.signal("maybe")
    handle.signal("no", "because")
    handle.signal("yes")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["no", "because", None]]
    assert conn.execute("select name from durable.mailbox order by number").fetchall() == [("maybe",), ("yes",)]


def test_after_the_timeout_it_goes_on_without_a_signal(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    then, elsewhere, for_ever = waiting(app, timeout="7d"), waiting(app, timeout="7d", has_late=True), waiting(app)
    clock(7 * 86_400 + 1)
    app.run(until_idle=True)
    assert (then.result(timeout=5), elsewhere.result(timeout=5)) == ([None], "late")
    assert for_ever.status() == "running"
    with pytest.raises(UnknownWorkflow):
        then.signal("answer")


def test_a_timeout_of_a_wait_that_was_resumed_does_nothing(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handle = waiting(app, timeout="1h", times=2)
    handle.signal("answer", 1)
    app.run(until_idle=True)
    assert left_behind(conn) == (1, 0), "one wait, the second"
    clock(2 * 3600)
    app.run(until_idle=True)
    assert handle.status() == "running"
    handle.signal("answer", 2)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", 1, None], ["answer", 2, None]]


def test_of_signals_with_one_key_the_first_counts_for_good(app: App, conn: Connection) -> None:
    handle = waiting(app, times=2)
    for n in range(3):
        handle.signal("answer", n, key="k")
    app.run(until_idle=True)
    handle.signal("answer", 3, key="k")
    handle.signal("answer", 4, key="other")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", 0, None], ["answer", 4, None]]


def test_a_wait_with_a_token_is_resumed_by_that_token_alone_and_once(
    app: App, tokens: list[str], conn: Connection
) -> None:
    handle, other = waiting(app, require_token=True, times=2), waiting(app, require_token=True)
    for wrong in (None, tokens[1], tokens[0][:-1] + "x", "1-" + "0" * 32, "", "x" * 1000):
        with pytest.raises(UnknownWorkflow, match="the token is wrong or used"):
            handle.signal("answer", token=wrong)
    handle.signal("answer", 1, token=tokens[0])
    app.run(until_idle=True)
    with pytest.raises(UnknownWorkflow, match="the token is wrong or used"):
        handle.signal("answer", 2, token=tokens[0])
    handle.signal("answer", 3)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", 1, None], ["answer", 3, None]]
    assert other.status() == "running"


def test_a_token_may_answer_before_its_wait_begins_and_a_signal_without_it_does_not_count(
    app: App, conn: Connection
) -> None:
    handle = started(app, require_token=True)
    token = one(conn, "select durable.token_of(%s, 1, (select secret from durable.secret))", handle.id)
    handle.signal("answer", "anybody")
    handle.signal("answer", "who was asked", token=token)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", "who was asked", None]]


@pytest.mark.parametrize("is_early", [True, False])
def test_of_signals_with_one_token_that_are_on_their_way_together_one_counts(
    app: App, conn: Connection, is_early: bool
) -> None:
    handle = (started if is_early else waiting)(app, require_token=True, times=2)
    token = one(conn, "select durable.token_of(%s, 1, (select secret from durable.secret))", handle.id)
    handle.signal("answer", "a click", token=token)
    handle.signal("answer", "another click", token=token)
    app.run(until_idle=True)
    assert left_behind(conn) == (1, 0), "the second wait, which demands no token, is not for the other click"
    handle.signal("answer", "by anybody")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", "a click", None], ["answer", "by anybody", None]]


def test_all_attempts_of_a_step_have_one_token(dsn: str, clock: Callable[[float], None]) -> None:
    app = App("again", dsn=dsn)
    machine = app.machine("again", state=int)
    tokens: list[str] = []

    @machine.step(start=True)
    def ask(ctx: Context, n: int) -> Continuation:
        tokens.append(ctx.token)
        if ctx.attempt == 1:
            raise RuntimeError("the mail was sent, and then this")
        return ctx.wait_for("answer", then=got, state=n, require_token=True)

    @machine.step()
    def got(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    handle = machine.start(1)
    app.run(until_idle=True)
    clock(600)
    app.run(until_idle=True)
    assert len(tokens) == 2 and tokens[0] == tokens[1]
    handle.signal("answer", token=tokens[0])
    app.run(until_idle=True)
    assert handle.result(timeout=5) == 1
    app.close()


def test_a_signal_is_sent_with_the_transaction_or_not_at_all(app: App, dsn: str, conn: Connection) -> None:
    handle = waiting(app)
    with psycopg.connect(dsn) as tx:
        handle.signal("answer", "never", tx=tx)
        tx.rollback()
        app.run(until_idle=True)
        handle.signal("answer", "once", tx=tx)
        app.run(until_idle=True)
        assert handle.status() == "running"
        tx.commit()
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", "once", None]]


def test_who_is_unknown_or_has_ended_gets_no_signal_and_nothing_is_left(app: App, conn: Connection) -> None:
    handle = waiting(app)
    handle.signal("answer")
    app.run(until_idle=True)
    assert handle.status() == "completed"
    unknown = Handle(app.client, "wait", "0" * 32)
    events = "select count(*) from pgque.event_1 union all select count(*) from pgque.event_2"
    before = conn.execute(events).fetchall()
    for refused in (handle, unknown):
        with pytest.raises(UnknownWorkflow, match="it is unknown, has ended"):
            refused.signal("answer")
    assert conn.execute(events).fetchall() == before
    assert left_behind(conn) == (0, 0)


def test_a_signal_that_comes_with_the_end_is_dropped(app: App, conn: Connection) -> None:
    handle = waiting(app)
    handle.signal("answer", 1)
    handle.signal("answer", 2)
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", 1, None]]


def test_a_mailbox_has_a_limit(app: App, conn: Connection) -> None:
    conn.execute("update durable.cluster set mailbox_max = 3")
    handle = waiting(app)
    for n in range(3):
        handle.signal("other", n)
    app.run(until_idle=True)
    with pytest.raises(InputError, match="holds 3 signals that it does not wait for"):
        handle.signal("other", 4)
    assert left_behind(conn) == (1, 3)


def test_a_flood_that_was_on_its_way_is_dropped_beyond_the_limit(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    conn.execute("update durable.cluster set mailbox_max = 3")
    handle = waiting(app)
    for n in range(10):
        handle.signal("other", n)
    app.run(until_idle=True)
    assert conn.execute("select event::json ->> 'payload' from durable.mailbox order by number").fetchall() == [
        ("0",),
        ("1",),
        ("2",),
    ]
    assert "7 signals were dropped" in caplog.text


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("select durable.signal(%s, 'No Name')", "signal name 'No Name' is not of"),
        ("select durable.signal(%s, 'answer', '{')", "the payload is not JSON"),
        ("select durable.signal(%s, 'answer', '\"\\ud800\"')", "the payload is not JSON"),
        ("select durable.signal(%s, 'answer', '[\"\\\\u0000\", \"\\udc18\"]')", "the payload is not JSON"),
        ("select durable.signal(%s, 'answer', 'null', '')", "a key has 1 to 255 characters"),
        (
            "select durable.signal(%s, 'answer', 'null', null, null, repeat('x', 256))",
            "the actor has 1 to 255 characters",
        ),
        ("select durable.signal(%s, 'answer', to_json(repeat('x', 300000))::text)", "the payload has 300,?002 bytes"),
    ],
)
def test_what_cannot_be_a_signal_is_refused(app: App, conn: Connection, query: str, says: str) -> None:
    handle = waiting(app)
    with pytest.raises(psycopg.Error, match=says) as refused:
        conn.execute(query.encode(), (handle.id,))
    assert refused.value.sqlstate == "DC002"


def test_what_cannot_be_waited_for_is_told(app: App) -> None:
    context = Context(app.named("wait"), Envelope("0" * 32, 1, "wait", "ask", 1, msgspec.Raw(b"1")))
    with pytest.raises(InputError, match="needs the name of a signal"):
        context.wait_for(then="got", state=1)
    with pytest.raises(AppError, match="signal name 'No Name'"):
        context.wait_for("No Name", then="got", state=1)
    with pytest.raises(InputError, match="has on_timeout and no timeout"):
        context.wait_for("answer", then="got", state=1, on_timeout="late")
    with pytest.raises(InputError, match="timeout: 'soon' is no duration"):
        context.wait_for("answer", then="got", state=1, timeout="soon")
    with pytest.raises(AppError, match="tokens are made where a cluster runs the step"):
        _ = context.token


def test_a_line_that_only_looks_like_a_signal_is_passed_over(app: App, conn: Connection) -> None:
    handle = waiting(app)
    for state in (
        "1",
        '{"event":1}',
        '{"event":{"name":"other","payload":1,"at":"2026-01-01T00:00:00Z"}}',
        '{"event":{}}',
    ):
        conn.execute(
            "select durable.append(shard, durable.line(%s, 1, '@signal', 'answer', 0, %s), 1)"
            " from durable.slot where slot = durable.slot_of(%s)",
            (handle.id, state, handle.id),
        )
    app.run(until_idle=True)
    handle.signal("answer", "real")
    app.run(until_idle=True)
    assert handle.result(timeout=5) == [["answer", "real", None]]


def test_where_a_workflow_waits_is_told(app: App, conn: Connection) -> None:
    open_ended, limited = waiting(app), waiting(app, timeout="1h")
    query = "select place, step, due is not null from durable.locate(%s)"
    assert conn.execute(query, (open_ended.id,)).fetchall() == [("waiting", "got", False)]
    assert conn.execute(query, (limited.id,)).fetchall() == [("waiting", "got", True)]


# --- races: two real sessions, in the statements that a page makes


def wait_of(handle: Handle, *, timeout_s: float | None = None) -> Waiting:
    state = b'{"got":[],"times":1,"names":["answer"]}'
    then = Envelope(handle.id, 2, "wait", "got", 1, msgspec.Raw(state))
    return Waiting(then, then, ("answer",), timeout_s, None)


def signal_to(handle: Handle, payload: int) -> Delivery:
    event = encode({"name": "answer", "payload": payload, "at": "2026-01-01T00:00:00Z"}).decode()
    return Delivery(Envelope(handle.id, 1, "@signal", "answer", 0, msgspec.Raw()), event, "", None)


@contextmanager
def beside(
    conn: Connection, session: Connection, act: Callable[[], Any], eventually: Callable[..., None]
) -> Iterator[Future[Any]]:
    """``act`` on ``session`` in a thread, once it waits for another session's lock."""
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", session.info.backend_pid))
        yield acting
        acting.result(timeout=10)


@pytest.fixture
def quiet(app: App, conn: Connection) -> Handle:
    """A workflow that lives, and of which nothing is in the log."""
    handle = waiting(app)
    conn.execute("delete from durable.wait")
    return handle


@pytest.mark.parametrize("is_wait_first", [True, False])
@pytest.mark.parametrize("is_committed", [True, False])
def test_a_signal_and_the_beginning_of_a_wait_wait_for_each_other(
    app: App,
    dsn: str,
    conn: Connection,
    quiet: Handle,
    eventually: Callable[..., None],
    is_wait_first: bool,
    is_committed: bool,
) -> None:
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second:

        def wait(tx: Connection) -> None:
            side_statements.await_signals(tx, [wait_of(quiet)])

        def signal(tx: Connection) -> None:
            side_statements.deliver(tx, [signal_to(quiet, 7)])

        begin, follow = (wait, signal) if is_wait_first else (signal, wait)
        begin(first)
        with beside(conn, second, lambda: follow(second), eventually):
            if is_committed:
                first.commit()
            else:
                first.rollback()
        second.commit()
    if is_committed:
        assert left_behind(conn) == (0, 0)
        app.run(until_idle=True)
        assert quiet.result(timeout=5) == [["answer", 7, None]]
    else:
        assert left_behind(conn) == ((0, 1) if is_wait_first else (1, 0))


@pytest.mark.parametrize("is_committed", [True, False])
def test_of_two_signals_at_once_one_resumes_and_the_other_is_kept(
    app: App, dsn: str, conn: Connection, quiet: Handle, eventually: Callable[..., None], is_committed: bool
) -> None:
    side_statements.await_signals(conn, [wait_of(quiet)])
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second:
        side_statements.deliver(first, [signal_to(quiet, 1)])
        with beside(conn, second, lambda: side_statements.deliver(second, [signal_to(quiet, 2)]), eventually):
            if is_committed:
                first.commit()
            else:
                first.rollback()
        second.commit()
    assert left_behind(conn) == (0, int(is_committed))
    app.run(until_idle=True)
    assert quiet.result(timeout=5) == [["answer", 1 if is_committed else 2, None]]


def test_a_timeout_that_comes_first_wins_and_the_signal_is_kept(
    app: App, dsn: str, conn: Connection, quiet: Handle, clock: Callable[[float], None], eventually: Callable[..., None]
) -> None:
    side_statements.await_signals(conn, [wait_of(quiet, timeout_s=3600.0)])
    clock(3601)
    with psycopg.connect(dsn) as sweeping, psycopg.connect(dsn) as second:
        assert side_statements.sweep(sweeping) == 1
        with beside(conn, second, lambda: side_statements.deliver(second, [signal_to(quiet, 1)]), eventually):
            sweeping.commit()
        second.commit()
    assert left_behind(conn) == (0, 1)
    app.run(until_idle=True)
    assert quiet.result(timeout=5) == [None]


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_signal_that_comes_first_wins_and_the_timeout_does_not_wait_for_it(
    app: App, dsn: str, conn: Connection, quiet: Handle, clock: Callable[[float], None], is_committed: bool
) -> None:
    side_statements.await_signals(conn, [wait_of(quiet, timeout_s=3600.0)])
    clock(3601)
    with psycopg.connect(dsn) as delivering:
        side_statements.deliver(delivering, [signal_to(quiet, 1)])
        assert side_statements.sweep(conn) == 1
        if is_committed:
            delivering.commit()
        else:
            delivering.rollback()
    clock(3603)
    app.run(until_idle=True)
    assert quiet.result(timeout=5) == ([["answer", 1, None]] if is_committed else [None])
    assert left_behind(conn) == (0, 0)


def test_a_page_with_waits_and_signals_of_many_locks_in_one_order(
    app: App, dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    handles = sorted((started(app) for _ in range(20)), key=lambda handle: handle.id)
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second:
        side_statements.lock_stripes(first, [handle.id for handle in handles])
        ids = [handle.id for handle in reversed(handles)]
        with beside(conn, second, lambda: side_statements.lock_stripes(second, ids), eventually):
            first.commit()
        second.commit()


def test_retention_forgets_what_signals_left_of_workflows_that_are_gone(
    app: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    gone, alive = waiting(app), waiting(app)
    for handle in (gone, alive):
        handle.signal("other", key="k")
    gone.signal("answer")
    app.run(until_idle=True)
    clock(40 * 86_400)
    while one(conn, "select durable.expire(30)"):
        pass
    assert conn.execute("select id::text from durable.mailbox").fetchall() == [(str(alive_id(alive)),)]
    assert conn.execute("select id::text from durable.signal_key").fetchall() == [(str(alive_id(alive)),)]


def alive_id(handle: Handle) -> str:
    digits = handle.id
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
