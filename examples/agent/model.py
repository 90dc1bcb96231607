"""What the agent calls over HTTP: a model that answers part by part, and tools with an effect. Errors are raised, not handled.

Nothing is tried again here: that is what the steps' ``Retry`` is for. The same key gives the same answer, and acts once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

import msgspec

TIMEOUT_S = 60.0


class CallFailed(Exception):
    """The answer was none."""


class Wanted(msgspec.Struct, frozen=True):
    """A tool that the model wants called."""

    tool: str
    argument: dict[str, Any]


class Reply(msgspec.Struct, frozen=True):
    """One turn of the model: tools to call, or an answer."""

    calls: tuple[Wanted, ...] = ()
    answer: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One entry of a transcript. ``role``: user, model, tools or system."""

    role: str
    content: Any


def ask(address: str, transcript: Sequence[Message], *, key: str, on_part: Callable[[int], None]) -> Reply:
    """The model's next turn; it comes in parts, and ``on_part`` hears how many there are. Raises CallFailed, OSError."""
    parts: list[bytes] = []
    with _Call(address, "POST", f"/turns/{key}", transcript) as response:
        while part := response.readline():
            parts.append(msgspec.json.decode(part, type=str).encode())
            on_part(len(parts))
    return msgspec.json.decode(b"".join(parts), type=Reply)


def act(address: str, tool: str, argument: dict[str, Any], *, key: str) -> str:
    """Do something in the world, once a key; the receipt. Raises CallFailed, OSError: even then it may be done."""
    with _Call(address, "PUT", f"/effects/{key}", Wanted(tool, argument)) as response:
        return msgspec.json.decode(response.read(), type=str)


class _Call:
    """One request on a connection of its own."""

    def __init__(self, address: str, method: str, path: str, body: object) -> None:
        self._connection = HTTPConnection(address, timeout=TIMEOUT_S)
        self._request = (method, path, msgspec.json.encode(body), {"User-Agent": f"agent/{os.getpid()}"})

    def __enter__(self) -> HTTPResponse:
        try:
            self._connection.request(*self._request)
            response = self._connection.getresponse()
        except HTTPException as error:
            self._connection.close()
            raise CallFailed("it hung up") from error
        if response.status != 200:
            self._connection.close()
            raise CallFailed(f"it answered {response.status}")
        return response

    def __exit__(self, *_: object) -> None:
        self._connection.close()
