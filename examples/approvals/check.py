"""The self-check: approvers who click, click twice, do not answer, and strangers who try; then the books are compared."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from http.client import HTTPConnection
from secrets import token_hex
from typing import Any
from urllib.parse import urlencode

import psycopg

from durable_cluster.examples.approvals.flows import Approver, Purchase, app, approval, prepare
from durable_cluster.examples.approvals.page import Page

AT_ONCE = "50ms"
NEVER = "1h"
WAIT_S = 30.0
RUN_S = 0.5
MARKUP = "<script>alert('1')</script> & \"more\""

Connection = psycopg.Connection[Any]
Answered = tuple[int, str]


def check() -> int:
    """Play it all through, say what was expected and what was found; 0 if they are equal."""
    with psycopg.connect(app.client.dsn, autocommit=True) as connection:
        prepare(connection)
    with Page(app.client.dsn) as page, ThreadPoolExecutor(1) as pool:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        playing = pool.submit(play, page, f"check-{token_hex(4)}")
        run_while(playing)
        page.shutdown()
    compared = playing.result()
    for what, expected, found in compared:
        print(f"✓ {what}" if expected == found else f"✗ {what}: {found}, not {expected}")
    return 0 if all(expected == found for _, expected, found in compared) else 1


def run_while(playing: Future[Any]) -> None:
    """Run the workflows in this thread until the play is over."""
    while not playing.done():
        app.run(timeout=RUN_S)


def play(page: Page, trial: str) -> list[tuple[str, object, object]]:
    """Each scene: what it is, what is expected, what was found."""
    with psycopg.connect(page.dsn, autocommit=True) as connection:
        stage = Stage(connection, page.address, trial)
        return [*stage.clicks(), *stage.strangers(), *stage.silence()]


class Stage:
    """The approvers' side: a browser, and the letters that they got."""

    def __init__(self, connection: Connection, address: str, trial: str) -> None:
        self._connection = connection
        self._address = address
        self._trial = trial

    def clicks(self) -> list[tuple[str, object, object]]:
        path = self.question("clicks", Approver("Grace", NEVER, NEVER))
        looked = [self.browse("GET", path) for _ in range(3)]
        pending = self.status("clicks")

        def click(_: int) -> int:
            return self.browse("POST", path, decision="approved", note=f"\0{MARKUP}")[0]

        with ThreadPoolExecutor(4) as pool:
            clicked = list(pool.map(click, range(4)))
        after = self.browse("POST", path, decision="rejected")[0]
        seen = self.browse("GET", path)[1]
        rejected = self.question("no", Approver("Grace", NEVER, NEVER))
        self.browse("POST", rejected, decision="rejected", note="too dear")
        return [
            ("a look changes nothing", (200, "open"), (looked[-1][0], pending)),
            (
                "markup is shown as it was typed",
                (False, True),
                ("<script>" in looked[0][1], "&lt;script&gt;" in looked[0][1]),
            ),
            ("of five clicks the first counts", ([303] * 4, 303, "approved"), (clicked, after, self.status("clicks"))),
            (
                "a later look says what was decided",
                True,
                "Approved</strong> by Grace" in seen and "&lt;script&gt;" in seen,
            ),
            ("the workflow's output", self.decision("clicks", "approved", "Grace", MARKUP), self.result("clicks")),
            ("a rejection", self.decision("no", "rejected", "Grace", "too dear"), self.result("no")),
        ]

    def strangers(self) -> list[tuple[str, object, object]]:
        path = self.question("strangers", Approver("Grace", NEVER, NEVER))
        other = self.question("another", Approver("Grace", NEVER, NEVER))
        workflow, token = path.split("/")[1:]
        wrong = [
            f"/{workflow}/{token[:-1]}{'0' if token[-1] != '0' else '1'}",
            f"/{workflow}/{other.split('/')[2]}",
            f"/{'0' * 32}/{token}",
            f"/{workflow}",
            "/",
        ]
        answers = {self.browse(method, one, decision="approved") for one in wrong for method in ("GET", "POST")}
        strange = [self.browse("POST", path, decision="perhaps")[0], self.browse("POST", path)[0]]
        return [
            ("wrong links get one answer", (1, 404), (len(answers), next(iter(answers))[0])),
            ("and decide nothing", ("open", "open"), (self.status("strangers"), self.status("another"))),
            ("nor does a form that is not ours", ([303, 303], "open"), (strange, self.status("strangers"))),
        ]

    def silence(self) -> list[tuple[str, object, object]]:
        self.question("reminded", Approver("Grace", AT_ONCE, NEVER))
        reminded = self.letter("reminded", "Grace", "reminder") == self.letter("reminded", "Grace", "question")
        first = self.question("boss", Approver("Grace", NEVER, AT_ONCE), Approver("Edsger", NEVER, NEVER))
        second = self.letter("boss", "Edsger", "question")
        passed = self.browse("POST", first, decision="rejected")
        self.browse("POST", second, decision="approved")
        self.question("nobody", Approver("Grace", NEVER, AT_ONCE), Approver("Edsger", NEVER, AT_ONCE))
        return [
            ("a reminder brings the same link", True, reminded),
            ("who answers too late is told what a stranger is", self.browse("GET", "/"), passed),
            ("the next one decides", self.decision("boss", "approved", "Edsger", ""), self.result("boss")),
            ("nobody answers", self.decision("nobody", "expired", None, ""), self.result("nobody")),
        ]

    def ref(self, name: str) -> str:
        return f"{self._trial}-{name}"

    def question(self, name: str, *approvers: Approver) -> str:
        """Start a purchase and wait for the first letter; the path in it."""
        what = MARKUP if name == "clicks" else "A chair"
        approval.start(Purchase(self.ref(name), "Ada", what, Decimal("12.50"), approvers), key=self.ref(name))
        return self.letter(name, approvers[0].name, "question")

    def letter(self, name: str, approver: str, kind: str) -> str:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            row = self._connection.execute(
                "select path from approvals.letter where (ref, approver, kind) = (%s, %s, %s)",
                (self.ref(name), approver, kind),
            ).fetchone()
            if row is not None:
                return str(row[0])
            time.sleep(0.01)
        raise TimeoutError(f"no {kind} to {approver} about {self.ref(name)} within {WAIT_S:g} s")

    def browse(self, method: str, path: str, **form: str) -> Answered:
        """Status and text of the answer, redirects not followed."""
        browser = HTTPConnection(self._address, timeout=WAIT_S)
        try:
            body = urlencode(form) if method == "POST" else None
            browser.request(method, path, body, {"Content-Type": "application/x-www-form-urlencoded"})
            response = browser.getresponse()
            return response.status, response.read().decode()
        finally:
            browser.close()

    def status(self, name: str) -> object:
        row = self._connection.execute(
            "select status from approvals.purchase where ref = %s", (self.ref(name),)
        ).fetchone()
        return row and row[0]

    def result(self, name: str) -> object:
        return approval.get(key=self.ref(name)).result(timeout=WAIT_S)

    def decision(self, name: str, status: str, by: str | None, note: str) -> object:
        return {"ref": self.ref(name), "status": status, "by": by, "note": note}
