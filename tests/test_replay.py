"""Start over, and start from a point: what is kept, what happens anew, what is refused, and who of two that try gets it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable_cluster import (
    App,
    Context,
    Continuation,
    Handle,
    InputError,
    InvalidState,
    Limit,
    Retry,
    Settings,
    TerminalError,
    UnknownWorkflow,
    Where,
    WorkflowFailed,
    WorkflowHandle,
    WorkflowStuck,
    continue_as_new,
    gather,
    loop,
    now,
    random,
    scope,
    select,
    set_attributes,
    sleep,
    statements,
    uuid4,
    wait_for,
)

Connection = psycopg.Connection[Any]
ONCE = Retry(attempts=1)
HOW = {
    "resumed": Settings(run_ahead_ms=0),
    "entered anew": Settings(functions_max=0, run_ahead_ms=0),
    "run ahead": Settings(run_ahead_ms=60_000),
}


@pytest.fixture(params=HOW)
def app(request: pytest.FixtureRequest, dsn: str) -> Iterator[App]:
    app = App("again", dsn=dsn, settings=HOW[request.param])
    yield app
    app.close()


@pytest.fixture
def plain(dsn: str) -> Iterator[App]:
    """For what does not depend on how a function is taken up."""
    app = App("again", dsn=dsn)
    yield app
    app.close()


class Ran:
    """What steps were run, with what, and which of them raise."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.broken: set[str] = set()

    def note(self, *what: Any) -> None:
        self.steps.append(what if len(what) > 1 else what[0])
        if what[0] in self.broken:
            raise RuntimeError(f"{what[0]} is out of order")

    def taken(self) -> list[Any]:
        """Since the last time."""
        steps, self.steps = self.steps, []
        return steps


@pytest.fixture
def did() -> Ran:
    return Ran()


def ran(app: App, handle: Handle) -> Any:
    app.run(until_idle=True)
    return handle.result(timeout=1)


def paths(handle: Handle) -> list[str]:
    return [f"{one.path} {one.status}" for one in handle.history()]


def orders(app: App, did: Ran, **how: Any) -> Any:
    """Three steps, one after the other."""

    @app.step(retry=ONCE)
    def price(n: int) -> int:
        did.note("price", n)
        return 10 * n

    @app.step(retry=ONCE)
    def charge(ctx: Context, cents: int) -> str:
        did.note("charge", cents)
        return f"receipt for {cents}"

    @app.step(retry=ONCE)
    def ship(receipt: str) -> str:
        did.note("ship")
        return f"shipped, {receipt}"

    @app.workflow(**{"keeps_memo": True, **how})
    async def order(n: int) -> str:
        return await ship(await charge(await price(n)))

    return order


def machine_of(app: App, did: Ran, *, limit: Limit | None = None) -> Any:
    """The same as steps that say what comes next."""
    machine = app.machine("order", state=int, limit=limit)

    @machine.step(start=True, retry=ONCE)
    def price(ctx: Context, n: int) -> Continuation:
        did.note("price", n)
        return ctx.goto(charge, 10 * n)

    @machine.step(retry=ONCE)
    def charge(ctx: Context, cents: int) -> Continuation:
        did.note("charge", cents)
        return ctx.done(f"receipt for {cents}")

    return machine


def live_events(conn: Connection, handle: Handle) -> int:
    return len(statements.locate(conn, handle.id))


# Replay.


@pytest.mark.parametrize("kind", [orders, machine_of])
def test_a_stuck_workflow_starts_over_itself_with_its_input_and_nothing_else(
    app: App, did: Ran, conn: Connection, kind: Callable[..., Any]
) -> None:
    did.broken = {"charge"}
    handle = kind(app, did).start(3, key="k", attributes={"a": 1})
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    again = handle.replay(actor="ada")
    assert (again.id, type(again)) == (handle.id, type(handle))
    assert (handle.status(), live_events(conn, handle)) == ("running", 1)
    did.broken, _ = set(), did.taken()
    assert "receipt for 30" in ran(app, again)
    assert did.taken()[:2] == [("price", 3), ("charge", 30)]
    assert app.named("order").get(key="k").attributes() == {"a": 1}


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("is_linear", [True, False])
def test_one_that_has_ended_is_started_anew_without_its_key_and_twice_gives_two(
    plain: App, did: Ran, conn: Connection, status: str, is_linear: bool
) -> None:
    kind = (orders if is_linear else machine_of)(plain, did)
    did.broken = {"charge"} if status != "completed" else set()
    first = kind.start(3, key="k", attributes={"customer": "ada"})
    plain.run(until_idle=True)
    if status == "cancelled":
        first.cancel()
        plain.run(until_idle=True)
    elif status == "failed":
        conn.execute("select durable.purge_dead_letter(%s)", (first.id,))
    assert first.status() == status
    did.broken, _ = set(), did.taken()
    again, and_again = first.replay(), first.replay()
    assert len({first.id, again.id, and_again.id}) == 3
    plain.run(until_idle=True)
    assert "receipt for 30" in again.result(timeout=1)
    assert did.taken().count(("price", 3)) == 2
    assert (first.status(), kind.get(key="k").id) == (status, first.id)
    assert again.attributes() == {"customer": "ada"}
    found = plain.list(origin=first.id)
    assert {(one.id, one.key, one.origin) for one in found} == {
        (one.id[:12], None, first.id[:12]) for one in (again, and_again)
    }
    if is_linear:
        assert isinstance(again, WorkflowHandle)


def test_a_replay_is_of_the_version_and_the_first_step_that_run_now(plain: App, did: Ran, dsn: str) -> None:
    first = machine_of(plain, did).start(1)
    plain.run(until_idle=True)
    newer = App("again", dsn=dsn)
    machine = newer.machine("order", state=int, version=2)

    @machine.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.done(["new", n])

    newer.run(until_idle=True)
    again = newer.get(first.id).replay()
    assert ran(newer, again) == ["new", 1]
    assert again.state().version == 2
    newer.close()


def test_one_that_goes_on_by_itself_is_refused(plain: App, did: Ran) -> None:
    @plain.workflow(keeps_memo=True)
    async def waiter() -> Any:
        return await wait_for("go")

    plain.run(until_idle=True)
    handle = waiter.start()
    with pytest.raises(InvalidState, match="goes on by itself; cancel it first"):
        handle.replay()
    plain.run(until_idle=True)
    with pytest.raises(InvalidState, match=f"durable-cluster cancel {handle.id[:12]}'"):
        handle.replay()
    handle.signal("go", 1)
    assert ran(plain, handle) == 1


def test_one_that_is_stuck_in_its_cleanup_is_refused(plain: App, did: Ran) -> None:
    machine = plain.machine("order", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.wait_for("never", then=begin, state=n)

    @machine.step(on_cancel=True)
    def clean_up(ctx: Context, n: int) -> Continuation:
        raise InputError("out of order")

    handle = machine.start(1)
    plain.run(until_idle=True)
    handle.cancel()
    plain.run(until_idle=True)
    with pytest.raises(InvalidState, match="stuck in its cleanup; retry or purge its dead letter first"):
        handle.replay()
    assert handle.status() == "stuck"


def test_unknown_ids_and_types_are_refused(plain: App, did: Ran, conn: Connection) -> None:
    kind = machine_of(plain, did)
    nobody = Handle(plain.client, "order", "0" * 32)
    for act in (nobody.replay, nobody.fork, nobody.history):
        with pytest.raises(UnknownWorkflow, match="no workflow with the id 000000000000…"):
            act()
    handle = kind.start(1)
    handle.cancel()
    plain.run(until_idle=True)
    with pytest.raises(InputError, match="actor"):
        handle.replay(actor="")
    conn.execute("delete from durable.workflow_type")
    for act in (handle.replay, handle.fork, handle.history):
        with pytest.raises(InvalidState, match="no code has run on this database that knows workflow 'order'"):
            act()


def test_the_asynchronous_twins_do_the_same(plain: App, did: Ran) -> None:
    first = orders(plain, did).start(3)
    assert ran(plain, first)

    async def all_three() -> tuple[Any, Any, Any]:
        return await first.replay_async(), await first.fork_async("2 charge"), await first.history_async()

    again, forked, recorded = asyncio.run(all_three())
    plain.run(until_idle=True)
    assert again.result(timeout=1) == forked.result(timeout=1) == "shipped, receipt for 30"
    assert len(recorded) == 3


def test_a_fork_is_of_the_version_whose_code_came_that_way(plain: App, did: Ran) -> None:
    first = orders(plain, did).start(3)
    assert ran(plain, first)

    @plain.workflow(name="order", version=2)
    async def newer(n: int) -> str:
        return f"new {n}"

    plain.run(until_idle=True)
    assert ran(plain, first.fork("3 ship")) == "shipped, receipt for 30"
    assert ran(plain, first.fork(input=4)) == ran(plain, first.replay()).replace("3", "4") == "new 4"


def test_a_replay_in_a_transaction_stands_and_falls_with_it(plain: App, did: Ran, dsn: str) -> None:
    did.broken = {"charge"}
    handle = orders(plain, did).start(1)
    plain.run(until_idle=True)
    with psycopg.connect(dsn) as tx:
        handle.replay(tx=tx)
        tx.rollback()
    assert handle.status() == "stuck"


def test_children_that_live_forbid_a_replay_and_those_that_ended_are_forgotten(app: App, did: Ran) -> None:
    @app.step
    def count(n: int) -> None:
        did.note("child", n)

    @app.workflow(keeps_memo=True)
    async def child(n: int) -> int:
        await count(n)
        if n == 2:
            await wait_for("go")
        return n

    @app.step(retry=ONCE)
    def fragile(n: int) -> int:
        did.note("fragile")
        return n

    @app.workflow(keeps_memo=True)
    async def parent(n: int) -> list[int]:
        one, two = child.spawn(1), child.spawn(2)
        await one
        await fragile(n)
        return await gather(one, two)

    did.broken = {"fragile"}
    handle = parent.start(7)
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    with pytest.raises(InvalidState, match=f"1 children of workflow .* live.*--parent {handle.id[:12]}'"):
        handle.replay()
    assert handle.status() == "stuck"
    app.get(list(handle.children())[1].id).signal("go")
    app.run(until_idle=True)
    did.broken = set()
    handle.replay()
    app.run(until_idle=True)
    assert sorted(one for one in did.taken() if one != "fragile") == [
        ("child", 1),
        ("child", 1),
        ("child", 2),
        ("child", 2),
    ]
    assert len(list(handle.children())) == 2, "those of the second life"
    app.get(list(handle.children())[1].id).signal("go")
    assert ran(app, handle) == [1, 2]


def test_children_of_a_machine_that_starts_over_are_of_its_second_life_alone(plain: App, did: Ran) -> None:
    child = plain.machine("child", state=int)
    parent = plain.machine("parent", state=int)

    @child.step(start=True)
    def count(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    @parent.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.spawn([child.child(k) for k in range(n)], then=fragile, state=n)

    @parent.step(retry=ONCE)
    def fragile(ctx: Context, n: int) -> Continuation:
        did.note("fragile")
        return ctx.gather(then=end, state=n)

    @parent.step()
    def end(ctx: Context, n: int) -> Continuation:
        return ctx.done(ctx.results.values())

    did.broken = {"fragile"}
    handle = parent.start(2)
    plain.run(until_idle=True)
    did.broken = set()
    assert ran(plain, handle.replay()) == [0, 1]


def test_signals_that_nobody_read_stay_and_those_that_were_read_can_be_sent_again(app: App, did: Ran) -> None:
    @app.step(retry=ONCE)
    def fragile() -> None:
        did.note("fragile")

    @app.workflow(keeps_memo=True)
    async def asks() -> list[Any]:
        said = [await wait_for("go")]
        await fragile()
        return [*said, await wait_for("early")]

    did.broken = {"fragile"}
    handle = asks.start()
    handle.signal("early", "kept")
    handle.signal("go", 1, key="once")
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    did.broken = set()
    handle.replay()
    app.run(until_idle=True)
    assert paths(handle) == ["now open"]
    handle.signal("go", 2, key="once")
    assert ran(app, handle) == [2, "kept"]


def test_a_token_of_the_first_life_opens_nothing_in_the_second(app: App, did: Ran) -> None:
    tokens: list[str] = []

    @app.step
    def mail(ctx: Context) -> None:
        tokens.append(ctx.token)

    @app.step(retry=ONCE)
    def fragile() -> None:
        did.note("fragile")

    @app.workflow(keeps_memo=True)
    async def asks() -> Any:
        await mail()
        said = await wait_for("go", require_token=True)
        await fragile()
        return said

    did.broken = {"fragile"}
    handle = asks.start()
    app.run(until_idle=True)
    handle.signal("go", 1, token=tokens[0])
    app.run(until_idle=True)
    assert handle.status() == "stuck"
    did.broken = set()
    handle.replay()
    app.run(until_idle=True)
    with pytest.raises(UnknownWorkflow):
        handle.signal("go", 2, token=tokens[0])
    handle.signal("go", 3, token=tokens[1])
    assert ran(app, handle) == 3


# Fork.


def test_a_fork_keeps_what_was_recorded_before_the_await_and_does_that_and_the_rest_anew(app: App, did: Ran) -> None:
    did.broken = {"ship"}
    first = orders(app, did).start(3, attributes={"customer": "ada"})
    app.run(until_idle=True)
    assert paths(first) == ["1 price completed", "2 charge completed", "3 ship open"]
    assert [(one.name, one.value) for one in first.history()] == [
        ("price", 30),
        ("charge", "receipt for 30"),
        ("ship", None),
    ]
    did.broken, _ = set(), did.taken()
    second = first.fork("2 charge")
    assert isinstance(second, WorkflowHandle)
    assert ran(app, second) == "shipped, receipt for 30"
    assert did.taken() == [("charge", 30), "ship"]
    assert first.status() == "stuck", "it stays as it is"
    assert second.attributes() == {"customer": "ada"}
    assert ran(app, first.fork("3")) == "shipped, receipt for 30"
    assert did.taken() == ["ship"]
    assert ran(app, first.fork("1 price", input=5)) == "shipped, receipt for 50"
    assert did.taken() == [("price", 5), ("charge", 50), "ship"]
    assert ran(app, first.fork(input=6)) == "shipped, receipt for 60"
    assert ran(app, first.fork()) == "shipped, receipt for 30"
    assert ran(app, second.fork("3 ship")) == "shipped, receipt for 30", "a fork is forked as any other"
    assert {one.origin for one in app.list("order", limit=9)} == {None, first.id[:12], second.id[:12]}


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "purged"])
def test_one_that_has_ended_is_forked_by_what_it_kept(app: App, did: Ran, conn: Connection, status: str) -> None:
    @app.step(retry=ONCE)
    def price(n: int) -> int:
        did.note("price")
        return 10 * n

    @app.step(retry=ONCE)
    def charge(cents: int) -> int:
        if "charge" in did.broken and status == "failed":
            raise TerminalError("no card")
        did.note("charge")
        return cents

    @app.workflow(keeps_memo=True)
    async def order(n: int) -> int:
        cents = await price(n)
        await sleep(0.001 if not did.broken or status != "cancelled" else 3600)
        return await charge(cents)

    did.broken = {"charge"} if status != "completed" else set()
    first = order.start(3)
    app.run(until_idle=True)
    if status == "cancelled":
        first.cancel()
        app.run(until_idle=True)
    elif status == "purged":
        conn.execute("select durable.purge_dead_letters()")
    assert first.status() == status.replace("purged", "failed")
    third = {"completed": ["3 charge completed"], "failed": ["3 charge failed"], "purged": ["3 charge open"]}
    known = ["1 price completed", *(["2 sleep completed", *third[status]] if status in third else ["cancel cancelled"])]
    assert paths(first) == known
    did.broken, _ = set(), did.taken()
    assert ran(app, first.fork("cancel" if status == "cancelled" else "3 charge")) == 30
    assert did.taken() == ["charge"]
    assert ran(app, first.fork("1 price", 4)) == 40


def test_those_that_wait_sleep_or_run_are_forked_where_they_stand(app: App, did: Ran, conn: Connection) -> None:
    @app.step
    def price(n: int) -> int:
        did.note("price")
        return n

    @app.workflow(keeps_memo=True)
    async def order(n: int) -> Any:
        cents = await price(n)
        await sleep("1h")
        word = await select("yes", "no")
        return [cents, word.name if word else None]

    first = order.start(3)
    app.run(until_idle=True)
    assert paths(first)[0] == "1 price completed"
    (place,) = statements.locate(conn, first.id)
    assert place.place == "sleeping"
    did.taken()
    second = first.fork("2 sleep")
    app.run(until_idle=True)
    assert (did.taken(), [one.place for one in statements.locate(conn, second.id)]) == ([], ["sleeping"])
    third = first.fork("now")
    app.run(until_idle=True)
    assert (did.taken(), [one.place for one in statements.locate(conn, third.id)]) == ([], ["sleeping"])
    queued = order.start(4)
    assert (statements.locate(conn, queued.id)[0].step, paths(queued)) == ("workflow.start", ["now open"])
    with pytest.raises(InputError, match="cannot be forked at '1 price'; it can at 'now'"):
        queued.fork("1 price")
    assert queued.fork(input=5).status() == "running"


def test_a_gather_that_runs_shows_what_has_ended_of_it(plain: App, did: Ran, conn: Connection) -> None:
    """Which its progress says, in a row of its own."""

    @plain.step
    async def fetch(n: int) -> int:
        did.note("fetch", n)
        return n

    @plain.workflow(keeps_memo=True)
    async def fan(n: int) -> list[int]:
        return await gather(fetch(1), fetch(2))

    first = fan.start(1)
    line = f'{{"w":"{first.id}","n":2,"f":"fan","s":"workflow.gather","v":1,"d":{{"i":1}}}}'
    plain.run(until_idle=True)
    assert sorted(paths(first)) == ["2.1 fetch completed", "3.1 fetch completed"]
    conn.execute("delete from durable.finished")
    conn.execute(
        "insert into durable.detached (id, seq, shard, owner, line, progress, since) values (%s, 2, 0, 77, %s, %s, now())",
        (first.id, line, '[["2.1 fetch",2]]'),
    )
    assert paths(first) == ["2.1 fetch completed", "now open"]
    did.taken()
    second = first.fork("2.1 fetch")
    assert ran(plain, second) == [1, 2]
    assert sorted(did.taken()) == [("fetch", 1), ("fetch", 2)]
    assert ran(plain, first.fork("now")) == [2, 2], "what the row says that the first came to"
    assert did.taken() == [("fetch", 2)]


def test_of_branches_counts_what_ended_first(plain: App, did: Ran) -> None:
    @plain.step
    async def fetch(n: int) -> int:
        did.note("fetch", n)
        return n

    @plain.workflow(keeps_memo=True)
    async def fan(n: int) -> int:
        await gather(fetch(1), fetch(2), fetch(3))
        return 0

    first = fan.start(1)
    plain.run(until_idle=True)
    order_of_ends = [one.value for one in first.history()]
    did.taken()
    second = first.fork(first.history()[2].path)
    plain.run(until_idle=True)
    assert did.taken() == [("fetch", order_of_ends[2])]
    assert second.result(timeout=1) == 0


def test_an_unknown_path_names_those_that_there_are(plain: App, did: Ran) -> None:
    did.broken = {"ship"}
    handle = orders(plain, did).start(3)
    plain.run(until_idle=True)
    with pytest.raises(InputError, match=r"cannot be forked at '9 ship'; it can at '1 price', '2 charge', '3 ship'$"):
        handle.fork("9 ship")
    with pytest.raises(InputError, match="does not fit int"):
        handle.fork("2 charge", input="three")

    @plain.step
    def tick(n: int) -> int:
        return n

    @plain.workflow(keeps_memo=True)
    async def many(n: int) -> int:
        for k in range(n):
            await tick(k)
        return n

    long = many.start(50)
    plain.run(until_idle=True)
    with pytest.raises(InputError, match=r"it can at …, '31 tick', .*'50 tick'$") as refusal:
        long.fork("nowhere")
    assert len(str(refusal.value)) < 500
    assert [one.number for one in long.history(limit=3)] == [48, 49, 50]
    with pytest.raises(InputError, match="1 or more"):
        long.history(limit=0)


def test_time_and_chance_before_the_point_are_kept_and_those_behind_it_are_new(app: App, did: Ran) -> None:
    @app.step
    def tick(n: int) -> int:
        return n

    @app.workflow(keeps_memo=True)
    async def chances() -> list[Any]:
        drawn: list[Any] = [str(uuid4()), now().timestamp()]
        await tick(1)
        drawn += [random()]
        await tick(2)
        return [*drawn, str(uuid4()), random()]

    first = chances.start()
    one = ran(app, first)
    assert [entry.path for entry in first.history()] == ["3 tick", "5 tick"]
    other = ran(app, first.fork("5 tick"))
    assert other[:3] == one[:3]
    assert set(other[3:]).isdisjoint(one[3:])
    early = ran(app, first.fork("3 tick"))
    assert early[:2] == one[:2]
    assert set(early[2:]).isdisjoint(one[2:])


def test_of_a_loop_the_turn_it_is_in_can_be_forked_and_what_is_before_the_loop(app: App, did: Ran) -> None:
    @app.step(retry=ONCE)
    def think(n: int) -> int:
        did.note("think", n)
        return n + 1

    @app.workflow(keeps_memo=True)
    async def agent(start: int) -> int:
        begin = await think(start)
        async for turn in loop(begin):
            turn.state = await think(turn.state)
            if turn.state >= 4:
                await think(100)
                break
        return turn.state

    first = agent.start(0)
    assert ran(app, first) == 4
    assert [one.path for one in first.history()] == ["1 think", "2~2.1 think", "2~2.2 think"]
    did.taken()
    assert ran(app, first.fork("2~2.2 think")) == 4
    assert did.taken() == [("think", 100)]
    assert ran(app, first.fork("2~2.1 think")) == 4
    assert did.taken() == [("think", 3), ("think", 100)]
    assert ran(app, first.fork("1 think")) == 4
    assert did.taken()[:2] == [("think", 0), ("think", 1)], "the loop begins with its first turn again"


def test_a_scope_that_has_ended_is_kept_as_a_whole(app: App, did: Ran) -> None:
    @app.step
    def tick(n: int) -> int:
        did.note("tick", n)
        return n

    @app.workflow(keeps_memo=True)
    async def scoped(n: int) -> list[int]:
        async def inner() -> int:
            return await tick(1) + await tick(2)

        total = await scope(inner)
        return [total, await tick(3)]

    first = scoped.start(1)
    assert ran(app, first) == [3, 3]
    did.taken()
    assert ran(app, first.fork("2 tick")) == [3, 3]
    assert did.taken() == [("tick", 3)]


def test_of_one_that_was_continued_as_new_its_last_run_is_forked(app: App, did: Ran) -> None:
    @app.step
    def tick(n: int) -> int:
        did.note("tick", n)
        return n

    @app.workflow(keeps_memo=True)
    async def runs(n: int) -> int:
        await tick(n)
        if n < 3:
            continue_as_new(n + 1)
        return await tick(10 * n)

    first = runs.start(1)
    assert ran(app, first) == 30
    did.taken()
    assert ran(app, first.fork("2 tick")) == 30
    assert did.taken() == [("tick", 30)]
    assert ran(app, first.fork()) == 30
    assert did.taken()[0] == ("tick", 1)


def test_a_failure_that_was_caught_before_the_point_is_raised_there_again(app: App, did: Ran) -> None:
    @app.step(retry=ONCE)
    def fragile(n: int) -> int:
        did.note("fragile")
        return n

    @app.step
    def after(n: int) -> int:
        did.note("after")
        return n

    @app.workflow(keeps_memo=True)
    async def careful(n: int) -> Any:
        try:
            await fragile(n)
        except RuntimeError as error:
            return [str(error), await after(n)]

    did.broken = {"fragile"}
    first = careful.start(1)
    assert ran(app, first) == ["fragile is out of order", 1]
    assert (first.history()[0].status, first.history()[0].error) == ("failed", "RuntimeError: fragile is out of order")
    did.broken, _ = set(), did.taken()
    assert ran(app, first.fork("2 after")) == ["fragile is out of order", 1]
    assert did.taken() == ["after"]


def test_a_signal_that_was_awaited_is_kept_and_others_stay_with_the_original(app: App, did: Ran) -> None:
    @app.workflow(keeps_memo=True)
    async def asks() -> list[Any]:
        return [await wait_for("a"), await wait_for("b")]

    first = asks.start()
    first.signal("a", 1)
    first.signal("c", "unread")
    app.run(until_idle=True)
    (entry,) = [one for one in first.history() if one.status == "completed"]
    assert (entry.path, entry.value["payload"]) == ("1 wait_for(a)", 1)
    first.signal("b", 2)
    assert ran(app, first) == [1, 2]
    second = first.fork("2 wait_for(b)")
    app.run(until_idle=True)
    assert second.status() == "running", "its own signal has to come"
    second.signal("b", 3)
    assert ran(app, second) == [1, 3]


def test_a_fork_at_the_step_that_hands_out_a_token_hands_out_its_own(app: App, did: Ran) -> None:
    tokens: list[str] = []

    @app.step
    def mail(ctx: Context) -> None:
        tokens.append(ctx.token)

    @app.workflow(keeps_memo=True)
    async def asks() -> Any:
        await mail()
        return await wait_for("go", require_token=True)

    first = asks.start()
    app.run(until_idle=True)
    second = first.fork("1 mail")
    app.run(until_idle=True)
    with pytest.raises(UnknownWorkflow):
        second.signal("go", 1, token=tokens[0])
    second.signal("go", 2, token=tokens[1])
    assert ran(app, second) == 2
    first.signal("go", 3, token=tokens[0])
    assert ran(app, first) == 3


def test_children_that_ended_come_along_and_are_not_run_again(app: App, did: Ran) -> None:
    @app.workflow(keeps_memo=True)
    async def child(n: int) -> int:
        did.note("child", n)
        if n == 13:
            raise TerminalError("bad luck")
        return 10 * n

    @app.step
    def total(values: list[int]) -> int:
        did.note("total", values)
        return sum(values)

    @app.workflow(keeps_memo=True)
    async def parent(n: int) -> list[Any]:
        one, two = child.spawn(1), child.spawn(2)
        values = await gather(one, two)
        before = await total(values)
        three = child.spawn(3)
        return [before, await three, await two, await total([1])]

    first = parent.start(0)
    assert ran(app, first) == [30, 30, 20, 1]
    recorded = [one.path for one in first.history()]
    assert len(recorded) == 5
    did.taken()
    second = first.fork(recorded[1])
    assert ran(app, second) == [30, 30, 20, 1]
    assert did.taken() == [("total", [10, 20]), ("child", 3), ("total", [1])]
    assert [(one.number, one.output) for one in second.children()] == [(0, 10), (1, 20), (2, 30)]
    third = second.fork(recorded[4])
    assert ran(app, third) == [30, 30, 20, 1]
    assert did.taken() == [("total", [1])]
    assert ran(app, third.fork(recorded[0])) == [30, 30, 20, 1]
    assert [one for one in did.taken() if one[0] == "child"] == [("child", 3)], "1 and 2 were spawned before that"


def test_a_fork_behind_children_that_live_is_refused_and_the_latest_point_is_named(app: App, did: Ran) -> None:
    @app.workflow(keeps_memo=True)
    async def child(n: int) -> Any:
        return await wait_for("go")

    @app.step
    def tick(n: int) -> int:
        return n

    @app.workflow(keeps_memo=True)
    async def parent(n: int) -> Any:
        await tick(1)
        await tick(2)
        one = child.spawn(1)
        await tick(3)
        await tick(4)
        return await one

    first = parent.start(0)
    app.run(until_idle=True)
    assert [one.name for one in first.history()][:4] == ["tick"] * 4
    with pytest.raises(
        InvalidState, match="children that have not ended; fork it when they have, or at '2 tick' at the"
    ):
        first.fork("5 tick")
    second = first.fork("2 tick")
    app.run(until_idle=True)
    assert [one.number for one in second.children()] == [0], "a child of its own"
    for handle in (first, second):
        app.get(next(iter(handle.children())).id).signal("go", handle.id[:3])
    assert ran(app, first) == first.id[:3]
    assert ran(app, second) == second.id[:3]


def test_a_cleanup_is_no_point_to_fork_at(app: App, did: Ran) -> None:
    @app.step
    def tick(n: int) -> int:
        did.note("tick", n)
        return n

    @app.workflow(keeps_memo=True)
    async def careful(n: int) -> Any:
        await tick(1)
        try:
            return await wait_for("go")
        finally:
            await tick(2)

    first = careful.start(0)
    app.run(until_idle=True)
    first.cancel()
    app.run(until_idle=True)
    assert paths(first) == ["1 tick completed", "cancel cancelled", "3 tick completed"]
    with pytest.raises(
        InvalidState, match=r"'3 tick' is of the cleanup after a cancel; .* at 'cancel', as if nobody had"
    ):
        first.fork("3 tick")
    second = first.fork("cancel")
    second.signal("go", "on")
    assert ran(app, second) == "on"


def test_what_was_not_kept_cannot_be_forked_but_from_its_beginning(plain: App, did: Ran) -> None:
    first = orders(plain, did, keeps_memo=False).start(3)
    assert ran(plain, first)
    for act in (first.history, lambda: first.fork("2 charge")):
        with pytest.raises(InvalidState, match=r"nothing is kept of what workflow .*keeps_memo=True"):
            act()
    assert ran(plain, first.fork(input=4)) == "shipped, receipt for 40"
    did.broken = {"ship"}
    stuck = orders_that_fail(plain, did).start(3)
    with pytest.raises(WorkflowFailed):
        ran(plain, stuck)
    assert [one.path for one in stuck.history()] == ["1 broken"], "of those that failed it is kept in any case"


def orders_that_fail(app: App, did: Ran) -> Any:
    @app.step(retry=ONCE)
    def broken(n: int) -> int:
        raise TerminalError("no")

    @app.workflow
    async def failing(n: int) -> int:
        return await broken(n)

    return failing


def test_more_than_a_step_event_could_carry_is_not_kept(dsn: str) -> None:
    app = App("again", dsn=dsn, settings=Settings(run_ahead_ms=60_000, payload_bytes_max=1000))

    @app.step
    def page(n: int) -> str:
        return "x" * 400

    @app.workflow(keeps_memo=True)
    async def reads(n: int) -> int:
        for k in range(n):
            await page(k)
        return n

    small, large = reads.start(2), reads.start(9)
    assert (ran(app, small), ran(app, large)) == (2, 9)
    assert len(small.history()) == 2
    with pytest.raises(InvalidState, match="it had too much"):
        large.history()
    app.close()


@pytest.mark.parametrize("value", ["\0", "🐘", "~0~1\\u0000 \\", {"~": ["\\\\u", None, "~1"]}])
def test_whatever_json_holds_is_read_and_forked_as_it_is(plain: App, value: Any) -> None:
    @plain.step
    def same(x: Any) -> Any:
        return x

    @plain.workflow(keeps_memo=True)
    async def twice(x: Any) -> Any:
        return [await same(x), await same(x)]

    first = twice.start(value)
    assert ran(plain, first) == [value, value]
    assert [one.value for one in first.history()] == [value, value]
    assert ran(plain, first.fork("2 same")) == [value, value]
    assert ran(plain, first.fork("1 same", input={"x": value})) == [{"x": value}] * 2


def test_a_machine_begins_in_any_of_its_steps(plain: App, did: Ran) -> None:
    machine = machine_of(plain, did)
    first = machine.start(3)
    assert ran(plain, first) == "receipt for 30"
    assert first.history() == []
    did.taken()
    assert ran(plain, first.fork("charge", input=5)) == "receipt for 5"
    assert did.taken() == [("charge", 5)]
    assert ran(plain, first.fork(input=4)) == "receipt for 40"
    assert ran(plain, first.fork("price", 6)) == "receipt for 60"
    for wrong, told in (
        (lambda: first.fork("charge"), "give the state of step 'charge' as the input"),
        (lambda: first.fork("ship"), "has no step 'ship' to be forked at; its steps are price, charge$"),
        (lambda: first.fork("charge", "five"), "the state of step 'charge' does not fit int"),
    ):
        with pytest.raises(InputError, match=told):
            wrong()
    did.broken = {"charge"}
    stuck = machine.start(7)
    with pytest.raises(WorkflowStuck):
        ran(plain, stuck)
    did.broken = set()
    assert ran(plain, stuck.fork("charge")) == "receipt for 70", "its own state"
    assert ran(plain, stuck.fork("charge", 8)) == "receipt for 8"
    assert stuck.status() == "stuck"


def test_a_machine_that_is_stuck_gives_its_signal_and_its_children(plain: App, did: Ran) -> None:
    child = plain.machine("child", state=int)
    machine = plain.machine("asks", state=int)

    @child.step(start=True)
    def count(ctx: Context, n: int) -> Continuation:
        did.note("child")
        return ctx.done(n)

    @machine.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.wait_for("go", then=answered, state=n)

    @machine.step(retry=ONCE)
    def answered(ctx: Context, n: int) -> Continuation:
        did.note("answered")
        assert ctx.signal is not None
        return ctx.gather([child.child(1), child.child(2)], then=joined, state=ctx.signal.payload)

    @machine.step(retry=ONCE)
    def joined(ctx: Context, n: int) -> Continuation:
        did.note("joined")
        return ctx.done([n, *ctx.results.values()])

    first = machine.start(0)
    first.signal("go", 7)
    did.broken = {"answered"}
    plain.run(until_idle=True)
    did.broken = {"joined"}
    second = first.fork("answered")
    plain.run(until_idle=True)
    assert second.status() == "stuck"
    did.broken, _ = set(), did.taken()
    assert ran(plain, second.fork("joined")) == [7, 1, 2]
    assert did.taken() == ["joined"]


@pytest.mark.parametrize("is_linear", [True, False])
def test_forks_and_replays_are_counted_by_a_limit(dsn: str, conn: Connection, did: Ran, is_linear: bool) -> None:
    app = App("again", dsn=dsn)
    limit = Limit("orders", concurrency=1, key=lambda n: f"key {n}")
    if is_linear:
        did.broken = {"ship"}
        handle = orders(app, did, limit=limit).start(3)
        app.run(until_idle=True)
        did.broken, _ = set(), did.taken()
        second = handle.fork("2 charge")
        app.run(until_idle=True)
        assert (did.taken(), statements.locate(conn, second.id)[0].place) == ([], "limited")
        assert ran(app, handle.replay()).startswith("shipped")
        assert ran(app, second).startswith("shipped")
    else:
        handle = machine_of(app, did, limit=limit).start(3)
        app.run(until_idle=True)
        with pytest.raises(InvalidState, match="a limit counts workflows 'order' by the state of their first step"):
            handle.fork("charge", 1)
        assert ran(app, handle.fork("price", 2)) == "receipt for 20"
    assert conn.execute("select count(*) from durable.permit").fetchone() == (0,)
    app.close()


def test_a_fork_that_is_cancelled_before_it_began_cleans_up(app: App, did: Ran) -> None:
    @app.step
    def tick(n: int) -> int:
        did.note("tick", n)
        return n

    @app.workflow(keeps_memo=True)
    async def careful(n: int) -> Any:
        await tick(1)
        try:
            return await tick(2)
        finally:
            await tick(3)

    first = careful.start(0)
    assert ran(app, first) == 2
    did.taken()
    careful.pause()
    second = first.fork("2 tick")
    app.run(until_idle=True)
    second.cancel()
    app.run(until_idle=True)
    assert (second.status(), did.taken()) == ("cancelled", [("tick", 3)])


def test_code_that_does_not_fit_leaves_the_fork_stuck_and_a_retry_goes_on(plain: App, did: Ran, dsn: str) -> None:
    first = orders(plain, did).start(3)
    assert ran(plain, first)
    other = App("again", dsn=dsn)

    @other.step
    def bill(n: int) -> int:
        return n

    @other.workflow
    async def order(n: int) -> int:
        return await bill(n)

    second = first.fork("3 ship")
    other.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="come this way differently"):
        second.result(timeout=1)
    other.close()
    did.taken()
    second.retry()
    assert ran(plain, second) == "shipped, receipt for 30"
    assert did.taken() == ["ship"]


class Bound:
    """A codec whose values are of use only where they were made."""

    def encode(self, payload: bytes, where: Where) -> bytes:
        return where.bound + b"|" + payload[::-1]

    def decode(self, coded: bytes, where: Where) -> bytes:
        assert coded.startswith(where.bound + b"|"), "another value"
        return coded[len(where.bound) + 1 :][::-1]


@pytest.mark.parametrize("kind", [orders, machine_of])
def test_what_a_codec_has_coded_is_started_anew_and_not_cut(dsn: str, did: Ran, kind: Callable[..., Any]) -> None:
    app = App("again", dsn=dsn, codec=Bound())
    did.broken = {"charge"}
    first = kind(app, did).start(3)
    app.run(until_idle=True)
    assert first.status() == "stuck"
    refused = [first.replay, lambda: first.fork("charge"), lambda: first.fork("2 charge"), first.history]
    for act in refused if kind is orders else refused[:2]:
        with pytest.raises(InvalidState, match="is coded by its app's codec"):
            act()
    did.broken = set()
    assert "receipt for 30" in ran(app, first.fork())
    assert "receipt for 40" in ran(app, first.fork(input=4))
    first.cancel()
    app.run(until_idle=True)
    assert "receipt for 30" in ran(app, first.replay())
    if kind is machine_of:
        assert ran(app, first.fork("charge", 5)) == "receipt for 5"
    app.close()


# Who did it, and who may.


def test_the_audit_says_who_replayed_and_forked_what(plain: App, did: Ran, conn: Connection) -> None:
    conn.execute("select durable.set_audit(true)")
    did.broken = {"ship"}
    first = orders(plain, did).start(3)
    plain.run(until_idle=True)
    second = first.fork("2 charge", actor="ada")
    first.replay(actor="bob")
    did.broken = set()
    plain.run(until_idle=True)
    third = first.replay(actor="carl")
    rows = {
        handle.id: conn.execute(
            "select what, actor, details from durable.audit_list(%s) where what <> 'start' order by at", (handle.id,)
        ).fetchall()
        for handle in (first, second, third)
    }
    assert rows[first.id] == [
        ("fork", "ada", {"to": second.id[:12]}),
        ("replay", "bob", {"workflow": "order"}),
        ("replay", "carl", {"to": third.id[:12]}),
    ]
    assert rows[second.id] == [("fork", "ada", {"from": first.id[:12], "workflow": "order"})]
    assert rows[third.id] == [("replay", "carl", {"from": first.id[:12], "workflow": "order"})]


def test_an_operator_replays_and_forks_and_sees_no_values(plain: App, did: Ran, conn: Connection, dsn: str) -> None:
    did.broken = {"ship"}
    first = orders(plain, did).start(3)
    plain.run(until_idle=True)
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("set role durable_operator")
        rows = other.execute("select path, status, bytes from durable.paths(%s)", (first.id,)).fetchall()
        assert rows == [("1 price", "completed", 2), ("2 charge", "completed", 16), ("3 ship", "open", None)]
        first.fork("2 charge", tx=other)
        first.replay(tx=other)
        for denied in (
            "select * from durable.history(%s)",
            "select durable.carried_of(%s)",
            "select * from durable.standing(%s)",
            "select durable.copy_children(%s, null, 1)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                other.execute(denied, (first.id,))
        other.execute("set role durable_client")
        assert other.execute("select path from durable.history(%s)", (first.id,)).fetchall() == [("now",)]
        for denied in ("select durable.replay(%s)", "select durable.fork(%s)", "select * from durable.paths(%s)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                other.execute(denied, (first.id,))


# Two at once.


@pytest.fixture
def rivals(dsn: str) -> Iterator[tuple[Connection, Connection]]:
    """Two sessions, each in a transaction of its own."""
    with psycopg.connect(make_conninfo(dsn)) as one, psycopg.connect(make_conninfo(dsn)) as other:
        yield one, other


def race(one: Connection, first: str, other: Connection, second: str, *parameters: Any) -> list[str]:
    """The first waits with its commit until the second stands behind it; what became of each."""
    said: list[str] = []
    one.execute(first.encode(), parameters)

    def follow() -> None:
        try:
            other.execute(second.encode(), parameters)
            other.commit()
            said.append("done")
        except psycopg.Error as error:
            other.rollback()
            said.append(error.sqlstate or "")

    thread = threading.Thread(target=follow)
    thread.start()
    with psycopg.connect(one.info.dsn, autocommit=True) as watch:
        while thread.is_alive():
            blocked = watch.execute(
                "select from pg_stat_activity where pid = %s and wait_event_type = 'Lock'", (other.info.backend_pid,)
            ).fetchone()
            if blocked is not None:
                break
    one.commit()
    thread.join(20)
    assert not thread.is_alive()
    return said


REPLAY, RETRY = "select durable.replay(%s)", "select durable.retry_dead_letter(%s)"
PURGE = "select durable.purge_dead_letter(%s)"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (REPLAY, REPLAY, "DC006"),
        (REPLAY, RETRY, "DC003"),
        (RETRY, REPLAY, "DC006"),
        (REPLAY, PURGE, "DC003"),
        (PURGE, REPLAY, "DC006"),
    ],
)
def test_of_two_that_take_one_dead_letter_the_second_is_told(
    plain: App,
    did: Ran,
    conn: Connection,
    rivals: tuple[Connection, Connection],
    first: str,
    second: str,
    said: str,
) -> None:
    did.broken = {"charge"}
    handle = orders(plain, did).start(3)
    plain.run(until_idle=True)
    assert race(rivals[0], first, rivals[1], second, handle.id) == [said]
    assert live_events(conn, handle) == (0 if first == PURGE else 1)
    did.broken = set()
    plain.run(until_idle=True)
    assert handle.status() == ("failed" if first == PURGE else "completed")


@pytest.mark.parametrize("is_cancel_first", [True, False])
def test_a_replay_and_a_cancel_leave_one_life_that_ends_as_cancelled(
    plain: App, did: Ran, conn: Connection, is_cancel_first: bool
) -> None:
    did.broken = {"charge"}
    handle = orders(plain, did).start(3)
    plain.run(until_idle=True)
    did.taken()
    if is_cancel_first:
        handle.cancel()
        handle.replay()
    else:
        handle.replay()
        handle.cancel()
    plain.run(until_idle=True)
    assert (handle.status(), live_events(conn, handle)) == ("cancelled", 0)
    assert conn.execute("select count(*) from durable.finished where id = %s", (handle.id,)).fetchone() == (1,)


def test_a_replay_against_the_delivery_of_a_cancel_leaves_one_continuation(
    plain: App, did: Ran, conn: Connection, rivals: tuple[Connection, Connection]
) -> None:
    did.broken = {"charge"}
    handle = orders(plain, did).start(3)
    plain.run(until_idle=True)
    deliver = "select durable.deliver_cancels(%s, 'no more', '', '1')"
    assert race(rivals[0], REPLAY, rivals[1], deliver, handle.id) == ["done"]
    assert live_events(conn, handle) == 1
    plain.run(until_idle=True)
    assert handle.status() == "cancelled"


def test_many_are_replayed_by_a_filter_page_by_page(plain: App, did: Ran, conn: Connection) -> None:
    did.broken = {"charge"}
    kind = machine_of(plain, did)
    handles = [kind.start(n, attributes={"lot": n % 2}) for n in range(7)]
    plain.run(until_idle=True)
    did.broken = set()
    after, done, calls = None, 0, 0
    while True:
        row = conn.execute(
            "select done, refused, cursor from durable.replay_many('order', 'stuck', 2, %s, '{\"lot\": 0}')", (after,)
        ).fetchone()
        assert row is not None
        if row[2] is None:
            break
        done, after, calls = done + row[0], row[2], calls + 1
    assert (done, calls) == (4, 2)
    plain.run(until_idle=True)
    assert [handle.status() for handle in handles] == ["completed", "stuck"] * 3 + ["completed"]
    waiting = conn.execute("select done, refused, refusal from durable.replay_many('order', 'running')").fetchone()
    assert waiting == (0, 0, None)


def test_a_fork_by_a_filter_counts_those_that_cannot_and_says_why(plain: App, did: Ran, conn: Connection) -> None:
    did.broken = {"ship"}
    kind = orders(plain, did)
    first = kind.start(1)
    plain.run(until_idle=True)
    did.broken = {"price"}
    kind.start(2)
    plain.run(until_idle=True)
    row = conn.execute(
        "select done, refused, refusal from durable.fork_many('2 charge', null, 'order', 'stuck')"
    ).fetchone()
    assert row is not None
    assert row[:2] == (1, 1)
    assert "cannot be forked at '2 charge'; it can at '1 price'" in row[2]
    did.broken = set()
    plain.run(until_idle=True)
    (forked,) = plain.list(origin=first.id)
    assert forked.status == "completed"
    assert msgspec.to_builtins(forked)["origin"] == first.id[:12]


def test_attributes_set_in_the_lines_before_the_point_are_the_originals(app: App) -> None:
    @app.step
    def tick(n: int) -> int:
        return n

    @app.workflow(keeps_memo=True)
    async def marks(n: int) -> int:
        await tick(1)
        set_attributes({"phase": "begun"})
        await tick(2)
        set_attributes({"phase": "done"})
        return n

    first = marks.start(1)
    assert ran(app, first) == 1
    second = first.fork("3 tick" if first.history()[-1].path == "3 tick" else "2 tick")
    assert ran(app, second) == 1
    assert second.attributes() == {"phase": "done"}
