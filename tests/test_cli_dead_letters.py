"""``durable-cluster dead-letters`` as people use it: look, take up again, end; asked before many, told when nothing is there."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from said import Said, Say

from durable_cluster import side_statements, statements
from durable_cluster.ops.cli import main

FLOWS = """
import msgspec
from durable_cluster import App, Context, Continuation


class Order(msgspec.Struct):
    lines: list[int]


app = App("shop")
elsewhere = App("elsewhere")
order = app.machine("order")


@order.step(start=True)
def charge(ctx: Context, order: Order) -> Continuation:
    return ctx.done(sum(order.lines))
"""
WHOLE_ID = re.compile("[0-9a-f]{32}")
STATE = '{"lines":[1,2],"card":"4242 \\u0000"}'
APP = ("--app", "flows_of_dead_letters:app")


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dsn: str) -> Iterator[Say]:
    """Runs ``dead-letters …`` (or another command) on the fresh database."""
    (tmp_path / "flows_of_dead_letters.py").write_text(FLOWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DURABLE_DSN", dsn)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    path = list(sys.path)

    def run(*words: str, command: str = "dead-letters") -> Said:
        try:
            code = main([command, *words])
        except SystemExit as exited:
            code = int(exited.code or 0)
        said = capsys.readouterr()
        assert not WHOLE_ID.search(said.out + said.err), said
        return Said(code, said.out, said.err)

    yield run
    sys.path[:] = path
    sys.modules.pop("flows_of_dead_letters", None)


def bury(
    conn: psycopg.Connection,
    number: int = 1,
    *,
    workflow: str = "order",
    step: str = "charge",
    reason: str = "attempts",
    message: str = "ValueError: no card",
    state: str = STATE,
) -> list[str]:
    """The ids of so many stuck workflows."""
    ids = [
        row[0] for row in conn.execute("select durable.hex(durable.new_id()) from generate_series(1, %s)", (number,))
    ]
    for one in ids:
        conn.execute(
            "insert into durable.started (id, day, workflow, version, input, at)"
            " values (%(id)s, durable.day_of(%(id)s), %(workflow)s, 1, '{}', durable.now())",
            {"id": one, "workflow": workflow},
        )
    lines = [f'{{"w":"{one}","n":3,"f":"{workflow}","s":"{step}","v":1,"d":{state},"a":5}}' for one in ids]
    details = msgspec.json.encode({"reason": message, "traceback": "Traceback:\n  in charge"}).decode()
    side_statements.bury(conn, lines, [reason] * number, [details] * number)
    return ids


def status(conn: psycopg.Connection, workflow_id: str) -> str:
    state = statements.state_of(conn, workflow_id)
    assert state is not None
    return state.status


def lines_of(conn: psycopg.Connection) -> str:
    return "\n".join(
        row[0] for row in conn.execute("select ev_data from pgque.event_1 union all select ev_data from pgque.event_2")
    )


def test_a_list_is_a_table_with_truncated_ids_and_one_line_a_letter(say: Say, conn: psycopg.Connection) -> None:
    assert say("list").out == "no dead letters\n"
    (first,) = bury(conn)
    (second,) = bury(conn, workflow="agent", step="think", reason="crashes", message="two\nlines \x1b[31m" + "x" * 99)
    said = say("list")
    assert (said.code, said.err) == (0, "")
    head, *rows = said.out.splitlines()
    assert head.split() == ["id", "workflow", "step", "seq", "attempt", "reason", "since", "message"]
    assert [row[:12] for row in rows] == [second[:12], first[:12]]
    assert rows[0].endswith("two")
    assert rows[1].endswith("ValueError: no card")
    assert "4242" not in said.out
    for words in (["--workflow", "order"], ["--step", "charge"], ["--reason", "attempts"]):
        assert [one["id"] for one in say("list", *words, "--json").json] == [first[:12]]
    assert say("list", "--limit", "1").err == "the newest 1 of 2; see more with --limit\n"


def test_show_tells_why_with_the_traceback_and_the_state(say: Say, conn: psycopg.Connection) -> None:
    (one,) = bury(conn)
    said = say("show", one[:6])
    assert said.code == 0, said.err
    for part in (
        f"{one[:12]}  order  stuck in step 3 'charge'",
        "because   its last attempt failed (attempts)",
        "message   ValueError: no card",
        "    Traceback:\n      in charge",
        '"card": "4242 \\u0000"',
        f"durable-cluster dead-letters retry {one[:12]}",
    ):
        assert part in said.out, said.out
    assert say("show", one, "--json").json["state"] == {"lines": [1, 2], "card": "4242 \0"}


def test_the_workflow_itself_is_shown_and_listed_as_stuck(say: Say, conn: psycopg.Connection) -> None:
    (one,) = bury(conn)
    shown = say(one[:12], command="show").out
    assert "order (version 1)  stuck" in shown
    assert "  stuck     in step 3 'charge': ValueError: no card" in shown
    assert f"durable-cluster dead-letters retry {one[:12]}" in shown
    assert [found["id"] for found in say("--status", "stuck", "--json", command="list").json] == [one[:12]]


def test_an_operator_acts_without_seeing_the_state(
    say: Say, conn: psycopg.Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("do $$ begin create role an_operator login; exception when duplicate_object then null; end $$")
    conn.execute("grant durable_operator to an_operator")
    monkeypatch.setenv("DURABLE_DSN", make_conninfo(dsn, user="an_operator"))
    first, second = bury(conn, 2)
    shown = say("show", first)
    assert "state     is not shown to this role" in shown.out
    assert "4242" not in shown.out + say("show", first, "--json").out + say("list", "--json").out
    assert say("retry", first).code == 0
    assert say("purge", "--all", "--yes").code == 0
    assert (status(conn, first), status(conn, second)) == ("running", "failed")


def test_a_retry_takes_one_up_again_and_says_so(say: Say, conn: psycopg.Connection) -> None:
    (one,) = bury(conn)
    said = say("retry", one[:12])
    assert (said.code, said.out) == (0, f"{one[:12]}  order goes on in step 'charge'\n")
    assert status(conn, one) == "running"
    again = say("retry", one[:12])
    assert (again.code, again.out) == (1, "")
    assert f"no dead letter begins with {one[:12]}" in again.err


def test_a_retry_with_an_edited_state_is_checked_against_the_app(say: Say, conn: psycopg.Connection) -> None:
    (one,) = bury(conn)
    for state, parts in (
        ('{"lines": [1, "two"]}', ["the state of step 'charge' does not fit Order", "lines[1]", '"two"']),
        ('{"lines": [1], "tip": 1}', ["'tip'"]),
    ):
        said = say("retry", one, "--state", state, *APP)
        assert (said.code, said.err.count("\n")) == (1, 1)
        assert all(part in said.err for part in parts), said.err
    assert "no workflow 'order'" in say("retry", one, "--state", "1", "--app", "flows_of_dead_letters:elsewhere").err
    assert status(conn, one) == "stuck"
    Path("state.json").write_text('{"lines": [40, 2]}')
    said = say("retry", one, "--state", "@state.json", *APP, "--json")
    assert said.json == {"done": 1, "id": one[:12]}
    assert '"d":{"lines":[40,2]}' in lines_of(conn)


def test_a_state_is_any_json_where_no_app_is_named(say: Say, conn: psycopg.Connection) -> None:
    (one,) = bury(conn)
    assert say("retry", one, "--state", '{"any": "thing"}').out.endswith("with the edited state\n")
    assert '"d":{"any":"thing"}' in lines_of(conn)


def test_a_purge_ends_one_workflow(say: Say, conn: psycopg.Connection) -> None:
    (one,) = bury(conn)
    said = say("purge", one[:12])
    assert said.out == f"{one[:12]}  order has ended: failed in step 'charge'\n"
    assert status(conn, one) == "failed"
    assert "\n  purged " in say(one[:12], command="show").out


@pytest.mark.parametrize(("act", "ends"), [("retry", "running"), ("purge", "failed")])
def test_many_are_shown_first_and_need_a_yes(say: Say, conn: psycopg.Connection, act: str, ends: str) -> None:
    meant = bury(conn, 7)
    (other,) = bury(conn, workflow="agent")
    said = say(act, "--all", "--workflow", "order")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("7 dead letters, the newest first:\n")
    assert said.err.count("ValueError: no card") == 5
    assert "this would " in said.err
    assert "7 workflows" in said.err.splitlines()[-1]
    assert "say --yes if that is meant" in said.err
    assert {status(conn, one) for one in meant} == {"stuck"}
    done = say(act, "--all", "--workflow", "order", "--yes", "--json")
    assert (done.code, done.json) == (0, {"done": 7, "id": None})
    assert {status(conn, one) for one in meant} == {ends}
    assert status(conn, other) == "stuck"
    assert say(act, "--all", "--workflow", "order", "--yes").out == "no dead letters\n"


@pytest.mark.parametrize("act", ["retry", "purge"])
def test_the_audit_says_who_did_it(
    say: Say, conn: psycopg.Connection, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURABLE_ACTOR", "the night shift")
    conn.execute("select durable.set_audit(true)")
    one, other, *_ = bury(conn, 4)
    assert say(act, one[:12], "--actor", "ada").code == 0
    assert say(act, other[:12]).code == 0
    assert say(act, "--all", "--yes", "--actor", "bob").code == 0
    rows = conn.execute("select actor from durable.audit_list(i_what => %s) order by actor", (act,)).fetchall()
    assert rows == [("ada",), ("bob",), ("bob",), ("the night shift",)]
    for wrong in ("", "a\nb", "x" * 256):
        assert "1 to 255 characters" in say(act, "--all", "--yes", "--actor", wrong).err


def test_more_than_one_transaction_takes_are_all_done(say: Say, conn: psycopg.Connection) -> None:
    ids = bury(conn, 450)
    assert say("retry", "--all", "--yes").out == "450 workflows taken up again\n"
    assert lines_of(conn).count("\n") == 449
    assert {status(conn, one) for one in ids} == {"running"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
@pytest.mark.parametrize(("answer", "ends"), [("yes", "failed"), ("no", "stuck"), ("", "stuck")])
def test_at_a_terminal_the_question_is_asked(
    conn: psycopg.Connection, dsn: str, tmp_path: Path, answer: str, ends: str
) -> None:
    (one,) = bury(conn)
    ours, theirs = pty.openpty()
    asking = subprocess.Popen(
        [sys.executable, "-m", "durable_cluster.ops", "dead-letters", "purge", "--all", "--dsn", dsn],
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
    assert "end 1 workflow for good, as failed? [y/N]" in shown
    assert status(conn, one) == ends
    assert (out == "1 workflow ended as failed\n") == (asking.returncode == 0) == (ends == "failed")
    assert ends == "failed" or "nothing was changed" in shown


def test_a_prefix_of_several_needs_more_digits(say: Say, conn: psycopg.Connection) -> None:
    ids = bury(conn, 40)
    digit = next(one[0] for one in ids if sum(other[0] == one[0] for other in ids) > 1)
    for act in ("show", "retry", "purge"):
        said = say(act, digit)
        assert said.code == 1
        assert f"dead letters begin with {digit} (" in said.err
        assert "give more digits" in said.err
    assert {status(conn, one) for one in ids} == {"stuck"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["ACTION"]),
        (["bury"], ["'bury'", "retry"]),
        (["list", "--reason", "bored"], ["--reason", "'bored'", "unroutable"]),
        (["list", "--limit", "0"], ["--limit", "'0'"]),
        (["show"], ["ID"]),
        (["show", "xyz"], ["'xyz'", "hex digits"]),
        (["retry"], ["an ID, or --all"]),
        (["retry", "--workflow", "order"], ["an ID, or --all"]),
        (["purge", "abc", "--all"], ["leave out --all"]),
        (["retry", "abc", "--step", "charge"], ["leave out --all and the filters"]),
        (["retry", "--all", "--state", "1", "--yes"], ["--state is for one workflow"]),
        (["retry", "abc", *APP], ["--app", "--state"]),
        (["retry", "abc", "--state", "{lines}"], ["--state is not JSON", "quote it"]),
        (["retry", "abc", "--state", "@missing.json"], ["--state @missing.json cannot be read"]),
        (["purge", "abc", "--state", "1"], ["--state"]),
    ],
)
def test_a_command_line_that_cannot_be_meant_changes_nothing(
    say: Say, conn: psycopg.Connection, words: list[str], parts: list[str]
) -> None:
    (one,) = bury(conn)
    said = say(*words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("durable-cluster: error: ")
    assert said.err.count("\n") == 1
    assert all(part in said.err for part in parts), said.err
    assert status(conn, one) == "stuck"
