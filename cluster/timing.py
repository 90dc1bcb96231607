"""How long a step of a recorded workflow took, carried along with its result to the page that hands it on: see ``timeline``.

All moments are those of this process's monotonic clock, in seconds; the database's clock is only asked when they are written.
"""

from __future__ import annotations

import time
from collections.abc import MutableSequence, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from durable_cluster.context import Context
    from durable_cluster.envelope import Envelope


class Lap(msgspec.Struct, frozen=True, gc=False):
    """A step of a linear workflow that ran within another's event. ``error``: why it failed; ``""``: it did not."""

    step: str
    attempt: int
    began: float
    ended: float
    outcome: str
    error: str


class Timing(msgspec.Struct):
    """When a step's handler began, and what ran within it."""

    began: float
    laps: list[Lap] = []

    def lap(self, step: str, began: float, *, attempt: int = 1, outcome: str = "continued", error: str = "") -> None:
        """Something that ran within it has ended."""
        self.laps.append(Lap(step, attempt, began, time.monotonic(), outcome, error))


class Timed(msgspec.Struct, frozen=True, gc=False):
    """What becomes of a step event that is recorded. ``began``: None for one that did not run; ``ended``: for one that goes on."""

    envelope: Envelope
    result: Any
    began: float | None = None
    ended: float | None = None
    laps: Sequence[Lap] = ()

    @property
    def children(self) -> Sequence[Any]:
        """The children that its step spawns."""
        return getattr(self.result, "children", ())


def timed(context: Context, envelope: Envelope, result: Any) -> Any:
    """The result of a step that has just ended, with its time if that is recorded."""
    timing = context.timing
    if timing is None:
        return result
    return Timed(envelope, result, timing.began, time.monotonic(), timing.laps)


def taken(slots: MutableSequence[Any]) -> dict[int, Timed]:
    """What is recorded among ``slots``, by index; in its place there, the results."""
    found = {index: slot for index, slot in enumerate(slots) if type(slot) is Timed}
    for index, slot in found.items():
        slots[index] = slot.result
    return found
