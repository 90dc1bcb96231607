"""The event loop of one linear workflow: it runs what is ready, in a fixed order, and has no clock and no I/O of its own.

The workflow's coroutines are ordinary asyncio tasks on it, so ``gather``, ``TaskGroup`` and ``timeout`` mean what they mean
anywhere. What would reach outside is refused: it belongs into a step.
"""

from __future__ import annotations

import asyncio
import asyncio.events
import ctypes
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, Never

from durable_cluster.context import short_id
from durable_cluster.errors import AppError, HandlerError

if TYPE_CHECKING:
    from durable_cluster.execution import Execution

logger = logging.getLogger("durable_cluster.loop")

TASKS_MAX = 10_000
TURNS_MAX = 100_000
"""Callbacks between two waits: more of them are a branch that waits for nothing."""
SLOW_S = 1.0


class WorkflowLoop(asyncio.AbstractEventLoop):
    """Runs the tasks of one execution, only when it is told to."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.tasks: list[asyncio.Task[Any]] = []
        self._ready: deque[asyncio.Handle | tuple[Callable[..., object], tuple[Any, ...], Context]] = deque()

    def run_ready(self) -> None:
        """Run until everything waits. Whoever asks for the running loop meanwhile is told of this one."""
        outer = asyncio.events._get_running_loop()
        asyncio.events._set_running_loop(self)
        if outer is not None:
            hooks = sys.get_asyncgen_hooks()
            sys.set_asyncgen_hooks(None, None)  # a workflow's generators outlive that loop
        ready, began_s = self._ready, time.monotonic()
        try:
            for _ in range(TURNS_MAX):
                if not ready:
                    break
                one = ready.popleft()
                if isinstance(one, asyncio.Handle):
                    if not one.cancelled():
                        one._run()
                else:
                    callback, args, context = one
                    context.run(callback, *args)
            else:
                ready.clear()
                self.execution.overrun = HandlerError(
                    f"workflow '{self.execution.workflow.name}' ran {TURNS_MAX:,} turns without waiting for a step, a time, a"
                    " signal or a child; what a branch waits for has to be one of those"
                )
        finally:
            asyncio.events._set_running_loop(outer)
            if outer is not None:
                sys.set_asyncgen_hooks(*hooks)
            took_s = time.monotonic() - began_s
            if took_s > SLOW_S:
                self._warn("kept the others of its process waiting for %.1f s; long work belongs in a step", took_s)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:  # type: ignore[override]
        """Run it in its turn. Tasks call this with a context, and want nothing back."""
        if context is not None:
            self._ready.append((callback, args, context))
            return None
        handle = asyncio.Handle(callback, args, self)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """After a durable sleep: this is what ``asyncio.sleep`` and ``asyncio.timeout`` stand on."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """At a time of this loop's clock."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.execution.call_at(when, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self.execution.forget_timer(handle)

    def time(self) -> float:
        """Seconds since 1970 by the database's clock, recorded: the same whenever this line runs again."""
        return self.execution.time()

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        """A branch of the workflow."""
        if len(self.tasks) >= TASKS_MAX:
            self.tasks = [task for task in self.tasks if not task.done()]
            if len(self.tasks) >= TASKS_MAX:
                coro.close()
                raise AppError(f"the workflow has {TASKS_MAX:,} branches at once; spawn children instead")
        task = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        self.execution.branched(task)
        return task

    def get_debug(self) -> bool:
        """Never: it would time callbacks."""
        return False

    def is_running(self) -> bool:
        """As far as its tasks can tell."""
        return True

    def is_closed(self) -> bool:
        """Never: it holds nothing."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A branch that failed with nobody to hear of it."""
        error = context.get("exception")
        is_quoted = error is None or self.execution.workflow.app.payloads.codec is None
        said = repr(error) if is_quoted else type(error).__name__
        logger.warning("in a workflow: %s: %s", context.get("message"), said)

    def close(self) -> None:
        """End what still waits, without letting it ask for anything more."""
        outer = asyncio.events._get_running_loop()
        asyncio.events._set_running_loop(self)
        try:
            for task in self.tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                if task.done():
                    _ = task.cancelled() or task.exception()  # nobody else will ask for it
                elif coroutine is not None:
                    try:
                        coroutine.close()
                    except Exception as error:
                        # Never freed: Python would run its lines again to end it, perhaps without end.
                        ctypes.pythonapi.Py_IncRef(ctypes.py_object(coroutine))
                        self._warn(
                            "did not let itself be put away: %s; 'except BaseException' has to raise again", error
                        )
        finally:
            asyncio.events._set_running_loop(outer)

    def _warn(self, what: str, *args: object) -> None:
        execution = self.execution
        logger.warning(f"workflow '%s' (%s…) {what}", execution.workflow.name, short_id(execution.workflow_id), *args)


def _refused(name: str) -> Callable[..., Never]:
    def refuse(*_: object, **__: object) -> Never:
        raise AppError(
            f"a workflow's own lines do no I/O and run no threads ({name}); put that into a step and await it"
        )

    return refuse


for _name in (
    "run_in_executor",
    "getaddrinfo",
    "getnameinfo",
    "create_connection",
    "create_server",
    "create_unix_connection",
    "create_datagram_endpoint",
    "subprocess_exec",
    "subprocess_shell",
    "connect_read_pipe",
    "connect_write_pipe",
    "sock_connect",
    "sock_recv",
    "sock_sendall",
    "add_reader",
    "add_writer",
    "add_signal_handler",
    "call_soon_threadsafe",
    "run_forever",
    "run_until_complete",
):
    setattr(WorkflowLoop, _name, _refused(_name))
