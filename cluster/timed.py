"""Steps run as others run them, and those of recorded workflows with the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from durable_cluster import traced
from durable_cluster.context import Context
from durable_cluster.envelope import Envelope, Page
from durable_cluster.executor import Task
from durable_cluster.settings import Settings
from durable_cluster.telemetry import SAMPLE_DIGITS, Tracing
from durable_cluster.timing import Timed, Timing, timed
from durable_cluster.traced import Steps

if TYPE_CHECKING:
    from durable_cluster.machine import Machine

ALL = 2**32
S = TypeVar("S")


class TimedSteps:
    """In place of ``steps``: the same, recording a part of each type of workflow.

    ``parts``: of each type that is recorded, how many of 2³² ids are. ``plain``: who runs steps that do not say that they are.
    """

    def __init__(self, steps: Steps, parts: Mapping[str, int], *, plain: Steps | None = None) -> None:
        self.steps = steps
        self.plain = plain or self
        self._parts = parts

    def records(self, envelope: Envelope) -> bool:
        """Whether this workflow is recorded: a function of its id, the same everywhere; see ``durable.is_recorded``."""
        part = self._parts.get(envelope.workflow)
        if part is None or not envelope.is_of_a_workflow:
            return False
        return part == ALL or int(envelope.workflow_id[SAMPLE_DIGITS], 16) < part

    def run(self, task: Task, context: Context) -> Any:
        """See ``executor.run``."""
        if not self.records(task.envelope):
            return self.steps.run(task, context)
        context.timing = Timing(time.monotonic())
        return timed(context, task.envelope, self.steps.run(task, context))

    def call(self, task: Task, context: Context) -> Any:
        """See ``executor.call``."""
        if not self.records(task.envelope):
            return self.steps.call(task, context)
        context.timing = Timing(time.monotonic())
        return timed(context, task.envelope, self.steps.call(task, context))

    async def run_async(self, task: Task, context: Context) -> Any:
        """See ``executor.run_async``."""
        if not self.records(task.envelope):
            return await self.steps.run_async(task, context)
        context.timing = Timing(time.monotonic())
        return timed(context, task.envelope, await self.steps.run_async(task, context))

    def tell(self, envelope: Envelope, why: str) -> None:
        """See ``executor.tell``."""
        self.steps.tell(envelope, why)


def steps_of(tracing: Tracing | None, machines: Mapping[str, Machine], settings: Settings) -> Steps:
    """Who runs steps with this tracer, or without any, and records what is to be recorded.

    The newest version of a type speaks for all of them.
    """
    steps = traced.steps_of(tracing)
    sampled = round(settings.history_sample * ALL)
    parts = {name: ALL if machine.history else sampled for name, machine in machines.items()}
    recorded = {name: part for name, part in parts.items() if part}
    # Where only steps that say so are recorded, the others need not be asked. Those of older versions may not know it yet.
    say_so = all(version.history for name in recorded for version in machines[name].versions.values())
    return TimedSteps(steps, recorded, plain=steps if say_so else None) if recorded else steps


def plain_of(steps: Steps) -> Steps:
    """Who runs the steps that do not say that they are recorded."""
    return steps.plain if isinstance(steps, TimedSteps) else steps


def as_recorded(steps: Steps, envelope: Envelope, slot: S, *, began: float | None = None) -> S | Timed:
    """What becomes of a step event that has not run, or (``began``) goes on: recorded if that is to be."""
    if not isinstance(steps, TimedSteps) or isinstance(slot, Timed) or not steps.records(envelope):
        return slot
    return Timed(envelope, slot, began)


def page_of(steps: Steps, shard: int, page: Page) -> AbstractContextManager[object]:
    """Around the run of one page."""
    return traced.page_of(steps.steps if isinstance(steps, TimedSteps) else steps, shard, page)
