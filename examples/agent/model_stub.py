"""A model and a world to try the agent with: deterministic, slow at times, failing at times.

A call can be held until its caller dies.

POST /turns/{key}     the next turn of a transcript, part by part; the same key gives the same turn
PUT /effects/{key}    done once a key; the same key gives the same receipt
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from durable_cluster.examples.agent.model import Message, Reply, Wanted

PARTS = 4
SLOW_S = 0.1
EVERY_WHICH_FAILS = 3
EVERY_WHICH_IS_SLOW = 4


def turn_of(transcript: Sequence[Message]) -> Reply:
    """What a model that knows its part says next. Asked anything else but for the order, it never comes to an end."""
    tools = [message.content for message in transcript if message.role == "tools"]
    if "order 17" not in str(transcript[0].content):
        return Reply((Wanted("look_up", {"what": "the meaning of it"}),))
    if not tools:
        return Reply(
            (Wanted("look_up", {"what": "order 17"}), Wanted("look_up", {"what": "policy"}), Wanted("dance", {}))
        )
    if len(tools) == 1:
        return Reply(
            (
                Wanted("refund", {"order": 17, "eur": 40}),
                Wanted("mail", {"to": "the customer", "text": "We look into it."}),
            )
        )
    is_refunded = not isinstance(tools[1][0], dict)
    return Reply(answer="The lamp is refunded." if is_refunded else "The refund was refused.")


class World(ThreadingHTTPServer):
    """The model and the world, on a free port of the loopback interface, in threads of this process.

    ``hold(what)``: the next call of that kind is not answered in full; what it does is done. The number of its caller's process
    comes out of the function that is returned.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.turns: dict[str, Reply] = {}
        self.effects: dict[str, Wanted] = {}
        self.calls: Counter[str] = Counter()
        self.failures = 0
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def hold(self, what: str) -> Callable[[float], int]:
        """``what``: "turns" or "effects"."""
        held = self._held[what] = _Held()
        return held.caller

    def called(self, what: str, key: str, body: bytes) -> tuple[bytes | None, float, _Held | None]:
        """The answer (None: an error), how long it takes, and who holds it."""
        with self._lock:
            self.calls[what] += 1
            fails = self.calls[what] % EVERY_WHICH_FAILS == 0
            self.failures += fails
            if what == "turns":
                transcript = msgspec.json.decode(body, type=list[Message])
                answer = msgspec.json.encode(self.turns.setdefault(key, turn_of(transcript)))
            else:
                done = self.effects.setdefault(key, msgspec.json.decode(body, type=Wanted))
                answer = msgspec.json.encode(f"{done.tool} {list(self.effects).index(key) + 1} is done")
            held = None if fails else self._held.pop(what, None)
            return None if fails else answer, SLOW_S if self.calls[what] % EVERY_WHICH_IS_SLOW == 0 else 0.0, held


class _Held:
    """A call that is not answered."""

    def __init__(self) -> None:
        self._is_here = threading.Event()
        self._pid = 0

    def caller(self, timeout_s: float) -> int:
        if not self._is_here.wait(timeout_s):
            raise TimeoutError(f"nobody called within {timeout_s:g} s")
        return self._pid

    def wait_for_its_end(self, pid: int, connection: socket.socket) -> None:
        self._pid = pid
        self._is_here.set()
        with suppress(ConnectionError):
            connection.recv(1)  # nothing comes but the end


class _Request(BaseHTTPRequestHandler):
    server: World  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        self._serve("turns")

    def do_PUT(self) -> None:
        self._serve("effects")

    def _serve(self, what: str) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer, pause_s, held = self.server.called(what, self.path.rpartition("/")[2], body)
        if answer is None:
            self.send_error(503)
            return
        time.sleep(pause_s)
        self.send_response(200)
        self.end_headers()
        parts = _parts(answer) if what == "turns" else [answer]
        self.wfile.writelines(parts[: len(parts) // 2])
        if held is not None:
            held.wait_for_its_end(int(self.headers["User-Agent"].rpartition("/")[2]), self.connection)
            return
        self.wfile.writelines(parts[len(parts) // 2 :])

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keys of effects are nobody's business."""


def _parts(answer: bytes) -> list[bytes]:
    """A line each, as JSON."""
    text, size = answer.decode(), -(-len(answer) // PARTS)
    return [msgspec.json.encode(text[at : at + size]) + b"\n" for at in range(0, len(text), size)]
