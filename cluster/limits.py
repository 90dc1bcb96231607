"""Limits: how many steps or workflows at once, how many a period; and a step event that needs a permit of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from durable_cluster.durations import seconds
from durable_cluster.envelope import NOT_AN_ENVELOPE, Envelope
from durable_cluster.errors import AppError, InputError
from durable_cluster.settings import checked_name
from durable_cluster.types import KEY_CHARS_MAX, NOT_OF_A_KEY

LIMIT = "@limit"
"""What the line has in place of a workflow's name that a rate lets the next pass with."""

OF_WORKFLOW, OF_STEP = 1, 2
"""The bits of ``Envelope.permit``."""


class Limit:
    """At most ``concurrency`` at once, at most ``rate`` ("100/1s", "5/1m") begun a period, across all processes and hosts.

    ``key``: a function of the state (of the input, for a machine); each key is counted by itself. The numbers are what counts until
    somebody sets others under this ``name`` (``durable-cluster limits set``). Raises InputError, AppError.
    """

    def __init__(
        self,
        name: str,
        *,
        concurrency: int | None = None,
        rate: str | None = None,
        key: Callable[[Any], object] | None = None,
    ) -> None:
        self.name = checked_name("limit", name)
        if concurrency is None and rate is None:
            raise InputError(f"limit '{name}' limits nothing; give it concurrency=… or rate='100/1s'")
        if concurrency is not None and concurrency < 0:
            raise InputError(f"limit '{name}': concurrency of {concurrency}; it is 0 or more")
        self.concurrency = concurrency
        self.rate: int | None = None
        self.period_s: float | None = None
        if rate is not None:
            self.rate, self.period_s = parsed_rate(name, rate)
        self.key = key

    def __repr__(self) -> str:
        return f"Limit({self.name!r})"

    def key_of(self, state: Any) -> str:
        """What this state is counted for. Raises InputError for what cannot be a key, and whatever the function raises."""
        if self.key is None:
            return ""
        key = str(self.key(state))
        if len(key) > KEY_CHARS_MAX or NOT_OF_A_KEY.search(key):
            raise InputError(
                f"limit '{self.name}': a key has at most {KEY_CHARS_MAX} characters and no control characters"
            )
        return key


class Queued(msgspec.Struct, frozen=True):
    """A step event that needs a permit of ``limit`` for ``key``. ``envelope``: as it goes on with the permit.

    ``permit_seq``: 0 for one that the workflow holds until it ends, else the step's number.
    """

    envelope: Envelope
    limit: Limit
    key: str
    permit_seq: int


class Pump(msgspec.Struct, frozen=True):
    """A rate lets the next pass. ``envelope``: the line that says so."""

    envelope: Envelope
    name: str
    key: str


class _Told(msgspec.Struct, frozen=True):
    name: str
    key: str


_told = msgspec.json.Decoder(_Told)


def checked_limit(limit: Limit | None, *, of: str) -> Limit | None:
    """``limit`` if it is one. Raises AppError naming what it was given to."""
    if limit is None or isinstance(limit, Limit):
        return limit
    raise AppError(f"limit of {of}: {limit!r} is no Limit(…); write limit=Limit('stripe', concurrency=10)")


def parsed_rate(name: str, rate: str) -> tuple[int, float]:
    """How many, in how many seconds: "100/1s", "5/m", "1000/1d". Raises InputError."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9.]*)\s*(ms|s|m|h|d)\s*", rate)
    count = int(found[1]) if found else 0
    period_s = seconds(f"{found[2] or 1}{found[3]}", what=f"the period of limit '{name}'") if found else 0.0
    if not count or not period_s:
        raise InputError(f"limit '{name}': rate {rate!r} is none; write it as '100/1s' or '5/1m'")
    return count, period_s


def pump_of(envelope: Envelope) -> Pump | None:
    """What a line of ``durable.let_pass`` says; None for one that somebody else wrote."""
    try:
        told = _told.decode(envelope.state)
    except NOT_AN_ENVELOPE:
        return None
    return None if NOT_OF_A_KEY.search(told.name + told.key) else Pump(envelope, told.name, told.key)


def without_permit(envelope: Envelope) -> Envelope:
    """The same step to be run another time: then it needs a permit again."""
    if envelope.permit & OF_STEP:
        return msgspec.structs.replace(envelope, permit=envelope.permit & ~OF_STEP)
    return envelope
