"""``schedules``: made, seen, paused, run and ended from the command line; what is wrong is said and changes nothing."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from said import Said, Say

from durable_cluster import App, Context, Continuation
from durable_cluster.firing import Firing
from durable_cluster.ops.cli import main
from durable_cluster.ops.start import declare
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import Terminal

FLOWS = """
import msgspec

from durable_cluster import App, Context, Continuation


class Report(msgspec.Struct):
    city: str
    at: str = ""


app = App("reports")
report = app.machine("report")


@report.step(start=True)
def write(ctx: Context, report: Report) -> Continuation:
    return ctx.done(report)
"""
WHOLE_ID = re.compile("[0-9a-f]{32}")
CREATE = ("create", "nightly", "0 3 * * *", "report", "--app", "flows_of_schedules:app", "--input", '{"city": "Ulm"}')


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dsn: str) -> Iterator[Say]:
    """Runs ``schedules …`` on the fresh database."""
    (tmp_path / "flows_of_schedules.py").write_text(FLOWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DURABLE_DSN", dsn)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    path = list(sys.path)

    def run(*words: str) -> Said:
        code = main(["schedules", *words])
        said = capsys.readouterr()
        assert not WHOLE_ID.search(said.out + said.err), said
        return Said(code, said.out, said.err)

    yield run
    sys.path[:] = path
    sys.modules.pop("flows_of_schedules", None)


def test_a_schedule_is_made_seen_paused_run_and_ended(say: Say, conn: psycopg.Connection) -> None:
    assert say("list").out == "no schedules\n"
    made = say(*CREATE, "--zone", "Europe/Berlin", "--overlap", "queue", "--catch-up", "2h", "--due-as", "at")
    assert made.code == 0
    assert "schedule 'nightly' is made; 'report' starts 20" in made.out
    assert re.search(r"nightly +report +0 3 \* \* \* +Europe/Berlin +on +20", say("list").out)
    assert [one["name"] for one in say("list", "--json").json] == ["nightly"]
    shown = say("show", "nightly").out
    for text in (
        "made      at run time",
        "overlap   queue; 0 running",
        "in the last 2 h",
        "due as    at",
        '"city": "Ulm"',
    ):
        assert text in shown, shown
    assert len(say("show", "nightly", "--json").json["coming"]) == 3

    assert "paused; go on with" in say("pause", "nightly", "--reason", "audit").out
    assert "paused already" in say("pause", "nightly").out
    assert re.search("paused    since .*: audit", say("show", "nightly").out)
    assert " paused " in say("list").out
    assert "goes on" in say("resume", "nightly").out
    assert "was not paused" in say("resume", "nightly").out

    run = say("trigger", "nightly", "--json").json
    assert (run["outcome"], len(run["id"])) == ("started", 12)
    assert "waits for the end of the run that lives" in say("trigger", "nightly").out
    assert "skipped: a run of it lives" in say("trigger", "nightly", "--overlap", "skip").out
    assert f"as {run['id']}; skipped 1" in say("show", "nightly").out

    assert say("backfill", "nightly", "2026-03-01", "2026-03-03T04:00:00+02:00").out.endswith("started 3 workflows\n")
    assert say("backfill", "nightly", "2026-03-01", "2026-03-03", "--json").json["started"] == 0
    assert say("delete", "nightly").code == 2
    assert say("delete", "nightly", "--yes").code == 0
    assert say("list").out == "no schedules\n"
    assert conn.execute("select count(*) from durable.started").fetchone() == (4,)


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ((*CREATE[:2], "0 25 * * *", *CREATE[3:]), 1, "cron: '0 25 * * *' cannot be read: bad hour"),
        ((*CREATE[:3], "unheard", *CREATE[4:]), 1, "has no workflow 'unheard'"),
        ((*CREATE[:-1], '{"town": 1}'), 1, "the input of workflow 'report' does not fit Report"),
        ((*CREATE[:-1], "{"), 2, "--input is not JSON"),
        ((*CREATE, "--zone", "Mars"), 1, "zone: 'Mars' is no time zone"),
        ((*CREATE, "--overlap", "x"), 1, "overlap: 'x' is no policy"),
        ((*CREATE, "--catch-up", "0"), 1, "catch_up: 0 is out of range"),
        ((*CREATE, "--catch-up", "-1"), 1, "catch_up: '-1' is no duration"),
        (("show", "none"), 1, "no schedule 'none'"),
        (("pause", "none"), 1, "no schedule 'none'"),
        (("trigger", "None"), 1, "schedule name 'None'"),
        (("backfill", "none", "yesterday", "2026-01-01"), 2, "FROM: 'yesterday' is no time"),
        (("backfill", "none", "2026-01-01", "2026-01-02"), 1, "no schedule 'none'"),
        (("paint", "none"), 2, "invalid choice"),
        ((), 2, "ACTION"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(
    say: Say, conn: psycopg.Connection, words: tuple[str, ...], code: int, what: str
) -> None:
    said = say(*words)
    assert (said.code, said.out) == (code, "")
    assert what in said.err
    assert said.err.count("\n") == 1
    assert conn.execute("select count(*) from durable.schedule").fetchone() == (0,)


def test_an_operator_sees_no_input(
    say: Say, conn: psycopg.Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert say(*CREATE).code == 0
    monkeypatch.setenv("DURABLE_DSN", f"{dsn} options='-c role=durable_operator'")
    shown = say("show", "nightly")
    assert shown.code == 0, shown
    assert "Ulm" not in shown.out
    assert say("pause", "nightly").code == 0
    assert say("resume", "nightly").code == 0
    assert say("trigger", "nightly").code == 0


def test_what_was_missed_is_shown(say: Say, conn: psycopg.Connection) -> None:
    assert say(*CREATE).code == 0
    conn.execute(
        "update durable.schedule set next_due = next_due - interval '9 days', since = since - interval '10 days'"
    )
    assert Firing().tend(conn, is_asked=True)
    shown = say("show", "nightly").out
    assert "missed    from 20" in shown
    assert "fired     1, the last for 20" in shown


def test_a_start_tells_what_the_code_no_longer_declares(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    app = App("reports", dsn=dsn)

    @app.machine("report").step(start=True)
    def write(ctx: Context, value: Any) -> Continuation:
        return ctx.done(value)

    app.schedule("nightly", "0 3 * * *", "report")
    with Target(dsn, None).opened(app=app) as database:
        declare(Terminal(), app, database, app.settings)
        assert capsys.readouterr().err == ""
        app.declared.clear()
        declare(Terminal(), app, database, app.settings)
    told = capsys.readouterr().err
    assert "schedule 'nightly' is no longer in the code of app 'reports' and goes on firing" in told
    assert "durable-cluster schedules delete nightly" in told
    app.close()
