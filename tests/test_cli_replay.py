"""``durable-cluster replay``, ``fork`` and ``history`` as people use them: one or many, looked at first, told when it cannot be."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from said import Said, Say

from durable_cluster import App, Handle
from durable_cluster.loading import load_app
from durable_cluster.ops.cli import main

FLOWS = """
import os
from durable_cluster import App, Context, Continuation, Retry, wait_for

app = App("shop")
elsewhere = App("elsewhere")
ONCE = Retry(attempts=1)


@app.step
def price(n: int) -> int:
    return 10 * n


@app.step(retry=ONCE)
def charge(cents: int) -> str:
    if "BROKEN" in os.environ:
        raise RuntimeError("no card\\nat all \\x1b[31m" + "x" * 99)
    return f"receipt for {cents}"


@app.workflow(keeps_memo=True)
async def order(n: int) -> str:
    return await charge(await price(n))


@app.workflow
async def waiter(n: int) -> str:
    return await wait_for("go")


machine = app.machine("parcel", state=int)


@machine.step(start=True)
def send(ctx: Context, n: int) -> Continuation:
    return ctx.done(n)
"""
WHOLE_ID = re.compile("[0-9a-f]{32}")
APP = ("--app", "flows_of_replay:app")


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dsn: str) -> Iterator[App]:
    (tmp_path / "flows_of_replay.py").write_text(FLOWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DURABLE_DSN", dsn)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    path = list(sys.path)
    app = load_app("flows_of_replay:app")
    yield app
    app.close()
    sys.path[:] = path
    sys.modules.pop("flows_of_replay", None)


@pytest.fixture
def say(app: App, capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*words: str) -> Said:
        try:
            code = main(words)
        except SystemExit as exited:
            code = int(exited.code or 0)
        said = capsys.readouterr()
        assert not WHOLE_ID.search(said.err), said
        return Said(code, said.out, said.err)

    return run


@pytest.fixture
def stuck(app: App, monkeypatch: pytest.MonkeyPatch) -> Handle:
    monkeypatch.setenv("BROKEN", "1")
    handle = app.named("order").start(3, attributes={"lot": 1})
    app.run(until_idle=True)
    monkeypatch.delenv("BROKEN")
    return handle


def ended(app: App, number: int) -> list[Handle]:
    handles = [app.named("order").start(n, attributes={"lot": 2}) for n in range(number)]
    app.run(until_idle=True)
    return handles


def test_a_stuck_workflow_starts_over_itself(say: Say, app: App, stuck: Handle) -> None:
    said = say("replay", stuck.id[:12], "--actor", "ada")
    assert (said.code, said.out, said.err) == (0, f"{stuck.id[:12]}  starts over\n", "")
    app.run(until_idle=True)
    assert stuck.result(timeout=1) == "receipt for 30"


def test_of_one_that_has_ended_the_new_id_is_the_answer(say: Say, app: App) -> None:
    (first,) = ended(app, 1)
    said = say("replay", first.id[:12])
    assert (said.code, WHOLE_ID.fullmatch(said.out.strip()) is not None) == (0, True)
    assert said.out.strip() != first.id
    assert said.err == f"replayed from {first.id[:12]}; see 'durable-cluster show {said.out[:12]}'\n"
    assert say("replay", first.id, "--json").json.keys() == {"id", "is_new", "of"}
    app.run(until_idle=True)
    assert app.get(said.out.strip()).result(timeout=1) == "receipt for 0"
    assert {one["origin"] for one in say("list", "--origin", first.id[:12], "--json").json} == {first.id[:12]}


def test_show_says_what_a_workflow_was_made_of(say: Say, app: App) -> None:
    (first,) = ended(app, 1)
    made = say("replay", first.id[:12]).out.strip()
    assert f"  made of   {first.id[:12]}, which it replays or is a fork of\n" in say("show", made).out
    assert say("show", made, "--json").json["origin"] == first.id[:12]
    assert "made of" not in say("show", first.id).out
    assert say("show", first.id, "--json").json["origin"] is None


def test_one_that_goes_on_by_itself_is_refused_with_what_to_do(say: Say, app: App) -> None:
    handle = app.named("waiter").start(1)
    app.run(until_idle=True)
    said = say("replay", handle.id[:12])
    assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert f"'durable-cluster cancel {handle.id[:12]}'" in said.err


def test_a_history_is_a_table_of_what_a_fork_can_begin_at(say: Say, app: App, stuck: Handle) -> None:
    said = say("history", stuck.id[:12])
    assert said.code == 0, said.err
    assert [line.split() for line in said.out.splitlines()] == [
        ["path", "status", "value"],
        ["1", "price", "completed", "30"],
        ["2", "charge", "open", "-"],
    ]
    assert [one["path"] for one in say("history", stuck.id, "--json").json] == ["1 price", "2 charge"]
    assert say("history", stuck.id, "--limit", "1").err == "the newest 1; see more with --limit\n"
    parcel = app.named("parcel").start(1)
    app.run(until_idle=True)
    assert say("history", parcel.id[:12]).out == "no await is recorded\n"
    waiter = app.named("waiter").start(1)
    waiter.signal("go", "on")
    app.run(until_idle=True)
    assert "not declared with keeps_memo=True" in say("history", waiter.id[:12]).err


def test_a_fork_prints_the_new_id_and_begins_there(say: Say, app: App, stuck: Handle) -> None:
    said = say("fork", stuck.id[:12], "--at", "2 charge")
    assert said.code == 0, said.err
    assert said.err.startswith(f"forked from {stuck.id[:12]}; see ")
    other = say("fork", stuck.id[:12], "--at", "1", "--input", "5", *APP, "--json").json
    Path("input.json").write_text("6")
    third = say("fork", stuck.id[:12], "--input", "@input.json").out
    app.run(until_idle=True)
    results = [app.get(one.strip()).result(timeout=1) for one in (said.out, other["id"], third)]
    assert results == ["receipt for 30", "receipt for 50", "receipt for 60"]
    assert stuck.status() == "stuck"


def test_a_fork_that_cannot_be_is_one_line_that_says_what_can(say: Say, app: App, stuck: Handle) -> None:
    for words, part in (
        (["--at", "7 ship"], "it can at '1 price', '2 charge'"),
        (["--input", '"three"', *APP], "does not fit int"),
        (["--at", "1", "--input", '"three"', *APP], "does not fit int"),
    ):
        said = say("fork", stuck.id[:12], *words)
        assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
        assert part in said.err
    assert "no workflow begins with" in say("fork", "0" * 12).err


def test_many_are_shown_first_and_need_a_yes(say: Say, app: App, stuck: Handle) -> None:
    handles = ended(app, 7)
    words = ("replay", "--all", "--status", "completed", "--attribute", "lot=2")
    said = say(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("7 workflows, the newest first:\nid ")
    assert len([line for line in said.err.splitlines() if " completed " in line]) == 5
    assert said.err.endswith("this would start 7 workflows over: say --yes if that is meant\n")
    assert len(app.list("order", status="completed")) == 7
    assert say(*words, "--yes", "--json").json == {"done": 7, "refused": 0, "refusal": None}
    app.run(until_idle=True)
    assert len(app.list("order", status="completed")) == 14
    assert {len(app.list(origin=one.id)) for one in handles} == {1}
    assert say("replay", "--all", "--status", "failed", "--yes").out == "no such workflows\n"
    assert say("replay", "--all", "--status", "stuck", "--yes").out == "1 workflow started over\n"
    app.run(until_idle=True)
    assert stuck.status() == "completed"


def test_more_than_one_transaction_takes_are_all_forked(say: Say, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable_cluster.ops.replay.AT_ONCE", 3)
    ended(app, 10)
    words = ("fork", "--all", "--workflow", "order", "--status", "completed", "--at", "2 charge")
    assert "this would fork 10 workflows at '2 charge'" in say(*words).err
    assert say(*words, "--yes").out == "10 workflows forked\n"
    said = say(*words[:-1], "9 ship", "--yes")
    assert said.code == 1
    assert said.out.startswith("0 workflows forked\n10 workflows left as they are; the first: workflow ")
    app.run(until_idle=True)
    assert len(app.list("order", status="completed")) == 20


def test_an_operator_acts_without_seeing_values(
    say: Say, app: App, stuck: Handle, conn: psycopg.Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("do $$ begin create role an_operator login; exception when duplicate_object then null; end $$")
    conn.execute("grant durable_operator to an_operator")
    conn.execute("select durable.set_audit(true)")
    monkeypatch.setenv("DURABLE_DSN", make_conninfo(dsn, user="an_operator"))
    said = say("history", stuck.id)
    assert [line.split() for line in said.out.splitlines()[:2]] == [
        ["path", "status", "bytes"],
        ["1", "price", "completed", "2"],
    ]
    assert say("fork", stuck.id, "--at", "2 charge", "--actor", "ada").code == 0
    assert say("replay", "--all", "--status", "stuck", "--yes", "--actor", "bob").code == 0
    rows = conn.execute("select what, actor, role from durable.audit_list() order by at, what, actor").fetchall()
    assert [row for row in rows if row[0] in ("fork", "replay")] == [
        ("fork", "ada", "an_operator"),
        ("fork", "ada", "an_operator"),
        ("replay", "bob", "an_operator"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
@pytest.mark.parametrize(("answer", "many"), [("yes", 2), ("no", 1)])
def test_at_a_terminal_the_question_is_asked(app: App, dsn: str, tmp_path: Path, answer: str, many: int) -> None:
    ended(app, 1)
    ours, theirs = pty.openpty()
    words = ["replay", "--all", "--status", "completed", "--workflow", "order", "--dsn", dsn]
    asking = subprocess.Popen(
        [sys.executable, "-m", "durable_cluster.ops", *words],
        cwd=tmp_path,
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    out, _ = asking.communicate(timeout=60)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "start 1 workflow over? [y/N]" in shown
    assert len(app.list("order")) == many
    assert (out == "1 workflow started over\n") == (asking.returncode == 0) == (many == 2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["replay"], ["an ID, or --all"]),
        (["replay", "--status", "failed"], ["an ID, or --all"]),
        (["replay", "--all"], ["--all needs --status"]),
        (["replay", "--all", "--workflow", "order"], ["--all needs --status"]),
        (["fork", "--all"], ["--all needs --workflow and --status"]),
        (["replay", "abc", "--all"], ["leave out --all"]),
        (["fork", "abc", "--key", "k"], ["leave out --all and the filters"]),
        (["replay", "xyz"], ["'xyz'", "hex digits"]),
        (["replay", "abc", "--at", "1"], ["--at"]),
        (["replay", "--all", "--status", "bored"], ["'bored'"]),
        (["fork", "abc", "--input", "{n}"], ["--input is not JSON", "quote it"]),
        (["fork", "abc", *APP], ["--app", "--input"]),
        (["fork", "abc", "--actor", ""], ["1 to 255 characters"]),
        (["history"], ["ID"]),
        (["history", "abc", "--limit", "0"], ["--limit", "'0'"]),
    ],
)
def test_a_command_line_that_cannot_be_meant_changes_nothing(
    say: Say, app: App, stuck: Handle, words: list[str], parts: list[str]
) -> None:
    said = say(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("durable-cluster: error: ")
    assert said.err.count("\n") == 1
    assert all(part in said.err for part in parts), said.err
    assert (stuck.status(), len(app.list())) == ("stuck", 1)
