"""What a command said: for the tests that call the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


class Said(msgspec.Struct, frozen=True):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)


Say = Callable[..., Said]
