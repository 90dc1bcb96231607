"""A linear workflow's function while it is in this process: entered, fed with what its awaits came to, and asked what it waits for.

Entered anew, it is fed with all that is recorded, in the recorded order, before anything else happens: so two branches of it see
each other's results in the order of the first time. What it asks for has to be what is recorded; else the code has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import structs

from durable_cluster import memo
from durable_cluster.codec import Where
from durable_cluster.commands import Alarm, Command
from durable_cluster.context import Asked, Context
from durable_cluster.envelope import encode
from durable_cluster.errors import ChildFailed, HandlerError, InputError, NonDeterminismError
from durable_cluster.failures import is_in, rebuilt
from durable_cluster.joins import Child
from durable_cluster.loop import WorkflowLoop
from durable_cluster.memo import CANCEL_KEY, Carried, Entry, Failure
from durable_cluster.notes import Attributes, Notes, checked_attributes, checked_progress
from durable_cluster.recorded import Recorded

if TYPE_CHECKING:
    from durable_cluster.ahead import Ahead
    from durable_cluster.linear import Workflow


EXITS_MAX = 10
"""So often a function that is put away may try to go on."""


class Branch:
    """A task of the workflow: where its awaits are counted."""

    __slots__ = ("awaits", "branches", "prefix")

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.awaits = 0
        self.branches = 0


class Pending:
    """An await without an answer. ``turn``: when it was asked for."""

    __slots__ = ("command", "future", "key", "turn")

    def __init__(self, key: str, command: Command, future: asyncio.Future[Any], turn: int) -> None:
        self.key = key
        self.command = command
        self.future = future
        self.turn = turn


class ContinueAsNew(BaseException):
    """Ends the function: it begins again with ``value``."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Execution:
    """One workflow's function, its branches, and what each of them waits for."""

    def __init__(self, workflow: Workflow[Any, Any], recorded: Recorded) -> None:
        self.workflow = workflow
        self.workflow_id = recorded.workflow_id
        self.carried = carried = recorded.carried
        self.recorded = recorded
        self.thread_id = 0
        self.is_sync = workflow.is_sync
        self.loop = WorkflowLoop(self)  # type: ignore[abstract]
        self.pending: dict[str, Pending] = {}
        self.children: list[Child] = []
        self.spawned = carried.spawned
        self.tokens = carried.tokens
        self.turn = 0
        self.expects = b""
        self.kept_at = 0.0
        self.main: asyncio.Task[Any]
        self.wrong: NonDeterminismError | None = None
        self.overrun: HandlerError | None = None
        self.ahead: Ahead | None = None
        self.is_replaying = True
        self.notes: Notes | None = None
        self._patches = set(carried.patches)
        self._unread: dict[str, str] = {}
        self._is_closed = False
        self._exits = 0
        self._root = Branch("")
        self._branches: dict[asyncio.Task[Any], Branch] = {}
        self._failures: list[BaseException] = []
        self._failed_at = 0
        self._timers: dict[int, asyncio.Future[Any]] = {}

    # From outside.

    def enter(self, main: Coroutine[Any, Any, Any], *, is_first: bool) -> None:
        """Begin the function and feed it with what is recorded. ``is_first``: no line of it has run before."""
        recorded, self.recorded.replay = self.recorded.replay, []
        self._unread = _names(recorded)
        self.is_replaying = not is_first
        self.main = self.loop.create_task(main)
        self.loop.run_ready()
        for entry, encoded in recorded:
            if self.wrong is not None:
                return
            if entry.key == CANCEL_KEY:
                self._cancel(msgspec.json.decode(entry.value), encoded)
            else:
                self._replay(entry, encoded)
        self.is_replaying = False
        self.recorded.replayed()

    def answer(self, key: str, encoded: bytes, value: Any) -> None:
        """An await came to ``value``; ``encoded``: its entry. On to where the function waits again."""
        pending = self.pending.pop(key)
        self.record_entry(key, encoded)
        if pending.future.done():
            pass
        elif isinstance(value, Exception):
            pending.future.set_exception(value)
        else:
            pending.future.set_result(value)
        self.loop.run_ready()

    def fail(self, key: str, failure: Failure) -> None:
        """A step failed for good."""
        pending = self.pending.pop(key)
        self.record_entry(key, memo.failed(key, failure))
        self._raise(pending, failure)
        self.loop.run_ready()

    def cancel(self, reason: str) -> None:
        """The workflow cleans up from here on."""
        self._cancel(reason, memo.cancelled(reason))

    def demand_waiting(self, key: str) -> None:
        """The function has to wait for this, as it did when the step event was handed on. Raises NonDeterminismError."""
        if self.wrong is None and key not in self.pending:
            self._refuse_recorded(key)
        self.demand_right()

    def demand_right(self) -> None:
        """Raises NonDeterminismError if the function has not come here as it did before."""
        if self.wrong is not None:
            self.close()
            raise self.wrong

    def as_new(self, value: msgspec.Raw) -> Carried:
        """What it begins again with."""
        self.recorded.drop_chain()
        return Carried(value, spawned=self.spawned, tokens=self.tokens, run=self.carried.run + 1)

    def close(self) -> None:
        """Put the function away, wherever it waits."""
        self._is_closed = True
        self.loop.close()

    @property
    def is_done(self) -> bool:
        """Whether the function has ended."""
        return self.main.done()

    @property
    def is_single(self) -> bool:
        """Whether no other branch runs, nothing else is waited for, and nothing is fed that is recorded."""
        return not (self.pending or self.children or self.is_replaying) and len(self._branches) == 1

    @property
    def waits(self) -> list[Pending]:
        """What the function waits for, in the order in which it asked."""
        return [one for one in self.pending.values() if not one.future.done()]

    @property
    def is_last_failure_uncaught(self) -> bool:
        """Whether the function ended with the failure it was just fed with, and asked for nothing after it."""
        return self._failed_at == self.turn and self.is_failure_uncaught

    @property
    def is_failure_uncaught(self) -> bool:
        """Whether the function ended with a failure of one of its steps."""
        error = self.main.exception() if self.main.done() and not self.main.cancelled() else None
        return error is not None and any(is_in(failure, error) for failure in self._failures)

    def encoded(self, key: str, args: bytes = b"[]") -> bytes:
        """Its state as it goes into the log. ``key``: of what the next step event answers, with a step's ``args``, or nothing.

        Raises HandlerError.
        """
        is_plain = not (self._patches or self.spawned or self.tokens or self.carried.run)
        try:
            self.expects = self.recorded.state(key, args, None if is_plain else self._rest())
        except HandlerError:
            self.close()
            raise
        return self.expects

    def history(self) -> bytes:
        """All that is recorded, wherever it stands, as a state. Raises HandlerError, Unreadable."""
        return encode(self.recorded.whole(self._rest()))

    def _rest(self) -> Carried:
        """What few carry."""
        return Carried(patches=sorted(self._patches), spawned=self.spawned, tokens=self.tokens, run=self.carried.run)

    def context_of(self, ctx: Context, key: str, step: str, *, attempt: int = 1, progress: Any = None) -> Context:
        """What one of several steps is told that run in the event of ``ctx``."""
        context = Context(self.workflow, structs.replace(ctx.envelope, step=step, attempt=attempt, progress=progress))
        context.answers(Asked(self.carried.run, key, self.tokens + 1))
        return context

    # From the workflow's own lines.

    def begin(self, command: Command, key: str = "") -> asyncio.Future[Any]:
        """Ask for something. What it comes to, later, is the future's. ``key``: if it has one already."""
        key = key or self.key(command.name)
        future = self.loop.create_future()
        self.pending[key] = Pending(key, command, future, self.turn)
        return future

    def instant(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns (JSON), recorded: the same whenever this line runs again."""
        key = self.key(name)
        known = self.recorded.instant(key)
        if known is None:
            encoded = encode(make())
            self.record(key, encoded)
            known = msgspec.Raw(encoded)
        return msgspec.json.decode(known)

    def time(self) -> float:
        """Seconds since 1970 by the database's clock, recorded."""
        return float(self.instant("time", self.workflow.app.clock.now))

    def now(self) -> float:
        """The same, as it is."""
        return self.workflow.app.clock.now()

    def call_at(self, when: float, handle: asyncio.TimerHandle) -> None:
        """A timer of asyncio's."""
        future = self.begin(Alarm(when, when - self.now()))
        future.add_done_callback(lambda _: None if handle.cancelled() else handle._run())
        self._timers[id(handle)] = future
        future.add_done_callback(lambda _: self._timers.pop(id(handle), None))

    def forget_timer(self, handle: asyncio.TimerHandle) -> None:
        """It is not wanted any more."""
        future = self._timers.get(id(handle))
        if future is not None:
            future.cancel()

    def branched(self, task: asyncio.Task[Any]) -> None:
        """A task of the workflow begins."""
        parent = self.branch
        parent.branches += 1
        is_main = not self._branches
        self._branches[task] = self._root if is_main else Branch(f"{parent.prefix}{parent.branches}.")
        task.add_done_callback(self._branches.pop) if not is_main else None

    @property
    def branch(self) -> Branch:
        """The one whose lines run now."""
        task = asyncio.current_task(self.loop)
        return self._root if task is None else self._branches.get(task, self._root)

    def record(self, key: str, value: bytes) -> None:
        """An instant of this key, from now on. Raises InputError."""
        app = self.workflow.app
        limit = app.settings.payload_bytes_max
        if len(value) > limit and app.payloads.codec is None:
            raise InputError(
                f"{memo.told(key)} would record {len(value):,} bytes, the limit is {limit:,}; store them, and record a reference"
            )
        self.recorded.set_instant(key, msgspec.Raw(value))

    def patched(self, name: str) -> bool:
        """Whether this run takes the change called ``name``: it was not past it before the change was made."""
        if name not in self._patches and not self.is_replaying:
            self._patches.add(name)
        return name in self._patches

    def note(self, *, attributes: Attributes | None = None, progress: Any = None) -> None:
        """What the workflow says of itself, unless it has said it before."""
        if self._unread:
            return
        self.notes = notes = self.notes or Notes()
        if attributes is not None:
            notes.attributes = {**(notes.attributes or {}), **checked_attributes(attributes)}
        if progress is not None:
            where = Where(self.workflow.name, "progress", self.workflow_id)
            notes.progress = checked_progress(progress, self.workflow.app.payloads, where, step=self.workflow.name)

    def spawn(self, children: Sequence[Child]) -> int:
        """Start children with the next step event. The number of the first in this workflow, from 0; the others follow."""
        known = self.spawned + len(self.children)
        first = int(self.instant("spawn", lambda: known))
        self.children += children[max(0, known - first) :]
        return first

    def take_token(self) -> int:
        """The number of this wait with a token."""

        def take() -> int:
            self.tokens += 1
            return self.tokens

        return int(self.instant("token", take))

    # Help.

    def _raise(self, pending: Pending, failure: Failure) -> None:
        error = rebuilt(failure)
        self._failures.append(error)
        self._failed_at = self.turn
        if not pending.future.done():
            pending.future.set_exception(error)

    def record_entry(self, key: str, encoded: bytes | None) -> None:
        """What an await came to; of one that did not have to wait, all there is to do. None: it stands in a chunk."""
        if encoded is not None:
            self.recorded.record(key, encoded)
        self.turn += 1

    def key(self, name: str) -> str:
        """Where the function stands now: a position of its own, and this name."""
        if self._is_closed:
            self._exits += 1
            if self._exits < EXITS_MAX:
                raise GeneratorExit
            return ""  # it waits for ever, and Python ends what will not end
        branch = self.branch
        branch.awaits += 1
        position = f"{branch.prefix}{branch.awaits}"
        if self._unread and self._unread.get(position, name) != name:
            self._refuse(
                f"at {memo.place(position)} '{self._unread[position]}' is recorded, and the code now asks for '{name}'"
            )
        return f"{position} {name}"

    def _replay(self, entry: Entry, encoded: bytes | None) -> None:
        pending = self.pending.pop(entry.key, None)
        if pending is None:
            self._refuse_recorded(entry.key)
            return
        self._unread.pop(entry.key.partition(" ")[0], None)
        self.record_entry(entry.key, encoded)
        if pending.future.done():
            pass
        elif entry.failure is not None:
            self._raise(pending, entry.failure)
        else:
            try:
                pending.future.set_result(pending.command.decoded(entry.value))
            except (msgspec.ValidationError, ChildFailed) as error:
                self._set_wrong(f"what is recorded of {memo.told(entry.key)} does not fit any more: {error}")
                return
        self.loop.run_ready()

    def _refuse_recorded(self, key: str) -> None:
        asks = ", ".join(memo.told(one.key) for one in self.waits)
        now = "has ended before it" if self.main.done() else f"waits for {asks or 'nothing'}"
        self._set_wrong(f"{memo.told(key)} is recorded, and the code now {now}")

    def _cancel(self, reason: str, encoded: bytes | None) -> None:
        self.record_entry(CANCEL_KEY, encoded)
        self.main.cancel(reason)
        self.loop.run_ready()

    def _refuse(self, what: str) -> None:
        self._set_wrong(what)
        assert self.wrong is not None
        raise self.wrong

    def _set_wrong(self, what: str) -> None:
        if self.wrong is None:
            self.wrong = NonDeterminismError(
                f"workflow '{self.workflow.name}' has come this way differently: {what}. Bring the line back, or put the new one"
                " behind 'if patched(name):', and retry"
            )


def _names(recorded: Sequence[tuple[Entry, bytes | None]]) -> dict[str, str]:
    """What is recorded, by position."""
    parted = [entry.key.partition(" ") for entry, _ in recorded if entry.key != CANCEL_KEY]
    return {position: name for position, _, name in parted}
