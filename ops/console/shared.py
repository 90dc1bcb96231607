"""What is read once for all who look at it: none waits long for a reading of another, and none at all after a failed one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import psycopg

from durable_cluster.errors import DurableError
from durable_cluster.ops.console.refusals import Refused

PATIENCE_S = 2.0
"""So long somebody waits for the reading of another."""
STALE_S = 30.0
"""Up to this age the reading before is shown in its place."""
FAILED_S = 1.0
"""So long a reading that failed counts as the answer to everybody."""

Kind = TypeVar("Kind")


class Shared(Generic[Kind]):
    """The newest reading; ``fresh_s``: so long it counts."""

    def __init__(self, read: Callable[[], Kind], *, fresh_s: float) -> None:
        self._read = read
        self._fresh_s = fresh_s
        self._lock = threading.Lock()
        self._known: tuple[Kind, float] | None = None
        self._failed: tuple[Exception, float] | None = None

    def newest(self) -> Kind:
        """As it is now, or was a moment ago. Raises what reading raises, and Refused while it takes somebody else too long."""
        if not self._lock.acquire(timeout=PATIENCE_S):
            return self._before()
        try:
            now = time.monotonic()
            if self._known is not None and now - self._known[1] <= self._fresh_s:
                return self._known[0]
            if self._failed is not None and now - self._failed[1] <= FAILED_S:
                raise self._failed[0].with_traceback(None)
            return self._anew()
        finally:
            self._lock.release()

    def _before(self) -> Kind:
        known = self._known
        if known is None or time.monotonic() - known[1] > STALE_S:
            raise Refused(503, "the database takes long to answer; try again in a moment")
        return known[0]

    def _anew(self) -> Kind:
        try:
            value = self._read()
        except (DurableError, psycopg.Error) as error:
            self._failed = (error, time.monotonic())
            raise
        self._known, self._failed = (value, time.monotonic()), None
        return value
