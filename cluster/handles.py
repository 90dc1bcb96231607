"""Handles that know the type of what they stand for: of a started linear workflow, and of a child in a workflow's lines."""

from __future__ import annotations

import asyncio.events
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from durable_cluster import bridge
from durable_cluster.client import Client, Handle
from durable_cluster.commands import EVERY, ChildrenWait
from durable_cluster.errors import AppError
from durable_cluster.execution import Execution
from durable_cluster.joins import Child, ChildResult
from durable_cluster.loop import WorkflowLoop

T = TypeVar("T")
ANY = msgspec.json.Decoder(Any)


class WorkflowHandle(Handle, Generic[T]):
    """As ``Handle``; the result is of the type that the workflow's function returns."""

    def __init__(self, client: Client, workflow: str, workflow_id: str, read: Callable[[bytes], Any]) -> None:
        super().__init__(client, workflow, workflow_id)
        self._read = read

    def result(self, timeout: float | None = None) -> T:
        """See ``Handle.result``."""
        return self._typed(super().result(timeout))

    async def wait(self, timeout: float | None = None) -> T:
        """See ``Handle.wait``."""
        return self._typed(await super().wait(timeout))

    def __await__(self) -> Generator[Any, None, T]:
        return self.wait().__await__()

    def _typed(self, value: Any) -> T:
        typed: T = self._read(msgspec.json.encode(value))
        return typed


class ChildHandle(Generic[T]):
    """A child of a workflow, in that workflow's lines: ``await`` it, or ``gather`` several. ``number``: among all its children."""

    def __init__(self, execution: Execution, number: int, workflow: str, read: Callable[[bytes], Any]) -> None:
        self.number = number
        self.workflow = workflow
        self._execution = execution
        self._read = read

    def __repr__(self) -> str:
        return f"<ChildHandle {self.number}: {self.workflow}>"

    async def wait(self) -> T:
        """What it returned. Raises ChildFailed."""
        (child,) = await self._execution.begin(wait_of(self._execution, [self], EVERY))
        return self.typed(child)

    def result(self) -> T:
        """As ``wait``, in a plain ``def`` workflow."""
        return bridge.wait(self.wait())  # type: ignore[no-any-return]

    def typed(self, child: ChildResult) -> T:
        """The output of what became of it. Raises ChildFailed."""
        typed: T = self._read(msgspec.json.encode(child.value))
        return typed

    def __await__(self) -> Generator[Any, None, T]:
        return self.wait().__await__()


def spawned(child: Child, read: Callable[[bytes], Any]) -> ChildHandle[Any]:
    """The handle of a child that the running workflow starts with its next checkpoint. Raises AppError outside of one."""
    execution = execution_of("spawn")
    return ChildHandle(execution, execution.spawn([child]), child.workflow, read)


def wait_of(execution: Execution, handles: list[ChildHandle[Any]], needed: int) -> ChildrenWait:
    """The wait for these children."""
    fetch = partial(execution.workflow.app.client.children, execution.workflow_id)
    return ChildrenWait([handle.number for handle in handles], needed, fetch)


def execution_of(what: str) -> Execution:
    """The workflow whose line this is. Raises AppError anywhere else."""
    loop = asyncio.events._get_running_loop()
    if type(loop) is not WorkflowLoop:
        raise AppError(f"{what}() is for the lines of a workflow (@app.workflow); this is none, or a step of one")
    return loop.execution
