"""The face of a linear workflow: started, looked up and spawned with the types that its function names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar, overload

import msgspec
import psycopg

from durable_cluster.client import Handle
from durable_cluster.durations import Duration
from durable_cluster.handles import ChildHandle, WorkflowHandle, spawned
from durable_cluster.machine import Machine
from durable_cluster.notes import Attributes

In = TypeVar("In")
R = TypeVar("R")


class TypedMachine(Machine, Generic[In, R]):
    """A machine whose input is an ``In`` (None: it takes none), and whose result is an ``R``."""

    returned: msgspec.json.Decoder[Any]

    @overload
    def start(
        self: TypedMachine[None, R],
        value: None = None,
        *,
        key: str | None = None,
        after: Duration | None = None,
        at: datetime | None = None,
        priority: float = 1,
        attributes: Attributes | None = None,
        tx: psycopg.Connection[Any] | None = None,
    ) -> WorkflowHandle[R]: ...
    @overload
    def start(
        self,
        value: In,
        *,
        key: str | None = None,
        after: Duration | None = None,
        at: datetime | None = None,
        priority: float = 1,
        attributes: Attributes | None = None,
        tx: psycopg.Connection[Any] | None = None,
    ) -> WorkflowHandle[R]: ...
    def start(self, value: Any = None, **how: Any) -> WorkflowHandle[R]:
        """Start it with ``value``; see ``Machine.start``. The handle's ``result()`` is of the type that the function returns."""
        return self._typed(super().start(value, **how))

    def start_many(
        self,
        values: Sequence[In],
        *,
        keys: Sequence[str] | None = None,
        after: Duration | None = None,
        at: datetime | None = None,
        priority: float = 1,
        attributes: Attributes | Sequence[Attributes | None] | None = None,
        tx: psycopg.Connection[Any] | None = None,
    ) -> Sequence[WorkflowHandle[R]]:
        """Start one for each value; see ``Machine.start_many``."""
        started = super().start_many(
            values, keys=keys, after=after, at=at, priority=priority, attributes=attributes, tx=tx
        )
        return [self._typed(handle) for handle in started]

    def get(self, *, key: str) -> WorkflowHandle[R]:
        """The one that was started with ``key``. Raises UnknownWorkflow."""
        return self._typed(super().get(key=key))

    @overload
    def spawn(
        self: TypedMachine[None, R],
        value: None = None,
        *,
        after: Duration | None = None,
        attributes: Attributes | None = None,
    ) -> ChildHandle[R]: ...
    @overload
    def spawn(
        self, value: In, *, after: Duration | None = None, attributes: Attributes | None = None
    ) -> ChildHandle[R]: ...
    def spawn(
        self, value: Any = None, *, after: Duration | None = None, attributes: Attributes | None = None
    ) -> ChildHandle[R]:
        """In a workflow's lines: start a child of this kind with the next checkpoint; ``await`` the handle for what it returns.

        Raises InputError.
        """
        return spawned(self.child(value, after=after, attributes=attributes), self._read)

    def _typed(self, handle: Handle) -> WorkflowHandle[R]:
        return WorkflowHandle(self.app.client, self.name, handle.id, self._read)

    def _read(self, output: bytes) -> Any:
        return self.app.upcasts.decoded(self.returned, output)
