"""What a step is told about itself, and how it says what comes next."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import psycopg

from durable_cluster.continuation import Continuation, Done, Fail, Goto
from durable_cluster.envelope import Envelope
from durable_cluster.errors import AppError

if TYPE_CHECKING:
    from durable_cluster.app import Machine

SHORT_ID_DIGITS = 12


def short_id(workflow_id: str) -> str:
    """The part of a workflow id that logs, traces and listings may carry: its first 12 hex digits."""
    return workflow_id[:SHORT_ID_DIGITS]


class Context:
    """Given to a step whose first parameter is annotated with it."""

    __slots__ = ("_connection", "_envelope", "_machine")

    def __init__(self, machine: Machine, envelope: Envelope, connection: psycopg.Connection[Any] | None = None) -> None:
        self._machine = machine
        self._envelope = envelope
        self._connection = connection

    @property
    def workflow_id(self) -> str:
        """The whole id, 32 hex digits: a capability. Log ``short_id`` instead."""
        return self._envelope.workflow_id

    @property
    def short_id(self) -> str:
        """The first 12 hex digits of the id: fit for logs."""
        return short_id(self._envelope.workflow_id)

    @property
    def step(self) -> str:
        """The name of the running step."""
        return self._envelope.step

    @property
    def seq(self) -> int:
        """The number of this step in its workflow, from 1."""
        return self._envelope.seq

    @property
    def attempt(self) -> int:
        """Which attempt of this step this is, from 1."""
        return self._envelope.attempt

    @property
    def idempotency_key(self) -> str:
        """32 hex digits, equal whenever this step of this workflow runs again: pass it to whatever must act once."""
        of = f"{self._envelope.workflow_id}:{self._envelope.seq - self._envelope.attempt + 1}"
        return blake2b(of.encode(), digest_size=16).hexdigest()

    @property
    def tx(self) -> psycopg.Connection[Any]:
        """The connection whose transaction also hands the workflow on. Only in ``transactional=True`` steps; never commit it."""
        if self._connection is None:
            raise AppError(f"step '{self.step}' has no transaction; declare it with @machine.step(transactional=True)")
        return self._connection

    def goto(self, step: str | Callable[..., Any], state: Any) -> Continuation:
        """Go on with ``step`` (the decorated function, or its name) and ``state``."""
        return Goto(self._machine.step_name(step), state)

    def done(self, output: Any = None) -> Continuation:
        """Complete the workflow; ``output`` (JSON) is what ``result()`` returns."""
        return Done(output)

    def fail(self, reason: str) -> Continuation:
        """End the workflow in failure, for good."""
        return Fail(reason)
