"""Steps that run beside the pages: ``async def`` on an event loop in a thread of its own, ``blocking=True`` in threads.

    page ── begin ──► running ── ends within the page's window ──► its result is handed on with the page
                         └────── outlasts it: detached, a row ──► ``ended``: handed on by itself, later

One thread, the consumer's, calls everything here; handlers run in the others and only ever set their own run's result.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

from durable_cluster import executor, running
from durable_cluster.context import Context
from durable_cluster.errors import StepTimeout
from durable_cluster.executor import Result, Task
from durable_cluster.failures import told_of
from durable_cluster.settings import Settings
from durable_cluster.timing import timed
from durable_cluster.traced import Steps

logger = logging.getLogger("durable_cluster.beside")

THREAD_IDLE_S = 10.0


class Run:
    """One run of a step. ``shard``: its workflow's; ``crashes``: how many processes have died with this step.

    ``is_recorded``: its row is committed; ``reported``, ``published``: what of its progress was written last.
    """

    __slots__ = (
        "begun_at",
        "canceller",
        "context",
        "crashes",
        "is_detached",
        "is_dropped",
        "is_recorded",
        "latch",
        "late_since",
        "published",
        "reported",
        "result",
        "shard",
        "task",
        "thread_id",
    )

    def __init__(self, task: Task, shard: int, crashes: int = 0) -> None:
        self.task = task
        self.shard = shard
        self.crashes = crashes
        self.context: Context = executor.context_of(task)
        self.result: Result | None = None
        self.is_detached = self.is_dropped = self.is_recorded = False
        self.begun_at: float | None = None
        self.late_since: float | None = None
        self.reported = self.context.said
        self.published = self.context.published
        self.latch: Latch | None = None
        self.canceller: asyncio.Task[None] | None = None
        self.thread_id: int | None = None

    @property
    def key(self) -> str:
        """What names its step."""
        return self.task.envelope.key


class Latch:
    """Opens when so many runs have ended."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.is_open = threading.Event()


class Beside:
    """The runs of one consumer."""

    def __init__(self, settings: Settings, *, steps: Steps = executor) -> None:
        self._settings = settings
        self._steps = steps
        self._lock = threading.Lock()
        self._running: set[Run] = set()
        self._ended: deque[Run] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = threading.Event()
        self._waiting: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._detached = self._threads = self._threads_busy = self._queued = 0
        self._is_pulse_due = False
        self._wakeup_read, self._wakeup_write = socket.socketpair()
        self._wakeup_read.setblocking(False)
        self._wakeup_write.setblocking(False)

    def fileno(self) -> int:
        """What becomes readable when a detached step ends."""
        return self._wakeup_read.fileno()

    @property
    def in_flight(self) -> int:
        """Detached steps that run, or have ended and are not handed on yet."""
        with self._lock:
            return self._detached + len(self._ended)

    @property
    def has_suspect(self) -> bool:
        """Whether a step runs alone among suspects."""
        with self._lock:
            return any(run.crashes for run in (*self._running, *self._ended))

    def begin(self, runs: Sequence[Run], *, as_detached: bool = False) -> None:
        """Run these steps; ``as_detached``: beside all pages, with their rows committed already."""
        with self._lock:
            self._running.update(runs)
            if as_detached:
                self._detached += len(runs)
                for run in runs:
                    run.is_detached = run.is_recorded = True
        awaited = [run for run in runs if run.task.step.signature.is_async]
        if awaited:
            self._event_loop().call_soon_threadsafe(self._create_tasks, awaited)
        for run in runs:
            if not run.task.step.signature.is_async:
                self._need_thread()
                self._waiting.put(run)

    def wait(self, runs: Sequence[Run], *, until: float) -> None:
        """Until they have ended, or the monotonic time ``until``."""
        with self._lock:
            still = [run for run in runs if run.result is None]
            latch = Latch(len(still))
            for run in still:
                run.latch = latch
        if still:
            latch.is_open.wait(max(0.0, until - time.monotonic()))

    def detach(self, runs: Iterable[Run]) -> list[Run]:
        """Those of ``runs`` that still run: from now on their ends are told by ``ended``."""
        with self._lock:
            slow = [run for run in runs if run.result is None]
            self._detached += len(slow)
            for run in slow:
                run.is_detached = True
        return slow

    def ended(self, limit: int) -> list[Run]:
        """Detached steps that have ended since the last time."""
        with contextlib.suppress(BlockingIOError):
            self._wakeup_read.recv(4096)
        with self._lock:
            return [self._ended.popleft() for _ in range(min(limit, len(self._ended)))]

    def drop(self, runs: Iterable[Run]) -> None:
        """Nobody waits for these any more: they are cancelled, and whatever they still answer is forgotten."""
        for run in runs:
            with self._lock:
                run.is_dropped = True
                self._forget(run)
                with contextlib.suppress(ValueError):
                    self._ended.remove(run)
            self._interrupt(run, asyncio.CancelledError)

    def running(self) -> list[Run]:
        """Those that run now, waited for or not."""
        with self._lock:
            return list(self._running)

    def detached(self) -> list[Run]:
        """The detached steps that run now."""
        with self._lock:
            return [run for run in self._running if run.is_detached]

    def known(self) -> list[Run]:
        """Those, and what has ended and is not handed on yet."""
        with self._lock:
            return [*self._ended, *(run for run in self._running if run.is_detached)]

    def overdue(self) -> list[Run]:
        """Interrupts the threads of steps beyond their timeouts; the runs that have not ended ``hang_grace_s`` after that.

        While a step holds the event loop, no other step there can end: then it alone is at fault. The grace begins when a run is
        first seen to be late, not at its timeout: the process may have been stopped in between.
        """
        now = time.monotonic()
        with self._lock:
            late = [run for run in self._running if run.begun_at and now > run.begun_at + run.task.step.timeout_s]
            for run in late:
                run.late_since = run.late_since or now
        for run in late:
            if run.thread_id is not None:
                self._interrupt(run, StepTimeout)
        hung = [run for run in late if now > (run.late_since or now) + self._settings.hang_grace_s]
        holder = self._holder_of_loop() if any(run.canceller is not None for run in late) else None
        if holder is None or all(run.canceller is not holder for run in self.known()):
            return hung
        return [run for run in hung if run.canceller in (None, holder)]

    def _holder_of_loop(self) -> asyncio.Task[None] | None:
        """The run's task that has kept the event loop from answering since the last look, if one has."""
        loop = self._loop
        if loop is None:
            return None
        if self._is_pulse_due:
            return asyncio.current_task(loop)
        self._is_pulse_due = True
        loop.call_soon_threadsafe(self._pulse)
        return None

    def _pulse(self) -> None:
        self._is_pulse_due = False

    def close(self) -> None:
        """Cancel what runs, end the loop; safe twice. A thread that does not let itself be interrupted is left behind."""
        with self._lock:
            runs = list(self._running)
        self.drop(runs)
        for _ in range(self._threads):
            self._waiting.put(None)
        self._is_closing.set()
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
        if self._wakeup_read.fileno() >= 0:
            self._wakeup_read.close()
            self._wakeup_write.close()

    # In the handlers' threads.

    def _create_tasks(self, runs: Sequence[Run]) -> None:
        loop = asyncio.get_running_loop()
        for run in runs:
            with self._lock:
                if run.is_dropped:
                    continue
                run.begun_at = time.monotonic()
                run.canceller = loop.create_task(self._run_async(run))

    async def _run_async(self, run: Run) -> None:
        running.begin(run.task.envelope)
        try:
            result = await self._steps.run_async(run.task, run.context)
        except BaseException as error:  # whatever it is, it is this step's
            result = timed(run.context, run.task.envelope, executor.failed(run.task, error, run.context))
        self._end(run, result)

    def _work(self) -> None:
        """A thread: blocking steps one after the other, until none has come for a while."""
        while True:
            try:
                run = self._waiting.get(timeout=THREAD_IDLE_S)
            except queue.Empty:
                run = None
                with self._lock:
                    if self._queued:  # it is on its way into the queue
                        continue
            with self._lock:
                if run is None:
                    self._threads -= 1
                    return
                self._queued -= 1
                if run.is_dropped:
                    continue
                self._threads_busy += 1
                run.begun_at, run.thread_id = time.monotonic(), threading.get_ident()
            result = self._run_interruptibly(run)
            self._end(run, result)
            with self._lock:
                self._threads_busy -= 1

    def _run_interruptibly(self, run: Run) -> Result:
        """Run a step of this thread. An interruption may also reach this thread between two lines of ours, and only once."""
        running.begin(run.task.envelope)
        result: Result | None = None
        while True:
            try:
                if result is None:
                    result = self._steps.run(run.task, run.context)
                with self._lock:
                    run.thread_id = None
                # One that was sent and has not arrived yet must not meet the next step.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)
                return result
            except BaseException as error:
                if result is None:
                    failed = executor.failed(run.task, told_of(run.task, error), run.context)
                    result = timed(run.context, run.task.envelope, failed)

    def _end(self, run: Run, result: Result) -> None:
        with self._lock:
            if run.result is not None:
                return
            run.result, run.thread_id = result, None
            self._forget(run)
            if run.is_dropped:
                return
            if run.is_detached:
                self._ended.append(run)
            if run.latch is not None:
                run.latch.left -= 1
                if not run.latch.left:
                    run.latch.is_open.set()
        if run.is_detached:
            self._wake()

    # Help.

    def _forget(self, run: Run) -> None:
        if run in self._running:
            self._running.discard(run)
            self._detached -= run.is_detached

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=_run_loop, args=(self._loop, self._is_closing), name="durable-async-steps", daemon=True
            ).start()
        return self._loop

    def _need_thread(self) -> None:
        with self._lock:
            self._queued += 1
            if (
                self._threads - self._threads_busy >= self._queued
                or self._threads >= self._settings.blocking_threads_max
            ):
                return
            self._threads += 1
        threading.Thread(target=self._work, name="durable-blocking-step", daemon=True).start()

    def _interrupt(self, run: Run, error: type[BaseException]) -> None:
        """Raise ``error`` where the run is: at its await, or between two lines of its thread."""
        loop = self._loop
        if run.canceller is not None and loop is not None:
            loop.call_soon_threadsafe(run.canceller.cancel)
            return
        with self._lock:
            if run.thread_id is not None and run.result is None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(run.thread_id), ctypes.py_object(error))
                run.thread_id = None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is readable already; closed: nobody listens
            self._wakeup_write.send(b"\0")


def _run_loop(loop: asyncio.AbstractEventLoop, is_closing: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    while not is_closing.is_set():
        try:
            loop.run_forever()
        except BaseException:  # what a step left behind raised to end its program, or stopped the loop
            logger.exception("a task that a step left behind would have ended the event loop")
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()
