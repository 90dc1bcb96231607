"""A machine: a kind of workflow, a named set of steps, plain functions, and which of them begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from durable_cluster import coordination
from durable_cluster.asynchronous import asynchronous
from durable_cluster.client import Handle
from durable_cluster.codec import Where
from durable_cluster.decoding import decoder_of
from durable_cluster.durations import Duration, beginning, seconds
from durable_cluster.errors import AppError, InputError, UnknownWorkflow
from durable_cluster.handles import ANY, ChildHandle, spawned
from durable_cluster.interactive import is_interactive
from durable_cluster.joins import Child
from durable_cluster.limits import Limit, checked_limit
from durable_cluster.notes import Attributes, encoded_attributes, encoded_each
from durable_cluster.replay_statements import Declared
from durable_cluster.retry import Policy, Retry
from durable_cluster.settings import checked_name
from durable_cluster.transactions import Transaction
from durable_cluster.types import Signature, checked_key, encoded_input, signature_of

if TYPE_CHECKING:
    from durable_cluster.app import App
    from durable_cluster.context import Context
    from durable_cluster.continuation import Continuation
    from durable_cluster.envelope import Envelope
    from durable_cluster.executor import Task

F = TypeVar("F", bound=Callable[..., Any])

VERSION_MAX = 2**31 - 1


class Step(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A handler and how to call it. ``is_reported_soon``: its progress is what others stand on, and not only a hint.

    ``is_recorded``: its runs stand in the timeline.
    """

    name: str
    handler: Callable[..., Any]
    signature: Signature
    is_transactional: bool
    is_blocking: bool
    retry: Policy
    timeout_s: float
    limit: Limit | None
    is_limited: bool
    is_recorded: bool = False
    is_reported_soon: bool = False
    decoder: msgspec.json.Decoder[Any]

    @property
    def is_beside(self) -> bool:
        """Whether it runs beside the page and may outlast it."""
        return self.is_blocking or self.signature.is_async

    @cached_property
    def is_inline(self) -> bool:
        """Whether it runs in the consumer's own thread, with no transaction open."""
        return not (self.is_beside or self.is_transactional)

    @cached_property
    def is_plain(self) -> bool:
        """Whether it runs there at once, and that is all."""
        return self.is_inline and not self.is_limited and not self.is_recorded


class Machine:
    """A kind of workflow, written as steps that say what comes next."""

    is_linear = False
    runs_now: tuple[str, int] | None = None
    """Of a linear workflow: the step that the page's own thread runs at this moment, and which attempt. For log records."""
    state_bytes_more = 0
    """What may come with a payload: a linear workflow's input, and what it has on record and not in the database yet."""

    def __init__(
        self, app: App, name: str, *, state: Any, version: int, limit: Limit | None, history: bool = False
    ) -> None:
        self.app = app
        self.state_bytes_max = app.settings.payload_bytes_max + self.state_bytes_more
        self.name = checked_name("workflow", name)
        self.version = checked_version(self.name, version)
        self.versions: dict[int, Machine] = {self.version: self}
        self.limit = checked_limit(limit, of=f"machine '{name}'")
        self.history = history
        self.steps: dict[str, Step] = {}
        self.first: Step | None = None
        self.on_cancel: Step | None = None
        self._state = state
        self._where_input = Where(self.name, "input")
        self._input_told = str(self._where_input)
        self._names: dict[str | Callable[..., Any], str] = {}

    def step(
        self,
        *,
        start: bool = False,
        on_cancel: bool = False,
        transactional: bool = False,
        blocking: bool = False,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        limit: Limit | None = None,
        name: str | None = None,
    ) -> Callable[[F], F]:
        """Make a function a step of this machine; it stays the plain function that it is.

        The function is ``(state)`` or ``(ctx: Context, state)``, ``def`` or ``async def``, and returns
        ``ctx.goto(step, state)``, ``ctx.done(output)`` or ``ctx.fail(reason)``. ``start``: a workflow begins here.
        ``on_cancel``: it runs in place of the next step of a cancelled workflow, with that step's state, and may go on to others.
        ``transactional``: it runs inside the transaction that hands the workflow on, with ``ctx.tx``. ``blocking``: a ``def`` that
        waits (for files, sockets, a subprocess) and runs in a thread. ``retry``: what happens when it raises (5 attempts).
        ``timeout``: how long one attempt may take (5 minutes). ``limit``: how many may run at once, or begin a
        period. Raises AppError for a signature that cannot be called, InputError for a retry or timeout that cannot be.
        """

        def register(function: F) -> F:
            step_name = checked_name("step", name or function.__name__)
            signature = signature_of(function, default=self._state)
            self._demand_possible(step_name, start=start, on_cancel=on_cancel)
            demand_callable(step_name, is_async=signature.is_async, transactional=transactional, blocking=blocking)
            if retry is not None and not isinstance(retry, Retry):
                raise AppError(f"retry of step '{step_name}': {retry!r} is no Retry(…)")
            step = Step(
                name=step_name,
                handler=function,
                signature=signature,
                is_transactional=transactional,
                is_blocking=blocking,
                retry=(retry or Retry()).policy,
                timeout_s=checked_timeout_s(step_name, timeout, default_s=self.app.settings.step_timeout_s),
                limit=checked_limit(limit, of=f"step '{step_name}'"),
                is_limited=limit is not None or (start and self.limit is not None),
                is_recorded=self.history,
                decoder=decoder_of(signature.state, f"step '{step_name}': its state type"),
            )
            self.steps[step_name] = step
            self._names[function] = self._names[step_name] = step_name
            if start:
                self.first = step
            if on_cancel:
                self.on_cancel = step
            return function

        return register

    def _demand_possible(self, step_name: str, *, start: bool, on_cancel: bool) -> None:
        if is_interactive():
            return
        if step_name in self.steps:
            raise AppError(f"machine '{self.name}' has a step '{step_name}' already; give one of them another name")
        if start and self.first is not None:
            raise AppError(f"machine '{self.name}' starts at '{self.first.name}' already; only one step has start=True")
        if on_cancel and self.on_cancel is not None:
            raise AppError(
                f"machine '{self.name}' cleans up at '{self.on_cancel.name}' already; only one step has on_cancel=True"
            )

    def beside(self, older: Machine, *, may_replace: bool) -> Machine:
        """Both of them in one app, which have one name and two versions, or this in place of the other; the newest of all.

        Raises AppError.
        """
        if self.version in older.versions and not may_replace:
            raise AppError(
                f"app '{self.app.name}' has a workflow '{self.name}' of version {self.version} already;"
                " give one of them another name or version"
            )
        versions = {**older.versions, self.version: self}
        for machine in versions.values():
            machine.versions = versions
        return versions[max(versions)]

    def of_version(self, version: int) -> Machine:
        """The code for a workflow of this version: of its own, else of the next one there is. KeyError: all code is older."""
        known = self.versions.get(version)
        if known is not None:
            return known
        newer = [one for one in self.versions if one > version]
        if not newer:
            raise KeyError(version)
        return self.versions[min(newer)]

    def step_name(self, step: str | Callable[..., Any]) -> str:
        """The name of one of this machine's steps. Raises AppError for any other."""
        name = self._names.get(step)
        if name is None:
            shown = getattr(step, "__name__", step)
            raise AppError(
                f"machine '{self.name}' has no step '{shown}'; its steps are {', '.join(self.steps) or 'none yet'}"
            )
        return name

    def start(
        self,
        value: Any,
        *,
        key: str | None = None,
        after: Duration | None = None,
        at: datetime | None = None,
        priority: float = 1,
        attributes: Attributes | None = None,
        traceparent: str | None = None,
        tx: Transaction | None = None,
    ) -> Handle:
        """Start a workflow with ``value``; the same ``key`` gives the same workflow.

        Its first step runs at once, or ``after`` a while ("7d", a timedelta, seconds), or ``at`` a time (with its time zone; by the
        database's clock). ``priority``: a weight from 0.1 to 10: its steps get such a share while there is more to do than can be
        done. ``attributes``: what it is found by, names with texts, numbers and booleans, at most 32. ``traceparent``: W3C's; the
        workflow's trace gets a link to that span, or without it to OpenTelemetry's current one. With ``tx`` it joins that
        connection's transaction: both commit or neither; a psycopg connection, or one that SQLAlchemy (also as a session) or
        Django holds. Raises InputError before anything is written.
        """
        begin = beginning(after=after, at=at)
        first = self._first()
        payload = self.coded(self._payload(first, value))
        key = None if key is None else checked_key(key)
        found_by = None if attributes is None else encoded_attributes(attributes)
        client = self.app.client
        workflow_id = client.start(
            self.name,
            self.version,
            first.name,
            payload,
            key=key,
            begin=begin,
            priority=priority,
            attributes=found_by,
            traceparent=traceparent,
            tx=tx,
        )
        return Handle(client, self.name, workflow_id)

    def start_many(
        self,
        values: Sequence[Any],
        *,
        keys: Sequence[str] | None = None,
        after: Duration | None = None,
        at: datetime | None = None,
        priority: float = 1,
        attributes: Attributes | Sequence[Attributes | None] | None = None,
        traceparent: str | None = None,
        tx: Transaction | None = None,
    ) -> Sequence[Handle]:
        """Start a workflow for each value (at most some 10,000 a call), in one transaction; handles in the order of values.

        ``after``, ``at``, ``priority``, ``traceparent``: as for ``start``, the same for all. ``attributes``: the same for all, or a
        sequence of those of each.
        """
        begin = beginning(after=after, at=at)
        if not values:
            return []
        first = self._first()
        payloads = [self.coded(self._payload(first, value)) for value in values]
        if keys is not None and len(keys) != len(values):
            raise InputError(f"{len(keys)} keys for {len(values)} values; give one key a piece")
        keys = None if keys is None else [checked_key(key) for key in keys]
        found_by = None if attributes is None else encoded_each(attributes, len(values))
        client = self.app.client
        ids = client.start_many(
            self.name,
            self.version,
            first.name,
            payloads,
            keys=keys,
            begin=begin,
            priority=priority,
            attributes=found_by,
            traceparent=traceparent,
            tx=tx,
        )
        return [Handle(client, self.name, workflow_id) for workflow_id in ids]

    def child(self, value: Any, *, after: Duration | None = None, attributes: Attributes | None = None) -> Child:
        """A workflow of this kind for a step to spawn: ``ctx.gather([ship.child(line) for line in lines], then=…, state=…)``.

        Its first step runs at once, or ``after`` a while. ``attributes``: as for ``start``. Raises InputError.
        """
        delay_s = 0.0 if after is None else seconds(after, what="after")
        found_by = "" if attributes is None else encoded_attributes(attributes)
        step, payload = self.opening(value)
        return Child(self.name, self.version, step, self.coded(payload), delay_s, found_by)

    def spawn(
        self, value: Any, *, after: Duration | None = None, attributes: Attributes | None = None
    ) -> ChildHandle[Any]:
        """In the lines of a linear workflow: start a child of this kind with the next checkpoint.

        ``await`` the handle for its output. Raises InputError.
        """
        return spawned(self.child(value, after=after, attributes=attributes), ANY.decode)

    def pause(self, *, actor: str | None = None) -> bool:
        """From now on no workflow of this kind begins a step, until ``resume``; new ones may be started. Whether that is new."""
        return coordination.pause(self.app.client.connection(), "type", self.name, actor=actor)

    def resume(self) -> bool:
        """Let them go on. Whether they were paused."""
        return coordination.resume(self.app.client.connection(), "type", self.name) is not None

    def get(self, *, key: str) -> Handle:
        """The workflow that was started with ``key``. Raises UnknownWorkflow."""
        try:
            return self.app.client.by_key(self.name, checked_key(key))
        except InputError as error:
            raise UnknownWorkflow(f"no workflow '{self.name}' with such a key: {error}") from error

    start_async = asynchronous(start)
    start_many_async = asynchronous(start_many)
    get_async = asynchronous(get)

    def after_failure(self, task: Task, error: BaseException, ctx: Context) -> Continuation | None:
        """What the workflow does about a step that failed for good, and says besides to ``ctx``; None: it is a dead letter."""
        return None

    def cleanup_state(self, envelope: Envelope) -> msgspec.Raw:
        """The state of the cleanup that runs in place of this step, whose own is in plain."""
        return envelope.state

    def memo_of(self, envelope: Envelope, error: BaseException) -> bytes:
        """What is kept of a workflow that ends because this step raised ``error``."""
        return b""

    def forget_all(self) -> None:
        """Let go of what this process keeps of its workflows."""

    def forget_step(self, name: str) -> None:
        """The app has a step of this name from now on, perhaps another."""

    def demand_fitting(self, step: Step, state: bytes) -> None:
        """Whether what a linear workflow's state holds fits too. Raises InputError."""

    def fork_step(self, at: str | None) -> str:
        """The step whose state is the input of a fork at ``at``. Raises AppError."""
        return self._first().name if at is None or self.is_linear else self.step_name(at)

    def counted(self, step: Step, state: Any) -> Any:
        """What a limit counts this step by, or the workflow if it is the first."""
        return state

    def declared(self, history_sample: float) -> Declared:
        """What the database is told of it; ``history_sample``: the part of the other types that is recorded."""
        steps = () if self.is_linear else tuple(self.steps)
        history = 1.0 if self.history else history_sample
        return Declared(self.name, self.version, self._first().name, steps, self.limit is not None, history)

    def coded(self, payload: bytes) -> str:
        """An input as the database gets it. Raises CodecError, and InputError for one that is too large."""
        return self.app.payloads.fitting(payload, self._where_input, self._input_told)

    def opening(self, value: Any) -> tuple[str, bytes]:
        """The name of the first step, and ``value`` as JSON that fits it. Raises AppError, InputError."""
        first = self._first()
        return first.name, self._payload(first, value)

    def _first(self) -> Step:
        if self.first is None:
            raise AppError(f"machine '{self.name}' has no first step; declare one with @machine.step(start=True)")
        return self.first

    def _payload(self, first: Step, value: Any) -> bytes:
        return encoded_input(value, decoder=first.decoder, what=self._input_told)


def checked_version(workflow: str, version: int) -> int:
    """``version``, if it is one. Raises AppError."""
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION_MAX:
        raise AppError(f"workflow '{workflow}': version={version!r}; it is a whole number from 0 to {VERSION_MAX:,}")
    return version


def demand_callable(step_name: str, *, is_async: bool, transactional: bool, blocking: bool) -> None:
    """Raises AppError for what a step cannot be at once."""
    if transactional and is_async:
        raise AppError(f"step '{step_name}' is async and transactional; a transactional step is a plain def")
    if blocking and (transactional or is_async):
        other = "transactional" if transactional else "async"
        raise AppError(f"step '{step_name}' is blocking and {other}; a blocking step is a plain def for a thread")


def checked_timeout_s(step: str, timeout: Duration | None, *, default_s: float) -> float:
    """Seconds of a step's timeout. Raises InputError."""
    if timeout is None:
        return default_s
    timeout_s = seconds(timeout, what=f"timeout of step '{step}'")
    if not timeout_s:
        raise InputError(f"timeout of step '{step}': {timeout!r} leaves it no time; leave it out for the default")
    return timeout_s
