"""A real process is killed with SIGKILL at every point of a step's path, once; the ledger then says what the model says.

The points are armed in the consumers' processes alone, by the module that holds their app, through an environment variable
that this process sets after it has loaded that module itself.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from durable_cluster import App, Settings
from durable_cluster.loading import load_app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

WORKFLOWS = 30
POSITIONS = (1, 3, 5)
POINTS = (
    "before the claim",
    "after the claim",
    "in phase 1",
    "between the phases",
    "after the fence",
    "in a transactional step",
    "after a timer was set",
    "after a step was detached",
    "after a dead letter was written",
    "before the commit",
    "after the commit",
    "before a sweep",
    "after a sweep",
    "in a detached step",
    "after a detached row was deleted",
    "after a detached step was handed on",
)
FLOWS = '''
"""What the crash tests run."""
import asyncio
import functools
import os
import signal

from durable_cluster import App, Context, Continuation, Retry, side_statements, statements
from durable_cluster.handoff import Handoff

app = App("crashing")
chain = app.machine("chain", state=dict)
POINT, _, MARK = os.environ.get("DURABLE_TEST_KILL_AT", "").partition("=")


def reach(point):
    """Die here, if this is the point and nobody has died at it yet."""
    if point != POINT:
        return
    try:
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner, name, *, before="", after=""):
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args, **options):
        reach(before)
        answer = inner(*args, **options)
        if answer is None or answer:  # a claim or a sweep that found something, or a call without an answer
            reach(after)
        return answer

    setattr(owner, name, wrapped)


def claim_and_die(*args, claim=statements.claim, **options):
    reach("before the claim")
    text = claim(*args, **options)
    if text is not None:
        reach("after the claim")
    return text


if POINT:
    statements.claim = claim_and_die
    around(Handoff, "commit", before="between the phases")
    around(statements, "fence", after="after the fence")
    around(side_statements, "schedule", after="after a timer was set")
    around(side_statements, "detach", after="after a step was detached")
    around(side_statements, "bury", after="after a dead letter was written")
    around(statements, "commit_page", after="before the commit")
    around(Handoff, "_hand_on", after="after the commit")
    around(side_statements, "sweep", before="before a sweep", after="after a sweep")
    around(side_statements, "complete_detached", after="after a detached row was deleted")
    around(Handoff, "complete", after="after a detached step was handed on")


@chain.step(start=True)
def plain(ctx: Context, at: dict) -> Continuation:
    reach("in phase 1")
    return ctx.goto(book, at | {"p": 1})


@chain.step(transactional=True)
def book(ctx: Context, at: dict) -> Continuation:
    ctx.tx.execute("insert into ledger values (%s, %s)", (at["n"], at["p"]))
    reach("in a transactional step")
    if at["p"] == 5:
        return ctx.done(at["n"])
    return ctx.goto(awaited if at["p"] == 1 else flaky, at | {"p": at["p"] + 1})


@chain.step()
async def awaited(ctx: Context, at: dict) -> Continuation:
    await asyncio.sleep(0.08)
    reach("in a detached step")
    return ctx.goto(book, at | {"p": 3})


@chain.step(retry=Retry(attempts=2, backoff=0.02))
def flaky(ctx: Context, at: dict) -> Continuation:
    if ctx.attempt == 1 or at["n"] < 0:
        raise ConnectionError("once")
    return ctx.sleep("20ms", book, at | {"p": 5})
'''


@pytest.fixture
def flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "crashing_flows.py").write_text(FLOWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sys.modules.pop("crashing_flows", None)
    return "crashing_flows:app"


@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_dies_there_loses_nothing_and_doubles_nothing(
    dsn: str,
    conn: psycopg.Connection,
    flows: str,
    run_cluster: Callable[..., object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., None],
    point: str,
) -> None:
    mark = tmp_path / "killed"
    conn.execute("create table ledger (n int, p int)")
    app: App = load_app(flows)
    app.client.use(dsn)
    machine = app.named("chain")
    handles = machine.start_many([{"n": n} for n in range(WORKFLOWS)])
    doomed = machine.start({"n": -1})
    monkeypatch.setenv("DURABLE_TEST_KILL_AT", f"{point}={mark}")
    run_cluster(dsn, app=flows, settings=Settings(dead_interval_s=30.0, page_window_ms=20))
    eventually(mark.exists, seconds=30, what=f"a death {point}")
    eventually(
        lambda: all(handle.status() == "completed" for handle in handles) and doomed.status() == "stuck",
        seconds=30,
        what="the end of every workflow",
    )
    expected = sorted([(n, p) for n in range(WORKFLOWS) for p in POSITIONS] + [(-1, 1), (-1, 3)])
    assert conn.execute("select n, p from ledger order by n, p").fetchall() == expected
    left = [
        conn.execute(f"select count(*) from durable.{of}").fetchone()[0] for of in ("detached", "wait", "dead_letter")
    ]
    assert left == [0, 0, 1]
    assert conn.execute("select sum(crashes), sum(suspects) from durable.win").fetchone() in ((None, None), (0, 0))


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_client_that_dies_around_its_commit_has_started_its_workflow_or_not(
    dsn: str, conn: psycopg.Connection, flows: str, is_committed: bool
) -> None:
    script = f"""
        import os, signal, psycopg
        from crashing_flows import chain
        connection = psycopg.connect({dsn!r})
        chain.start({{"n": 1}}, key="k", tx=connection)
        if {is_committed}:
            connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=30)
    assert ended.returncode == -signal.SIGKILL
    rows = conn.execute("select count(*) from durable.started").fetchone()
    keys = conn.execute("select count(*) from durable.key").fetchone()
    assert rows == keys == (int(is_committed),)
