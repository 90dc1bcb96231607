"""How often a child may be started again, and after which pause. Pure: time and chance are handed in."""

from __future__ import annotations

from collections.abc import Sequence

BACKOFF_S_MIN = 0.1
BACKOFF_S_MAX = 30.0


def recent(deaths: Sequence[float], *, now: float, window_s: float) -> list[float]:
    """The deaths (seconds on some clock) that still count."""
    return [death for death in deaths if now - death < window_s]


def pause_s(deaths: int, *, chance: float) -> float:
    """Seconds until the next start after so many recent deaths: none after the first, then doubling, with jitter.

    ``chance``: from [0, 1). The pause lies between half of the step and the whole of it.
    """
    if deaths <= 1:
        return 0.0
    step = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2.0 ** (deaths - 2))
    return step * (0.5 + chance / 2)
