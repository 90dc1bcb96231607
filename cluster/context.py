"""What a step is told about itself, and how it says what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster.codec import Where
from durable_cluster.continuation import Continuation, Done, Fail, Goto, Join, Sleep, Spawn, Wait
from durable_cluster.durations import Duration, seconds
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import AppError, InputError
from durable_cluster.joins import Child, ChildResult, Results, checked_children
from durable_cluster.logs import WorkflowLogger
from durable_cluster.notes import Attributes, Notes, checked_attributes, checked_progress
from durable_cluster.retry import Retry
from durable_cluster.running import UNWATCHED, Watch
from durable_cluster.settings import checked_name
from durable_cluster.signals import Signal, signal_of, token, token_seq_of

if TYPE_CHECKING:
    from durable_cluster.machine import Machine
    from durable_cluster.timing import Timing

SHORT_ID_DIGITS = 12


def short_id(workflow_id: str) -> str:
    """The part of a workflow id that logs, traces and listings may carry: its first 12 hex digits."""
    return workflow_id[:SHORT_ID_DIGITS]


class Asked(msgspec.Struct, frozen=True, gc=False):
    """Which await of a linear workflow a step answers. ``run``, ``key``: see ``memo``; ``token``: the number of its next token."""

    run: int
    key: str
    token: int


class Context(msgspec.Struct, eq=False, gc=False):
    """Given to a step whose first parameter is annotated with it."""

    _machine: Machine
    _envelope: Envelope
    _connection: psycopg.Connection[Any] | None = None
    _said: msgspec.Raw | None = None
    _children: list[ChildResult] | None = None
    notes: Notes | None = None
    _call: Asked | None = None
    timing: Timing | None = None
    watch: Watch | None = None

    def __repr__(self) -> str:
        return f"<Context of step {self.seq} ('{self.step}') of {self.short_id}…>"

    @property
    def envelope(self) -> Envelope:
        """The step event."""
        return self._envelope

    def read(self) -> Envelope:
        """The step event as its step sees it, which it is from now on. Raises Unreadable."""
        self._envelope = self._machine.app.payloads.event(self._envelope)
        return self._envelope

    def _where(self, kind: str) -> Where:
        return Where(self._envelope.workflow, kind, self._envelope.workflow_id)

    def answers(self, call: Asked) -> None:
        """The step is that of a linear workflow, which waits for it there."""
        self._call = call

    def attempt_of(self, step: str, attempt: int) -> AbstractContextManager[None]:
        """Around one attempt of one of the steps that this event of a linear workflow runs: a tracer may watch it."""
        return UNWATCHED if self.watch is None else self.watch.attempt(step, attempt)

    @property
    def workflow_id(self) -> str:
        """The whole id, 32 hex digits: a capability. Log ``short_id`` instead."""
        return self._envelope.workflow_id

    @property
    def short_id(self) -> str:
        """The first 12 hex digits of the id: fit for logs."""
        return short_id(self._envelope.workflow_id)

    @property
    def logger(self) -> WorkflowLogger:
        """A logger whose records say which workflow, step and attempt speaks; the id truncated."""
        return WorkflowLogger(self._envelope.workflow, self.short_id, step=self.step, attempt=self.attempt)

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
        if self._call is not None:
            of = f"{self._envelope.workflow_id}:{self._call.run}:{self._call.key}"
        else:
            of = f"{self._envelope.workflow_id}:{self._envelope.seq - self._envelope.attempt + 1}"
        return blake2b(of.encode(), digest_size=16).hexdigest()

    @property
    def tx(self) -> psycopg.Connection[Any]:
        """The connection whose transaction also hands the workflow on. Only in ``transactional=True`` steps; never commit it."""
        if self._connection is None:
            raise AppError(f"step '{self.step}' has no transaction; declare it with @machine.step(transactional=True)")
        return self._connection

    @property
    def progress(self) -> Any:
        """What the attempt before this one last said to ``heartbeat`` (plain JSON values); None if it said nothing."""
        return self._machine.app.payloads.value(self._envelope.progress, self._where("heartbeat"))

    def heartbeat(self, progress: Any) -> None:
        """Say how far this step is (JSON): if it is interrupted, its next attempt finds that in ``progress``.

        Kept in memory and written about once a second while the step runs beside the pages. Raises InputError.
        """
        try:
            encoded = encode(progress)
            encode(msgspec.json.decode(encoded))  # what the log carries is read and written again
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise InputError(f"progress of step '{self.step}' is not JSON: {error}") from error
        what = f"progress of step '{self.step}'"
        self._said = msgspec.Raw(self._machine.app.payloads.fitting(encoded, self._where("heartbeat"), what).encode())

    @property
    def said(self) -> Any:
        """The last progress of this attempt, before it has any that of the one before: as the database gets it."""
        return self._said if self._said is not None else self._envelope.progress

    def set_attributes(self, attributes: Attributes) -> None:
        """Change what the workflow is found by: the given names (texts, numbers, booleans), None takes one away.

        Written with the handoff of this step, or not at all: an attempt that fails changes nothing. At most 32, in 4 KiB; a step
        that would make them more is a dead letter. Raises InputError.
        """
        self.notes = notes = self.notes or Notes()
        notes.attributes = checked_attributes({**(notes.attributes or {}), **checked_attributes(attributes)})

    def set_progress(self, progress: Any) -> None:
        """Publish how far the workflow is (JSON, at most 8 KiB), for ``handle.progress()``; the last word counts.

        For onlookers, not for the next attempt: that is ``heartbeat``. Written with the handoff of this step; while the step runs
        beside the pages, about once a second. Raises InputError.
        """
        self.notes = notes = self.notes or Notes()
        notes.progress = checked_progress(progress, self._machine.app.payloads, self._where("progress"), step=self.step)

    @property
    def published(self) -> msgspec.Raw | None:
        """What ``set_progress`` was last told, as JSON."""
        return None if self.notes is None else self.notes.progress

    def goto(self, step: str | Callable[..., Any], state: Any, *, retry: Retry | None = None) -> Continuation:
        """Go on with ``step`` (the decorated function, or its name) and ``state``.

        ``retry``: for this call, in place of the step's own.
        """
        if self._call is not None:
            self._demand_machine()
        return Goto(self._machine.step_name(step), state, None if retry is None else retry.policy)

    def sleep(
        self, duration: Duration, then: str | Callable[..., Any], state: Any, *, retry: Retry | None = None
    ) -> Continuation:
        """Go on with ``then`` and ``state`` after ``duration``: seconds, a timedelta, or text such as "90s" and "7d".

        Raises InputError.
        """
        return Sleep(seconds(duration, what="sleep"), self._goto(then, state, retry))

    def wait_for(
        self,
        *names: str,
        then: str | Callable[..., Any],
        state: Any,
        timeout: Duration | None = None,
        on_timeout: str | Callable[..., Any] | None = None,
        require_token: bool = False,
        retry: Retry | None = None,
    ) -> Continuation:
        """Wait for a signal of one of ``names`` and go on with ``then``, which finds it in ``ctx.signal``.

        One that came earlier is there already. After ``timeout`` it goes on with ``on_timeout``, else with ``then`` and no signal.
        ``require_token``: only a signal with ``ctx.token`` counts. Raises InputError.
        """
        if not names:
            raise InputError("wait_for needs the name of a signal: ctx.wait_for('approved', then=…, state=…)")
        for name in names:
            checked_name("signal", name)
        goto = self._goto(then, state, retry)
        late, timeout_s = self._late(goto, on_timeout, timeout)
        return Wait(names, goto, late, timeout_s, require_token)

    def spawn(
        self,
        children: Iterable[Child],
        *,
        then: str | Callable[..., Any],
        state: Any,
        retry: Retry | None = None,
    ) -> Continuation:
        """Start ``children`` (at most 1,024 a step), and go on with ``then`` and ``state`` at once.

        They are of one group with those that earlier steps spawned, until the workflow waits for the group. Raises InputError.
        """
        return Spawn(checked_children(children), self._goto(then, state, retry))

    def gather(
        self,
        children: Iterable[Child] = (),
        *,
        then: str | Callable[..., Any],
        state: Any,
        tolerance: int | None = None,
        cancel_rest: bool = False,
        timeout: Duration | None = None,
        on_timeout: str | Callable[..., Any] | None = None,
        retry: Retry | None = None,
    ) -> Continuation:
        """Start ``children``, and go on with ``then``, which reads them in ``ctx.results``, when all of the group have ended.

        ``tolerance``: as soon as more than so many have failed, too; ``cancel_rest``: then the others are cancelled.
        ``timeout``: go on with ``on_timeout``, else with ``then``, after a while; the children go on too, and a later gather may
        wait for them again. Raises InputError.
        """
        if tolerance is not None and tolerance < 0:
            raise InputError(f"tolerance of {tolerance} failed children; it is 0 or more")
        goto = self._goto(then, state, retry)
        late, timeout_s = self._late(goto, on_timeout, timeout)
        return Join(checked_children(children), goto, late, timeout_s, None, tolerance, cancel_rest)

    def first(
        self,
        children: Iterable[Child] = (),
        *,
        then: str | Callable[..., Any],
        state: Any,
        cancel_rest: bool = False,
        timeout: Duration | None = None,
        on_timeout: str | Callable[..., Any] | None = None,
        retry: Retry | None = None,
    ) -> Continuation:
        """As ``gather``, until one child has completed, or none can any more."""
        goto = self._goto(then, state, retry)
        late, timeout_s = self._late(goto, on_timeout, timeout)
        return Join(checked_children(children), goto, late, timeout_s, 1, None, cancel_rest)

    def at_least(
        self,
        needed: int,
        children: Iterable[Child] = (),
        *,
        then: str | Callable[..., Any],
        state: Any,
        cancel_rest: bool = False,
        timeout: Duration | None = None,
        on_timeout: str | Callable[..., Any] | None = None,
        retry: Retry | None = None,
    ) -> Continuation:
        """As ``gather``, until ``needed`` children have completed, or so many cannot any more."""
        if needed < 1:
            raise InputError(f"at_least({needed}) waits for nothing; it takes 1 or more")
        goto = self._goto(then, state, retry)
        late, timeout_s = self._late(goto, on_timeout, timeout)
        return Join(checked_children(children), goto, late, timeout_s, needed, None, cancel_rest)

    @property
    def results(self) -> Results:
        """What became of the children that this step was resumed by: to be iterated; ``values()`` gives their outputs."""
        if not self._envelope.has_children:
            raise AppError(
                f"step '{self.step}' has no children to read: it is no step that ctx.gather, first or at_least went on to"
            )
        app = self._machine.app
        read = None if self._children is None else [app.payloads.child(child) for child in self._children]
        return Results(partial(app.client.children, self.workflow_id), read)

    @property
    def signal(self) -> Signal | None:
        """The signal that this step was resumed with; None after a timeout, and in steps that waited for none."""
        return signal_of(self._envelope)

    @property
    def cancelled(self) -> str | None:
        """Why the workflow was cancelled, in the steps of its cleanup; None in all others."""
        return self._envelope.cancelled or None

    @property
    def token(self) -> str:
        """What a signal must bring to resume the wait that this step begins with ``require_token=True``. Equal for all attempts.

        In a linear workflow: the next wait with ``require_token=True``, however many steps there are before it.

        A secret that works once: whoever has it can answer for the workflow, and needs its id besides.
        """
        secret = self._machine.app.secret
        if secret is None:
            raise AppError(f"step '{self.step}' has no token here: tokens are made where a cluster runs the step")
        number = token_seq_of(self._envelope) if self._call is None else self._call.token
        return token(self._envelope.workflow_id, number, secret)

    def done(self, output: Any = None) -> Continuation:
        """Complete the workflow; ``output`` (JSON) is what ``result()`` returns."""
        self._demand_machine()
        return Done(output)

    def fail(self, reason: str) -> Continuation:
        """End the workflow in failure, for good."""
        self._demand_machine()
        return Fail(reason)

    def _demand_machine(self) -> None:
        if self._call is not None:
            raise AppError(
                f"step '{self.step}' is of a linear workflow: it returns a value, and the function says what is next"
            )

    def _goto(self, step: str | Callable[..., Any], state: Any, retry: Retry | None) -> Goto:
        self._demand_machine()
        return Goto(self._machine.step_name(step), state, None if retry is None else retry.policy)

    def _late(
        self, goto: Goto, on_timeout: str | Callable[..., Any] | None, timeout: Duration | None
    ) -> tuple[Goto, float | None]:
        """Where a wait goes on when its time is over, and how many seconds that is."""
        if on_timeout is not None and timeout is None:
            raise InputError("the wait has on_timeout and no timeout; say how long it waits")
        late = goto if on_timeout is None else msgspec.structs.replace(goto, step=self._machine.step_name(on_timeout))
        return late, None if timeout is None else seconds(timeout, what="timeout")
