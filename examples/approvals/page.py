"""What an approver sees: one page a link, and a POST to answer. Standard library only.

A GET changes nothing: mail scanners follow links. The token in the link is also what no other site can know, so a forged form gets
nowhere. An unknown id, a wrong token and a link that was passed over get one and the same answer. Nothing here logs a path.
"""

from __future__ import annotations

import logging
import re
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import msgspec
import psycopg

from durable_cluster import UnknownWorkflow, short_id
from durable_cluster.examples.approvals.flows import Answer, app, digest_of
from durable_cluster.examples.approvals.html import NOT_VALID, Shown, page_of

BODY_BYTES_MAX = 8_192
NOTE_CHARS_MAX = 500
IDLE_S = 10.0
SETTLE_S = 5.0
PATH = re.compile(r"/([0-9a-f]{32})/(\d{1,9}-[0-9a-f]{32})")
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

logger = logging.getLogger("durable_cluster.examples.approvals")


class Page(ThreadingHTTPServer):
    """The page on a port of the loopback interface; ``port`` 0: any free one."""

    daemon_threads = True

    def __init__(self, dsn: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self.dsn = dsn

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Request(BaseHTTPRequestHandler):
    """One request: a look, or an answer."""

    server: Page  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = IDLE_S
    server_version = "approvals"
    sys_version = ""

    def do_GET(self) -> None:
        with psycopg.connect(self.server.dsn, autocommit=True) as connection:
            shown = look(connection, self.path)
        self._answer(*((HTTPStatus.NOT_FOUND, NOT_VALID) if shown is None else (HTTPStatus.OK, page_of(shown))))

    def do_POST(self) -> None:
        """Send the answer, wait until the workflow has taken it, and show the page again: a reload does not send it twice."""
        sent = self._form()
        with psycopg.connect(self.server.dsn, autocommit=True) as connection:
            shown = look(connection, self.path)
            if shown is None:
                self._answer(HTTPStatus.NOT_FOUND, NOT_VALID)
                return
            if shown.is_open and sent is not None:
                answer(connection, self.path, shown.approver, *sent)
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _form(self) -> tuple[str, str] | None:
        """Which button was pressed, and the note; None for anything that the page's own form does not send."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BODY_BYTES_MAX:
            self.close_connection = True
            return None
        fields = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        decision, note = fields.get("decision", [""])[0], fields.get("note", [""])[0].replace("\0", "")
        return (decision, note[:NOTE_CHARS_MAX]) if decision in ("approved", "rejected") else None

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The request line holds an id and a token: of both only what may be shown."""
        found = PATH.fullmatch(getattr(self, "path", ""))
        logger.info("%s %s…", getattr(self, "command", "?"), short_id(found[1]) if found else "")


def look(connection: psycopg.Connection[Any], path: str) -> Shown | None:
    """What the link of this path shows; None for one that is none, by one look for all."""
    row = connection.execute(
        "select p.ref, p.asked_by, p.what, p.amount, k.approver, p.status, p.decided_by, p.decided_at, p.note"
        " from approvals.link k join approvals.purchase p using (ref) where k.digest = %s and k.is_open",
        (digest_of(path),),
    ).fetchone()
    return None if row is None else Shown(*row)


def answer(connection: psycopg.Connection[Any], path: str, approver: str, decision: str, note: str) -> None:
    """Signal the workflow, and wait a moment until it has decided. The token works once: of several clicks the first counts."""
    found = PATH.fullmatch(path)
    assert found is not None
    try:
        said = msgspec.to_builtins(Answer(note))
        app.get(found[1]).signal(decision, said, token=found[2], actor=approver, tx=connection)
    except UnknownWorkflow:
        return  # another click, or the timeout, was quicker; the page says what came of it
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        shown = look(connection, path)
        if shown is None or not shown.is_open:
            return
        time.sleep(0.01)
