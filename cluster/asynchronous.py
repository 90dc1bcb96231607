"""The ``…_async`` twin of a method that asks the database: for programs whose event loop must not wait."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from durable_cluster import transactions

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

THREADS_MAX = 4
"""Each has a connection of its own, as every thread has."""


class _Threads:
    """Where the calls of event loops are made. Threads do not live on in a forked process: it gets its own."""

    def __init__(self) -> None:
        self.begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="durable-cluster client")


_threads = _Threads()


async def in_a_thread(function: Callable[[], R]) -> R:
    """What it comes to, in one of a few threads."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_threads.pool, context.run, function)


def asynchronous(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Its twin. A ``tx`` has to be asynchronous too, and is asked from the event loop; everything else is asked from a thread."""

    @functools.wraps(method)
    async def twin(self: S, *args: Any, tx: Any = None, **how: Any) -> R:
        if tx is None:
            return await in_a_thread(functools.partial(method, self, *args, **how))
        return await transactions.over(tx, lambda plain: method(self, *args, tx=plain, **how))

    twin.__name__ = f"{method.__name__}_async"
    twin.__qualname__ = f"{method.__qualname__}_async"
    twin.__doc__ = (
        f"As ``{method.__name__}``, without blocking the event loop. A ``tx``, where there is one, is an ``AsyncConnection`` of"
        " psycopg or SQLAlchemy, or SQLAlchemy's ``AsyncSession``."
    )
    return twin  # type: ignore[return-value]  # any parameters, and so these
