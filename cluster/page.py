"""One page: phase 1 runs its handlers with no transaction open, phase 2 (see ``handoff``) hands the results on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import psycopg

from durable_cluster import executor
from durable_cluster.envelope import Envelope, Page
from durable_cluster.executor import Result, Task
from durable_cluster.handoff import Handoff, Slot, Window
from durable_cluster.settings import Settings
from durable_cluster.statements import Outcome

if TYPE_CHECKING:
    from durable_cluster.app import Machine

logger = logging.getLogger("durable_cluster.page")

T = TypeVar("T")


class AsyncRunner:
    """The event loop of the async steps, kept from page to page.

    It runs in this thread; where a loop runs here already, as in a notebook, in a thread of its own.
    """

    def __init__(self) -> None:
        self._loop: asyncio.Runner | None = None
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run ``main()`` to its end."""
        if self._loop is None:
            self._loop = asyncio.Runner()
            self._thread = ThreadPoolExecutor(1, "durable-async-steps") if _is_in_a_loop() else None
        if self._thread is not None:
            return self._thread.submit(self._loop.run, main()).result()
        return self._loop.run(main())

    def close(self) -> None:
        """End the loop; safe twice."""
        if self._loop is not None and self._thread is not None:
            self._thread.submit(self._loop.close).result()
            self._thread.shutdown()
        elif self._loop is not None:
            self._loop.close()
        self._loop = self._thread = None


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class PageDone(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a page: lines handed on, workflows ended, whether its window is finished."""

    steps: int
    ended: int
    failed: int
    is_window_finished: bool


class PageRunner:
    """Runs the pages of one consumer on its one connection."""

    def __init__(
        self, connection: psycopg.Connection[Any], machines: Mapping[str, Machine], settings: Settings
    ) -> None:
        self._machines = machines
        self._window_s = settings.page_window_ms / 1000
        self._handoff = Handoff(connection, settings)
        self._runner = AsyncRunner()

    def run(self, window: Window, page: Page) -> PageDone:
        """Run as much of ``page`` as its time window lets begin, and commit it. Raises BatchLost."""
        slots = self._phase_1(page.lines)
        results = self._handoff.commit(window, page, slots)
        ended = [result for result in results if isinstance(result, Outcome)]
        return PageDone(
            steps=len(results),
            ended=len(ended),
            failed=sum(result.status == "failed" for result in ended),
            is_window_finished=page.header.last and len(results) == len(page.lines),
        )

    def close(self) -> None:
        """End the event loop of the async steps."""
        self._runner.close()

    def _phase_1(self, lines: Sequence[Envelope | None]) -> list[Slot]:
        """A slot for each line that the time window let begin. Transactional steps stay tasks: they run in phase 2."""
        stop_at = time.monotonic() + self._window_s
        slots: list[Slot] = []
        awaited: list[tuple[int, Task]] = []
        for envelope in lines:
            if slots and time.monotonic() > stop_at:
                break
            slot = self._begin(envelope)
            if isinstance(slot, Task) and slot.step.signature.is_async:
                awaited.append((len(slots), slot))
            slots.append(slot)
        if awaited:
            results = self._run_async([task for _, task in awaited])
            for (index, _), result in zip(awaited, results, strict=True):
                slots[index] = result
        return slots

    def _begin(self, envelope: Envelope | None) -> Slot:
        if envelope is None:
            logger.error("a line of the log is no step event; it is passed over")
            return None
        task = executor.resolve(self._machines, envelope)
        if not isinstance(task, Task) or task.step.is_transactional or task.step.signature.is_async:
            return task
        return executor.run(task)

    def _run_async(self, tasks: Sequence[Task]) -> list[Result]:
        async def all_of_them() -> list[Result]:
            return await asyncio.gather(*map(executor.run_async, tasks))

        return self._runner.submit(all_of_them)
