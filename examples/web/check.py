"""The self-check: a browser that orders, looks on, decides twice and asks for what cannot be; then the books are compared."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import msgspec
import psycopg
import uvicorn

from durable_cluster.examples.web.flows import app
from durable_cluster.examples.web.service import service

WAIT_S = 30.0
AT_ONCE = 20

Compared = tuple[str, object, object]


def check() -> int:
    """Play it all through, say what was expected and what was found; 0 if they are equal."""
    with served() as port:
        compared = Browser(port).play()
    for what, expected, found in compared:
        print(f"✓ {what}" if expected == found else f"✗ {what}: {found}, not {expected}")
    return 0 if all(expected == found for _, expected, found in compared) else 1


@contextmanager
def served() -> Generator[int]:
    """The service in a thread, on a free port of the loopback interface."""
    server = uvicorn.Server(uvicorn.Config(service, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + WAIT_S
        while not server.started:
            if time.monotonic() > until or not thread.is_alive():
                raise TimeoutError("the service did not start")
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(WAIT_S)


class Browser:
    """Whoever orders, and whoever decides."""

    def __init__(self, port: int) -> None:
        self._port = port

    def play(self) -> list[Compared]:
        return [*self.cheap(), *self.dear(), *self.wrong(), *self.many()]

    def cheap(self) -> list[Compared]:
        status, ordered = self.ask("POST", "/orders", {"article": "tea", "cents": 350})
        seen = list(self.events(ordered["ref"]))
        receipt = {"receipt": f"{ordered['ref']}: 3.50 EUR", "parcel": "tea from shelf 3"}
        stages = [one["progress"] for one in seen if one["progress"]]
        return [
            ("an order is taken", (201, "running"), (status, ordered["status"])),
            ("its events end with its result", ("completed", receipt), (seen[-1]["status"], seen[-1]["result"])),
            ("no stage is told out of turn", stages, sorted(stages, key=["reserving", "charging", "packing"].index)),
            ("the row and the workflow are there", (1, 1), self.books(ordered["ref"])),
            ("a look says the same", seen[-1], self.ask("GET", f"/orders/{ordered['ref']}")[1]),
        ]

    def dear(self) -> list[Compared]:
        ref = self.ask("POST", "/orders", {"article": "piano", "cents": 900_000})[1]["ref"]
        seen: list[Any] = []
        decided: list[int] = []
        for event in self.events(ref):
            seen.append(event)
            if event["progress"] == "waiting for approval" and not decided:
                decided += [self.decide(ref, approved=True), self.decide(ref, approved=False)]
        refused = self.ask("POST", "/orders", {"article": "piano", "cents": 900_000})[1]["ref"]
        self.decide(refused, approved=False)
        return [
            ("of two decisions the first counts", ([202, 409], "completed"), (decided, seen[-1]["status"])),
            ("one that is refused fails", "failed", list(self.events(refused))[-1]["status"]),
            ("a decision after the end is none", 409, self.decide(refused, approved=True)),
        ]

    def wrong(self) -> list[Compared]:
        before = self.total()
        too_dear = self.ask("POST", "/orders", {"article": "yacht", "cents": 2_000_000})[0]
        nonsense = self.ask("POST", "/orders", {"article": "tea"})[0]
        unknown = [self.ask("GET", "/orders/nowhere")[0], self.ask("GET", "/orders/nowhere/events")[0]]
        return [
            ("a row that breaks a rule is told", 422, too_dear),
            ("and takes its workflow with it", before, self.total()),
            ("a body that is none", 422, nonsense),
            ("an order that is none", [404, 404, 404], [*unknown, self.decide("nowhere", approved=True)]),
        ]

    def many(self) -> list[Compared]:
        def order(_: int) -> str:
            ref = self.ask("POST", "/orders", {"article": "tea", "cents": 100})[1]["ref"]
            return str(list(self.events(ref))[-1]["status"])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(order, range(AT_ONCE)))
        return [("many at once", ["completed"] * AT_ONCE, found)]

    def decide(self, ref: str, *, approved: bool) -> int:
        return self.ask("POST", f"/orders/{ref}/decision", {"approved": approved, "by": "Grace"})[0]

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        browser = HTTPConnection("127.0.0.1", self._port, timeout=WAIT_S)
        try:
            headers = {"Content-Type": "application/json"}
            browser.request(method, path, None if body is None else msgspec.json.encode(body), headers)
            response = browser.getresponse()
            return response.status, msgspec.json.decode(response.read())
        finally:
            browser.close()

    def events(self, ref: str) -> Iterator[Any]:
        """As they come."""
        browser = HTTPConnection("127.0.0.1", self._port, timeout=WAIT_S)
        try:
            browser.request("GET", f"/orders/{ref}/events")
            for line in browser.getresponse():
                if line.startswith(b"data: "):
                    yield msgspec.json.decode(line.removeprefix(b"data: "))
        finally:
            browser.close()

    def books(self, ref: str) -> object:
        with psycopg.connect(app.client.dsn) as connection:
            return connection.execute(
                "select (select count(*)::int from web.purchase where ref = %s),"
                " (durable.find('fulfil', %s) is not null)::int",
                (ref, ref),
            ).fetchone()

    def total(self) -> int:
        return len(app.list("fulfil", limit=10_000))
