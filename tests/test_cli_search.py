"""``list``, ``show`` and ``audit`` as people use them: filters, attributes, the record and its export."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from said import Said, Say

from durable_cluster import App, Handle, UnknownWorkflow, side_statements
from durable_cluster.ops.cli import main

FLOWS = """
from durable_cluster import App, Context, Continuation

app = App("searched")
flow = app.machine("flow", state=str)


@flow.step(start=True)
def begin(ctx: Context, text: str) -> Continuation:
    ctx.set_progress({"at": text})
    return ctx.wait_for("go", then=begin, state=text)
"""
WHOLE_ID = re.compile("[0-9a-f]{32}(?![0-9a-f])")


@pytest.fixture
def say(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Say:
    (tmp_path / "flows_to_search.py").write_text(FLOWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("flows_to_search", None)

    def said(*words: str) -> Said:
        code = main([*words, "--dsn", dsn])
        out, err = capsysbinary.readouterr()
        return Said(code, out.decode(), err.decode())

    return said


def started(say: Say, *words: str) -> str:
    """The whole id of a workflow that was started with these options."""
    ran = say("run", "flow", "--app", "flows_to_search:app", "--input", '"here"', *words)
    assert ran.code == 0, ran.err
    return ran.out.strip()


def test_run_sets_attributes_and_list_finds_by_them(say: Say) -> None:
    ada = started(say, "--attribute", "customer=ada", "--attribute", "n=7", "--attribute", "vip=true", "--key", "k")
    bob = started(say, "--attribute", "customer=bob", "--attribute", 'n="7"')
    assert say("list", "--json").json[1]["attributes"] == {"customer": "ada", "n": 7, "vip": True}
    for words, whole in (
        (["--attribute", "customer=ada"], ada),
        (["--attribute", "n=7"], ada),
        (["--attribute", "vip=true", "--attribute", "customer=ada"], ada),
        (["--attribute", 'n="7"'], bob),
        (["--key", "k"], ada),
        (["--limit", "1"], bob),
        (["--limit", "1", "--after", say("list", "--json").json[0]["cursor"]], ada),
    ):
        assert [one["id"] for one in say("list", "--json", *words).json] == [whole[:12]], words
    assert 'customer="ada" n=7 vip=true' in say("list").out
    for words in (["--from", "2999-01-01"], ["--to", "2020-01-31T10:00:00+00:00"], ["--parent", ada]):
        assert say("list", *words).out == "no workflows\n"
    assert (
        say(
            "run", "flow", "--app", "flows_to_search:app", "--input", '"x"', "--count", "3", "--attribute", "many=1"
        ).code
        == 0
    )
    assert len(say("list", "--attribute", "many=1", "--json").json) == 3


def test_show_tells_attributes_and_progress(say: Say, conn: psycopg.Connection) -> None:
    whole = started(say, "--attribute", "customer=ada")
    side_statements.publish(conn, {whole: '{"at":"here"}'})
    text = say("show", whole[:12]).out
    assert '  found by  customer="ada"' in text
    assert '  progress  {"at":"here"}' in text
    shown = say("show", whole[:12], "--json").json
    assert (shown["attributes"], shown["progress"]) == ({"customer": "ada"}, {"at": "here"})


def test_the_audit_is_switched_listed_and_exported(say: Say, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started(say)
    assert say("audit", "list").out == "nothing is recorded\n"
    assert say("audit", "on", "--actor", "ada").out == "the audit is on\n"
    monkeypatch.setenv("DURABLE_ACTOR", "bob")
    whole = started(say)
    assert say("cancel", whole[:12], "--actor", "carl").code == 0
    client = App("other", dsn=dsn).client
    with pytest.raises(UnknownWorkflow):
        Handle(client, "flow", "0" * 32).signal("go")
    client.close()
    listed = say("audit", "list", "--json").json
    assert [(one["what"], one["actor"]) for one in listed] == [
        ("signal_refused", "bob"),
        ("cancel", "carl"),
        ("start", "bob"),
        ("audit_on", "ada"),
    ]
    for words, whats in (
        (["--id", whole], ["cancel", "start"]),
        (["--id", whole[:12]], ["cancel", "start"]),
        (["--actor", "bob"], ["signal_refused", "start"]),
        (["--what", "cancel"], ["cancel"]),
        (["--since", "2999-01-01"], []),
        (["--limit", "1"], ["signal_refused"]),
    ):
        assert [one["what"] for one in say("audit", "list", "--json", *words).json] == whats, words
    assert "reason=cancelled" in say("audit", "list").out
    assert say("audit", "off").code == 0
    assert [one["what"] for one in say("audit", "list", "--limit", "1", "--json").json] == ["audit_off"]


def test_an_export_is_whole_oldest_first_and_gives_no_id_away(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_cluster.ops.audit.EXPORTED_AT_ONCE", 4)
    say("audit", "on")
    wholes = [started(say) for _ in range(9)]
    exported = say("audit", "export", "--since", "2020-01-01")
    rows = [msgspec.json.decode(line) for line in exported.out.splitlines()]
    assert [row["what"] for row in rows] == ["audit_on", *["start"] * 9]
    assert [row["id"] for row in rows[1:]] == [whole[:12] for whole in wholes]
    assert len({row["id_hash"] for row in rows}) == 10
    assert "10 rows exported" in exported.err
    assert not any(whole in exported.out for whole in wholes)
    to_file = say("audit", "export", "--before", "2999-01-01", "--out", str(tmp_path / "audit.jsonl"))
    assert to_file.out == ""
    assert (tmp_path / "audit.jsonl").read_text() == exported.out
    assert say("audit", "export", "--before", "2020-01-01").out == ""
    again = say("audit", "export", "--before", "2999-01-01", "--out", str(tmp_path / "audit.jsonl"))
    assert (again.code, "is there already" in again.err) == (2, True)
    assert say("audit", "export").code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--attribute", "a"], "no attribute: write it as NAME=VALUE"),
        (["list", "--attribute", "a b=1"], "a name is of"),
        (["list", "--from", "yesterday"], "is no time: write it as"),
        (["list", "--after", "x"], "no cursor of a list"),
        (["list", "--parent", "xyz"], "up to 32 hex digits"),
        (["audit", "list", "--id", "xyz"], "is no workflow id"),
        (["audit", "gone"], "invalid choice: 'gone'"),
    ],
)
def test_what_cannot_be_meant_is_said_in_a_line(say: Say, words: list[str], said: str) -> None:
    answer = say(*words)
    assert answer.code in (1, 2)
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not WHOLE_ID.search(answer.err)


def test_doctor_says_whether_the_audit_is_on(
    say: Say, conn: psycopg.Connection, clock: Callable[[float], None]
) -> None:
    def found() -> dict[str, Any]:
        return {one["check"]: one for one in say("doctor", "--json").json["findings"]}["audit"]

    assert (found()["verdict"], found()["says"]) == ("ok", "off")
    say("audit", "on")
    assert found()["says"].startswith("on, reaches back")
    clock(85 * 86_400)
    assert found()["verdict"] == "note"
    assert "audit export" in found()["next_step"]
