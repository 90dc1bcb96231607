"""When a step that raised runs again, and when it does not. Pure: chance is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from durable_cluster.durations import DURATION_S_MAX, Duration, seconds
from durable_cluster.errors import InputError

ATTEMPTS_MAX = 1_000_000
DOUBLINGS_MAX = 60


class Policy(msgspec.Struct, frozen=True, array_like=True):
    """A checked ``Retry`` as the log carries it: seconds, and exceptions by their full names."""

    attempts: Annotated[int, msgspec.Meta(ge=1)]
    backoff_s: Annotated[float, msgspec.Meta(ge=0, le=DURATION_S_MAX)]
    backoff_s_max: Annotated[float, msgspec.Meta(ge=0, le=DURATION_S_MAX)]
    jitter: Annotated[float, msgspec.Meta(ge=0, le=1)]
    retry_on: tuple[str, ...] = ()
    give_up_on: tuple[str, ...] = ()

    def is_retried(self, error: BaseException) -> bool:
        """Whether an error of this type is worth another attempt."""
        names = {full_name(kind) for kind in type(error).__mro__}
        return names.isdisjoint(self.give_up_on) and (not self.retry_on or not names.isdisjoint(self.retry_on))

    def pause_s(self, attempt: int, *, chance: float) -> float:
        """Seconds between this failed ``attempt`` (from 1) and the next. ``chance``: from [0, 1)."""
        step = min(self.backoff_s_max, self.backoff_s * 2.0 ** min(attempt - 1, DOUBLINGS_MAX))
        return step * (1 - self.jitter * chance)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and when a step that raises is tried again; then it becomes a dead letter.

    ``attempts``: in all, from 1. The pause doubles from ``backoff`` to ``max_backoff``; ``jitter``: the share of it that is left to
    chance, from 0 to 1. ``retry_on``: only these exceptions, if any are named; ``give_up_on``: never these. Raises InputError.
    """

    attempts: int = 5
    backoff: Duration = 1.0
    max_backoff: Duration = 300.0
    jitter: float = 1.0
    retry_on: tuple[type[BaseException], ...] = ()
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        _ = self.policy

    @property
    def policy(self) -> Policy:
        """Checked, and as the log carries it."""
        if (
            not isinstance(self.attempts, int)
            or isinstance(self.attempts, bool)
            or not 1 <= self.attempts <= ATTEMPTS_MAX
        ):
            raise InputError(
                f"Retry attempts: {self.attempts!r} is out of range; choose 1 (no retry) to {ATTEMPTS_MAX:,}"
            )
        backoff_s = seconds(self.backoff, what="Retry backoff")
        backoff_s_max = seconds(self.max_backoff, what="Retry max_backoff")
        if backoff_s > backoff_s_max:
            raise InputError(f"Retry backoff: {self.backoff!r} is above max_backoff, {self.max_backoff!r}")
        if isinstance(self.jitter, bool) or not isinstance(self.jitter, int | float) or not 0 <= self.jitter <= 1:
            raise InputError(f"Retry jitter: {self.jitter!r} is out of range; it is a share from 0 to 1")
        return Policy(
            self.attempts,
            backoff_s,
            backoff_s_max,
            float(self.jitter),
            _names("retry_on", self.retry_on),
            _names("give_up_on", self.give_up_on),
        )


def full_name(kind: type) -> str:
    """Module and name of a class: what an exception is known by in the log."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _names(field: str, kinds: object) -> tuple[str, ...]:
    several = kinds if isinstance(kinds, tuple | list) else (kinds,)
    for kind in several:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise InputError(f"Retry {field}: {kind!r} is no exception class; give a tuple of classes")
    return tuple(full_name(kind) for kind in several)
