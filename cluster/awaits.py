"""What the lines of a linear workflow may await besides steps, and what they may ask for without waiting."""

from __future__ import annotations

import asyncio
import random as chance
import typing
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar, overload

import msgspec

from durable_cluster import bridge
from durable_cluster.commands import EVERY, Alarm, Command, SignalWait
from durable_cluster.context import short_id
from durable_cluster.decoding import decoder_of
from durable_cluster.durations import Duration, seconds
from durable_cluster.envelope import encode
from durable_cluster.errors import AppError, InputError
from durable_cluster.execution import ContinueAsNew, Execution
from durable_cluster.handles import ChildHandle, execution_of, wait_of
from durable_cluster.logs import WorkflowLogger
from durable_cluster.notes import Attributes
from durable_cluster.settings import checked_name
from durable_cluster.signals import Signal

T = TypeVar("T")
P = ParamSpec("P")
S = TypeVar("S")


def sleep(duration: Duration) -> Coroutine[Any, Any, None]:
    """Wait for ``duration`` (seconds, a timedelta, "90s", "7d"); durable: no process waits. Raises InputError."""
    execution = execution_of("sleep")
    delay_s = seconds(duration, what="sleep")
    return _ask(execution, Alarm(execution.now() + delay_s, delay_s))


@overload
def wait_for(name: str, type_: type[T], /, *, require_token: bool = False) -> Coroutine[Any, Any, T]: ...
@overload
def wait_for(
    name: str, type_: type[T], /, *, timeout: Duration, require_token: bool = False
) -> Coroutine[Any, Any, T | None]: ...
@overload
def wait_for(
    name: str, /, *, timeout: Duration | None = None, require_token: bool = False
) -> Coroutine[Any, Any, Any]: ...
def wait_for(
    name: str, type_: Any = Any, /, *, timeout: Duration | None = None, require_token: bool = False
) -> Coroutine[Any, Any, Any]:
    """The payload, as ``type_``, of the next signal called ``name``; None after ``timeout``.

    One that came earlier is there already. ``require_token``: only one that brings ``ctx.token``, as the steps before this line saw
    it, counts. Raises InputError, also for a payload that does not fit.
    """
    waiting: Any = select(name, timeout=timeout, require_token=require_token)
    execution = execution_of("wait_for")
    upcasts = execution.workflow.app.upcasts

    def payload(signal: Signal | None) -> Any:
        return None if signal is None else signal.payload if type_ is Any else signal.payload_as(type_, upcasts)

    async def awaited() -> Any:
        return payload(await waiting)

    return payload(waiting) if execution.is_sync else awaited()


def select(
    *names: str, timeout: Duration | None = None, require_token: bool = False
) -> Coroutine[Any, Any, Signal | None]:
    """The next signal of one of ``names``; None after ``timeout``. As ``wait_for``; says which it was, who sent it and when."""
    execution = execution_of("select")
    if not names:
        raise InputError("select needs the name of a signal: await select('approved', 'rejected')")
    for name in names:
        checked_name("signal", name)
    timeout_s = None if timeout is None else seconds(timeout, what="timeout")
    due = None if timeout_s is None else execution.now() + timeout_s
    token = execution.take_token() if require_token else None
    return _ask(execution, SignalWait(names, timeout_s, due, token))


def gather(*awaited: Awaitable[T]) -> Coroutine[Any, Any, list[T]]:
    """What all of these come to, in their order: steps, sleeps, children, coroutines. The first that raises ends the wait.

    Steps run at once, in one process; children wherever there is one.
    """
    execution = execution_of("gather")
    return _given(execution, _gathered(execution, awaited))


async def _gathered(execution: Execution, awaited: tuple[Awaitable[T], ...]) -> list[T]:
    handles = _children_of(awaited)
    if handles is None:
        return list(await asyncio.gather(*awaited))
    if not handles:
        return []
    ended = await execution.begin(wait_of(execution, handles, EVERY))
    by_number = {child.number: child for child in ended}
    return [handle.typed(by_number[handle.number]) for handle in handles]


def first(*awaited: Awaitable[T]) -> Coroutine[Any, Any, T]:
    """What the first of these comes to that does not raise; what the last one raises, if all do.

    Steps that still run are cancelled; children go on.
    """
    execution = execution_of("first")
    if not awaited:
        raise InputError("first() of nothing; give it what may come first")

    async def only() -> T:
        return (await _some(execution, 1, awaited))[0]

    return _given(execution, only())


def at_least(needed: int, *awaited: Awaitable[T]) -> Coroutine[Any, Any, list[T]]:
    """What the first ``needed`` of these come to, as they end. Steps that still run are cancelled; children go on.

    Raises what the last one raised, when so many cannot come any more.
    """
    execution = execution_of("at_least")
    if not 1 <= needed <= len(awaited):
        raise InputError(f"at_least({needed}) of {len(awaited)}: it takes 1 to {len(awaited)}")
    return _given(execution, _some(execution, needed, awaited))


async def _some(execution: Execution, needed: int, awaited: tuple[Awaitable[T], ...]) -> list[T]:
    handles = _children_of(awaited)
    if handles is not None:
        ended = await execution.begin(wait_of(execution, handles, needed))
        by_number = {handle.number: handle for handle in handles}
        failed = [child for child in ended if not child.is_completed]
        completed = [by_number[child.number].typed(child) for child in ended if child.is_completed]
        return completed[:needed] if len(completed) >= needed else [failed[-1].value]
    tasks = [asyncio.ensure_future(one) for one in awaited]
    values: list[T] = []
    try:
        for ended_task in asyncio.as_completed(tasks):
            try:
                values.append(await ended_task)
            except Exception:
                if sum(not task.done() for task in tasks) + len(values) < needed:
                    raise
            if len(values) == needed:
                break
    finally:
        for task in tasks:
            task.cancel()
    return values


def now() -> datetime:
    """The time (UTC, the database's clock), recorded: the same whenever this line runs again."""
    return datetime.fromtimestamp(execution_of("now").time(), UTC)


def uuid4() -> uuid.UUID:
    """A random UUID, recorded."""
    return uuid.UUID(execution_of("uuid4").instant("uuid4", lambda: str(uuid.uuid4())))


def random() -> float:
    """A random number from [0, 1), recorded."""
    return float(execution_of("random").instant("random", chance.random))


def side_effect(make: Callable[[], T]) -> T:
    """What ``make`` returns (JSON, read as the type that ``make`` says it returns, if it says one), recorded.

    It runs again if this process dies before the next checkpoint: for what is cheap and harmless.
    """
    execution = execution_of("side_effect")
    decoder = decoder_of(_returned_by(make), "what side_effect() is given returns")
    value: T = execution.workflow.app.upcasts.decoded(decoder, encode(execution.instant("side_effect", make)))
    return value


def patched(name: str) -> bool:
    """Whether this run takes the change called ``name``: True but for runs that were past this line before the change was made."""
    return execution_of("patched").patched(name)


def continue_as_new(value: Any = None) -> NoReturn:
    """End this run of the function, and begin it again with ``value``: the same workflow, with nothing recorded."""
    execution_of("continue_as_new")
    raise ContinueAsNew(value)


def set_attributes(attributes: Attributes) -> None:
    """Change what the workflow is found by, with the next checkpoint; see ``Context.set_attributes``. Raises InputError."""
    execution_of("set_attributes").note(attributes=attributes)


def set_progress(progress: Any) -> None:
    """Publish how far the workflow is, with the next checkpoint; see ``Context.set_progress``. Raises InputError."""
    execution_of("set_progress").note(progress=progress)


class Running(msgspec.Struct, frozen=True):
    """The workflow whose line asks. ``workflow_id``: whole, a capability; ``run``: how often it was continued as new.

    ``logger``: its records say which workflow speaks; silent where the function only comes again to where it was.
    """

    workflow_id: str
    workflow: str
    run: int
    logger: WorkflowLogger

    @property
    def short_id(self) -> str:
        """Fit for logs."""
        return short_id(self.workflow_id)

    def __repr__(self) -> str:
        return f"<{self.workflow} {self.short_id}…>"


def current() -> Running:
    """Which workflow this is."""
    execution = execution_of("current")
    name, workflow_id = execution.workflow.name, execution.workflow_id
    logger = WorkflowLogger(name, short_id(workflow_id), is_silent=lambda: execution.is_replaying)
    return Running(workflow_id, name, execution.carried.run, logger)


class Turn(Generic[S]):
    """A turn of a loop. Set ``state`` to what the next one begins with; ``number``: from 0."""

    def __init__(self, number: int, state: S) -> None:
        self.number = number
        self.state = state


class _Recorded(msgspec.Struct, frozen=True):
    n: int
    state: msgspec.Raw


_recorded = msgspec.json.Decoder(_Recorded)


async def loop(state: S) -> AsyncIterator[Turn[S]]:
    """Turns without end: ``async for turn in loop(state)``. Only ``turn.state`` lives on from one to the next; ``break`` ends it.

    What the awaits of a turn came to is forgotten when the next begins, so that a workflow of 100,000 turns carries no more than
    one. A process that takes it up enters the function anew and goes on in the recorded turn: variables from outside of the loop
    are as the lines before it make them.
    """
    execution = execution_of("loop")
    if execution.is_sync:
        raise AppError(
            "loop() is for async def workflows; a plain def that goes on for long ends with continue_as_new(value)"
        )
    branch = execution.branch
    key = execution.key("loop")
    position = key.partition(" ")[0]
    decoder = decoder_of(_type_of(state), "the state of a loop")
    known, upcasts = execution.recorded.instant(key), execution.workflow.app.upcasts
    recorded = _recorded.decode(known) if known is not None else _Recorded(0, msgspec.Raw(encode(state)))
    while True:
        branch.prefix, branch.awaits, branch.branches = f"{position}~{recorded.n}.", 0, 0
        turn: Turn[S] = Turn(recorded.n, upcasts.decoded(decoder, recorded.state))
        yield turn
        recorded = _Recorded(recorded.n + 1, msgspec.Raw(encode(turn.state)))
        execution.record(key, encode(recorded))
        execution.recorded.forget(f"{position}~")


def scope(function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
    """What an ``async def`` of awaits comes to (JSON); once it has ended, only that is carried on, not each of its awaits."""
    execution = execution_of("scope")
    return _given(execution, _scoped(execution, function, args, kwargs))


async def _scoped(execution: Execution, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    branch = execution.branch
    key = execution.key("scope")
    position = key.partition(" ")[0]
    decoder = decoder_of(_returned_by(function), f"what scope({function.__name__}) returns")
    known = execution.recorded.instant(key)
    if known is None:
        before = branch.prefix, branch.awaits, branch.branches
        branch.prefix, branch.awaits, branch.branches = f"{position}~.", 0, 0
        value = await function(*args, **kwargs)
        branch.prefix, branch.awaits, branch.branches = before
        known = msgspec.Raw(encode(value))
        execution.record(key, bytes(known))
        execution.recorded.forget(f"{position}~")
    return execution.workflow.app.upcasts.decoded(decoder, known)


class compensation:
    """``async with compensation() as undo``: what is registered with ``undo(step, …)`` is run, last first, if the block raises or
    is cancelled; then that goes on. A step that undoes is tried as often as its retry says, as any other.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Awaitable[Any]]] = []

    def __call__(self, step: Callable[P, Awaitable[Any]], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run ``step(…)`` if this does not end well."""
        self._undo.append(lambda: step(*args, **kwargs))

    async def __aenter__(self) -> compensation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, GeneratorExit | ContinueAsNew):
            return
        while self._undo:
            await self._undo.pop()()


def _ask(execution: Execution, command: Command) -> Coroutine[Any, Any, Any]:
    return execution.workflow.asked(execution, command)  # type: ignore[no-any-return]


def _given(execution: Execution, coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """What a line gets: the coroutine; in a plain ``def``, whose types cannot say so, what it comes to."""
    return bridge.wait(coroutine) if execution.is_sync else coroutine


def _children_of(awaited: tuple[Any, ...]) -> list[ChildHandle[Any]] | None:
    """They, if all are children."""
    return list(awaited) if all(isinstance(one, ChildHandle) for one in awaited) else None


def _type_of(state: Any) -> Any:
    kind = type(state)
    return Any if kind.__module__ == "builtins" else kind


def _returned_by(function: Callable[..., Any]) -> Any:
    return typing.get_type_hints(function).get("return", Any)
