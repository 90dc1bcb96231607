"""The testing kit: the clock, deaths of the process, histories, breakpoints, the fixtures of pytest."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    AppError,
    ConfigurationError,
    Context,
    Continuation,
    InputError,
    NonDeterminismError,
    NotInstalled,
    ResultTimeout,
    Retry,
    SchemaMismatch,
    Settings,
    TerminalError,
    UnknownWorkflow,
    Where,
    WorkflowStuck,
    compensation,
    current,
    gather,
    loop,
    now,
    patched,
    schema,
    sleep,
    testing,
    wait_for,
)
from durable_cluster import random as chance
from durable_cluster.testing import History, check_replay
from durable_cluster.testing.databases import databases_on

ROOT = Path(__file__).parent.parent
BEGIN = datetime(2030, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True, scope="module")
def on_the_server_of_the_tests(server: str) -> Iterator[None]:
    """The kit makes its databases there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DURABLE_DSN", server)
        yield
    databases_on(server).close()
    databases_on.cache_clear()


@pytest.fixture
def app() -> App:
    return App("tested")


def counted(seen: list[Any], value: Any) -> Any:
    seen.append(value)
    return value


# The clock.


def test_a_year_passes_between_two_lines_and_both_clocks_say_so_to_the_microsecond(app: App) -> None:
    @app.step
    async def ask(n: int) -> int:
        return n + 1

    @app.workflow
    async def flow(n: int) -> tuple[datetime, datetime, int]:
        begin = now()
        n = await ask(n)
        await sleep("365d")
        return begin, now(), await ask(n)

    with testing.cluster(app, now=BEGIN) as cluster:
        handle = flow.start(1)
        cluster.advance("1h")
        began = time.monotonic()
        cluster.advance("365d")
        assert time.monotonic() - began < 5
        assert handle.result(timeout=0) == (BEGIN, BEGIN + timedelta(days=365), 3)
        assert cluster.now == BEGIN + timedelta(days=365, hours=1)
        assert handle.state().started_at.startswith("2030-01-01T12:00:00+")


def test_while_a_cluster_runs_no_time_passes_not_even_a_little(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        await sleep("1ms")

    with testing.cluster(app) as cluster:
        begin, handle = cluster.now, flow.start()
        assert cluster.run() == 1
        assert (handle.status(), cluster.now) == ("running", begin)
        assert cluster.run() == 0
        assert cluster.advance("1ms") == 1
        assert handle.status() == "completed"
        assert cluster.now == begin + timedelta(milliseconds=1)


def test_each_attempt_finds_the_clock_at_its_own_time(app: App) -> None:
    attempts: list[datetime] = []

    @app.step(retry=Retry(attempts=3, backoff="1m", jitter=0))
    def fail() -> None:
        attempts.append(cluster.now)
        raise ConnectionError("away")

    @app.workflow
    async def flow() -> None:
        await fail()

    with testing.cluster(app, now=BEGIN) as cluster:
        handle = flow.start()
        cluster.advance("30s")
        assert attempts == [BEGIN]
        cluster.advance("10d")
        assert attempts == [BEGIN, BEGIN + timedelta(minutes=1), BEGIN + timedelta(minutes=3)]
        with pytest.raises(WorkflowStuck, match="away"):
            cluster.result(handle)


def test_attempts_of_steps_that_run_at_once_are_not_waited_for_either(app: App) -> None:
    @app.step(retry=Retry(attempts=4, backoff="1m"))
    async def flaky(ctx: Context, n: int) -> int:
        if ctx.attempt < 4:
            raise ConnectionError("away")
        return n

    @app.workflow
    async def flow() -> list[int]:
        return await gather(flaky(1), flaky(2))

    with testing.cluster(app) as cluster:
        handle = flow.start()
        assert cluster.result(handle) == [1, 2]


def test_a_timeout_is_as_long_as_it_is_where_steps_run_beside_it(app: App) -> None:
    @app.step
    async def hang() -> None:
        await asyncio.sleep(60)

    @app.workflow
    async def flow() -> str:
        try:
            async with asyncio.timeout(0.05):
                await hang()
        except TimeoutError:
            return "too late"
        return "in time"

    with testing.cluster(app) as cluster:
        handle = flow.start()
        assert cluster.result(handle) == "too late"


def test_a_wait_ends_by_its_timeout_or_by_its_signal(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        return await wait_for("approved", str, timeout="3d") or "nobody came"

    with testing.cluster(app) as cluster:
        late, early = flow.start_many([None, None])
        cluster.advance("2d")
        early.signal("approved", "yes")
        cluster.run()
        assert (late.status(), early.result(timeout=0)) == ("running", "yes")
        cluster.advance("1d")
        assert late.result(timeout=0) == "nobody came"


def test_a_result_that_no_time_brings_says_what_would(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        await sleep("2d")
        return await wait_for("approved", str)

    with testing.cluster(app, now=BEGIN) as cluster:
        handle = flow.start()
        with pytest.raises(ResultTimeout, match=r"is waiting, and no time .* for a signal: .*'approved'") as told:
            cluster.result(handle)
        assert handle.id not in str(told.value)
        assert cluster.now == BEGIN + timedelta(days=2)
        handle.signal("approved", "yes")
        assert cluster.result(handle) == "yes"


def test_a_result_that_never_comes_ends_the_test(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable_cluster.testing.kit.MOVES_MAX", 20)

    @app.workflow
    async def flow() -> None:
        async for turn in loop(0):
            await sleep("1h")
            turn.state += 1

    with testing.cluster(app) as cluster:
        handle = flow.start()
        with pytest.raises(ResultTimeout, match="is sleeping still, after the clock was moved 20 times"):
            cluster.result(handle)


def test_a_schedule_fires_at_each_of_its_due_times(app: App) -> None:
    seen: list[tuple[str, datetime]] = []

    @app.workflow
    async def report(at: dict[str, str]) -> None:
        seen.append((at["due"], now()))

    app.schedule("nightly", "0 3 * * *", report, {}, zone="Europe/Berlin", due_as="due")
    with testing.cluster(app, now=datetime(2030, 3, 29, 12, tzinfo=UTC)) as cluster:
        cluster.advance("3d")
    assert seen == [
        ("2030-03-30T03:00:00+01:00", datetime(2030, 3, 30, 2, tzinfo=UTC)),
        ("2030-03-31T03:00:00+02:00", datetime(2030, 3, 31, 1, tzinfo=UTC)),
        ("2030-04-01T03:00:00+02:00", datetime(2030, 4, 1, 1, tzinfo=UTC)),
    ]


def test_machines_and_children_live_by_the_same_clock(app: App) -> None:
    machine = app.machine("reminder", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.sleep("7d", then=end, state=n)

    @machine.step()
    async def end(ctx: Context, n: int) -> Continuation:
        return ctx.done(n)

    @app.workflow
    async def parent(n: int) -> list[int]:
        return await gather(*(machine.spawn(k) for k in range(n)))

    with testing.cluster(app) as cluster:
        handle = parent.start(3)
        cluster.advance("6d")
        assert handle.status() == "running"
        cluster.advance("1d")
        assert handle.result(timeout=0) == [0, 1, 2]


def test_a_start_for_later_is_one(app: App) -> None:
    @app.workflow
    async def flow() -> datetime:
        return now()

    with testing.cluster(app, now=BEGIN) as cluster:
        later, on_time = flow.start(after="2h"), flow.start(at=BEGIN + timedelta(days=1))
        cluster.advance("7d")
        assert later.result(timeout=0) == BEGIN + timedelta(hours=2)
        assert on_time.result(timeout=0) == BEGIN + timedelta(days=1)


@pytest.mark.parametrize("begin", [datetime(1999, 12, 31, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC)])
def test_a_clock_may_begin_at_any_time_and_timers_go_by_it(app: App, begin: datetime) -> None:
    @app.workflow
    async def flow() -> datetime:
        await sleep("7d")
        return now()

    with testing.cluster(app, now=begin) as cluster:
        handle = flow.start()
        cluster.advance("7d")
        assert handle.result(timeout=0) == begin + timedelta(days=7)


def test_a_clock_that_cannot_be_is_refused(app: App) -> None:
    with pytest.raises(InputError, match="has no time zone"), testing.cluster(app, now=datetime(2030, 1, 1)):
        pass
    with pytest.raises(InputError, match="after 1970"), testing.cluster(app, now=datetime(1960, 1, 1, tzinfo=UTC)):
        pass
    with testing.cluster(app, now=BEGIN) as cluster:
        with pytest.raises(InputError, match="advance: '-1d'"):
            cluster.advance("-1d")
        assert cluster.now == BEGIN


def test_an_app_that_is_run_by_hand_does_not_wait_for_a_clock_that_stands(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        await sleep("20s")

    with testing.cluster(app):
        handle = flow.start()
        began = time.monotonic()
        app.run(until_idle=True)
        assert time.monotonic() - began < 10
        assert handle.status() == "running"


# Whose clock it is.


def test_the_clock_of_an_ordinary_database_cannot_be_moved(app: App, dsn: str, conn: psycopg.Connection) -> None:
    with (
        pytest.raises(ConfigurationError, match="the clock of this database is the real one"),
        testing.cluster(app, dsn=dsn),
    ):
        pass
    assert conn.execute("select to_regproc('durable.set_clock'), to_regclass('durable.test_clock')").fetchone() == (
        None,
        None,
    )
    with pytest.raises(SchemaMismatch, match="its clock is the real one and stays so"):
        schema.install(conn, shards=2, is_for_tests=True)
    real = "select abs(extract(epoch from clock_timestamp() - durable.now())) < 1, to_regclass('durable.test_clock')"
    assert conn.execute(real).fetchone() == (True, None)
    assert schema.is_current(conn)


def test_an_ordinary_installation_over_one_of_the_kit_gives_the_real_clock_back(app: App) -> None:
    with testing.cluster(app, now=BEGIN) as cluster, psycopg.connect(cluster.dsn, autocommit=True) as conn:
        assert not schema.is_current(conn)
        schema.install(conn, shards=1)
        assert schema.is_current(conn)
        real = (
            "select abs(extract(epoch from clock_timestamp() - durable.now())) < 1,"
            " to_regproc('durable.set_clock'), to_regclass('durable.test_clock')"
        )
        assert conn.execute(real).fetchone() == (True, None, None)
        with pytest.raises(ConfigurationError, match="the real one"):
            cluster.advance("1d")


def test_a_clock_never_goes_back_behind_what_has_started(app: App) -> None:
    @app.workflow
    async def flow() -> None: ...

    with testing.cluster(app, now=BEGIN) as cluster, psycopg.connect(cluster.dsn, autocommit=True) as conn:
        flow.start()
        with pytest.raises(psycopg.Error, match="it cannot go back") as caught:
            conn.execute("select durable.set_clock(%s)", (BEGIN - timedelta(seconds=1),))
        assert caught.value.sqlstate == "DC002"


def test_a_database_without_a_schema_is_told_so(app: App, empty_dsn: str) -> None:
    with pytest.raises(NotInstalled), testing.cluster(app, dsn=empty_dsn):
        pass


# The database, and the app in it.


def databases_of(server: str) -> set[str]:
    with psycopg.connect(server) as admin:
        return {
            name
            for (name,) in admin.execute(
                "select datname from pg_database where datname like 'durable_test_%%\\_%%\\_%%'"
            )
        }


def test_an_app_comes_back_to_where_it_was_also_when_the_test_fails(server: str) -> None:
    app = App("tested", dsn="host=nowhere", settings=Settings(run_ahead_ms=7))
    before = app.client, app.clock, app.settings
    with pytest.raises(ZeroDivisionError), testing.cluster(app) as cluster:
        assert app.client.dsn == cluster.dsn != before[0].dsn
        assert app.settings.run_ahead_ms == 7
        cluster.run()
        _ = 1 / 0
    assert (app.client, app.clock, app.settings) == before
    known = databases_on(server)
    made = databases_of(server)
    known.close()
    assert databases_of(server) < made


def test_each_cluster_begins_empty_unless_it_is_told_of_another(app: App) -> None:
    @app.workflow
    async def flow() -> int:
        return 1

    with testing.cluster(app) as first:
        handle = flow.start(key="k")
        first.run()
        other = App("tested")
        with testing.cluster(other, dsn=first.dsn) as same:
            assert other.get(handle.id).result(timeout=0) == 1
            assert same.now == first.now
    with testing.cluster(app) as second:
        assert app.list() == []
        assert second.dsn != first.dsn


def test_a_new_version_of_an_app_goes_on_where_the_old_one_was(app: App) -> None:
    @app.workflow
    async def flow() -> str:
        await sleep("1d")
        return "old"

    new = App("tested")

    @new.workflow(name="flow")
    async def newer() -> str:
        await sleep("1d")
        return "new"

    with testing.cluster(app) as cluster:
        handle = flow.start()
        cluster.run()
        with testing.cluster(new, dsn=cluster.dsn) as after:
            after.advance("1d")
        assert handle.result(timeout=0) == "new"


@pytest.mark.parametrize("waits", ["sleep", "signal", "steps"])
def test_a_run_that_stood_at_the_wait_behind_a_patch_does_not_take_it(waits: str) -> None:
    def declared(*, is_patched: bool) -> App:
        app = App("patched")

        @app.step
        def step(n: int) -> int:
            return n + 1

        @app.step(retry=Retry(attempts=1))
        async def stopped(n: int) -> int:
            if not is_patched:
                raise ZeroDivisionError
            return n

        @app.workflow
        async def work(n: int) -> int:
            n = await step(n)
            if is_patched and patched("twice"):
                n = await step(n)
            if waits == "steps":
                await gather(stopped(n), step(n))
            else:
                await (sleep("1h") if waits == "sleep" else wait_for("go"))
            return n

        return app

    before, after = declared(is_patched=False), declared(is_patched=True)
    with testing.cluster(before) as cluster:
        old = before.named("work").start(0)
        cluster.run()
        with testing.cluster(after, dsn=cluster.dsn) as deployed:
            handles = [after.get(old.id), after.named("work").start(0)]
            for handle in handles:
                handle.signal("go")
            if waits == "steps":
                old.retry()
            assert [deployed.result(handle) for handle in handles] == [1, 2]


# Deaths.


class World:
    """A workflow of each kind that runs the step called ``kind`` once; what ran is in ``ran``, how often a function was entered
    in ``entered``.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.app = app = App("dying", settings=settings)
        self.ran: list[int] = []
        self.entered = 0

        @app.step
        async def begin() -> None: ...

        @app.step
        def quick(n: int) -> int:
            return counted(self.ran, n)

        @app.step
        async def slow(n: int) -> int:
            return counted(self.ran, n)

        @app.step(blocking=True)
        def blocking(n: int) -> int:
            return counted(self.ran, n)

        @app.step
        async def lasting(n: int) -> int:
            await asyncio.sleep(0.1)
            return counted(self.ran, n)

        @app.step(transactional=True)
        def booked(ctx: Context, n: int) -> int:
            ctx.tx.execute("insert into ledger values (%s)", (n,))
            return counted(self.ran, n)

        @app.workflow
        async def alone(kind: str) -> int:
            self.entered += 1
            await begin()
            n: int = await app.steps[kind](1)
            await sleep("1h")
            return n

        @app.workflow
        async def at_once(kind: str) -> int:
            self.entered += 1
            n, _ = await gather(app.steps[kind](1), begin())
            await sleep("1h")
            return n

        machine = app.machine("machine", state=str)

        @machine.step(start=True)
        def first(ctx: Context, step: str) -> Continuation:
            return ctx.goto(step, "")

        @machine.step()
        def plain(ctx: Context, _: str) -> Continuation:
            self.ran.append(1)
            return ctx.sleep("1h", last, "")

        @machine.step()
        async def awaited(ctx: Context, _: str) -> Continuation:
            self.ran.append(1)
            return ctx.sleep("1h", last, "")

        @machine.step()
        def last(ctx: Context, _: str) -> Continuation:
            return ctx.done(1)


PATHS = [
    *(("alone", step) for step in ("quick", "slow", "blocking", "lasting", "booked")),
    *(("at_once", step) for step in ("quick", "slow", "blocking", "lasting")),
    *(("machine", step) for step in ("plain", "awaited")),
]
RUNS = {"before": 1, "after": 2, "committed": 1}


@pytest.mark.parametrize("point", RUNS)
@pytest.mark.parametrize(("workflow", "step"), PATHS, ids=lambda part: part)
def test_a_step_beside_which_its_process_dies_runs_again_or_not(workflow: str, step: str, point: str) -> None:
    world = World()
    with testing.cluster(world.app) as cluster, psycopg.connect(cluster.dsn, autocommit=True) as conn:
        conn.execute("create table ledger (n int)")
        handle = world.app.named(workflow).start(step)
        with cluster.crash(**{point: step}) as crash:  # type: ignore[arg-type]
            cluster.run()
        assert crash.happened == 1
        assert len(world.ran) == RUNS[point], "a death is no attempt, after which there would be a pause"
        assert cluster.result(handle) == 1
        assert len(world.ran) == RUNS[point]
        assert conn.execute("select count(*) from ledger").fetchone() == (int(step == "booked"),)
        for left in ("win", "detached", "dead_letter", "lease"):
            assert conn.execute(f"select count(*) from durable.{left}").fetchone() == (0,) or left == "lease"


def test_a_death_takes_the_functions_that_are_kept_in_memory_along() -> None:
    entered = {}
    for point in RUNS:
        world = World(Settings(run_ahead_ms=0))
        with testing.cluster(world.app) as cluster:
            world.app.named("alone").start("quick")
            with cluster.crash(**{point: "quick"}):  # type: ignore[arg-type]
                cluster.run()
        entered[point] = world.entered
    assert entered == {"before": 2, "after": 2, "committed": 1}, "after the commit it only sleeps"


def test_quick_steps_that_share_a_page_run_again_together(app: App) -> None:
    ran: list[str] = []

    @app.step
    def one() -> str:
        return counted(ran, "one")

    @app.step
    def two() -> str:
        return counted(ran, "two")

    @app.workflow
    async def flow() -> str:
        return await one() + await two()

    with testing.cluster(app) as cluster:
        handle = flow.start()
        with cluster.crash(after=two, times=2) as crash:
            cluster.run()
        assert (crash.happened, handle.result(timeout=0)) == (2, "onetwo")
        assert ran == ["one", "two"] * 3


def test_who_has_died_undoes_nothing(app: App) -> None:
    undone: list[str] = []

    @app.step
    def book_flight() -> str:
        return "flight"

    @app.step
    def book_hotel() -> str:
        return "hotel"

    @app.step
    def give_back(what: str) -> None:
        undone.append(what)

    @app.workflow
    async def flow() -> str:
        async with compensation() as undo:
            undo(give_back, await book_flight())
            return await book_hotel()

    with testing.cluster(app) as cluster:
        for point in ("before", "after"):
            handle = flow.start()
            with cluster.crash(**{point: book_hotel}):  # type: ignore[arg-type]
                cluster.run()
            assert handle.result(timeout=0) == "hotel"
    assert undone == []


def test_a_step_that_dies_often_by_no_fault_of_its_own_is_no_poison() -> None:
    world = World(Settings(max_crashes=1))
    with testing.cluster(world.app) as cluster:
        for step in ("slow", "quick"):
            handle = world.app.named("alone").start(step)
            with cluster.crash(after=step, times=5):
                cluster.run()
            assert cluster.result(handle) == 1


def test_a_failed_attempt_is_on_record_or_not_as_any_other_end(app: App) -> None:
    attempts: list[int] = []

    @app.step(retry=Retry(attempts=3, backoff="1m"))
    def fail(ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ConnectionError("away")

    @app.workflow
    async def flow() -> None:
        await fail()

    with testing.cluster(app) as cluster:
        handle = flow.start()
        with cluster.crash(after=fail):
            cluster.run()
        with pytest.raises(WorkflowStuck):
            cluster.result(handle)
    assert attempts == [1, 1, 2, 3]


def test_a_death_that_does_not_happen_fails_the_test(app: App) -> None:
    @app.step
    def never() -> None: ...

    with testing.cluster(app) as cluster:
        with (
            pytest.raises(AssertionError, match="died 0 times after step 'never' and not 1"),
            cluster.crash(after=never),
        ):
            cluster.run()
        with pytest.raises(ZeroDivisionError), cluster.crash(after=never):
            _ = 1 / 0


def test_a_death_at_no_step_is_refused(app: App) -> None:
    @app.step
    def known() -> None: ...

    with testing.cluster(app) as cluster:
        for step in ("unknown", test_a_death_at_no_step_is_refused, App("other").step(known.function)):
            with pytest.raises(AppError, match=r"has no step .*; it has known"), cluster.crash(before=step):
                pass
        for wrong in ({}, {"before": known, "after": known}, {"after": known, "times": 0}):
            with pytest.raises(InputError, match="crash takes one of before="), cluster.crash(**wrong):  # type: ignore[arg-type]
                pass


def test_whatever_was_wrapped_for_a_death_is_as_it_was_afterwards() -> None:
    from durable_cluster.database import WorkerConnection
    from durable_cluster.functions import StepFunction
    from durable_cluster.handoff import Handoff

    def parts() -> list[Any]:
        return [
            StepFunction.run,
            Handoff.commit,
            Handoff.complete,
            WorkerConnection.wait,
            *world.app.named("machine").steps.values(),
        ]

    world = World()
    before = parts()
    with testing.cluster(world.app) as cluster, pytest.raises(AssertionError), cluster.crash(before="plain"):
        assert parts() != before
    assert parts() == before
    assert "wait" not in vars(WorkerConnection)


# Histories.


class Pet(msgspec.Struct):
    name: str


def shop(*, steps: tuple[str, ...] = ("price", "charge"), is_patched: bool = False, returned: Any = int) -> App:
    """An app whose workflow asks for these steps, then sleeps, waits for a child and a signal, and ends."""
    app = App("shop")

    def step(name: str) -> None:
        def run(pet: Pet) -> Any:
            return len(pet.name)

        run.__annotations__ = {"pet": Pet, "return": returned}
        app.step(name=name)(run)

    for name in ("price", "charge", "refund"):
        step(name)

    @app.workflow
    async def child(n: int) -> int:
        if n < 0:
            raise TerminalError("below zero")
        return n

    @app.workflow
    async def fulfil(pet: Pet) -> list[Any]:
        assert isinstance(pet, Pet)
        began, _ = now(), chance()
        said: list[Any] = [await app.steps[name](pet) for name in steps]
        if is_patched and patched("with a refund"):
            said.append(await app.steps["refund"](pet))
        await sleep("1d")
        said += await gather(child.spawn(1), child.spawn(2))
        said.append(await wait_for("paid", str))
        return [*said, began.year, current().run]

    return app


@pytest.fixture
def histories(tmp_path: Path) -> dict[str, Path]:
    """Of one that sleeps, one that waits, and one that has ended."""
    app = shop()
    with testing.cluster(app, now=BEGIN) as cluster:
        asleep, waiting, ended = (app.named("fulfil").start(Pet(name)) for name in ("rex", "tom", "kitty"))
        ended.signal("paid", "yes")
        paths = {}
        for what, handle in (("sleeping", asleep), ("waiting", waiting), ("ended", ended)):
            cluster.run() if what == "sleeping" else cluster.advance("1d")
            paths[what] = tmp_path / f"{what}.json"
            history = cluster.history(handle)
            history.save(paths[what])
            assert handle.id not in paths[what].read_text()
            assert handle.id not in repr(history)
        assert ended.result(timeout=0) == [5, 5, 1, 2, "yes", 2030, 0]
        assert [one.place for one in testing.record(app)] == ["waits", "waits"]
    assert [json.loads(path.read_text())["place"] for path in paths.values()] == ["waits", "waits", "has ended"]
    return paths


@pytest.mark.parametrize("where", ["sleeping", "waiting", "ended"])
def test_the_same_code_and_code_that_says_what_is_new_replay_a_history(histories: dict[str, Path], where: str) -> None:
    check_replay(shop(), histories[where])
    check_replay(shop(is_patched=True), str(histories[where]))


@pytest.mark.parametrize("where", ["sleeping", "waiting", "ended"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"steps": ("price", "refund")}, "at await 4 'charge' is recorded, and the code now asks for 'refund'"),
        ({"steps": ("charge", "price")}, "at await 3 'price' is recorded, and the code now asks for 'charge'"),
        ({"steps": ("price", "charge", "refund")}, "'refund'"),
        ({"returned": str}, "what is recorded of 'price' at await 3 does not fit any more"),
    ],
)
def test_code_that_comes_another_way_is_told_with_both_sides(
    histories: dict[str, Path], where: str, changed: dict[str, Any], told: str
) -> None:
    with pytest.raises(NonDeterminismError, match=told):
        check_replay(shop(**changed), histories[where])


def test_a_line_less_is_found_where_the_history_goes_on(histories: dict[str, Path]) -> None:
    with pytest.raises(NonDeterminismError, match="'charge' is recorded, and the code now asks for 'sleep'"):
        check_replay(shop(steps=("price",)), histories["ended"])


def test_a_replay_asks_no_database_and_runs_no_step(
    histories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURABLE_DSN", "host=nowhere")
    app = shop()
    monkeypatch.setattr("durable_cluster.functions.StepFunction.run", None)
    before = app.client
    check_replay(app, histories["ended"])
    assert app.client is before


def test_an_input_that_does_not_fit_any_more_is_told(histories: dict[str, Path]) -> None:
    app = App("shop")

    @app.workflow
    async def fulfil(n: int) -> None: ...

    with pytest.raises(NonDeterminismError, match="the input does not fit workflow 'fulfil' any more"):
        check_replay(app, histories["ended"])


def test_the_arguments_of_a_step_that_is_under_way_have_to_fit_too() -> None:
    def app_of(kind: Any) -> App:
        app = App("arguments")

        async def charge(cents: Any) -> None:
            raise ZeroDivisionError

        charge.__annotations__["cents"] = kind
        app.step(retry=Retry(attempts=1))(charge)

        @app.workflow
        async def flow() -> None:
            await app.steps["charge"](100)

        return app

    app = app_of(int)
    with testing.cluster(app) as cluster:
        handle = app.named("flow").start(None)
        cluster.run()
        history = cluster.history(handle)
    assert repr(history) == "<History of a 'flow' that is stuck>"
    check_replay(app_of(int), history)
    with pytest.raises(NonDeterminismError, match=r"the arguments do not fit step 'charge': cents: expected array"):
        check_replay(app_of(list[int]), history)


def test_lines_that_raise_are_told_as_they_are(histories: dict[str, Path]) -> None:
    app = shop()

    async def fulfil(pet: Pet) -> list[Any]:
        found = await app.named("fulfil").function(pet)  # type: ignore[attr-defined]
        raise LookupError(f"nothing of {len(found)}")

    other = shop()
    workflow = other.named("fulfil")
    workflow.function, app.steps = fulfil, other.steps  # type: ignore[attr-defined]
    with pytest.raises(LookupError, match="nothing of 7"):
        check_replay(other, histories["ended"])


def test_what_is_no_history_is_refused(tmp_path: Path, app: App) -> None:
    for text in ("", "{}", "[1]"):
        (tmp_path / "none.json").write_text(text)
        with pytest.raises(InputError, match=r"none.json holds no history"):
            check_replay(app, tmp_path / "none.json")
    machine = app.machine("m", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.sleep("1d", begin, n)

    with pytest.raises(InputError, match="is a machine and has no history"):
        check_replay(app, History(workflow="m", version=1, place="waits", state=msgspec.Raw(b"{}")))
    with testing.cluster(app) as cluster:
        handle = machine.start(1)
        with pytest.raises(UnknownWorkflow, match="has not been run yet"):
            cluster.history(handle)
        cluster.run()
        with pytest.raises(InputError, match="is a machine and has no history"):
            cluster.history(handle)


def test_a_history_is_replayed_by_the_code_of_its_version() -> None:
    app = App("versions")

    @app.step
    def one() -> None: ...

    @app.step
    def two() -> None: ...

    @app.workflow(name="flow", version=2)
    async def older() -> None:
        await one()
        await wait_for("word")

    with testing.cluster(app) as cluster:
        handle = older.start()
        cluster.run()
        history = cluster.history(handle)

    def changed(app: App, version: int) -> None:
        @app.workflow(name="flow", version=version)
        async def newer() -> None:
            await two()

    changed(app, 3)
    check_replay(app, history)
    alone = App("versions")
    alone.step(one.function), alone.step(two.function)
    changed(alone, 1)
    with pytest.raises(
        UnknownWorkflow, match="the history is of version 2 of workflow 'flow'; this code has come to 1"
    ):
        check_replay(alone, history)
    changed(alone, 4)
    with pytest.raises(NonDeterminismError, match="'one' is recorded, and the code now asks for 'two'"):
        check_replay(alone, history)


class Reversed:
    """A codec, so to speak."""

    def encode(self, payload: bytes, where: Where, /) -> bytes:
        return payload[::-1]

    decode = encode


@pytest.mark.parametrize("codec", [None, Reversed()], ids=["plain", "coded"])
def test_workflows_of_a_running_system_are_recorded_wherever_they_stand(dsn: str, codec: Any) -> None:
    """Not only in databases of the kit."""
    app = App("live", dsn=dsn, codec=codec)

    @app.step(retry=Retry(attempts=1))
    async def fail() -> None:
        raise ZeroDivisionError

    @app.step
    def fine() -> int:
        return 1

    @app.workflow
    async def flow(kind: str) -> None:
        await fine()
        match kind:
            case "stuck":
                await fail()
            case "asleep":
                await sleep("30d")
            case "soon":
                await sleep("50s")
            case "waiting":
                await wait_for("word", timeout="2d")

    machine = app.machine("m", state=int)

    @machine.step(start=True)
    def begin(ctx: Context, n: int) -> Continuation:
        return ctx.sleep("1d", begin, n)

    for kind in ("stuck", "asleep", "waiting", "soon", "ended"):
        flow.start(kind)
    machine.start(1)
    app.run(until_idle=True, timeout=0.5)
    found = testing.record(app)
    assert sorted(one.place for one in found) == ["is stuck", "sleeps", "waits", "waits"]
    for history in found:
        check_replay(app, history)
    assert len(testing.record(app, limit=2)) == 2
    app.close()


# Breakpoints.

DEBUGGED = """
import asyncio, time
from durable_cluster import App, Context, Retry, Settings, gather, testing

app = App("debugged", settings=Settings(dead_interval_s=1, step_timeout_s=0.3, hang_grace_s=0.2, functions_max=100))
ONCE = Retry(attempts=1)

@app.step(retry=ONCE)
def quick(word: str) -> str:
    breakpoint()
    return word + " quick"

@app.step(retry=ONCE)
async def slow(word: str) -> str:
    breakpoint()
    await asyncio.sleep(0)
    return word + " slow"

@app.step(retry=ONCE, blocking=True)
def blocking(word: str) -> str:
    breakpoint()
    return word + " blocking"

@app.step(retry=ONCE, transactional=True)
def booked(ctx: Context, word: str) -> str:
    breakpoint()
    ctx.tx.execute("select 1")
    return word + " booked"

@app.step(retry=ONCE)
async def hanging() -> None:
    await asyncio.sleep(60)

@app.workflow
async def flow(kind: str) -> str:
    word = kind.upper()
    if kind == "flow":
        breakpoint()
        return word
    if kind == "gathered":
        return ",".join(await gather(slow(word), blocking(word)))
    return await app.steps[kind](word)

@app.workflow
def plain(kind: str) -> str:
    word = kind.upper()
    breakpoint()
    return word

with testing.cluster(app) as cluster:
    for kind in KINDS:
        handle = (plain if kind == "plain" else flow).start(kind)
        print("result", cluster.result(handle))
"""


@pytest.mark.parametrize(
    ("kind", "stops", "result"),
    [
        ("flow", 1, "FLOW"),
        ("plain", 1, "PLAIN"),
        ("quick", 1, "QUICK quick"),
        ("slow", 1, "SLOW slow"),
        ("blocking", 1, "BLOCKING blocking"),
        ("booked", 1, "BOOKED booked"),
        ("gathered", 2, "GATHERED slow,GATHERED blocking"),
    ],
)
def test_who_stands_at_a_breakpoint_has_all_the_time_there_is(
    tmp_path: Path, kind: str, stops: int, result: str
) -> None:
    """Longer than the step's timeout, the grace of one that hangs, and the interval after which the silent are dead."""
    program = tmp_path / "debugged.py"
    program.write_text(f"KINDS = {[kind]!r}\n{DEBUGGED}")
    commands = "import time\ntime.sleep(1.2)\np 'word is', word\nc\n"
    done = subprocess.run(
        [sys.executable, program], input=commands * stops, capture_output=True, check=False, text=True, timeout=60
    )
    assert done.stdout.count(f"('word is', '{kind.upper()}')") == stops, done.stdout + done.stderr
    assert f"result {result}" in done.stdout, done.stdout + done.stderr


def test_where_nobody_debugs_a_step_is_late_as_anywhere() -> None:
    app = App("late", settings=Settings(step_timeout_s=0.2))

    @app.step(retry=Retry(attempts=1))
    async def hanging() -> None:
        await asyncio.sleep(60)

    @app.step(retry=Retry(attempts=1), blocking=True)
    def standing() -> None:
        for _ in range(6_000):
            time.sleep(0.01)

    @app.workflow
    async def flow(kind: str) -> None:
        await app.steps[kind]()

    with testing.cluster(app) as cluster:
        for kind in ("hanging", "standing"):
            with pytest.raises(WorkflowStuck, match=r"did not end within its timeout of 0\.2 s"):
                cluster.result(flow.start(kind))


# The plugin of pytest.


@pytest.fixture
def run_pytest(tmp_path: Path, server: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_pytest(conftest=…, test_x=…)``: pytest in a process of its own, as where durable-cluster is installed."""
    site = tmp_path / "site"
    info = site / "durable_cluster_of_the_tests-0.dist-info"
    info.mkdir(parents=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["pytest11"]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: durable-cluster-of-the-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + "".join(f"{name} = {of}\n" for name, of in points.items()))
    for module in points.values():
        (site / module).symlink_to(ROOT / project["tool"]["setuptools"]["package-dir"][module])
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]

    def run(*options: str, **files: str) -> subprocess.CompletedProcess[str]:
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DURABLE_DSN": server},
            capture_output=True,
            check=False,
            text=True,
            timeout=120,
        )

    return run


FLOWS = """
    from durable_cluster import App, sleep
    app = App("mine")

    @app.step
    def greet(name: str) -> str:
        return f"hello, {name}"

    @app.workflow
    async def greeting(name: str) -> str:
        await sleep("7d")
        return await greet(name)
"""


def test_the_fixture_runs_the_app_of_the_suite(run_pytest: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_pytest(
        my_flows=FLOWS,
        conftest="""
            import pytest
            from my_flows import app

            @pytest.fixture
            def durable_app():
                return app
        """,
        test_mine="""
            import pytest
            from my_flows import app, greet, greeting

            @pytest.mark.parametrize("name", ["ada", "bob"])
            def test_greeting(durable, name):
                handle = greeting.start(name, key="one")
                durable.run()
                assert handle.status() == "running"
                durable.advance("7d")
                assert handle.result(timeout=0) == f"hello, {name}"

            def test_dies(durable):
                with durable.crash(after=greet):
                    assert durable.result(greeting.start("eve")) == "hello, eve"

            def test_fails(durable):
                assert durable.result(greeting.start("eve")) == "hello, adam"

            def test_without():
                assert app.client._dsn is None
        """,
    )
    assert "4 passed" in done.stdout and "1 failed" in done.stdout, done.stdout + done.stderr
    assert "hello, adam" in done.stdout


def test_the_suite_of_the_guide_passes(run_pytest: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    page = (ROOT / "docs" / "guide" / "testing.md").read_text()
    files = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert set(files) == {"flows", "conftest", "test_flows"}
    done = run_pytest(**files)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_suite_that_has_no_app_is_told_how_to_name_it(
    run_pytest: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_pytest(test_mine="def test_mine(durable): ...")
    assert "1 error" in done.stdout, done.stdout + done.stderr
    assert "runs the app that the fixture 'durable_app' returns; define that in conftest.py" in done.stdout


def test_a_suite_that_does_not_use_it_pays_nothing_and_may_use_its_names(
    run_pytest: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_pytest(
        test_mine="""
            import sys
            import pytest

            def test_not_loaded(pytestconfig):
                assert pytestconfig.pluginmanager.has_plugin("durable_cluster")
                assert not [name for name in sys.modules if name.split(".")[0] in ("durable_cluster", "psycopg", "msgspec")]

            @pytest.fixture
            def durable():
                return "mine"

            def test_name(durable):
                assert durable == "mine"
        """
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_cluster_needs_no_pytest(tmp_path: Path) -> None:
    (tmp_path / "my_flows.py").write_text(textwrap.dedent(FLOWS))
    (tmp_path / "test_unit.py").write_text(
        textwrap.dedent(
            """
            import sys
            import unittest
            from durable_cluster import testing
            from my_flows import app, greeting

            class Greeting(unittest.TestCase):
                def setUp(self):
                    self.cluster = self.enterContext(testing.cluster(app))

                def test_greeting(self):
                    self.assertEqual(self.cluster.result(greeting.start("ada")), "hello, ada")
                    self.assertNotIn("pytest", sys.modules)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "unittest", "test_unit"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_without_a_server_of_its_own_the_kit_brings_one_that_is_gone_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "my_flows.py").write_text(textwrap.dedent(FLOWS))
    program = """
        from durable_cluster import testing
        from my_flows import app, greeting
        for _ in range(2):
            with testing.cluster(app) as cluster:
                print(cluster.result(greeting.start("ada")))
        print(cluster.dsn.split("host=")[1].split()[0])
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    environment = {name: value for name, value in os.environ.items() if name != "DURABLE_DSN"}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *said, socket = done.stdout.split("\n")[:-1]
    assert said == ["hello, ada"] * 2
    assert not Path(socket).exists()
    assert not (tmp_path / ".durable").exists()
