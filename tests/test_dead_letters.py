"""Dead letters are alive: found, shown, taken up again exactly once or ended exactly once, whatever their state holds."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from durable_cluster import (
    App,
    Context,
    Continuation,
    DurableError,
    Handle,
    InputError,
    Machine,
    Settings,
    TerminalError,
    UnknownWorkflow,
    WorkflowFailed,
    WorkflowStuck,
    side_statements,
    statements,
)

Eventually = Callable[..., None]
WHOLE_ID = re.compile("[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-")
DETAILS = '{"reason":"ValueError: no card","step":"charge","seq":3,"attempt":5,"traceback":"Traceback\\n  line"}'
ANY_JSON = [
    r'{"sum":3}',
    r'"\u0000"',
    r'{"\u0000":["\ud83d\udc18","\\u0000","\\\u0000","\\\\u0000~1~0~"],"~1":"~"}',
    r'{"a":1,"n":2,"w":"","g":7,"u":[],"d":{"d":null},"x":"}\",\"a\":9}"}',
    '"' + "\\\\" * 2000 + r'\u0000"',
    "[" * 500 + "]" * 500,
    "null",
    "1e400",
    '"Grüße, 🐘 \x7f"',
]


class Order(msgspec.Struct):
    lines: list[int]
    customer: str = "ALFKI"


RUNS: list[tuple[int, str, Any]] = []


@pytest.fixture
def machine(dsn: str) -> Machine:
    RUNS.clear()
    app = App("shop", dsn=dsn, settings=Settings(takeover_probe_s=0, dead_interval_s=3600))
    machine = app.machine("order", state=Order)

    @machine.step(start=True)
    def take(ctx: Context, order: Order) -> Continuation:
        return ctx.goto(charge, order)

    @machine.step()
    def charge(ctx: Context, order: Order) -> Continuation:
        RUNS.append((ctx.attempt, ctx.idempotency_key, order.lines))
        return ctx.done(sum(order.lines))

    return machine


def line(handle: Handle, state: str = '{"lines":[1,2]}', *, seq: int = 3, step: str = "charge", more: str = "") -> str:
    return f'{{"w":"{handle.id}","n":{seq},"f":"order","s":"{step}","v":1,"d":{state}{more}}}'


def only_started(conn: psycopg.Connection, machine: Machine, count: int = 1) -> list[Handle]:
    """Workflows whose one live continuation is about to be a dead letter: nothing of theirs is in the log."""
    ids = [row[0] for row in conn.execute("select durable.hex(durable.new_id()) from generate_series(1, %s)", (count,))]
    for one in ids:
        conn.execute(
            "insert into durable.started (id, day, workflow, version, input, at)"
            " values (%(id)s, durable.day_of(%(id)s), 'order', 1, '{}', durable.now())",
            {"id": one},
        )
    return [Handle(machine.app.client, "order", one) for one in ids]


def bury(conn: psycopg.Connection, *lines: str, reason: str = "attempts", details: str = DETAILS) -> None:
    side_statements.bury(conn, list(lines), [reason] * len(lines), [details] * len(lines))


@pytest.fixture
def stuck(conn: psycopg.Connection, machine: Machine) -> Handle:
    (handle,) = only_started(conn, machine)
    bury(conn, line(handle, more=',"a":5'))
    return handle


def logged(conn: psycopg.Connection) -> list[str]:
    """The lines of all logs."""
    events = [
        body
        for shard in (0, 1)
        for (body,) in conn.execute(f"select ev_data from pgque.event_{shard + 1} order by ev_id".encode())
    ]
    return [one for body in events for one in body.split("\n")]


def count(conn: psycopg.Connection, table: str) -> int:
    (rows,) = conn.execute(f"select count(*) from durable.{table}".encode()).fetchone() or (0,)
    return rows


def continuations(conn: psycopg.Connection) -> tuple[int, int, int]:
    """How many step events, dead letters and terminal records there are."""
    return len(logged(conn)), count(conn, "dead_letter"), count(conn, "finished")


# What a dead letter says.


def test_a_workflow_with_a_dead_letter_is_stuck_and_not_ended(stuck: Handle, conn: psycopg.Connection) -> None:
    state = stuck.state()
    assert (stuck.status(), state.status, state.finished_at) == ("stuck", "stuck", None)
    assert statements.outcome(conn, stuck.id) is not None
    assert conn.execute("select id, status from durable.list(null, 'stuck')").fetchall() == [(stuck.id[:12], "stuck")]
    assert conn.execute("select * from durable.list(null, 'running')").fetchall() == []
    assert conn.execute("select * from durable.totals()").fetchall() == [("order", "stuck", 1)]


def test_waiting_for_a_stuck_workflow_says_where_why_and_what_next(stuck: Handle) -> None:
    with pytest.raises(WorkflowStuck) as caught:
        stuck.result(timeout=5)
    short = stuck.id[:12]
    assert str(caught.value) == (
        f"workflow {short}… ('order') is stuck in step 'charge' after 5 attempts: ValueError: no card;"
        f" see 'durable-cluster dead-letters show {short}', retry it with 'durable-cluster dead-letters retry {short}'"
    )
    assert caught.value.reason == "ValueError: no card"


def test_a_listing_tells_the_newest_first_with_truncated_ids(conn: psycopg.Connection, machine: Machine) -> None:
    first, second = only_started(conn, machine, 2)
    bury(conn, line(first, more=',"a":5'))
    bury(conn, line(second, step="ship", seq=4), reason="crashes", details='{"reason":"' + "x" * 500 + '"}')
    rows = conn.execute("select * from durable.dead_letters()").fetchall()
    assert [row[:6] for row in rows] == [
        (second.id[:12], "order", "ship", 4, 1, "crashes"),
        (first.id[:12], "order", "charge", 3, 5, "attempts"),
    ]
    assert [len(row[6]) for row in rows] == [200, len("ValueError: no card")]
    for one, there in (("'order'", 2), ("'other'", 0), ("null, 'ship'", 1), ("null, null, 'attempts'", 1)):
        assert len(conn.execute(f"select * from durable.dead_letters({one})".encode()).fetchall()) == there, one
        assert conn.execute(f"select letters from durable.dead_letter_total({one})".encode()).fetchone() == (there,)


def test_paging_loses_none_of_those_that_share_a_moment(conn: psycopg.Connection, machine: Machine) -> None:
    conn.execute(
        "create or replace function durable.now() returns timestamptz language sql volatile as"
        " $$ select '2030-01-01'::timestamptz + current_setting('test.seconds')::int * interval '1 second' $$"
    )
    handles = only_started_at(conn, machine, 9)
    for number, handle in enumerate(handles):
        conn.execute("select set_config('test.seconds', %s, false)", (str(number // 3),))
        bury(conn, line(handle))
    seen: list[str] = []
    before = "infinity"
    while rows := conn.execute(
        "select id, at::text from durable.dead_letters(i_limit => 2, i_before => %s)", (before,)
    ).fetchall():
        seen += [row[0] for row in rows]
        before = rows[-1][1]
    assert sorted(seen) == sorted(handle.id[:12] for handle in handles)


def only_started_at(conn: psycopg.Connection, machine: Machine, number: int) -> list[Handle]:
    conn.execute("select set_config('test.seconds', '0', false)")
    return only_started(conn, machine, number)


def test_details_that_cannot_be_read_are_a_reason_and_stop_no_page(conn: psycopg.Connection, machine: Machine) -> None:
    handles = only_started(conn, machine, 4)
    details = ['{"reason":"\\u0000"}', "not json", "[1]", "{}"]
    side_statements.bury(conn, [line(one) for one in handles], ["given_up"] * 4, details)
    told = [msgspec.json.decode((statements.outcome(conn, one.id) or ("", ""))[1]) for one in handles]
    assert [one["reason"] for one in told] == ['{"reason":"\\u0000"}', "not json", "[1]", "unknown"]
    assert all((one["step"], one["seq"], one["attempt"]) == ("charge", 3, 1) for one in told)
    assert len(conn.execute("select * from durable.dead_letters()").fetchall()) == 4


def test_burying_twice_leaves_the_first_and_what_is_no_envelope_is_nobodys(
    stuck: Handle, conn: psycopg.Connection
) -> None:
    bury(conn, line(stuck, more=',"a":9'), "no envelope", "", '{"w":"' + "f" * 32 + '"}')
    assert conn.execute("select attempt from durable.dead_letter").fetchall() == [(5,)]


@pytest.mark.parametrize(
    ("reasons", "details", "said"),
    [
        (["bored"], [DETAILS], "not bored"),
        (["attempts"], [DETAILS] * 2, "one of each"),
        (["attempts"] * 2, [DETAILS], "one of each"),
    ],
)
def test_a_dead_letter_without_a_known_reason_and_details_is_refused(
    stuck: Handle, conn: psycopg.Connection, reasons: list[str], details: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        side_statements.bury(conn, [line(stuck, seq=9)], reasons, details)
    assert count(conn, "dead_letter") == 1


# Retry.


def test_a_retry_takes_the_workflow_up_where_it_stopped(
    stuck: Handle, machine: Machine, conn: psycopg.Connection
) -> None:
    stuck.retry()
    assert stuck.status() == "running"
    assert continuations(conn) == (1, 0, 0)
    assert machine.app.run(until_idle=True) == 1
    assert stuck.result(timeout=5) == 3
    ((attempt, _, lines),) = RUNS
    assert (attempt, lines) == (6, [1, 2])


def test_a_retry_keeps_the_idempotency_key_and_counts_attempts_anew(
    machine: Machine, conn: psycopg.Connection, stuck: Handle
) -> None:
    stuck.retry()
    (again,) = logged(conn)
    fields = msgspec.json.decode(again)
    assert (fields["n"], fields["a"], fields["g"]) == (4, 6, 5)
    bury(conn, again)
    stuck.retry()
    fields = msgspec.json.decode(logged(conn)[-1])
    assert (fields["n"], fields["a"], fields["g"]) == (5, 7, 6)
    machine.app.run(until_idle=True)
    assert len({key for _, key, _ in RUNS}) == 1


@pytest.mark.parametrize("state", ANY_JSON, ids=lambda state: state[:12])
def test_a_retry_hands_the_state_on_as_it_was_whatever_json_it_is(
    machine: Machine, conn: psycopg.Connection, state: str
) -> None:
    (handle,) = only_started(conn, machine)
    more = f',"a":2,"g":1,"u":4,"r":[3,1.0,2.0,0.5,["a.B"],[]],"p":{state},"later":{state}'
    bury(conn, line(handle, state, more=more))
    assert conn.execute("select attempt from durable.dead_letter").fetchone() == (2,)
    assert conn.execute("select durable.dead_letter_state(%s)", (handle.id,)).fetchone() == (state,)
    handle.retry()
    kept = f'"d":{state},"r":[3,1.0,2.0,0.5,["a.B"],[]],"p":{state},"later":{state}'
    assert logged(conn) == [f'{{"w":"{handle.id}","n":4,"f":"order","s":"charge","v":1,{kept},"a":3,"g":2}}']


@pytest.mark.parametrize("state", ANY_JSON, ids=lambda state: state[:12])
def test_an_edited_state_is_handed_on_as_it_was_given(stuck: Handle, conn: psycopg.Connection, state: str) -> None:
    side_statements.retry_dead_letter(conn, stuck.id, state=state)
    assert logged(conn) == [line(stuck, state, seq=4, more=',"a":6,"g":5')]


def test_a_retry_with_an_edited_state_runs_with_it(stuck: Handle, machine: Machine) -> None:
    stuck.retry(Order([10, 20]))
    machine.app.run(until_idle=True)
    assert stuck.result(timeout=5) == 30


def test_an_edited_state_that_does_not_fit_is_named_with_field_and_value_and_nothing_changes(
    stuck: Handle, machine: Machine, conn: psycopg.Connection
) -> None:
    for state, parts in (
        ({"lines": [1, "two"]}, ["the state of step 'charge' does not fit Order", "lines[1]", "int", '"two"']),
        ({"lines": [1], "tip": 2}, ["'tip'"]),
        (None, ["Order", "null"]),
        ({"lines": [1] * 200_000}, ["the limit is 262,144"]),
        (object(), ["is not JSON"]),
    ):
        with pytest.raises(InputError) as caught:
            machine.app.get(stuck.id).retry(state)
        assert all(part in str(caught.value) for part in parts), caught.value
    for payload in ("{", "", '"' + "x" * 300_000 + '"'):
        with pytest.raises(InputError):
            side_statements.retry_dead_letter(conn, stuck.id, state=payload)
    assert continuations(conn) == (0, 1, 0)


def test_an_edited_state_reaches_no_other_step_than_it_was_checked_against(
    stuck: Handle, conn: psycopg.Connection
) -> None:
    with pytest.raises(UnknownWorkflow):
        side_statements.retry_dead_letter(conn, stuck.id, state="1", seq=4)
    assert continuations(conn) == (0, 1, 0)


def test_a_program_that_does_not_know_the_step_may_edit_its_state_with_any_json(
    stuck: Handle, conn: psycopg.Connection, dsn: str
) -> None:
    App("elsewhere", dsn=dsn).get(stuck.id).retry({"anything": 1})
    assert '"d":{"anything":1}' in logged(conn)[0]


def test_a_letter_that_is_not_json_stays_until_it_is_purged(machine: Machine, conn: psycopg.Connection) -> None:
    broken, whole = only_started(conn, machine, 2)
    bury(conn, line(broken, "[" * 100_000), line(whole))
    with pytest.raises(InputError, match="it can only be purged"):
        broken.retry()
    assert conn.execute("select durable.dead_letter_state(%s)", (broken.id,)).fetchone() == (None,)
    assert conn.execute("select durable.retry_dead_letters()").fetchone() == (1,)
    assert conn.execute("select durable.retry_dead_letters()").fetchone() == (0,)
    assert conn.execute("select durable.purge_dead_letters()").fetchone() == (1,)
    assert (broken.status(), whole.status()) == ("failed", "running")


@pytest.mark.parametrize("act", ["retry", "purge"])
def test_what_is_no_dead_letter_any_more_is_said_and_nothing_changes(
    stuck: Handle, conn: psycopg.Connection, act: str
) -> None:
    function = f"select durable.{act}_dead_letter(%s)"
    conn.execute(function.encode(), (stuck.id,))
    before = continuations(conn)
    for unknown in (stuck.id, "f" * 32):
        with pytest.raises(psycopg.Error) as caught:
            conn.execute(function.encode(), (unknown,))
        assert caught.value.sqlstate == "DC003"
        assert unknown[:12] in str(caught.value)
        assert not WHOLE_ID.search(str(caught.value))
    with pytest.raises(UnknownWorkflow):
        stuck.retry()
    with pytest.raises(UnknownWorkflow):
        stuck.retry({"lines": []})
    assert continuations(conn) == before


def test_a_retry_that_is_rolled_back_has_not_happened(stuck: Handle, dsn: str, conn: psycopg.Connection) -> None:
    with psycopg.connect(dsn) as tx:
        side_statements.retry_dead_letter(tx, stuck.id)
        tx.rollback()
    assert continuations(conn) == (0, 1, 0)


# Many.


def test_many_go_on_once_each_in_every_shard_and_the_others_stay(machine: Machine, conn: psycopg.Connection) -> None:
    handles = only_started(conn, machine, 60)
    bury(conn, *[line(one) for one in handles[:50]])
    bury(conn, *[line(one) for one in handles[50:]], reason="crashes")
    assert conn.execute("select durable.retry_dead_letters('order', 'charge', 'attempts', 30)").fetchone() == (30,)
    assert conn.execute("select durable.retry_dead_letters(i_reason => 'attempts')").fetchone() == (20,)
    assert len(logged(conn)) == 50
    assert machine.app.run(until_idle=True) == 50
    assert {one.status() for one in handles[:50]} == {"completed"}
    assert {one.status() for one in handles[50:]} == {"stuck"}
    assert conn.execute("select durable.purge_dead_letters('other')").fetchone() == (0,)
    assert conn.execute("select durable.purge_dead_letters('order')").fetchone() == (10,)
    assert {one.status() for one in handles[50:]} == {"failed"}


def test_an_entry_of_the_log_holds_about_a_mebibyte_of_those_that_go_on(
    machine: Machine, conn: psycopg.Connection
) -> None:
    handles = only_started(conn, machine, 30)
    bury(conn, *[line(one, '"' + "x" * 200_000 + '"') for one in handles])
    assert conn.execute("select durable.retry_dead_letters()").fetchone() == (30,)
    sizes = conn.execute(
        "select octet_length(ev_data), ev_extra1::int from pgque.event_1 union all"
        " select octet_length(ev_data), ev_extra1::int from pgque.event_2"
    ).fetchall()
    assert sum(lines for _, lines in sizes) == 30
    assert max(size for size, _ in sizes) < 1_400_000


# Purge.


def test_a_purge_ends_the_workflow_with_what_its_dead_letter_says(stuck: Handle, conn: psycopg.Connection) -> None:
    conn.execute("select durable.purge_dead_letter(%s)", (stuck.id,))
    assert continuations(conn) == (0, 0, 1)
    with pytest.raises(WorkflowFailed, match="failed in step 'charge': ValueError: no card"):
        stuck.result(timeout=5)
    output = msgspec.json.decode(stuck.state().output or "")
    assert output == {**msgspec.json.decode(DETAILS), "purged": True}


# Two at a time, in two real sessions.


ACTS = {
    "retry": "select durable.retry_dead_letter(%s)",
    "purge": "select durable.purge_dead_letter(%s)",
}


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize(("first", "second"), [("retry", "retry"), ("retry", "purge"), ("purge", "retry")])
def test_of_two_that_take_one_dead_letter_the_second_waits_and_finds_none_or_takes_it(
    stuck: Handle,
    dsn: str,
    conn: psycopg.Connection,
    eventually: Eventually,
    first: str,
    second: str,
    is_committed: bool,
) -> None:
    answers: list[str | None] = []

    def follow() -> None:
        with psycopg.connect(dsn, autocommit=True) as late:
            try:
                late.execute(ACTS[second].encode(), (stuck.id,))
                answers.append(None)
            except psycopg.Error as error:
                answers.append(error.sqlstate)

    with psycopg.connect(dsn) as early:
        early.execute(ACTS[first].encode(), (stuck.id,))
        thread = threading.Thread(target=follow)
        thread.start()
        eventually(lambda: waits_for_a_lock(conn), what="the second waiting for the first")
        (early.commit if is_committed else early.rollback)()
        thread.join(20)
    assert answers == (["DC003"] if is_committed else [None])
    went = first if is_committed else second
    assert continuations(conn) == ((1, 0, 0) if went == "retry" else (0, 0, 1))


def waits_for_a_lock(conn: psycopg.Connection) -> bool:
    row = conn.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    ).fetchone()
    return row == (1,)


@pytest.mark.parametrize("act", ["retry", "purge"])
def test_many_leave_to_others_what_others_are_busy_with(
    stuck: Handle, machine: Machine, dsn: str, conn: psycopg.Connection, act: str
) -> None:
    (other,) = only_started(conn, machine)
    bury(conn, line(other))
    with psycopg.connect(dsn) as early:
        early.execute(ACTS["retry"].encode(), (stuck.id,))
        assert conn.execute(f"select durable.{act}_dead_letters()".encode()).fetchone() == (1,)
    assert sum(continuations(conn)) == 2
    assert stuck.status() == "running"


# Roles, and who sees what.


@contextmanager
def acting_as(dsn: str, role: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"set role {role}".encode())
        yield connection


def test_an_operator_retries_and_purges_without_seeing_a_state_and_a_viewer_only_looks(
    stuck: Handle, machine: Machine, dsn: str, conn: psycopg.Connection
) -> None:
    (other,) = only_started(conn, machine)
    bury(conn, line(other, '"a secret"'))
    look = ("select * from durable.dead_letters()", "select * from durable.dead_letter_total()")
    act = (
        "select durable.retry_dead_letter(%s)",
        "select durable.purge_dead_letter(%s)",
        "select * from durable.dead_letter_of(%s)",
    )
    with acting_as(dsn, "durable_viewer") as viewer:
        for allowed in look:
            assert viewer.execute(allowed.encode()).fetchall()
        for denied in (
            *act,
            "select durable.dead_letter_state(%s)",
            "select durable.dead_letters_by_prefix(durable.hex(%s))",
        ):
            with pytest.raises(InsufficientPrivilege):
                viewer.execute(denied.encode(), (stuck.id,))
    with acting_as(dsn, "durable_operator") as operator:
        assert operator.execute("select * from durable.dead_letter_of(%s)", (other.id,)).fetchall()
        for denied in ("select durable.dead_letter_state(%s)", "select line from durable.dead_letter where id = %s"):
            with pytest.raises(InsufficientPrivilege):
                operator.execute(denied.encode(), (other.id,))
        assert "a secret" not in repr([operator.execute(query.encode()).fetchall() for query in look])
        operator.execute("select durable.retry_dead_letter(%s)", (stuck.id,))
        operator.execute("select durable.purge_dead_letter(%s)", (other.id,))
    with acting_as(dsn, "durable_client") as client:
        assert client.execute("select status from durable.outcome(%s)", (other.id,)).fetchone() == ("failed",)
        for denied in (*look, "select durable.bury('', '', '')"):
            with pytest.raises(InsufficientPrivilege):
                client.execute(denied.encode())
        with pytest.raises(InsufficientPrivilege):
            client.execute("select durable.retry_dead_letter(%s)", (stuck.id,))


def test_no_error_and_no_listing_of_dead_letters_carries_a_whole_id(
    stuck: Handle, conn: psycopg.Connection, machine: Machine
) -> None:
    rows = conn.execute("select * from durable.dead_letters()").fetchall()
    assert not WHOLE_ID.search(repr(rows))
    (broken,) = only_started(conn, machine)
    bury(conn, line(broken, "["))
    calls: list[Callable[[], object]] = [
        stuck.result,
        broken.retry,
        lambda: stuck.retry("x"),
        lambda: Handle(machine.app.client, "order", "f" * 32).retry(),
        lambda: Handle(machine.app.client, "order", "f" * 32).retry(1),
    ]
    for call in calls:
        with pytest.raises(DurableError) as caught:
            call()
        assert not WHOLE_ID.search(f"{caught.value!r} {vars(caught.value)}")


# What steps do.


def test_a_step_that_gives_up_is_a_dead_letter_and_goes_on_once_it_is_mended(
    machine: Machine, conn: psycopg.Connection
) -> None:
    answers: list[Any] = ["garbage"]

    @machine.app.machine("mended").step(start=True)
    def answer(ctx: Context, _: Any) -> Continuation:
        return answers[-1] if isinstance(answers[-1], str) else ctx.done(answers[-1])  # type: ignore[return-value]

    handle = machine.app.named("mended").start(None)
    machine.app.run(until_idle=True, timeout=20)
    with pytest.raises(WorkflowStuck, match="in step 'answer' after 1 attempt: step 'answer' returned str"):
        handle.result(timeout=5)
    answers.append(42)
    handle.retry()
    machine.app.run(until_idle=True, timeout=20)
    assert handle.result(timeout=5) == 42
    assert count(conn, "dead_letter") == 0


def test_a_terminal_error_ends_its_workflow_and_leaves_no_dead_letter(
    machine: Machine, conn: psycopg.Connection
) -> None:
    @machine.app.machine("ended").step(start=True)
    def end(ctx: Context, _: Any) -> Continuation:
        raise TerminalError("the card is stolen")

    handle = machine.app.named("ended").start(None)
    machine.app.run(until_idle=True, timeout=20)
    with pytest.raises(WorkflowFailed) as caught:
        handle.result(timeout=5)
    assert caught.value.reason == TerminalError("the card is stolen").reason
    assert count(conn, "dead_letter") == 0
