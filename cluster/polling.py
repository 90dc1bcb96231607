"""How often a result is asked for: often at first, then less."""

from __future__ import annotations

from collections.abc import Iterator

POLL_S_MIN = 0.002
POLL_S_FREQUENT = 0.02
POLL_S_MAX = 0.25
FREQUENT_POLLS_S = 1.0
POLL_GROWTH = 1.5


def pauses() -> Iterator[float]:
    """Seconds before each further question, without end."""
    pause, waited = POLL_S_MIN, 0.0
    while True:
        yield pause
        waited += pause
        pause = min(pause * POLL_GROWTH, POLL_S_MAX if waited > FREQUENT_POLLS_S else POLL_S_FREQUENT)
