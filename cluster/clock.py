"""The database's clock, as this process reckons it between two looks."""

from __future__ import annotations

import time


class Clock:
    """``now()``: seconds since 1970 by ``durable.now()``, as far as it was ahead of this machine's when it was last seen."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time() + self._ahead_s

    def real_s(self, duration_s: float) -> float:
        """How long this process waits for so much of the clock's time, in seconds."""
        return duration_s

    def seen(self, database_s: float) -> None:
        """The database's clock shows this, now."""
        self._ahead_s = database_s - time.time()
