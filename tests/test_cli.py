"""The command line against a running cluster: start, run, look, stop. Every command is the real one.

Each is run in a process of its own once at least; what is asked again is asked in this one (``say``), which spares its start.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from said import Said, Say

from durable_cluster.ops.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

Eventually = Callable[..., None]
COMMAND = [sys.executable, "-m", "durable_cluster.ops"]
WHOLE_ID = re.compile("[0-9a-f]{32}")
SHARDS = 2
FLOWS = """
import time
from pathlib import Path

import msgspec

from durable_cluster import App, Context, Continuation, TerminalError


class Sum(msgspec.Struct):
    numbers: list[int]


app = App("sums")
add = app.machine("add")
hold = app.machine("hold")
ask = app.machine("ask")


@add.step(start=True)
def split(ctx: Context, of: Sum) -> Continuation:
    if not of.numbers:
        raise TerminalError("nothing to add up \\x1b[31m")
    return ctx.goto(total, of)


@add.step()
def total(ctx: Context, of: Sum) -> Continuation:
    return ctx.done({"total": sum(of.numbers)})


app.schedule("new-year", "0 0 1 1 *", add, Sum(numbers=[1]), zone="Europe/Berlin")


@hold.step(start=True)
def wait_for_file(ctx: Context, name: str) -> Continuation:
    Path(name).with_suffix(".reached").touch()
    while not Path(name).exists():
        time.sleep(0.01)
    return ctx.done()


@ask.step(start=True)
def question(ctx: Context, n: int) -> Continuation:
    return ctx.wait_for("answer", then=answered, state=n)


@ask.step()
def answered(ctx: Context, n: int) -> Continuation:
    return ctx.done([ctx.signal.payload, ctx.signal.actor])
"""


class Cluster:
    """A cluster started by the command, and a way to ask the command about it."""

    def __init__(self, dsn: str, home: Path) -> None:
        self.dsn = dsn
        self.home = home
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_")}
        self.env["DURABLE_DSN"] = dsn
        self.process: subprocess.Popen[str] | None = None

    def start(self, *words: str) -> Any:
        """What it says once it is up."""
        self.process = self.popen("start", "--json", "--app", "flows:app", *words)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return msgspec.json.decode(line)

    def popen(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *words],
            cwd=self.home,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **more,
        )

    def ask(self, *words: str, text: str = "", timeout: float = 60) -> Said:
        done = subprocess.run(
            [*COMMAND, *words],
            cwd=self.home,
            env=self.env,
            text=True,
            input=text,
            capture_output=True,
            check=False,
            timeout=timeout,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def run(self, *words: str, text: str = "") -> Said:
        return self.ask("run", *words, "--app", "flows:app", text=text)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    (made / "flows.py").write_text(FLOWS)
    return made


@pytest.fixture(scope="module")
def module_dsn(server: str, template: str) -> Iterator[str]:
    name = f"durable_cli_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} template {template}")
    yield make_conninfo(server, dbname=name, password="hunter2")
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"drop database {name} with (force)")


@pytest.fixture(scope="module")
def up_and_cluster(module_dsn: str, home: Path) -> Iterator[tuple[Any, Cluster]]:
    made = Cluster(module_dsn, home)
    yield made.start(), made
    assert made.process is not None
    made.process.terminate()
    out, err = made.process.communicate(timeout=30)
    assert (out, err) == ("", "the cluster has stopped\n")
    assert made.process.returncode == 0


@pytest.fixture
def cluster(up_and_cluster: tuple[Any, Cluster]) -> Cluster:
    return up_and_cluster[1]


@pytest.fixture
def say(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """``cluster.ask`` in this process."""
    monkeypatch.chdir(cluster.home)
    for name in os.environ:
        if name.startswith("DURABLE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DURABLE_DSN", cluster.dsn)

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def ids(up_and_cluster: tuple[Any, Cluster]) -> list[str]:
    """The whole ids of 30 completed workflows and a failed one, which is the last."""
    _, made = up_and_cluster
    many = made.run("add", "--input", '{"numbers": [1, 2, 3]}', "--count", "30", "--timeout", "20")
    assert many.code == 0, many.err
    failed = made.run("add", "--input", '{"numbers": []}', "--wait")
    assert failed.code == 1
    return [*many.out.split(), failed.out.strip()]


def test_start_says_what_is_up_and_no_password(up_and_cluster: tuple[Any, Cluster]) -> None:
    up, cluster = up_and_cluster
    with psycopg.connect(cluster.dsn) as connection:
        row = connection.execute(
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and application_name ~ '^durable-cluster (shard|maintenance|supervisor)'"
        ).fetchone()
    assert row == (up["connections"],) == (SHARDS + 2,)
    assert up["processes"] == SHARDS + 2
    assert up["memory_mib"] > 10
    assert (up["shards"], up["app"], up["workflows"]) == (SHARDS, "flows:app", ["add", "hold", "ask"])
    assert "hunter2" not in str(up)


def test_start_makes_the_schedules_that_the_code_declares(up_and_cluster: tuple[Any, Cluster]) -> None:
    with psycopg.connect(up_and_cluster[1].dsn) as connection:
        made = connection.execute("select name, workflow, app, is_in_code from durable.schedules()").fetchall()
    assert made == [("new-year", "add", "sums", True)]


def test_run_prints_the_whole_id_and_with_wait_the_result(cluster: Cluster) -> None:
    done = cluster.run("add", "--input", '{"numbers": [1, 2, 3]}', "--wait")
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert WHOLE_ID.fullmatch(first)
    assert msgspec.json.decode("\n".join(rest)) == {"total": 6}


def test_run_reads_its_input_from_a_file_or_from_standard_input(cluster: Cluster) -> None:
    (cluster.home / "input.json").write_text('{"numbers": [4, 5]}')
    assert cluster.run("add", "--input", "@input.json", "--wait", "--json").json["result"] == {"total": 9}
    assert (
        cluster.run("add", "--input", "@-", "--wait", "--json", text='{"numbers": [7]}').json["status"] == "completed"
    )


def test_run_with_a_key_gives_the_same_workflow_again(cluster: Cluster) -> None:
    words = ("add", "--input", '{"numbers": [1]}', "--key", "only-once")
    first, second = cluster.run(*words), cluster.run(*words)
    assert first.out == second.out
    assert WHOLE_ID.fullmatch(first.out.strip())


def test_run_with_a_count_prints_as_many_ids(ids: list[str]) -> None:
    assert len(set(ids)) == 31
    assert all(WHOLE_ID.fullmatch(one) for one in ids)


def test_a_wait_that_is_too_short_fails_and_names_show(cluster: Cluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    late = cluster.run("hold", "--input", f'"{gate}"', "--timeout", "0.2")
    gate.touch()
    assert late.code == 1
    assert "did not end in time; it goes on: see 'durable-cluster show " in late.err
    assert not WHOLE_ID.search(late.err)


def test_show_says_where_a_running_workflow_stands(cluster: Cluster, tmp_path: Path, eventually: Eventually) -> None:
    gate = tmp_path / "gate"
    started = cluster.run("hold", "--input", f'"{gate}"')
    eventually(gate.with_suffix(".reached").exists, what="the step running")
    shown = cluster.ask("show", started.out[:12])
    gate.touch()
    assert shown.code == 0, shown.err
    assert "stands    claimed at step 1 'wait_for_file', shard" in shown.out


def test_show_tells_a_failure_with_its_traceback_and_no_power_over_the_terminal(
    cluster: Cluster, say: Say, ids: list[str]
) -> None:
    shown = cluster.ask("show", ids[-1])
    assert "failed    in step 1 'split': nothing to add up" in shown.out
    assert 'raise TerminalError("nothing to add up' in shown.out
    assert "\x1b" not in shown.out
    assert say("show", ids[-1][:12], "--json").json["failure"]["step"] == "split"


def test_show_demands_more_digits_of_an_ambiguous_prefix(say: Say, ids: list[str]) -> None:
    firsts = [one[0] for one in ids]
    digit = next(digit for digit in firsts if firsts.count(digit) > 1)
    shown = say("show", digit)
    assert shown.code == 1
    assert f"workflows begin with {digit} (" in shown.err
    assert "give more digits" in shown.err


def test_list_shows_the_newest_first_and_filters(cluster: Cluster, say: Say, ids: list[str]) -> None:
    listed = cluster.ask("list", "--status", "failed", "--workflow", "add", "--json").json
    assert [one["id"] for one in listed] == [ids[-1][:12]]
    some = say("list", "--limit", "3")
    assert len(some.out.splitlines()) == 4
    assert "the newest 3; go on with --after " in some.err
    rest = say("list", "--after", some.err.split()[-1], "--json").json
    assert {one["id"] for one in rest}.isdisjoint(line.split()[0] for line in some.out.splitlines()[1:])
    assert say("list", "--workflow", "nobody").out == "no workflows\n"


def test_no_command_but_run_prints_a_whole_id(say: Say, ids: list[str]) -> None:
    for words in (
        ["list"],
        ["list", "--json"],
        ["status"],
        ["show", ids[-1]],
        ["show", ids[-1], "--json"],
        ["show", "f" * 32],
    ):
        said = say(*words)
        assert not WHOLE_ID.search(said.out + said.err), (words, said)


def test_status_counts_consumers_and_workflows(cluster: Cluster, say: Say, ids: list[str]) -> None:
    status = cluster.ask("status", "--json").json
    assert [one["consumers"] for one in status["shards"]] == [1] * SHARDS
    assert {"workflow": "add", "status": "failed", "workflows": 1} in status["workflows"]
    assert cluster.process is not None
    assert status["pid"] == cluster.process.pid
    text = say("status").out
    assert f"the cluster runs here (pid {cluster.process.pid})" in text
    assert "hunter2" not in text


def test_doctor_finds_a_running_cluster_well(cluster: Cluster, ids: list[str]) -> None:
    diagnosis = cluster.ask("doctor", "--json").json
    wrong = {one["check"] for one in diagnosis["findings"] if one["verdict"] == "wrong"}
    assert wrong <= {"crash safety"}  # a server of the tests need not survive
    assert {"server", "schema", "partitions", "consumers", "windows", "rotation", "clock", "sessions", "snapshots"} <= {
        one["check"] for one in diagnosis["findings"]
    }


def test_psql_is_connected_to_the_database(cluster: Cluster) -> None:
    said = cluster.ask("psql", "-Atc", "select count(*) from durable.shard", "-X")
    if "there is no psql on the PATH" in said.err:
        pytest.skip("no psql here")
    assert (said.code, said.out) == (0, f"{SHARDS}\n"), said.err


def test_a_second_cluster_of_the_same_directory_is_refused(cluster: Cluster) -> None:
    second = cluster.ask("start", "--app", "flows:app")
    assert second.code == 1
    assert cluster.process is not None
    assert f"a cluster runs from .durable already (pid {cluster.process.pid})" in second.err


def test_uninstall_is_refused_while_a_cluster_is_connected(cluster: Cluster) -> None:
    refused = cluster.ask("uninstall", "--yes")
    assert refused.code == 1
    assert "processes of a cluster are connected" in refused.err
    assert "nothing was removed" in refused.err


def test_a_reader_who_has_had_enough_is_no_error(cluster: Cluster) -> None:
    with cluster.popen("run", "add", "--input", '{"numbers": [1]}', "--count", "3000", "--app", "flows:app") as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.returncode == 0


def test_stop_waits_until_the_cluster_is_gone_and_the_next_one_starts(dsn: str, home: Path, tmp_path: Path) -> None:
    cluster = Cluster(dsn, home)
    data = str(tmp_path / "data")
    for more in ([], ["--now"]):
        up = cluster.start("--data", data)
        stopped = cluster.ask("stop", "--data", data, "--json", *more)
        assert stopped.code == 0, stopped.err
        assert stopped.json["pid"] == up["pid"]
        assert cluster.process is not None
        assert cluster.process.wait(5) == 0
    again = cluster.ask("stop", "--data", data)
    assert again.code == 1
    assert f"no cluster runs from {data}" in again.err


def test_ctrl_c_while_the_children_start_is_clean(dsn: str, home: Path, tmp_path: Path, eventually: Eventually) -> None:
    cluster = Cluster(dsn, home)
    with cluster.popen(
        "start", "--app", "flows:app", "--data", str(tmp_path / "data"), start_new_session=True
    ) as starting:
        tasks = Path(f"/proc/{starting.pid}/task/{starting.pid}/children")
        with contextlib.suppress(FileNotFoundError):
            eventually(lambda: len(tasks.read_text().split()) >= 3, seconds=30, what="the first children")
        os.killpg(starting.pid, signal.SIGINT)
        out, err = starting.communicate(timeout=30)
    assert starting.returncode == 0
    assert "Traceback" not in out + err
    assert err == "the cluster has stopped\n"


@pytest.mark.slow
@pytest.mark.parametrize("flow", [[], ["--linear"]], ids=["machine", "function"])
def test_the_demo_reconciles_exactly_while_its_consumers_are_killed(
    server: str, home: Path, tmp_path: Path, flow: list[str]
) -> None:
    cluster = Cluster(server, home)
    demo = cluster.ask("demo", "--chaos", *flow, "--shards", "2", "--json", "--data", str(tmp_path), timeout=300)
    assert demo.code == 0, demo.err
    assert demo.json["is_exact"] is True
    assert demo.json["found"]["orders"] == demo.json["parcels"]["booked"] == 830
    assert demo.json["parcels"]["twice"] == demo.json["parcels"]["off"] == 0
    assert demo.json["letters"] == {"found": 5, "by_attempts": 3, "by_crashes": 2, "retried": 5}
    assert demo.json["havoc"]["kills"] >= 1
    assert demo.json["havoc"]["server_kills"] == 0
    killed = re.search(r"killed (\d+) consumers while they held a window", demo.err)
    assert killed is not None, demo.err
    assert "Postgres was not killed: it is not the demo's own (--dsn)" in demo.err


def test_a_signal_from_the_command_line_resumes_and_a_cancel_ends(
    cluster: Cluster, say: Say, eventually: Eventually
) -> None:
    asked, doomed = cluster.run("ask", "--input", "1", "--count", "2").out.split()

    def waits(one: str) -> bool:
        return "waiting for a signal" in say("show", one[:12]).out

    eventually(lambda: waits(asked) and waits(doomed))
    assert "2 waiting for a signal" in say("status").out
    sent = cluster.ask("signal", asked, "answer", "--payload", '{"n": 42}', "--actor", "ada")
    assert (sent.code, sent.out) == (0, f"signal 'answer' sent to workflow {asked[:12]}…\n")
    eventually(lambda: say("show", asked[:12], "--json").json["status"] == "completed")
    assert say("show", asked[:12], "--json").json["output"] == [{"n": 42}, "ada"]
    again = say("signal", asked, "answer")
    assert again.code == 1 and "has ended" in again.err and asked not in again.err
    assert "the whole id, 32 hex digits" in say("signal", asked[:12], "answer").err

    assert "is paused; go on with 'durable-cluster resume" in cluster.ask("pause", doomed[:12], "--actor", "ada").out
    assert "by ada: workflow" in say("status").out
    assert "was paused already" in say("pause", doomed[:12]).out
    assert "goes on; 0 steps had been held" in cluster.ask("resume", doomed[:12]).out
    assert "no limits; a step or a machine declares one" in say("limits", "list").out
    assert "limit 'stripe' is set" in cluster.ask("limits", "set", "stripe", "--concurrency", "3", "--rate", "5/1m").out
    assert re.search(r"stripe +3 +5/60.0 s +set +0 +0 +0", say("limits", "list").out)
    assert "counts again as the code declares it" in say("limits", "reset", "stripe").out
    assert "give --concurrency N or --rate" in say("limits", "set", "stripe").err
    assert "has priority 4 from its next step on" in cluster.ask("priority", doomed[:12], "4").out
    assert "a weight from 0.1 to 10" in say("priority", doomed[:12], "99").err
    assert "was not paused" in say("resume", "--workflow", "ask").out
    assert "name one thing" in say("pause", doomed[:12], "--shard", "1").err

    assert "is asked to end" in cluster.ask("cancel", doomed[:12], "--reason", "the customer left").out
    eventually(lambda: say("show", doomed[:12], "--json").json["status"] == "cancelled")
    assert "before step 2 'answered': the customer left" in say("show", doomed[:12]).out
    assert "has ended already" in say("cancel", doomed[:12]).out
    assert "no workflow begins with 000000000000" in say("cancel", "0" * 12).err
