"""Steps run as the executor runs them, and told to a tracer: all of sampled workflows, and of others what does not go well."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from durable_cluster import executor
from durable_cluster.context import Context
from durable_cluster.dead_letters import DeadLetter, brief_of
from durable_cluster.envelope import Page
from durable_cluster.executor import FAILURES, Later, Result, Task
from durable_cluster.notes import Noted
from durable_cluster.statements import Outcome
from durable_cluster.telemetry import Tracing, tell


class Steps(Protocol):
    """Who runs steps: ``executor``, or one that tells a tracer of them too."""

    def call(self, task: Task, context: Context) -> Result:
        """See ``executor.call``."""

    def run(self, task: Task, context: Context) -> Result:
        """See ``executor.run``."""

    async def run_async(self, task: Task, context: Context) -> Result:
        """See ``executor.run_async``."""


class TracedSteps:
    """In place of ``executor``: the same functions, with spans."""

    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing

    def call(self, task: Task, context: Context) -> Result:
        """See ``executor.call``."""
        envelope = task.envelope
        if envelope.attempt > 1 or self.tracing.is_sampled(envelope.workflow_id):
            with self.tracing.step(envelope, quotes=_quotes(task)) as span:
                result = executor.call(task, context)
                if wrong := _wrong_with(result):
                    tell(span, wrong)
                return result
        began_ns = time.time_ns()
        try:
            result = executor.call(task, context)
        except FAILURES as error:
            self.tracing.failure(envelope, began_ns, brief_of(task.machine, error))
            raise
        if type(result) in TELLING and (wrong := _wrong_with(result)):
            self.tracing.failure(envelope, began_ns, wrong)
        return result

    def run(self, task: Task, context: Context) -> Result:
        """See ``executor.run``."""
        try:
            return self.call(task, context)
        except FAILURES as error:
            return executor.failed(task, executor.told_of(task, error), context)

    async def run_async(self, task: Task, context: Context) -> Result:
        """See ``executor.run_async``."""
        envelope = task.envelope
        if envelope.attempt > 1 or self.tracing.is_sampled(envelope.workflow_id):
            with self.tracing.step(envelope, quotes=_quotes(task)) as span:
                result = await executor.run_async(task, context)
                if wrong := _wrong_with(result):
                    tell(span, wrong)
                return result
        began_ns = time.time_ns()
        result = await executor.run_async(task, context)
        if type(result) in TELLING and (wrong := _wrong_with(result)):
            self.tracing.failure(envelope, began_ns, wrong)
        return result


def steps_of(tracing: Tracing | None) -> Steps:
    """Who runs steps with this tracer, or without any."""
    return executor if tracing is None else TracedSteps(tracing)


def page_of(steps: Steps, shard: int, page: Page) -> AbstractContextManager[None]:
    """Around the run of one page."""
    return steps.tracing.page(shard, page) if isinstance(steps, TracedSteps) else nullcontext()


TELLING = (DeadLetter, Later, Outcome, Noted)


def _quotes(task: Task) -> bool:
    """Whether a trace may say what its exceptions say: they quote values, which a codec keeps secret."""
    return task.machine.app.payloads.codec is None


def _wrong_with(result: Result) -> str | None:
    """Why this result is none to be content with; None if it is one."""
    if isinstance(result, Noted):
        return _wrong_with(result.result)
    if isinstance(result, DeadLetter):
        return str(result.details["reason"])
    if isinstance(result, Outcome):
        return "the workflow has failed" if result.status == "failed" else None
    return (result.reason or None) if isinstance(result, Later) else None
