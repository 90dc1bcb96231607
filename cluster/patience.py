"""What a page waits for, of what runs beside it, and how much of that it begins at once.

A step that outlasts its page costs a row, so a page waits, while its window lasts, for steps of the kinds that end within it.
Two things keep them from ending: they are slow, or there are too many at once for the processor and the threads. Of the
latter the page begins no more than ended in time before, and leaves the other lines to the next page. The former are not
waited for, but for a try after a while, and then a longer one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from durable_cluster.beside import Run

Kind = tuple[str, str]

FIRST_CROWD = 128
CROWD_MIN = 32  # so few run at once: those that do not end are slow
AIM = 0.7  # of the window, in which all of a page should have ended
FIRST_PAUSE_S = 1.0
PAUSE_MAX_S = 60.0


def kind(run: Run) -> Kind:
    """Steps that may be expected to take alike."""
    return run.task.machine.name, run.task.step.name


class Patience:
    """What one consumer's pages have learnt. ``crowd``: how many steps to begin that are waited for; ``crowd_max`` at most."""

    def __init__(self, window_s: float, crowd_max: int) -> None:
        self.crowd = min(FIRST_CROWD, crowd_max)
        self._aim_s = AIM * window_s
        self._crowd_max = crowd_max
        self._crowd_min = min(CROWD_MIN, crowd_max)
        self._slow: dict[Kind, tuple[float, float]] = {}

    def awaits(self, run: Run) -> bool:
        """Whether a page waits for it: its kind is not known to be slow, or it is time for another try."""
        slow = self._slow.get(kind(run)) if self._slow else None
        return slow is None or time.monotonic() >= slow[0]

    def learn(self, awaited: Sequence[Run], took_s: float) -> None:
        """From what a page waited for so long, once it has detached those that still run."""
        begun = Counter(map(kind, awaited))
        ended = Counter(kind(run) for run in awaited if not run.is_detached)
        for which, count in list(begun.items()):
            if count <= CROWD_MIN and 2 * ended[which] < count:
                self._know_slow(which)
                del begun[which], ended[which]
            else:
                self._slow.pop(which, None)
        if ended.total() < begun.total():
            self.crowd = max(ended.total(), self.crowd // 4, self._crowd_min)
        elif begun.total() >= self.crowd:
            fitting = int(self.crowd * min(2.0, self._aim_s / took_s))
            self.crowd = min(max(fitting, self._crowd_min), self._crowd_max)

    def _know_slow(self, which: Kind) -> None:
        _, pause_s = self._slow.get(which, (0.0, FIRST_PAUSE_S / 2))
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
        self._slow[which] = time.monotonic() + pause_s, pause_s
