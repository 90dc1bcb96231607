"""``breakpoint()`` in a step: who sits at the prompt of a debugger is not late.

The timeouts of steps go by the real clock. Once somebody has called ``breakpoint()``, those of the steps that run are lifted, and
this cluster sets no more.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from durable_cluster import concurrent, executor
from durable_cluster.beside import Beside

_listening: list[Patience] = []
_is_hooked = False


class Patience:
    """What knows the timeouts of async steps that run."""

    def __init__(self) -> None:
        self.is_debugged = False
        self._running: WeakKeyDictionary[asyncio.Timeout, asyncio.AbstractEventLoop] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Steps that begin meanwhile have timeouts that can be lifted."""
        _hook()
        with ExitStack() as stack:
            for module in (executor, concurrent):
                stack.enter_context(patch.object(module, "timeout", self._timeout))
            stack.enter_context(patch.object(Beside, "overdue", self._overdue(Beside.overdue)))
            _listening.append(self)
            stack.callback(_listening.remove, self)
            yield

    def lift(self) -> None:
        """Nobody is late any more. From any thread."""
        self.is_debugged = True
        with self._lock:
            running = list(self._running.items())
        for limit, loop in running:
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(_lift, limit)

    def _timeout(self, delay_s: float | None) -> asyncio.Timeout:
        """In place of ``asyncio.timeout``."""
        if self.is_debugged:
            return asyncio.timeout(None)
        limit = asyncio.timeout(delay_s)
        with self._lock:
            self._running[limit] = asyncio.get_running_loop()
        return limit

    def _overdue(self, inner: Callable[[Beside], Any]) -> Callable[[Beside], Any]:
        """In place of ``Beside.overdue``: steps in threads."""
        return lambda beside: [] if self.is_debugged else inner(beside)


def _lift(limit: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # its step has ended
        limit.reschedule(None)


def _hook() -> None:
    """Hear of ``breakpoint()``. A hook of its own would be a frame, and the debugger would stop there; an audit hook is none.

    It cannot be taken away again.
    """
    global _is_hooked  # noqa: PLW0603
    if not _is_hooked:
        _is_hooked = True
        sys.addaudithook(_heard)


def _heard(event: str, _: tuple[Any, ...]) -> None:
    if event == "builtins.breakpoint":
        for patience in _listening:
            patience.lift()
