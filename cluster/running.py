"""Which step runs here, for whoever asks beside it: log records, and a tracer of the steps that one event runs.

Every step pays for it, and hardly one is asked for: in the page's own thread nothing is said that is not known anyway.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol

import msgspec

from durable_cluster.envelope import Envelope


class Running(msgspec.Struct, frozen=True, gc=False):
    """An attempt of a step of the workflow of ``envelope``."""

    envelope: Envelope
    step: str
    attempt: int


RUNNING: ContextVar[Running | None] = ContextVar("durable_cluster_running", default=None)
"""What runs in this thread, or in this task of asyncio's. Not the steps of a page's own thread, which are too quick: see
``Consumer.inline``, and ``Machine.runs_now``.
"""

UNWATCHED = nullcontext()
"""Around an attempt that no tracer watches."""


def begin(envelope: Envelope) -> None:
    """From now on this step runs here."""
    RUNNING.set(Running(envelope, envelope.step, envelope.attempt))


class Watch(Protocol):
    """A tracer of what an event of a linear workflow runs."""

    def attempt(self, step: str, attempt: int) -> AbstractContextManager[None]:
        """Around one attempt of a step."""
