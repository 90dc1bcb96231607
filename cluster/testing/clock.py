"""The clock of a test: it stands still until it is moved, in the database and in this process alike."""

from __future__ import annotations

from durable_cluster.clock import Clock


class StandingClock(Clock):
    """Shows what the database's showed when it was last seen. Nothing waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._shows_s = 0.0

    def now(self) -> float:
        """Seconds since 1970."""
        return self._shows_s

    def seen(self, database_s: float) -> None:
        """It was moved to this."""
        self._shows_s = database_s

    def real_s(self, duration_s: float) -> float:
        """None of it."""
        return 0.0
