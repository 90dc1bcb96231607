"""The examples to copy: each plays through its own self-check, in processes of their own, and keeps what it promises."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest

from durable_cluster import App, InputError, UnknownWorkflow
from durable_cluster.examples.agent import flows as agents
from durable_cluster.examples.agent.flows import Call
from durable_cluster.examples.agent.model import CallFailed, Message, ask
from durable_cluster.examples.agent.model_stub import World
from durable_cluster.examples.approvals import flows as approvals
from durable_cluster.examples.approvals.flows import Approver, Purchase
from durable_cluster.examples.approvals.html import Shown, page_of
from durable_cluster.examples.approvals.page import Page, look

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

Connection = psycopg.Connection[Any]
DAY_S = 86_400


@pytest.mark.parametrize("example", ["approvals", "agent", "web"])
def test_an_example_passes_its_own_check(example: str, dsn: str) -> None:
    if example == "web":
        pytest.importorskip("fastapi", reason="THE WEB SERVICE WAS NOT TESTED: fastapi is not installed")
    done = subprocess.run(
        [sys.executable, "-m", f"durable_cluster.examples.{example}", "--check"],
        env={**os.environ, "DURABLE_DSN": dsn},
        capture_output=True,
        check=False,
        text=True,
        timeout=150,
    )
    assert (done.returncode, "✗" in done.stdout) == (0, False), done.stdout + done.stderr
    assert done.stdout.count("✓") >= 10


@pytest.fixture
def desk(dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """The approvals' own app, on a fresh database with its tables."""
    monkeypatch.setenv("DURABLE_DSN", dsn)
    approvals.app.client.use(dsn)
    approvals.prepare(conn)
    yield approvals.app
    approvals.app.close()


@pytest.fixture
def page(desk: App, dsn: str) -> Iterator[Page]:
    with Page(dsn) as page:
        thread = threading.Thread(target=page.serve_forever)
        thread.start()
        yield page
        page.shutdown()
        thread.join(10)


def letters(conn: Connection) -> list[tuple[str, str]]:
    return conn.execute("select approver, kind from approvals.letter order by number").fetchall()


def path_to(conn: Connection, approver: str) -> str:
    row = conn.execute("select path from approvals.letter where approver = %s", (approver,)).fetchone()
    assert row is not None
    return row[0]


def purchase(what: str = "A chair") -> Purchase:
    return Purchase("2026-1", "Ada", what, Decimal("12.50"), (Approver("Grace"), Approver("Edsger")))


def test_who_does_not_answer_is_reminded_after_a_day_and_passed_over_after_three(
    desk: App, conn: Connection, clock: Callable[[float], None]
) -> None:
    handle = approvals.approval.start(purchase())
    desk.run(until_idle=True)
    assert letters(conn) == [("Grace", "question")]
    clock(DAY_S + 1)
    desk.run(until_idle=True)
    assert letters(conn) == [("Grace", "question"), ("Grace", "reminder")]
    first = path_to(conn, "Grace")
    assert look(conn, first) is not None
    clock(3 * DAY_S + 2)
    desk.run(until_idle=True)
    assert letters(conn)[2:] == [("Edsger", "question")]
    assert look(conn, first) is None
    with pytest.raises(UnknownWorkflow):
        handle.signal("approved", {}, token=first.split("/")[2])
    clock(9 * DAY_S)
    desk.run(until_idle=True)
    assert handle.result(timeout=5)["status"] == "expired"


def test_who_has_answered_is_not_reminded(desk: App, conn: Connection, clock: Callable[[float], None]) -> None:
    handle = approvals.approval.start(purchase())
    desk.run(until_idle=True)
    token = path_to(conn, "Grace").split("/")[2]
    handle.signal("rejected", {"note": "no"}, token=token, actor="Grace")
    desk.run(until_idle=True)
    clock(DAY_S + 1)
    desk.run(until_idle=True)
    assert letters(conn) == [("Grace", "question")]
    assert approvals.reminder.get(key="2026-1/Grace").result(timeout=5) == 0


def test_the_page_logs_neither_ids_nor_tokens(
    page: Page, desk: App, conn: Connection, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    approvals.approval.start(purchase())
    desk.run(until_idle=True)
    path = path_to(conn, "Grace")
    with caplog.at_level(logging.DEBUG):
        for method, where in (("GET", path), ("PUT", path), ("GET", f"{path}0")):
            browser = HTTPConnection(page.address, timeout=10)
            browser.request(method, where)
            browser.getresponse().read()
            browser.close()
    said = caplog.text + "".join(capfd.readouterr())
    workflow, token = path.split("/")[1:]
    assert f"{workflow[:12]}…" in said
    assert workflow[:13] not in said
    assert token not in said


def test_a_form_that_is_too_long_or_says_no_length_decides_nothing(page: Page, desk: App, conn: Connection) -> None:
    approvals.approval.start(purchase())
    desk.run(until_idle=True)
    path = path_to(conn, "Grace")
    long = urlencode({"decision": "approved", "note": "x" * 10_000})
    for headers in ({"Content-Length": str(len(long))}, {"Content-Length": "-1"}, {}):
        browser = HTTPConnection(page.address, timeout=10)
        browser.putrequest("POST", path)
        for name, value in headers.items():
            browser.putheader(name, value)
        browser.endheaders()
        assert browser.getresponse().status == 303
        browser.close()
    desk.run(until_idle=True)
    shown = look(conn, path)
    assert shown is not None
    assert shown.is_open


def test_whatever_was_typed_is_escaped() -> None:
    bad = "<script>&\"'"
    shown = Shown(bad, bad, bad, Decimal(1), bad, "approved", bad, None, bad)
    assert "<script>" not in page_of(shown).replace("<style>", "")
    assert page_of(shown).count("&lt;script&gt;&amp;&quot;&#x27;") == 7


def test_a_refund_that_is_refused_is_none(dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_DSN", dsn)
    agents.app.client.use(dsn)
    agents.prepare(conn)
    with World() as world:
        threading.Thread(target=world.serve_forever, daemon=True).start()
        asked = agents.tool.start(Call("talk", world.address, "refund", {"eur": 40}))
        agents.app.run(until_idle=True)
        (token,) = conn.execute("select token from agent.approval").fetchone() or ("",)
        asked.signal("rejected", token=token, actor="Grace")
        agents.app.run(until_idle=True)
        assert asked.result(timeout=5) == {"refused by": "Grace"}
        assert world.effects == {}
        world.shutdown()
    agents.app.close()


def test_the_model_gives_one_turn_for_one_key_and_fails_at_times() -> None:
    with World() as world:
        threading.Thread(target=world.serve_forever, daemon=True).start()
        parts: list[int] = []
        turns = []
        for _ in range(8):
            try:
                turns.append(ask(world.address, [Message("user", "order 17")], key="one", on_part=parts.append))
            except CallFailed as error:
                assert "503" in str(error)
        assert len(turns) == 6
        assert set(map(repr, turns)) == {repr(turns[0])}
        assert parts == [1, 2, 3, 4] * 6
        assert len(world.turns) == 1
        world.shutdown()


def test_a_transcript_is_no_input() -> None:
    with pytest.raises(InputError):
        agents.agent.start({"conversation": "talk"})
