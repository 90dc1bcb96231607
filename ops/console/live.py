"""Server-sent events: what changes is drawn once for all who follow, and nothing is read while nobody does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec
from starlette.concurrency import run_in_threadpool

from durable_cluster.ops.console.refusals import Refused, refusal_of

EVERY_S = 2.0
FOLLOWERS_MAX = 64
STREAM_S_MAX = 900.0
"""Then the browser comes again, and has to pass the gate again."""

logger = logging.getLogger("durable_cluster.console")


class Live:
    """One stream. ``draw`` (in a thread) gives the HTML of each part of a page, by the id of the element that it fills."""

    def __init__(self, draw: Callable[[], Mapping[str, str]], *, every_s: float = EVERY_S) -> None:
        self._draw = draw
        self._every_s = every_s
        self._followers: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None

    def follow(self) -> AsyncIterator[bytes]:
        """The stream of one follower, who gets what is newest and misses what it is too slow for. Raises Refused."""
        if len(self._followers) >= FOLLOWERS_MAX:
            raise Refused(503, f"{FOLLOWERS_MAX} pages follow this already; reload yours to see what is new")
        return self._events()

    async def _events(self) -> AsyncIterator[bytes]:
        newest: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)
        self._followers.add(newest)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            until = time.monotonic() + STREAM_S_MAX
            yield b": durable-cluster\n\n"
            while time.monotonic() < until:
                yield await newest.get()
        finally:
            self._followers.discard(newest)

    async def _run(self) -> None:
        """Draw as long as somebody follows."""
        while self._followers:
            event = await run_in_threadpool(self._event)
            for newest in self._followers:
                if newest.full():
                    newest.get_nowait()
                newest.put_nowait(event)
            await asyncio.sleep(self._every_s)

    def _event(self) -> bytes:
        try:
            return _framed("parts", dict(self._draw()))
        except Exception as error:  # those who follow are told, and the next reading may do better
            refusal = refusal_of(error)
            if refusal.status == 500:
                logger.exception("a live page could not be drawn")
            return _framed("wrong", refusal.detail)


def _framed(name: str, value: object) -> bytes:
    """JSON has no newline, which is what would end an event's data."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
