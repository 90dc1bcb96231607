"""What the lines of a linear workflow can ask for. Each says under which name it is recorded, and what its answer means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from durable_cluster.errors import ChildFailed
from durable_cluster.joins import ChildResult
from durable_cluster.retry import Policy
from durable_cluster.signals import Signal

if TYPE_CHECKING:
    from durable_cluster.functions import StepFunction

ENDED = ("completed", "failed", "cancelled")
EVERY = 0
"""As ``needed``: all of the children."""


class Options(msgspec.Struct, frozen=True):
    """What a call sets in place of what its step declares."""

    retry: Policy | None = None
    timeout_s: float | None = None


class Call(msgspec.Struct, frozen=True, eq=False):
    """A step to be run. ``args``: JSON, one for each of its parameters."""

    function: StepFunction[..., Any]
    args: bytes
    options: Options

    @property
    def name(self) -> str:
        """The step's."""
        return self.function.name

    def decoded(self, value: msgspec.Raw) -> Any:
        """What it returned."""
        return self.function.app.upcasts.decoded(self.function.returned, value)


class Alarm(msgspec.Struct, frozen=True, eq=False):
    """A time to come: ``due`` in seconds since 1970 by the database's clock, ``timeout_s`` from when it was asked for."""

    due: float
    timeout_s: float

    @property
    def name(self) -> str:
        """All are called so."""
        return "sleep"

    def decoded(self, _: msgspec.Raw) -> None:
        """It is over."""


class SignalWait(msgspec.Struct, frozen=True, eq=False):
    """A signal of one of ``names``; nothing after ``timeout_s``, at ``due``. ``token``: the number of the one it must bring."""

    names: tuple[str, ...]
    timeout_s: float | None
    due: float | None
    token: int | None

    @property
    def name(self) -> str:
        """With those of the signals."""
        return f"wait_for({'|'.join(self.names)})"

    def decoded(self, value: msgspec.Raw) -> Signal | None:
        """The signal; None after the timeout."""
        signal: Signal | None = _signal.decode(value)
        return signal


class ChildrenWait(msgspec.Struct, frozen=True, eq=False):
    """The ends of children, by number. ``needed``: so many completed are enough. ``fetch``: see ``joins.Results``."""

    numbers: Sequence[int]
    needed: int
    fetch: Callable[[int, int], list[ChildResult]]

    @property
    def name(self) -> str:
        """By how many."""
        return "child" if len(self.numbers) == 1 else f"children({len(self.numbers)})"

    def decoded(self, value: msgspec.Raw) -> list[ChildResult]:
        """Those that had ended, by number."""
        return self.read(_numbers.decode(value))

    def read(self, numbers: Sequence[int]) -> list[ChildResult]:
        """What became of these."""
        wanted, found, first = set(numbers), [], min(numbers, default=0)
        while wanted:
            part = self.fetch(first, READ_AT_ONCE)
            found += [child for child in part if child.number in wanted]
            wanted -= {child.number for child in part}
            if len(part) < READ_AT_ONCE:
                break
            first = part[-1].number + 1
        if wanted:
            raise ChildFailed(f"{len(wanted)} children cannot be read any more; their days have been dropped")
        return found

    def ended(self, children: Sequence[ChildResult]) -> list[ChildResult] | None:
        """Those of ``children`` that have ended, if they are enough."""
        wanted = set(self.numbers)
        ended = [child for child in children if child.number in wanted and child.status in ENDED]
        completed = sum(child.is_completed for child in ended)
        left = len(wanted) - len(ended)
        is_enough = not left if self.needed == EVERY else completed >= self.needed or completed + left < self.needed
        return ended if is_enough else None


READ_AT_ONCE = 1_000
Command = Call | Alarm | SignalWait | ChildrenWait

_signal = msgspec.json.Decoder(Signal | None)
_numbers = msgspec.json.Decoder(list[int])
