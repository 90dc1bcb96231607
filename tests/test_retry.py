"""Retries: which errors, how often, after which pause; one idempotency key for all attempts; then a dead letter."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from durable_cluster import (
    App,
    AppError,
    Context,
    Continuation,
    InputError,
    Retry,
    Settings,
    TerminalError,
    WorkflowFailed,
    WorkflowStuck,
    statements,
)
from durable_cluster.retry import full_name


def test_the_pause_doubles_up_to_its_limit_and_chance_only_shortens_it() -> None:
    policy = Retry(attempts=9, backoff="1s", max_backoff="5m").policy
    assert [policy.pause_s(attempt, chance=0.0) for attempt in (1, 2, 3, 9, 10, 5000)] == [1, 2, 4, 256, 300, 300]
    assert [policy.pause_s(3, chance=chance) for chance in (0.25, 0.5)] == [3.0, 2.0]
    assert Retry(backoff=2, jitter=0).policy.pause_s(1, chance=0.9) == 2.0
    assert Retry(backoff=timedelta(milliseconds=20)).policy.backoff_s == 0.02


def test_only_named_errors_are_retried_and_named_ones_are_given_up_with_their_subclasses() -> None:
    picky = Retry(retry_on=(ConnectionError, TimeoutError), give_up_on=(ConnectionRefusedError,)).policy
    tried = [ConnectionResetError(), TimeoutError(), ConnectionRefusedError(), ValueError()]
    assert [picky.is_retried(error) for error in tried] == [True, True, False, False]
    assert Retry().policy.is_retried(KeyError())
    assert full_name(ConnectionError) == "builtins.ConnectionError"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attempts": 0}, "Retry attempts: 0 is out of range"),
        ({"attempts": -1}, "Retry attempts: -1"),
        ({"attempts": True}, "Retry attempts: True"),
        ({"attempts": 2.5}, "Retry attempts: 2.5"),
        ({"backoff": "-1s"}, "Retry backoff: '-1s' is no duration"),
        ({"backoff": -1}, "Retry backoff: -1 is out of range"),
        ({"backoff": "3 fortnights"}, "Retry backoff: '3 fortnights' has an unknown unit 'fortnights'"),
        ({"backoff": "10m"}, "Retry backoff: '10m' is above max_backoff, 300.0"),
        ({"max_backoff": "200000d"}, "Retry max_backoff: '200000d' is out of range"),
        ({"jitter": 1.5}, "Retry jitter: 1.5 is out of range"),
        ({"retry_on": ("ValueError",)}, "Retry retry_on: 'ValueError' is no exception class"),
        ({"give_up_on": (int,)}, "Retry give_up_on: <class 'int'> is no exception class"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_field_and_value(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        Retry(**given)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"timeout": 0}, InputError, "timeout of step 'step': 0 leaves it no time"),
        ({"timeout": "-1s"}, InputError, "timeout of step 'step': '-1s' is no duration"),
        ({"timeout": "5 parsecs"}, InputError, "unknown unit 'parsecs'"),
        ({"retry": 3}, AppError, "retry of step 'step': 3 is no Retry(…)"),
        ({"blocking": True, "transactional": True}, AppError, "step 'step' is blocking and transactional"),
    ],
)
def test_a_step_whose_options_cannot_be_is_refused(given: dict[str, Any], error: type[Exception], says: str) -> None:
    machine = App("bad").machine("bad", state=int)

    def step(n: int) -> Continuation: ...

    with pytest.raises(error) as raised:
        machine.step(**given)(step)
    assert says in str(raised.value)
    assert not machine.steps


def seen_by(
    dsn: str, body: Callable[[Context], Continuation], **options: Any
) -> tuple[Any, list[tuple[int, int, str]]]:
    """A workflow of one such step, run to its end; its handle, and seq, attempt and key of each attempt."""
    app = App("trying", dsn=dsn, settings=Settings(step_timeout_s=5))
    machine = app.machine("trying", state=int)
    seen: list[tuple[int, int, str]] = []

    @machine.step(start=True)
    def first(ctx: Context, n: int) -> Continuation:
        return ctx.goto(tried, n, retry=options.pop("per_call", None))

    @machine.step(**{name: value for name, value in options.items() if name != "per_call"})
    def tried(ctx: Context, n: int) -> Continuation:
        seen.append((ctx.seq, ctx.attempt, ctx.idempotency_key))
        return body(ctx)

    handle = machine.start(1)
    app.run(until_idle=True)
    return handle, seen


def fails_until(attempt: int) -> Callable[[Context], Continuation]:
    def body(ctx: Context) -> Continuation:
        if ctx.attempt < attempt:
            raise ConnectionError(f"attempt {ctx.attempt}")
        return ctx.done(ctx.attempt)

    return body


@pytest.mark.parametrize("kind", ["plain", "blocking", "transactional"])
def test_each_attempt_is_a_step_of_its_own_and_all_share_one_idempotency_key(dsn: str, kind: str) -> None:
    options = {} if kind == "plain" else {kind: True}
    handle, seen = seen_by(dsn, fails_until(3), retry=Retry(backoff=0), **options)
    assert handle.result(timeout=1) == 3
    assert [(seq, attempt) for seq, attempt, _ in seen] == [(2, 1), (3, 2), (4, 3)]
    assert len({key for _, _, key in seen}) == 1


def test_after_the_last_attempt_the_step_is_a_dead_letter_that_says_step_attempt_error_and_traceback(
    dsn: str, conn: psycopg.Connection
) -> None:
    handle, seen = seen_by(dsn, fails_until(9), retry=Retry(attempts=2, backoff=0))
    assert len(seen) == 2
    with pytest.raises(WorkflowStuck, match="stuck in step 'tried' after 2 attempts: ConnectionError: attempt 2"):
        handle.result(timeout=1)
    details = conn.execute(
        "select reason, details::json ->> 'attempt', details::json ->> 'traceback' from durable.dead_letter"
    )
    reason, attempt, traceback = details.fetchone()
    assert (reason, attempt) == ("attempts", "2")
    assert "raise ConnectionError" in traceback


def test_a_dead_letter_that_is_taken_up_again_has_fresh_attempts_and_the_same_key(dsn: str) -> None:
    app = App("again", dsn=dsn)
    machine = app.machine("again", state=int)
    seen: list[tuple[int, str]] = []

    @machine.step(start=True, retry=Retry(attempts=2, backoff=0))
    def tried(ctx: Context, n: int) -> Continuation:
        seen.append((ctx.attempt, ctx.idempotency_key))
        if len(seen) < 4:
            raise ConnectionError
        return ctx.done(len(seen))

    handle = machine.start(1)
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    handle.retry()
    app.run(until_idle=True)
    assert handle.result(timeout=1) == 4
    assert [attempt for attempt, _ in seen] == [1, 2, 3, 4]
    assert len({key for _, key in seen}) == 1


def test_a_policy_of_the_call_stands_in_for_that_of_the_step(dsn: str) -> None:
    handle, seen = seen_by(dsn, fails_until(3), retry=Retry(attempts=1), per_call=Retry(attempts=3, backoff=0))
    assert (handle.result(timeout=1), len(seen)) == (3, 3)


def test_an_error_that_is_given_up_on_is_a_dead_letter_at_once(dsn: str, conn: psycopg.Connection) -> None:
    handle, seen = seen_by(dsn, fails_until(3), retry=Retry(backoff=0, give_up_on=(OSError,)))
    assert (handle.status(), len(seen)) == ("stuck", 1)
    assert conn.execute("select reason from durable.dead_letter").fetchall() == [("given_up",)]


def test_a_terminal_error_ends_the_workflow_without_another_attempt(dsn: str, conn: psycopg.Connection) -> None:
    def body(ctx: Context) -> Continuation:
        raise TerminalError("the account is closed")

    handle, seen = seen_by(dsn, body, retry=Retry(backoff=0))
    assert len(seen) == 1
    with pytest.raises(WorkflowFailed, match="failed in step 'tried': the account is closed"):
        handle.result(timeout=1)
    assert conn.execute("select count(*) from durable.dead_letter").fetchone() == (0,)


def test_a_step_that_exits_python_fails_its_attempt_and_not_its_process(dsn: str) -> None:
    def body(ctx: Context) -> Continuation:
        if ctx.attempt == 1:
            raise SystemExit(3)
        return ctx.done("still here")

    handle, _ = seen_by(dsn, body, retry=Retry(backoff=0))
    assert handle.result(timeout=1) == "still here"


def test_a_statement_beyond_the_timeout_of_its_transactional_step_is_ended_and_its_neighbours_commit(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("create table effect (n int)")
    app = App("late", dsn=dsn)
    machine = app.machine("late", state=int)

    @machine.step(start=True, transactional=True, timeout="200ms", retry=Retry(attempts=2, backoff=0))
    def slow(ctx: Context, n: int) -> Continuation:
        ctx.tx.execute("insert into effect values (%s)", (n,))
        if n == 3 and ctx.attempt == 1:
            ctx.tx.execute("select pg_sleep(10)")
        return ctx.done(ctx.attempt)

    handles = machine.start_many(list(range(6)))
    app.run(until_idle=True)
    assert [handle.result(timeout=1) for handle in handles] == [1, 1, 1, 2, 1, 1]
    assert [n for (n,) in conn.execute("select n from effect order by n")] == list(range(6))


def test_what_no_code_knows_waits_for_code_that_does(dsn: str, conn: psycopg.Connection) -> None:
    new, old = App("new", dsn=dsn), App("old", dsn=dsn)

    @new.machine("coming", state=int).step(start=True)
    def arrives(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    handle = new.named("coming").start(7)
    old.run(timeout=0.3)
    assert (handle.status(), [place.place for place in statements.locate(conn, handle.id)]) == ("running", ["sleeping"])
    new.run(until_idle=True)
    assert handle.result(timeout=1) == 7


def test_what_no_code_knows_for_too_long_is_a_dead_letter(dsn: str, conn: psycopg.Connection) -> None:
    new = App("new", dsn=dsn)
    old = App("old", dsn=dsn, settings=Settings(unroutable_limit_s=0.5))

    @new.machine("coming", state=int).step(start=True)
    def arrives(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    handle = new.named("coming").start(7)
    old.run(until_idle=True)
    assert handle.status() == "stuck"
    assert conn.execute("select reason from durable.dead_letter").fetchall() == [("unroutable",)]


def test_a_sleep_goes_on_with_its_step_and_state_when_it_is_over(dsn: str, conn: psycopg.Connection) -> None:
    app = App("sleeping", dsn=dsn)
    machine = app.machine("sleeping", state=int)

    @machine.step(start=True)
    def falls_asleep(ctx: Context, n: int) -> Continuation:
        return ctx.sleep("50ms" if n else "7d", wakes_up, n + 1)

    @machine.step()
    def wakes_up(ctx: Context, n: int) -> Continuation:
        return ctx.done((n, ctx.seq))

    short, long = machine.start_many([1, 0])
    app.run(until_idle=True)
    assert short.result(timeout=1) == [2, 2]
    assert long.status() == "running"
    place = statements.locate(conn, long.id)[0]
    assert (place.place, place.step, place.seq) == ("sleeping", "wakes_up", 2)
    conn.execute(
        "create or replace function durable.now() returns timestamptz language sql volatile as"
        " $$ select clock_timestamp() + interval '8 days' $$"
    )
    app.run(until_idle=True)
    assert long.result(timeout=1) == [1, 2]
    assert conn.execute("select count(*) from durable.wait").fetchone() == (0,)


@pytest.mark.parametrize("duration", ["-1s", "200 years", -5, float("nan"), "1 fortnight", None])
def test_a_sleep_that_cannot_be_is_a_mistake_in_the_step(dsn: str, duration: Any) -> None:
    handle, seen = seen_by(dsn, lambda ctx: ctx.sleep(duration, "tried", 1), retry=Retry(backoff=0))
    assert handle.status() == "stuck"
    assert len(seen) == 1, "another attempt would fail the same way"
