"""A measured figure, beside the limit that it must keep."""

from __future__ import annotations

import sys

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a report. ``of``: the measurement; ``limit``: the most that ``value`` may be, if there is one."""

    of: str
    what: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it keeps its limit."""
        return self.limit is None or self.value <= self.limit

    def told(self) -> str:
        """For people."""
        sign = " " if self.limit is None else "✓" if self.is_kept else "✗"
        limit = "" if self.limit is None else f"   limit {self.limit:g} {self.unit}"
        return f"{sign} {self.of:<9} {self.what:<62} {_rounded(float(self.value)):>11} {self.unit}{limit}"


def say(text: str) -> None:
    """What happens meanwhile, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"
