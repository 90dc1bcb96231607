"""Steps run as the executor runs them, and told to a tracer: all of sampled workflows, and of others what does not go well.

An event of a machine runs one step, and is a span. One of a linear workflow may run several, and lines of the workflow's own: each
step is a span for itself (see ``Watch``), and so is an event of the workflow's own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from time import time_ns
from types import TracebackType
from typing import Protocol, TypeVar

import msgspec

from durable_cluster import executor
from durable_cluster.context import Context
from durable_cluster.dead_letters import DeadLetter
from durable_cluster.envelope import Envelope, Page
from durable_cluster.errors import STEP_FAILURES
from durable_cluster.executor import FAILURES, Later, Result, Task
from durable_cluster.failures import told_of
from durable_cluster.linear import OWN, RESUME
from durable_cluster.notes import Noted
from durable_cluster.statements import Outcome
from durable_cluster.telemetry import SAMPLE_DIGITS, StepSpan, Tracing

R = TypeVar("R")


class Steps(Protocol):
    """Who runs steps: ``executor``, or one that tells a tracer of them too."""

    def call(self, task: Task, context: Context) -> Result:
        """See ``executor.call``."""

    def run(self, task: Task, context: Context) -> Result:
        """See ``executor.run``."""

    async def run_async(self, task: Task, context: Context) -> Result:
        """See ``executor.run_async``."""

    def tell(self, envelope: Envelope, why: str) -> None:
        """See ``executor.tell``."""


class TracedSteps:
    """In place of ``executor``: the same functions, with spans."""

    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing
        self._sampled_below = tracing.sampled_below

    def call(self, task: Task, context: Context) -> Result:
        """See ``executor.call``."""
        with Event(self.tracing, task, context) as event:
            return event.ended(executor.call(task, context))

    def run(self, task: Task, context: Context) -> Result:
        """See ``executor.run``."""
        envelope, step = task.envelope, task.step
        is_untold = envelope.workflow_id[SAMPLE_DIGITS] >= self._sampled_below and envelope.attempt == 1
        if not is_untold or not step.is_plain or task.machine.is_linear:
            return self._run_told(task, context)
        began_ns = time_ns()  # as most: what goes well costs a look at the clock
        try:
            result = executor.call(task, context)
        except FAILURES as error:
            self.tracing.failure(envelope, began_ns, error, quotes=_quotes(task))
            return executor.failed(task, error, context)
        if type(result) is not Envelope and (wrong := _wrong_with(result)):
            self.tracing.failure(envelope, began_ns, wrong.reason)
        return result

    def _run_told(self, task: Task, context: Context) -> Result:
        with self._beside(task):
            try:
                return self.call(task, context)
            except FAILURES as error:
                return self._failed(task, told_of(task, error), context)

    async def run_async(self, task: Task, context: Context) -> Result:
        """See ``executor.run_async``."""
        with self._beside(task):
            try:
                with Event(self.tracing, task, context) as event:
                    return event.ended(await executor.call_async(task, context))
            except FAILURES as error:
                return self._failed(task, error, context)

    def tell(self, envelope: Envelope, why: str) -> None:
        """Of a step that ends without having run, or not as it seemed to its own code."""
        self.tracing.failure(envelope, time_ns(), why)

    def _beside(self, task: Task) -> AbstractContextManager[object]:
        """Where no page says that what a step of an unsampled workflow traces is not recorded."""
        workflow_id = task.envelope.workflow_id
        if task.step.is_inline or self.tracing.is_sampled(workflow_id):
            return IN_ITS_PAGE
        return self.tracing.unrecorded(workflow_id)

    def _failed(self, task: Task, error: BaseException, context: Context) -> Result:
        """The attempt is told already; not what its workflow's own lines have made of it."""
        result = executor.failed(task, error, context)
        if task.machine.is_linear and (wrong := _wrong_with(result)) and wrong.step != task.envelope.step:
            self.tell(_of_step(task.envelope, wrong.step or RESUME, 1), wrong.reason)
        return result


class Event:
    """A step event that runs: a span, if it is one, and what is told of it without one.

    Of a linear workflow it watches each step; then it is a span itself only where it is one of the workflow's own.
    """

    __slots__ = ("_began_ns", "_envelope", "_is_own", "_quotes", "_span", "_told", "_tracing", "is_sampled")

    def __init__(self, tracing: Tracing, task: Task, context: Context) -> None:
        self._tracing = tracing
        self._envelope = task.envelope
        self._quotes = _quotes(task)
        self.is_sampled = tracing.is_sampled(task.envelope.workflow_id)
        self._is_own = not task.machine.is_linear or task.step.name in OWN
        self._told: set[str] = set()
        self._span: StepSpan | None = None
        if task.machine.is_linear:
            context.watch = self

    def __enter__(self) -> Event:
        self._began_ns = time_ns()
        if self._is_own and (self.is_sampled or self._envelope.attempt > 1):
            self._span = self._tracing.step(self._envelope, quotes=self._quotes)
            self._span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is not None:
            self._span.__exit__(kind, error, trace)
        elif isinstance(error, FAILURES) and self._envelope.step not in self._told:
            self._tracing.failure(self._envelope, self._began_ns, error, quotes=self._quotes)

    def ended(self, result: Result) -> Result:
        """It came to ``result``, which is told if it is none to be content with and no attempt has said so."""
        wrong = _wrong_with(result)
        if wrong is None or wrong.step in self._told:
            return result
        if self._span is not None:
            self._span.tell(wrong.reason)
        else:
            step = self._envelope.step if self._is_own else wrong.step or RESUME
            self._tracing.failure(_of_step(self._envelope, step, 1), self._began_ns, wrong.reason)
        return result

    def attempt(self, step: str, attempt: int) -> AbstractContextManager[None]:
        """See ``running.Watch``."""
        return WatchedAttempt(self, step, attempt)

    def begin(self, step: str, attempt: int) -> StepSpan:
        """The span of one of its steps."""
        return self._tracing.step(_of_step(self._envelope, step, attempt), quotes=self._quotes)

    def failed(self, step: str, attempt: int, began_ns: int, error: BaseException) -> None:
        """An attempt without a span has failed."""
        envelope = _of_step(self._envelope, step, attempt)
        self._tracing.failure(envelope, began_ns, error, quotes=self._quotes)

    def has_told(self, step: str) -> None:
        """Of this step it is known that it failed."""
        self._told.add(step)


class WatchedAttempt:
    """One attempt of a step that an event of a linear workflow runs."""

    __slots__ = ("_attempt", "_began_ns", "_event", "_span", "_step")

    def __init__(self, event: Event, step: str, attempt: int) -> None:
        self._event = event
        self._step = step
        self._attempt = attempt
        self._span: StepSpan | None = None
        self._began_ns = 0

    def __enter__(self) -> None:
        if self._event.is_sampled or self._attempt > 1:
            self._span = self._event.begin(self._step, self._attempt)
            self._span.__enter__()
        else:
            self._began_ns = time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._span is not None:
            self._span.__exit__(kind, error, trace)
        if isinstance(error, STEP_FAILURES):  # and not one that nobody waits for any more
            self._event.has_told(self._step)
            if self._span is None:
                self._event.failed(self._step, self._attempt, self._began_ns, error)


def steps_of(tracing: Tracing | None) -> Steps:
    """Who runs steps with this tracer, or without any."""
    return executor if tracing is None else TracedSteps(tracing)


def page_of(steps: Steps, shard: int, page: Page) -> AbstractContextManager[object]:
    """Around the run of one page."""
    return steps.tracing.page(shard, page) if isinstance(steps, TracedSteps) else nullcontext()


def told(steps: Steps, result: R) -> R:
    """What becomes of a step that did not run; if it is a dead letter, a tracer hears of it."""
    if isinstance(result, DeadLetter):
        steps.tell(result.envelope, str(result.details["reason"]))
    return result


IN_ITS_PAGE = nullcontext()


class Wrong(msgspec.Struct, frozen=True):
    """Why a result is none to be content with. ``step``: the one that did not go well; None: the workflow itself."""

    reason: str
    step: str | None = None


def _wrong_with(result: Result) -> Wrong | None:
    if isinstance(result, Noted):
        return _wrong_with(result.result)
    if isinstance(result, DeadLetter):
        return Wrong(str(result.details["reason"]), result.envelope.step)
    if isinstance(result, Outcome):
        return Wrong("the workflow has failed") if result.status == "failed" else None
    return Wrong(result.reason, result.envelope.step) if isinstance(result, Later) and result.reason else None


def _quotes(task: Task) -> bool:
    """Whether a trace may say what its exceptions say: they quote values, which a codec keeps secret."""
    return task.machine.app.payloads.codec is None


def _of_step(envelope: Envelope, step: str, attempt: int) -> Envelope:
    return msgspec.structs.replace(envelope, step=step, attempt=attempt)
