"""The face of a linear workflow: started, looked up and spawned with the types that its function names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, TypedDict, TypeVar, Unpack, overload

import msgspec

from durable_cluster.client import Handle
from durable_cluster.durations import Duration
from durable_cluster.handles import ChildHandle, WorkflowHandle, spawned
from durable_cluster.machine import Machine
from durable_cluster.notes import Attributes
from durable_cluster.transactions import Transaction

In = TypeVar("In")
R = TypeVar("R")


class Shared(TypedDict, total=False):
    """What may be said of one start and of many; see ``Machine.start``."""

    after: Duration | None
    at: datetime | None
    priority: float
    traceparent: str | None
    tx: Transaction | None


class Beginning(Shared, total=False):
    """What may be said of a start."""

    key: str | None
    attributes: Attributes | None


class Beginnings(Shared, total=False):
    """What may be said of many."""

    keys: Sequence[str] | None
    attributes: Attributes | Sequence[Attributes | None] | None


class TypedMachine(Machine, Generic[In, R]):
    """A machine whose input is an ``In`` (None: it takes none), and whose result is an ``R``."""

    returned: msgspec.json.Decoder[Any]
    keeps_memo = False

    @overload
    def start(self: TypedMachine[None, R], value: None = None, **how: Unpack[Beginning]) -> WorkflowHandle[R]: ...
    @overload
    def start(self, value: In, **how: Unpack[Beginning]) -> WorkflowHandle[R]: ...
    def start(self, value: Any = None, **how: Any) -> WorkflowHandle[R]:
        """Start it with ``value``; see ``Machine.start``. The handle's ``result()`` is of the type that the function returns."""
        return self._typed(super().start(value, **how))

    def start_many(self, values: Sequence[In], **how: Unpack[Beginnings]) -> Sequence[WorkflowHandle[R]]:
        """Start one for each value; see ``Machine.start_many``."""
        return [self._typed(handle) for handle in super().start_many(values, **how)]

    def get(self, *, key: str) -> WorkflowHandle[R]:
        """The one that was started with ``key``. Raises UnknownWorkflow."""
        return self._typed(super().get(key=key))

    @overload
    async def start_async(
        self: TypedMachine[None, R], value: None = None, **how: Unpack[Beginning]
    ) -> WorkflowHandle[R]: ...
    @overload
    async def start_async(self, value: In, **how: Unpack[Beginning]) -> WorkflowHandle[R]: ...
    async def start_async(self, value: Any = None, **how: Any) -> WorkflowHandle[R]:
        """As ``start``, without blocking the event loop; see ``Machine.start_async``."""
        return self._typed(await super().start_async(value, **how))

    async def start_many_async(self, values: Sequence[In], **how: Unpack[Beginnings]) -> Sequence[WorkflowHandle[R]]:
        """As ``start_many``, without blocking the event loop; see ``Machine.start_many_async``."""
        return [self._typed(handle) for handle in await super().start_many_async(values, **how)]

    async def get_async(self, *, key: str) -> WorkflowHandle[R]:
        """As ``get``, without blocking the event loop."""
        return self._typed(await super().get_async(key=key))

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
