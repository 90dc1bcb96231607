"""The testing kit: the clock, deaths of the process, histories, breakpoints, the fixtures of pytest."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import threading
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
    WorkflowFailed,
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
        with pytest.raises(ResultTimeout, match="is waiting, and no time will end that: it waits for a signal: .*'approved'") as told:
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
    with pytest.raises(ConfigurationError, match="the clock of this database is the real one"):
        with testing.cluster(app, dsn=dsn):
            pass
    assert conn.execute("select to_regproc('durable.set_clock'), to_regclass('durable.test_clock')").fetchone() == (None, None)
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
        real = "select abs(extract(epoch from clock_timestamp() - durable.now())) < 1, to_regproc('durable.set_clock')"
        assert conn.execute(real).fetchone() == (True, None)
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
        return {name for (name,) in admin.execute("select datname from pg_database where datname like 'durable_test_%%\\_%%\\_%%'")}


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
