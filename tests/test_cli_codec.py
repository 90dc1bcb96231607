"""What a codec has made, on the command line: told to be coded, and read by the App that ``--app`` names."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from said import Said, Say

from durable_cluster.ops.cli import main

FLOWS = """
import zlib
from durable_cluster import App, Context, Continuation, Retry


class Zlib:
    def encode(self, payload, where):
        return zlib.compress(payload + where.bound)

    def decode(self, coded, where):
        return zlib.decompress(coded).removesuffix(where.bound)


app = App("shop", codec=Zlib())
order = app.machine("order", state=dict)


@order.step(start=True, retry=Retry(attempts=1))
def charge(ctx: Context, order: dict) -> Continuation:
    ctx.set_progress({"asked": order["card"]})
    if order["card"] == "wrong":
        raise ValueError("no card " + order["card"])
    return ctx.wait_for("paid", then=end, state=order)


@order.step()
def end(ctx: Context, order: dict) -> Continuation:
    return ctx.done([order, ctx.signal.payload])
"""
APP = ("--app", "flows_with_a_codec:app")
CODED = "is coded: --app module:app names the App whose codec reads it"


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dsn: str) -> Iterator[Say]:
    """Runs a command on the fresh database."""
    (tmp_path / "flows_with_a_codec.py").write_text(FLOWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DURABLE_DSN", dsn)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    path = list(sys.path)

    def run(*words: str) -> Said:
        try:
            code = main(list(words))
        except SystemExit as exited:
            code = int(exited.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    yield run
    sys.path[:] = path
    sys.modules.pop("flows_with_a_codec", None)


def started(say: Say, card: str) -> str:
    """The whole id of an order that has run as far as it can."""
    said = say("run", "order", *APP, "--input", f'{{"card": "{card}"}}')
    assert said.code == 0, said
    go_on(say)
    return said.out.strip()


def go_on(say: Say) -> None:
    app = sys.modules["flows_with_a_codec"].app
    app.run(until_idle=True)
    app.close()


def test_show_tells_that_values_are_coded_and_reads_them_with_the_app(say: Say) -> None:
    whole = started(say, "4242")
    assert f"  progress  {CODED}\n" in say("show", whole).out
    assert '  progress  {"asked":"4242"}\n' in say("show", whole, *APP).out
    assert say("signal", whole, "paid", "--payload", '{"cents": 5}', *APP).code == 0
    go_on(say)
    assert f"  output    {CODED}\n" in say("show", whole).out
    assert list(say("show", whole, "--json").json["output"]) == ["$codec"]
    assert say("show", whole, *APP, "--json").json["output"] == [{"card": "4242"}, {"cents": 5}]
    assert '"card": "4242"' in say("show", whole, *APP).out


def test_a_signal_is_coded_by_the_app_and_by_nobody_else(say: Say, conn: psycopg.Connection) -> None:
    whole = started(say, "4242")
    for payload, more in (("hidden", APP), ("plain", ())):
        assert say("signal", whole, "other", "--payload", f'"{payload}"', *more).code == 0
    go_on(say)
    events = [event for (event,) in conn.execute("select event from durable.mailbox order by number")]
    assert ['"$codec"' in event for event in events] == [True, False]
    assert '"plain"' in events[1]
    refused = say("signal", "0" * 32, "paid", *APP)
    assert (refused.code, "no workflow takes signal 'paid'" in refused.err) == (1, True)


def test_a_dead_letter_is_read_and_its_state_edited_with_the_app(say: Say, conn: psycopg.Connection) -> None:
    whole = started(say, "wrong")
    short = whole[:12]
    listed, shown = say("dead-letters", "list").out, say("dead-letters", "show", short).out
    for said in (listed, shown):
        assert "ValueError (what it says is coded)" in said
        assert "no card" not in said
    assert f"  text      {CODED}\n  state     {CODED}\n" in shown
    read = say("dead-letters", "show", short, *APP).out
    assert "ValueError: no card wrong" in read
    assert "Traceback" in read
    assert '"card": "wrong"' in read
    assert "no card wrong" in say("show", short, *APP).out
    assert "no card" not in say("show", short).out
    refused = say("dead-letters", "retry", short, "--state", '{"card": "4242"}')
    assert (refused.code, "its payloads are coded: name the App" in refused.err) == (2, True)
    assert say("dead-letters", "retry", short, "--state", '{"card": "4242"}', *APP).code == 0
    go_on(say)
    assert conn.execute("select line like '%\"$codec\"%' from durable.wait").fetchone() == (True,)
    assert say("signal", whole, "paid", *APP).code == 0
    go_on(say)
    assert say("show", whole, *APP, "--json").json["output"] == [{"card": "4242"}, None]


def test_a_schedule_shows_its_input_to_the_app(say: Say) -> None:
    assert say("schedules", "create", "nightly", "@daily", "order", "--input", '{"card": "4242"}', *APP).code == 0
    assert f"  input     {CODED}\n" in say("schedules", "show", "nightly").out
    assert '"card": "4242"' in say("schedules", "show", "nightly", *APP).out


def test_run_waits_for_results_that_it_reads(say: Say) -> None:
    whole = started(say, "4242")
    assert say("signal", whole, "paid", *APP).code == 0
    go_on(say)
    again = say("run", "order", *APP, "--input", '{"card": "wrong"}', "--key", "one")
    go_on(say)
    waited = say("run", "order", *APP, "--input", '{"card": "wrong"}', "--key", "one", "--wait")
    assert waited.out == again.out
    assert (waited.code, "ValueError: no card wrong" in waited.err) == (1, True)
