"""What a step hands on: go to a step, be done, or fail. Pure data; the page turns it into rows."""

from __future__ import annotations

from typing import Any

import msgspec


class Goto(msgspec.Struct, frozen=True):
    """The workflow goes on with ``step`` and ``state``."""

    step: str
    state: Any


class Done(msgspec.Struct, frozen=True):
    """The workflow is completed with ``output``."""

    output: Any


class Fail(msgspec.Struct, frozen=True):
    """The workflow has failed for good, for ``reason``."""

    reason: str


Continuation = Goto | Done | Fail
