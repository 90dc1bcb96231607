"""Steps that end their process: found out one by one, set aside after so many deaths; nobody beside them is blamed or held up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable_cluster import App, Context, Continuation, Settings, WorkflowStuck, statements
from durable_cluster.loading import load_app
from durable_cluster.shards import endings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

Eventually = Callable[..., None]
MAX_CRASHES = 2
FLOWS = '''
"""What the poison tests run. Each run of a poisonous step leaves a line in a file before it does its worst."""
import asyncio
import ctypes
import os
import time
from pathlib import Path

from durable_cluster import App, Context, Continuation

app = App("poisonous")
inline = app.machine("inline", state=dict)
beside = app.machine("beside", state=dict)
transactional = app.machine("transactional", state=dict)
held = app.machine("held", state=str)
RUNS = Path(os.environ.get("DURABLE_TEST_RUNS", "/dev/null"))


def worst(how: str) -> None:
    if how:
        with RUNS.open("a") as runs:
            runs.write(how + "\\n")
    if how == "exit":
        os._exit(0)
    if how == "segfault":
        ctypes.string_at(0)
    while how == "hang":
        try:
            time.sleep(0.01)
        except BaseException:
            continue


@inline.step(start=True, timeout="300ms")
def plain(ctx: Context, at: dict) -> Continuation:
    worst(at.get("how", ""))
    return ctx.done(at["n"])


@transactional.step(start=True, transactional=True, timeout="300ms")
def within(ctx: Context, at: dict) -> Continuation:
    ctx.tx.execute("select 1")
    worst(at.get("how", ""))
    return ctx.done(at["n"])


@beside.step(start=True, blocking=True, timeout="300ms")
def threaded(ctx: Context, at: dict) -> Continuation:
    time.sleep(0.05)
    worst(at.get("how", ""))
    return ctx.done(at["n"])


@held.step(start=True)
def holds(ctx: Context, directory: str) -> Continuation:
    mark = Path(directory) / "pid"
    if mark.exists():
        return ctx.done(1)
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    while True:
        time.sleep(1)
'''
SETTINGS = Settings(
    dead_interval_s=30.0,
    hang_grace_s=0.2,
    max_crashes=MAX_CRASHES,
    page_window_ms=20,
    page_lines_max=20,
    restarts_max=100,
)


@pytest.fixture
def flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "poisonous_flows.py").write_text(FLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DURABLE_TEST_RUNS", str(tmp_path / "runs"))
    sys.modules.pop("poisonous_flows", None)
    return "poisonous_flows:app"


def app_of(flows: str, dsn: str) -> App:
    app = load_app(flows)
    app.client.use(dsn)
    return app


@pytest.mark.parametrize(
    ("machine", "how"),
    [
        *((machine, how) for machine in ("inline", "transactional", "beside") for how in ("exit", "hang")),
        ("inline", "segfault"),
    ],
)
def test_a_step_that_ends_its_process_is_a_dead_letter_and_its_neighbours_complete(
    dsn: str,
    conn: psycopg.Connection,
    flows: str,
    run_cluster: Callable[..., Any],
    tmp_path: Path,
    eventually: Eventually,
    machine: str,
    how: str,
) -> None:
    app = app_of(flows, dsn)
    states = [{"n": n} for n in range(30)]
    states[11]["how"] = how
    handles = app.named(machine).start_many(states)
    poison = handles.pop(11)
    cluster = run_cluster(dsn, app=flows, settings=SETTINGS)
    eventually(lambda: poison.status() == "stuck", seconds=40, what="the dead letter")
    eventually(lambda: {handle.status() for handle in handles} == {"completed"}, what="the neighbours")
    assert conn.execute("select count(*), min(reason) from durable.dead_letter").fetchone() == (1, "crashes")
    with pytest.raises(WorkflowStuck, match=f"the process died {MAX_CRASHES} times while step '.*' ran alone"):
        poison.result(timeout=1)
    runs = (tmp_path / "runs").read_text().count(how)
    assert runs == cluster.supervisor.restarts
    assert MAX_CRASHES <= runs <= MAX_CRASHES + 1, (
        "once among its neighbours, if it was not known to hang, and then alone"
    )


def test_a_kill_from_outside_makes_nobody_a_suspect(
    dsn: str,
    conn: psycopg.Connection,
    flows: str,
    run_cluster: Callable[..., Any],
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    app = app_of(flows, dsn)
    handle = app.named("held").start(str(tmp_path))
    run_cluster(dsn, app=flows, settings=SETTINGS)
    eventually((tmp_path / "pid").exists, seconds=30)
    seen: list[Any] = []
    with psycopg.connect(dsn, autocommit=True) as watching:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

        def is_over() -> bool:
            seen.extend(watching.execute("select suspects, crashes from durable.win").fetchall())
            return handle.status() == "completed"

        eventually(is_over, seconds=30)
    assert set(seen) <= {(0, 0)}


def test_a_stopped_process_is_stood_in_for_and_wakes_to_find_its_work_lost(
    dsn: str,
    conn: psycopg.Connection,
    flows: str,
    run_cluster: Callable[..., Any],
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    app = app_of(flows, dsn)
    handle = app.named("held").start(str(tmp_path))
    run_cluster(dsn, app=flows, settings=Settings(dead_interval_s=1.0, heartbeat_s=0.2, drain_grace_s=1.0))
    eventually((tmp_path / "pid").exists, seconds=30)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: handle.status() == "completed", seconds=20, what="a sibling's run")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert conn.execute("select count(*) from durable.finished").fetchone() == (1,)


def test_the_window_of_a_crashed_process_is_gone_through_line_by_line_and_then_as_before(
    dsn: str, conn: psycopg.Connection
) -> None:
    from durable_cluster.consumer import Consumer

    app = App("counting", dsn=dsn, settings=Settings(takeover_probe_s=0.0))
    machine = app.machine("count", state=int)

    @machine.step(start=True)
    def count(n: int) -> Any:
        from durable_cluster.continuation import Done

        return Done(n)

    handles = machine.start_many(list(range(50)))
    first = Consumer(dsn, 0, app.machines, app.settings)
    first.shards = [0, 1]
    claimed = [
        statements.claim(
            first.connection, shard, member=f"m{shard}", owner=first.owner, lines_max=1000, bytes_max=1 << 20
        )
        for shard in (0, 1)
        if statements.join_shard(first.connection, shard, f"m{shard}") is None
    ]
    assert all(claimed)
    statements.abandon(conn, first.owner, suspects=5)
    assert conn.execute("select suspects, crashes from durable.win").fetchall() == [(5, 0), (5, 0)]
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"completed"}
    first.close()


@pytest.mark.parametrize(
    ("code", "was_hanging", "was_out_of_memory", "is_at_fault"),
    [
        (0, False, False, True),
        (17, False, False, True),
        (endings.EXIT_HUNG, False, False, True),
        (endings.EXIT_BROKEN, False, False, False),
        (-signal.SIGSEGV, False, False, True),
        (-signal.SIGABRT, False, False, True),
        (-signal.SIGKILL, False, False, False),
        (-signal.SIGKILL, False, True, True),
        (-signal.SIGKILL, True, False, True),
        (-signal.SIGTERM, False, True, False),
        (None, False, False, False),
    ],
)
def test_whether_a_process_died_of_what_it_ran(
    code: int | None, was_hanging: bool, was_out_of_memory: bool, is_at_fault: bool
) -> None:
    assert endings.is_of_its_own(code, was_hanging=was_hanging, was_out_of_memory=was_out_of_memory) is is_at_fault


def test_the_kernels_count_of_kills_for_memory_is_a_number() -> None:
    assert endings.out_of_memory_kills() >= 0


def test_endings_are_told_by_their_names() -> None:
    assert [endings.told(code) for code in (3, -9, -64)] == ["exit code 3", "SIGKILL", "SIGRTMAX"]


@pytest.mark.parametrize(
    ("alone", "suspects", "crashes"),
    [
        ((), 0, [0, 0, 0]),
        ((), 9, [1, 1, 1]),
        ((2,), 9, [0, 1, 0]),
        ((2,), 0, [0, 0, 0]),
    ],
    ids=["ended from outside", "nobody ran alone", "one ran alone", "ended from outside while one ran alone"],
)
def test_who_is_blamed_for_the_death_of_a_process_that_ran_detached_steps(
    conn: psycopg.Connection, alone: tuple[int, ...], suspects: int, crashes: list[int]
) -> None:
    keys = "\n".join(f"{'0' * 32}:{seq}" for seq in (1, 2, 3))
    conn.execute("select durable.detach(0, %s, %s, %s, %s)", ("7\n7\n7", keys, "{}\n{}\n{}", "0\n0\n0"))
    conn.execute("update durable.detached set is_alone = seq = any(%s)", (list(alone),))
    statements.abandon(conn, 7, suspects=suspects)
    found = conn.execute("select crashes, owner, is_alone from durable.detached order by seq").fetchall()
    assert found == [(crash, 0, False) for crash in crashes]


@pytest.mark.parametrize(
    ("marked", "suspects", "found"),
    [(0, 9, (9, 0)), (1, 9, (1, 1)), (1, 0, (0, 0)), (0, 0, (0, 0))],
    ids=["a crash", "a crash of a marked suspect", "a kill while a suspect ran", "a kill"],
)
def test_what_a_window_is_left_with_after_the_death_of_its_process(
    dsn: str, conn: psycopg.Connection, marked: int, suspects: int, found: tuple[int, int]
) -> None:
    conn.execute(
        "insert into durable.win (batch, shard, owner, s0, s1, active, crashes)"
        " values (1, 0, 7, pg_current_snapshot(), pg_current_snapshot(), now(), %s)",
        (marked,),
    )
    statements.abandon(conn, 7, suspects=suspects)
    assert conn.execute("select suspects, crashes from durable.win").fetchone() == found


def test_a_marked_line_of_the_page_is_the_culprit_and_not_the_step_that_ran_alone_beside_it(
    conn: psycopg.Connection,
) -> None:
    conn.execute("select durable.detach(0, '7', %s, '{}', '0')", (f"{'0' * 32}:1",))
    conn.execute("update durable.detached set is_alone = true, crashes = 1")
    conn.execute(
        "insert into durable.win (batch, shard, owner, s0, s1, active, suspects, crashes) select b, 0, 7,"
        " pg_current_snapshot(), pg_current_snapshot(), now(), b - 1, b - 1 from generate_series(1, 2) b"
    )
    statements.abandon(conn, 7, suspects=9)
    assert conn.execute("select crashes from durable.detached").fetchall() == [(1,)]
    assert conn.execute("select suspects, crashes from durable.win order by batch").fetchall() == [(0, 0), (1, 1)]


def test_a_transactional_step_that_ends_its_own_session_again_and_again_is_a_dead_letter(
    dsn: str, conn: psycopg.Connection
) -> None:
    from durable_cluster.consumer import Consumer

    app = App("severing", dsn=dsn, settings=Settings(max_crashes=2))
    machine = app.machine("sever", state=int)

    @machine.step(start=True, transactional=True)
    def severs(ctx: Context, n: int) -> Continuation:
        if n == 3:
            ctx.tx.execute("select pg_terminate_backend(pg_backend_pid())")
        return ctx.done(n)

    handles = machine.start_many(list(range(6)))
    consumer = Consumer(dsn, 0, app.machines, app.settings)
    consumer.shards = [0, 1]
    losses = 0
    while any(handle.status() == "running" for handle in handles):
        try:
            consumer.work(lambda: False, lambda: None) or consumer.wait(0)
        except psycopg.OperationalError:
            losses += 1
            assert losses < 10
            consumer.reconnect()
    consumer.close()
    assert [handle.status() for handle in handles] == ["completed"] * 3 + ["stuck"] + ["completed"] * 2
    assert losses == 2
