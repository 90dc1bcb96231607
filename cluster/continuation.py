"""What a step hands on: go to a step, now, after a sleep, when a signal comes or when children have ended, be done, or fail.

Pure data; the page turns it into rows.
"""

from __future__ import annotations

from typing import Any

import msgspec

from durable_cluster.joins import Child
from durable_cluster.retry import Policy


class Goto(msgspec.Struct, frozen=True, gc=False):
    """The workflow goes on with ``step`` and ``state``; ``retry``: in place of the step's own policy."""

    step: str
    state: Any
    retry: Policy | None = None


class Sleep(msgspec.Struct, frozen=True, gc=False):
    """As ``goto``, after ``seconds``."""

    seconds: float
    goto: Goto


class Stuck(msgspec.Struct, frozen=True, gc=False):
    """The workflow cannot go on as its code is: a dead letter that, retried, begins with ``goto``. ``error``, ``reason``: why."""

    goto: Goto
    error: BaseException
    reason: str = "given_up"


class Retrying(msgspec.Struct, frozen=True, gc=False):
    """The first attempt of ``goto`` has failed already with ``error``; the second follows after ``pause_s``, with what it said."""

    goto: Goto
    error: BaseException
    pause_s: float
    progress: Any = None


class Wait(msgspec.Struct, frozen=True, gc=False):
    """The workflow goes on with ``goto`` when a signal of one of ``names`` comes, with ``late`` after ``timeout_s`` seconds.

    ``token_seq``: the number of the token it must bring, in place of the step's own.
    """

    names: tuple[str, ...]
    goto: Goto
    late: Goto
    timeout_s: float | None
    requires_token: bool
    token_seq: int | None = None


class Spawn(msgspec.Struct, frozen=True, gc=False):
    """The workflow starts ``children`` and goes on with ``goto`` at once.

    ``keeps_group``: they are of one group with all that it spawned, also before it waited for them.
    """

    children: tuple[Child, ...]
    goto: Goto
    keeps_group: bool = False


class Join(msgspec.Struct, frozen=True, gc=False):
    """The workflow starts ``children`` and goes on with ``goto`` when enough have ended, with ``late`` after ``timeout_s`` seconds.

    ``needed``, ``tolerance``: see ``joins.Joining``. ``names``, ``token_seq``: signals that it goes on with too; see ``Wait``.
    """

    children: tuple[Child, ...]
    goto: Goto
    late: Goto
    timeout_s: float | None
    needed: int | None = None
    tolerance: int | None = None
    cancels_rest: bool = False
    keeps_group: bool = False
    names: tuple[str, ...] = ()
    token_seq: int | None = None


class Done(msgspec.Struct, frozen=True, gc=False):
    """The workflow is completed with ``output``. ``memo``: what a linear one carried, to be kept; nothing: it is not."""

    output: Any
    memo: bytes = b""


class Fail(msgspec.Struct, frozen=True, gc=False):
    """The workflow has failed for good, for ``reason``. ``memo``: as of ``Done``."""

    reason: str
    memo: bytes = b""


Continuation = Goto | Sleep | Wait | Spawn | Join | Done | Fail | Stuck | Retrying
