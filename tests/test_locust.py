"""The load test: Locust's users on real clusters, what they count, what they refuse, what they come through."""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest
from console import OPERATOR_TOKEN, served

from durable_cluster import Settings, replay_statements
from durable_cluster.errors import ResultTimeout
from durable_cluster.loadtest import load, load_options, mixes
from durable_cluster.ops import lookups

pytestmark = pytest.mark.skipif(
    find_spec("locust") is None, reason="no Locust here: pip install 'durable-cluster[loadtest]'"
)
LOCUSTFILE = Path(load.__file__).with_name("locustfile.py")
MIXES = {"OrderFlow", "Approvals", "AgentLoop", "FanOut"}
SETTINGS = Settings(drain_grace_s=2.0)
DEADLINE_S = 60.0


@pytest.fixture
def cluster(dsn: str, run_cluster: Callable[..., Any]) -> Any:
    """One that runs the mixes."""
    return run_cluster(dsn, app=load.APP, settings=SETTINGS).demand_up()


@contextmanager
def locust(dsn: str, folder: Path, *words: str, seconds: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Locust at work, in a group of its own."""
    bounds = [
        "--headless",
        "--equal-weights",
        "-u",
        "4",
        "-r",
        "4",
        "-t",
        f"{seconds}s",
        "--stop-timeout",
        "20",
        "--only-summary",
    ]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *bounds, "--csv", "out", "--html", "out.html"]
    with subprocess.Popen(
        [*command, *words],
        cwd=folder,
        env={**os.environ, "DURABLE_DSN": dsn},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def run_locust(dsn: str, folder: Path, *words: str, seconds: int = 2) -> tuple[int, str]:
    """Its exit code and what it said."""
    with locust(dsn, folder, *words, seconds=seconds) as process:
        said, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, said


def counted(folder: Path, what: str) -> dict[str, tuple[int, int]]:
    """How many calls of that kind each mix made, and how many of them failed."""
    with (folder / "out_stats.csv").open(newline="") as file:
        return {
            row["Name"]: (int(row["Request Count"]), int(row["Failure Count"]))
            for row in csv.DictReader(file)
            if row["Type"] == what
        }


def test_users_start_signal_and_await_workflows_of_each_mix(
    dsn: str, conn: psycopg.Connection, cluster: Any, tmp_path: Path
) -> None:
    code, said = run_locust(dsn, tmp_path, "--think", "0.05", "--width", "3", "--turns", "2")
    assert code == 0, said
    ended = counted(tmp_path, "end to end")
    assert set(ended) == MIXES
    assert all(calls > 0 and not failed for calls, failed in ended.values()), ended
    assert counted(tmp_path, "start") == ended
    assert counted(tmp_path, "signal") == {"Approvals": ended["Approvals"]}
    assert counted(tmp_path, "signal to end") == {"Approvals": ended["Approvals"]}
    done = {one.workflow: one.workflows for one in lookups.totals(conn) if one.status == "completed"}
    kinds = {"OrderFlow": "order", "Approvals": "purchase", "AgentLoop": "agent", "FanOut": "batch"}
    assert {mix: done[kind] for mix, kind in kinds.items()} == {mix: calls for mix, (calls, _) in ended.items()}
    assert done["part"] == 3 * ended["FanOut"][0] + 1  # and the one that asks whether there is a cluster
    written = said + "".join(path.read_text("utf-8") for path in tmp_path.iterdir())
    assert not re.search("[0-9a-f]{32}", written)
    assert dsn not in written


def test_named_mixes_at_a_rate_in_several_processes(dsn: str, cluster: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--processes", "2", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    code, said = run_locust(dsn, tmp_path, *words, "--rate", "2", "OrderFlow", "Approvals", seconds=5)
    assert code == 0, said
    ended = counted(tmp_path, "end to end")
    assert set(ended) == {"OrderFlow", "Approvals"}
    assert sum(calls for calls, _ in ended.values()) <= 4 * 2 * (5 + 1)


def test_users_come_through_a_lost_connection_and_a_restart_of_the_cluster(
    dsn: str,
    conn: psycopg.Connection,
    cluster: Any,
    run_cluster: Callable[..., Any],
    tmp_path: Path,
    eventually: Callable[..., None],
) -> None:
    def ended() -> int:
        return sum(
            one.workflows for one in lookups.totals(conn) if (one.workflow, one.status) == ("order", "completed")
        )

    with locust(dsn, tmp_path, "OrderFlow", seconds=600) as process:
        eventually(lambda: ended() >= 4, seconds=DEADLINE_S, what="the first orders")
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
            " and application_name = 'durable-cluster client'"
        )
        cluster.stop()
        before = ended()
        run_cluster(dsn, app=load.APP, settings=SETTINGS).demand_up()
        eventually(lambda: ended() > before + 8, seconds=DEADLINE_S, what="orders after the restart")
        process.terminate()
        said, _ = process.communicate(timeout=DEADLINE_S)
    (calls, failed), (starts, refused) = (
        counted(tmp_path, "end to end")["OrderFlow"],
        counted(tmp_path, "start")["OrderFlow"],
    )
    assert calls - failed > 4, said
    assert refused + failed <= 8, said  # each user once or twice, and not in a storm
    assert 0 <= starts - refused - calls <= 4, said  # some are under way
    assert process.returncode == (1 if refused + failed else 0), said


def test_users_of_the_rest_api_start_signal_and_await(
    dsn: str, conn: psycopg.Connection, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay_statements.declare_types(conn, mixes.app.declared_types(SETTINGS))
    monkeypatch.setenv("DURABLE_CONSOLE_TOKEN", OPERATOR_TOKEN)
    with served(dsn, operator_token=OPERATOR_TOKEN) as url:
        code, said = run_locust("nowhere", tmp_path, "--api", url, "--think", "0.05", "ApiCustomer")
    assert code == 0, said
    ended, _ = counted(tmp_path, "end to end")["ApiCustomer"]
    assert ended > 0
    assert set(counted(tmp_path, "POST")) == {"/api/workflows", "/api/workflows/{id}/signal"}
    done = {one.workflow: one.workflows for one in lookups.totals(conn) if one.status == "completed"}
    assert done == {"purchase": ended}
    assert OPERATOR_TOKEN not in said + "".join(path.read_text("utf-8") for path in tmp_path.iterdir())


def test_without_an_api_its_users_do_not_begin_and_are_told_why(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_CONSOLE_TOKEN", "of-somebody-elses-console")
    assert "name it with --api" in refused(dsn, of_api=[True])
    assert "nobody answers at http://127.0.0.1:1 " in refused(dsn, of_api=[True, False], api="http://127.0.0.1:1")
    with served(dsn, operator_token=OPERATOR_TOKEN) as url:
        assert refused(dsn, of_api=[True], api=url).endswith(
            "answered 401: set DURABLE_CONSOLE_TOKEN to an operator's token"
        )
        assert refused(dsn, of_api=[True], api=f"{url}/static").endswith("answered 404: is it a console?")


def test_a_call_that_waits_lets_the_other_users_go_on(dsn: str) -> None:
    """One start waits for the transaction of another one with its key, which ends only if its user gets a turn."""
    program = """
import locust, gevent, sys
from durable_cluster.loadtest import mixes
mixes.app.client.use(sys.argv[1])

def first():
    with mixes.app.client.connection().transaction():
        mixes.part.start(1, key="same")
        gevent.sleep(0.2)

def second():
    mixes.app.client.connection().execute("set lock_timeout = '5s'")
    return mixes.part.start(1, key="same").id

holder = gevent.spawn(first)
gevent.sleep(0.1)
waiter = gevent.spawn(second)
gevent.joinall([holder, waiter], raise_error=True, timeout=20)
print(len(waiter.get(block=False)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, dsn], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.stdout == "32\n", done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", "0"], "--width: '0' is not a whole number from 1 to 10,000"),
        (["--width", "10001"], "is not a whole number from 1 to 10,000"),
        (["--turns", "many"], "--turns: 'many' is not a whole number"),
        (["--rate", "-1"], "--rate: '-1' is not a number from 0 to 1,000"),
        (["--rate", "nan"], "is not a number"),
        (["--think", "inf"], "is not a number"),
        (["--timeout", "0"], "--timeout: '0' is not a number from 0.1"),
        (["--api", "localhost:8100"], "--api: it is no address such as http://"),
        (["--api", "http://me:secret@localhost"], "--api: it is no address such as http://"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    load_options.declare(parser)
    with pytest.raises(SystemExit) as refusal:
        parser.parse_args(words)
    assert refusal.value.code == 2
    refusal_told = capsys.readouterr().err
    assert said in refusal_told
    assert "secret" not in refusal_told


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot connect to 127.0.0.1:1/none"),
        ("what?secret", "--dsn cannot be read as a connection string"),
        (" ", "--dsn is empty"),
        (None, "there is no local database in"),
    ],
)
def test_without_a_database_it_ends_and_says_why(
    named: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DURABLE_DSN", raising=False)
    refusal = refused(named, data=tmp_path)
    assert said in refusal
    assert "secret" not in refusal


def test_without_the_schema_it_ends_and_says_how_to_install_it(empty_dsn: str) -> None:
    assert "durable-cluster init" in refused(empty_dsn)


def test_without_a_cluster_it_ends_and_says_how_to_start_one(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_options, "ANSWER_S_MAX", 0.2)
    assert f"start one with 'durable-cluster start --app {load.APP}'" in refused(dsn)


def test_more_users_than_connections_are_warned_of(
    conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    load_options.warn_of_too_many(conn, 20)
    assert capsys.readouterr().err == ""
    load_options.warn_of_too_many(conn, 20_000)
    assert "20000 users hold a connection each, and the server has" in capsys.readouterr().err


def test_what_keeps_the_users_from_beginning_is_all_that_is_said(tmp_path: Path) -> None:
    code, said = run_locust("host=127.0.0.1 port=1", tmp_path)
    assert code == 1
    assert said.splitlines()[-1].startswith("locust: error: cannot connect to 127.0.0.1:1/")
    assert "Traceback" not in said


def test_the_same_error_is_counted_as_one_whichever_workflow_it_met() -> None:
    errors = {
        load_options.told(ResultTimeout(f"workflow {id_}… ('order') did not end: see 'durable-cluster show {id_}'"))
        for id_ in ("2bb2c6f96e72", "2bb11d76e67f")
    }
    assert errors == {"ResultTimeout: workflow … ('order') did not end: see 'durable-cluster show …'"}
    assert load_options.told(psycopg.OperationalError("gone\nfor good")) == "OperationalError: gone"


def refused(
    dsn: str | None, *, data: Path | None = None, api: str | None = None, of_api: Sequence[bool] = (False,)
) -> str:
    """What it says when it ends before it began."""
    with pytest.raises(SystemExit) as refusal:
        load_options.prepared(argparse.Namespace(dsn=dsn, data=data, api=api, num_users=1), of_api=of_api)
    mixes.app.close()
    return str(refusal.value.code)


def test_make_loadtest_says_what_each_mix_took(server: str, tmp_path: Path) -> None:
    done = run_load("--dsn", server, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PostgreSQL" in done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split()[:3] == ["end", "to", "end"]
    assert {row.split()[0] for row in rows[:-1]} == MIXES
    assert rows[-1].startswith("✓")
    assert (tmp_path / "loadtest-report" / "loadtest.html").exists()
    assert databases_of_load_tests(server) == 0


def test_a_load_test_that_does_not_begin_says_why(server: str, tmp_path: Path) -> None:
    done = run_load("--dsn", server, "Nobody", cwd=tmp_path)
    assert done.returncode == 1
    assert "Locust did not begin" in done.stderr
    assert "Unknown User(s): Nobody" in done.stderr


def test_errors_and_stuck_workflows_are_failures(tmp_path: Path) -> None:
    options = argparse.Namespace(report=tmp_path)
    (tmp_path / "loadtest_stats.csv").write_text(
        "Type,Name,Request Count,Failure Count,Requests/s,50%,95%,99%,100%\n"
        "start,FanOut,3,0,1.5,1,2,3,4\nend to end,FanOut,3,1,1.5,10,20,30,40\n,Aggregated,6,1,3,1,2,3,4\n"
    )
    (tmp_path / "loadtest_failures.csv").write_text(
        "Method,Name,Error,Occurrences\nend to end,FanOut,ResultTimeout: too late,1\n"
    )
    (latency,), errors = load.read(options)
    assert (latency.mix, latency.ended, latency.failed, latency.percentiles) == ("FanOut", 2, 1, [10, 20, 30, 40])
    assert errors == ["FanOut, end to end: ResultTimeout: too late (1 times)"]


def test_ctrl_c_ends_all_that_a_load_test_started(server: str, tmp_path: Path, eventually: Callable[..., None]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "durable_cluster.loadtest.load", "--seconds", "60", "--dsn", server],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        log = tmp_path / "loadtest-report" / "loadtest.log"
        eventually(
            lambda: log.exists() and "All users spawned" in log.read_text("utf-8"),
            seconds=DEADLINE_S,
            what="the users",
        )
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == load.INTERRUPTED, said
    assert "Traceback" not in said
    eventually(lambda: not members_of(process.pid), what="the end of all its processes")
    assert databases_of_load_tests(server) == 0


def run_load(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "durable_cluster.loadtest.load",
        "--seconds",
        "3",
        "--users",
        "10",
        "--shards",
        "1",
    ]
    return subprocess.run([*command, *words], cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def databases_of_load_tests(server: str) -> int:
    with psycopg.connect(server) as admin:
        row = admin.execute(r"select count(*) from pg_database where datname like 'durable\_loadtest\_%'").fetchone()
    assert row is not None
    return row[0]


def members_of(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found
