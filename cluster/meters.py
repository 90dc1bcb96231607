"""What one process counts of its pages: plain totals since it began, once a page, after the commit that makes them true.

Nothing here is read on the path of a step. A process tells its totals whole, so that one that is not heard is made up for by the
next, and none counts twice.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from typing import TypeAlias, TypeVar

import msgspec

from durable_cluster.beside import Beside
from durable_cluster.dead_letters import DeadLetter
from durable_cluster.envelope import Envelope
from durable_cluster.executor import Later, Task
from durable_cluster.joins import Joining
from durable_cluster.side_results import Slot
from durable_cluster.signals import Waiting
from durable_cluster.statements import Outcome

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""The upper bounds of the buckets of durations and of steps a page; one more holds what is above."""

UNKNOWN = "(unknown)"
"""Stands for workflows that only the log names: somebody may have written there what they like."""


Value = TypeVar("Value", str, tuple[str, str])


class Histogram(msgspec.Struct, array_like=True):
    """How many values fell between each two bounds, and their sum."""

    counts: list[int]
    sum: float = 0.0

    @classmethod
    def over(cls, bounds: Sequence[float]) -> Histogram:
        """An empty one."""
        return cls([0] * (len(bounds) + 1))

    def add(self, value: float, bounds: Sequence[float] = SECONDS) -> None:
        """Count one value."""
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value

    def add_all(self, other: Histogram) -> None:
        """Count what the other has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class OfWorkflow(msgspec.Struct, array_like=True):
    """The totals of one type of workflow on one shard."""

    steps: int = 0
    retries: int = 0
    dead_letters: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0


class OfShard(msgspec.Struct, array_like=True):
    """The totals of one shard."""

    pages: int = 0
    fenced: int = 0
    unroutable: int = 0
    page_steps: Histogram = msgspec.field(default_factory=lambda: Histogram.over(STEPS))
    page_s: Histogram = msgspec.field(default_factory=lambda: Histogram.over(SECONDS))
    claim_s: Histogram = msgspec.field(default_factory=lambda: Histogram.over(SECONDS))
    commit_s: Histogram = msgspec.field(default_factory=lambda: Histogram.over(SECONDS))
    workflows: dict[str, OfWorkflow] = {}


Totals: TypeAlias = dict[int, OfShard]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a process tells of itself.

    ``totals``: None if they are what it told before; ``detached``: how many such steps run now, by shard; ``step_cpu_s``: of the
    processor time what was seen to go into steps, by type of workflow.
    """

    totals: Totals | None = None
    detached: dict[int, int] = {}
    cpu_s: float = 0.0
    step_cpu_s: dict[str, float] = {}
    spans_dropped: int = 0


class Meters:
    """The totals of one process. ``known``: the types of workflows that its code has."""

    def __init__(self, known: Container[str], beside: Beside) -> None:
        self.totals: Totals = {}
        self._known = known
        self._beside = beside
        self.newest_commit_s = 0.0
        self._is_news = False
        self._cpu_s = time.process_time()
        self._step_cpu_s: defaultdict[str, float] = defaultdict(float)

    def report(self, *, spans_dropped: int = 0) -> Report:
        """The totals themselves, which go on counting: encode them at once. Any thread may ask."""
        totals, self._is_news = (self.totals if self._is_news else None), False
        detached = dict(Counter(run.shard for run in self._beside.detached()))
        return Report(
            totals=totals,
            detached=detached,
            cpu_s=time.process_time(),
            step_cpu_s=dict(self._step_cpu_s),
            spans_dropped=spans_dropped,
        )

    def copied(self) -> Totals:
        """The totals as they are at this moment. Any thread may ask: nothing is counted while they are encoded."""
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.totals), type=Totals)

    def look(self, inline: Task | None) -> None:
        """See whose steps run: ``inline``, which the consumer's own thread runs, else those beside it. One other thread does.

        To their types goes the processor time since the last look: no step pays for it, and over many looks each type gets its
        part. What is seen while none runs is nobody's: reading pages, and handing them on.
        """
        running = [inline] if inline is not None else [run.task for run in self._beside.running()]
        self.saw([task.machine.name for task in running])

    def saw(self, running: Sequence[str]) -> None:
        """Steps of these types were seen to run."""
        now = time.process_time()
        passed, self._cpu_s = now - self._cpu_s, now
        for name in running:
            self._step_cpu_s[name] += passed / len(running)

    def claimed(self, shard: int, began: float) -> None:
        """A claim found something; ``began``: by ``time.perf_counter``."""
        self._of(shard).claim_s.add(time.perf_counter() - began)

    def ran(self, shard: int, steps: int, seconds: float) -> None:
        """A page is through, all its commits included. ``seconds``: how long its steps ran."""
        of = self._of(shard)
        of.pages += 1
        of.page_steps.add(steps, STEPS)
        of.page_s.add(seconds)

    def committed(self, shard: int, began: float) -> None:
        """A commit of a page went through; ``began``: as above."""
        self.newest_commit_s = time.perf_counter() - began
        self._of(shard).commit_s.add(self.newest_commit_s)

    def was_fenced(self, shard: int) -> None:
        """A commit was refused: the window is somebody else's."""
        self._of(shard).fenced += 1

    def handed_on(
        self, shard: int, lines: Sequence[Envelope | None], results: Sequence[Slot], *, may_put_back: bool = True
    ) -> None:
        """These step events came to this, and it is committed. ``may_put_back``: some may have come to nothing but themselves."""
        of = self._of(shard)
        if not may_put_back:
            # A successor bears the name that its code has, always the same object: that is counted quickly.
            names = [result.workflow for result in results if type(result) is Envelope]
            for name, steps in _counted(names):
                self._of_workflow(of, name).steps += steps
            if len(names) == len(results):
                return
        ends: list[tuple[str, str]] = []
        for line, result in zip(lines, results, strict=True):
            kind = type(result)
            if kind is Outcome:
                ends.append((line.workflow, result.status))  # type: ignore[union-attr]
            elif (may_put_back or kind is not Envelope) and line is not None and result is not line:
                self._count(of, line, result)
        for (name, status), steps in _counted(ends):
            mine = self._of_workflow(of, name)
            mine.steps += steps
            setattr(mine, status, getattr(mine, status) + steps)

    def _count(self, of: OfShard, line: Envelope, result: Slot) -> None:
        kind = type(result)
        if kind is Envelope or kind is Waiting or kind is Joining:
            self._of_workflow(of, line.workflow).steps += 1
        elif isinstance(result, DeadLetter):
            mine = self._of_workflow(of, line.workflow)
            mine.dead_letters += 1
            mine.steps += result.envelope.seq - line.seq  # a linear workflow went on to the step that is dead
        elif isinstance(result, Later):
            self._count_later(of, line, result.envelope)

    def _count_later(self, of: OfShard, line: Envelope, later: Envelope) -> None:
        if later.unrouted > line.unrouted:
            of.unroutable += 1
            return
        mine = self._of_workflow(of, line.workflow)
        if later.attempt == 1:  # it sleeps
            mine.steps += 1
            return
        mine.retries += 1
        mine.steps += later.seq - line.seq - 1  # as of dead letters: an attempt has a number too

    def _of(self, shard: int) -> OfShard:
        self._is_news = True
        found = self.totals.get(shard)
        if found is None:
            found = self.totals[shard] = OfShard()
        return found

    def _of_workflow(self, of: OfShard, name: str) -> OfWorkflow:
        found = of.workflows.get(name)
        if found is None:
            name = name if name in self._known else UNKNOWN
            found = of.workflows.setdefault(name, OfWorkflow())
        return found


def _counted(values: list[Value]) -> Iterable[tuple[Value, int]]:
    """How often each is there. Most pages are of one kind."""
    if values and values.count(values[0]) == len(values):
        return [(values[0], len(values))]
    return Counter(values).items()


def summed(several: Iterable[Totals]) -> Totals:
    """The totals of several processes together; theirs stay as they are."""
    total: Totals = {}
    for totals in several:
        for shard, of in totals.items():
            _add(total.setdefault(shard, OfShard()), of)
    return total


def _add(total: OfShard, of: OfShard) -> None:
    for name in ("pages", "fenced", "unroutable"):
        setattr(total, name, getattr(total, name) + getattr(of, name))
    for name in ("page_steps", "page_s", "claim_s", "commit_s"):
        getattr(total, name).add_all(getattr(of, name))
    for workflow, mine in of.workflows.items():
        known = total.workflows.setdefault(workflow, OfWorkflow())
        for name in OfWorkflow.__struct_fields__:
            setattr(known, name, getattr(known, name) + getattr(mine, name))
