"""One page: phase 1 runs its handlers with no transaction open, phase 2 (see ``handoff``) hands the results on."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster import coordination, dead_letters, executor, statements
from durable_cluster.beside import Beside, Run
from durable_cluster.envelope import Envelope, Page
from durable_cluster.errors import BatchLost
from durable_cluster.executor import OnTheWay, Parked, Task
from durable_cluster.handoff import Answer, Handoff, Window
from durable_cluster.joins import ChildResult, Joining, Spawning
from durable_cluster.limits import without_permit
from durable_cluster.meters import Meters
from durable_cluster.notes import Noted
from durable_cluster.patience import Patience
from durable_cluster.settings import Settings
from durable_cluster.side_results import Detached, Slot
from durable_cluster.statements import Outcome
from durable_cluster.timed import as_recorded, plain_of
from durable_cluster.timing import Timed
from durable_cluster.traced import Steps, told

if TYPE_CHECKING:
    from durable_cluster.machine import Machine

logger = logging.getLogger("durable_cluster.page")

MAY_HAVE_CHILDREN = (Spawning, Joining, Noted, Timed)


class PageDone(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a page: lines handed on, those that have a successor in the log now, whether its window is finished."""

    steps: int
    appended: int
    is_window_finished: bool


class PageRunner:
    """Runs the pages of one consumer on its one connection; slow steps go on beside them."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        machines: Mapping[str, Machine],
        settings: Settings,
        beside: Beside,
        *,
        steps: Steps = executor,
    ) -> None:
        self.inline: Task | None = None
        self._connection = connection
        self._machines = machines
        self._settings = settings
        self._window_s = settings.page_window_ms / 1000
        self.steps = steps
        self._plain = plain_of(steps)
        self.meters = Meters(machines, beside)
        self._handoff = Handoff(connection, settings, steps=steps, meters=self.meters)
        self._beside = beside
        self._patience = Patience(self._window_s, settings.page_lines_max)
        self._marked: tuple[int, int, str] | None = None
        self._crashes = 0
        self._cancelled: Mapping[str, str] = {}
        self._has_permits = False
        self._weights: Mapping[str, float] = {}
        self._heaviest = 0.0
        self._is_diverting = False
        self._is_plain = False
        self._paused: frozenset[str] = frozenset()
        self._children: Mapping[str, list[ChildResult]] = {}

    def run(self, window: Window, page: Page) -> PageDone:
        """Run as much of ``page`` as its time window lets begin, and commit it. Raises BatchLost."""
        self._cancelled, self._paused = page.header.cancelled, page.header.paused
        self._children = self._read_children(page)
        self._has_permits = False
        self._weights, self._heaviest = page.header.weights, _heaviest(page)
        self._is_diverting = bool(self._cancelled or self._paused or self._heaviest)
        self._is_plain = page.is_plain and not self._is_diverting  # the state of a cleanup is coded here
        try:
            if page.header.suspects:
                with self._alone():
                    return self._run_suspects(window, page)
            return self._run_all(window, page)
        except BatchLost:
            self.meters.was_fenced(window.shard)
            raise

    def _run_all(self, window: Window, page: Page) -> PageDone:
        began = time.perf_counter()
        slots, runs = self._phase_1(page.lines, window.shard)
        ran_s = time.perf_counter() - began
        try:
            results = self._commit(window, page, slots)
        except BaseException:
            self._beside.drop(run for run in runs if not run.is_recorded)
            raise
        return self._done(window, page, results, ran_s)

    def _done(self, window: Window, page: Page, results: Sequence[Slot], ran_s: float) -> PageDone:
        if results:
            self.meters.ran(window.shard, len(results), ran_s)
        return PageDone(
            steps=len(results),
            appended=sum(isinstance(result, Envelope) for result in results),
            is_window_finished=page.header.last and len(results) == len(page.lines),
        )

    def _commit(self, window: Window, page: Page, slots: list[Slot], first: int = 0) -> list[Slot]:
        def on_task(task: Task | None) -> None:
            # Anew each time: who watches tells the runs of a step that conflicts apart.
            self.inline = None if task is None else msgspec.structs.replace(task)

        return self._handoff.commit(window, page, slots, first=first, on_task=on_task, has_permits=self._has_permits)

    def _phase_1(self, lines: Sequence[Envelope | None], shard: int) -> tuple[list[Slot], list[Run]]:
        """A slot for each line that the time window let begin, and the runs that outlast it.

        Transactional steps stay tasks: they run in phase 2. Steps beside the page begin when the others are through; see
        ``Patience`` for how many, and for which are waited for.
        """
        stop_at = time.monotonic() + self._window_s
        room = self._settings.detached_max - self._beside.in_flight
        slots: list[Slot] = []
        runs: dict[int, Run] = {}
        awaited: list[Run] = []
        children = 0
        for envelope in lines:
            if slots and (
                time.monotonic() > stop_at
                or children > self._settings.page_lines_max
                or len(awaited) >= self._patience.crowd
            ):
                break
            slot = self._begin(envelope)
            if type(slot) is Envelope:  # most are
                slots.append(slot)
                continue
            if isinstance(slot, MAY_HAVE_CHILDREN):
                children += len(slot.children)
            elif isinstance(slot, Task) and slot.step.is_beside:
                if len(runs) < room:
                    runs[len(slots)] = run = Run(slot, shard)
                    if self._patience.awaits(run):
                        awaited.append(run)
                else:
                    slot = as_recorded(self.steps, slot.envelope, Detached(slot.envelope, None))
            slots.append(slot)
        self.inline = None
        return slots, self._run_beside(slots, runs, awaited, until=stop_at) if runs else []

    def _run_beside(
        self, slots: list[Slot], runs: Mapping[int, Run], awaited: Sequence[Run], *, until: float
    ) -> list[Run]:
        """Puts what became of ``runs`` into their slots; those that have not ended by then."""
        begun_at = time.monotonic()
        self._beside.begin([*runs.values()])
        self._beside.wait(awaited, until=until)
        took_s = time.monotonic() - begun_at
        slow = self._beside.detach(runs.values())
        if begun_at < until - self._window_s / 2:  # else the steps before them left them no time
            self._patience.learn(awaited, took_s)
        for index, run in runs.items():
            if run.is_detached:
                left = Detached(run.task.envelope, run)
                slots[index] = as_recorded(self.steps, left.envelope, left, began=run.begun_at)
            else:
                slots[index] = run.result
        return slow

    def _read_children(self, page: Page) -> Mapping[str, list[ChildResult]]:
        parents = [envelope.workflow_id for envelope in page.lines if envelope is not None and envelope.has_children]
        return coordination.children_of(self._connection, parents) if parents else {}

    def _begin(self, envelope: Envelope | None) -> Slot:
        if envelope is None:
            logger.error("a line of the log is no step event; it is passed over")
            return None
        if self._is_diverting:
            envelope, instead = self._diverted(envelope)
            if instead is not None:
                return instead
        task = executor.resolve(
            self._machines, envelope, limit_s=self._settings.unroutable_limit_s, is_plain=self._is_plain
        )
        if not isinstance(task, Task):
            is_told = isinstance(task, OnTheWay) or (task is not None and envelope.has_names)
            return as_recorded(self.steps, envelope, told(self.steps, task)) if is_told else self._begin(None)
        if envelope.has_children or not task.step.is_plain:
            return self._prepared(task)
        self.inline = task
        return self._plain.run(task, executor.context_of(task))

    def _diverted(self, envelope: Envelope) -> tuple[Envelope, Slot]:
        """The step event that runs in place of one whose workflow is cancelled; and what becomes of it if none does now."""
        if envelope.workflow_id in self._cancelled:
            self._has_permits |= envelope.permit > 0
            instead = executor.cancelled(self._machines, envelope, self._cancelled[envelope.workflow_id])
            if isinstance(instead, Outcome):
                return envelope, as_recorded(self.steps, envelope, instead)
            envelope = instead or envelope
        if self._paused and executor.is_paused(envelope, self._paused):
            self._has_permits |= envelope.permit > 0
            return envelope, as_recorded(self.steps, envelope, Parked(without_permit(envelope)))
        if self._heaviest and not envelope.cancelled and envelope.workflow in self._machines:
            share = self._weights.get(envelope.workflow_id, 1.0) / self._heaviest
            if share < 1 and random.random() > share:
                return envelope, envelope  # to the end of the log: its turn comes another time
        return envelope, None

    def _prepared(self, task: Task) -> Slot:
        """A task that runs beside the page or in phase 2; what a step of an unusual kind came to, if it ran at once."""
        if task.step.is_limited:
            if queued := executor.queued(task):
                return as_recorded(self.steps, task.envelope, queued)
            self._has_permits |= task.envelope.permit > 0
        if task.envelope.has_children:
            task = msgspec.structs.replace(task, children=self._children.get(task.envelope.workflow_id))
        if not task.step.is_inline:
            return task
        self.inline = task
        return self.steps.run(task, executor.context_of(task))

    def _run_suspects(self, window: Window, page: Page) -> PageDone:
        """A process died with one of these lines: each runs and is committed alone, and is known to run before it does.

        One beside which processes have died too often becomes a dead letter. A step that would run beside the page is put
        among the detached ones, where suspects also run alone.
        """
        stop_at = time.monotonic() + self._window_s
        results: list[Slot] = []
        ran_s = 0.0
        for index, envelope in enumerate(page.lines[: page.header.suspects]):
            if results and time.monotonic() > stop_at:
                break
            crashes = self._mark(window, page, index)
            began = time.perf_counter()
            if envelope is not None and crashes > self._settings.max_crashes:
                letter = told(self.steps, dead_letters.crashed(envelope, crashes - 1))
                slot: Slot = as_recorded(self.steps, envelope, letter)
            else:
                slot = self._begin(envelope)
                self.inline = None
                if isinstance(slot, Task) and slot.step.is_beside:
                    slot = as_recorded(self.steps, slot.envelope, Detached(slot.envelope, None, crashes))
            ran_s += time.perf_counter() - began
            results += self._commit(window, page, [slot], first=index)
        return self._done(window, page, results, ran_s)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No step runs with another in one event meanwhile: which one it was has to be found out."""
        apps = {machine.app for machine in self._machines.values()}
        for app in apps:
            app.runs_alone = True
        try:
            yield
        finally:
            for app in apps:
                app.runs_alone = False

    def _mark(self, window: Window, page: Page, index: int) -> int:
        """How many processes will have died with this line if this one does; counted once, however often its commit is tried."""
        batch, cursor = page.header.batch, page.cursor(index)
        if self._marked != (batch, window.owner, cursor):
            self._crashes = statements.mark_suspect(self._connection, batch=batch, owner=window.owner, done=cursor)
            self._marked = batch, window.owner, cursor
        return self._crashes

    def complete(self, owner: int, answers: Sequence[Answer]) -> int:
        """See ``Handoff.complete``."""
        return self._handoff.complete(owner, answers)

    def use(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection."""
        self._connection = connection
        self._handoff.use(connection)


def _heaviest(page: Page) -> float:
    """The weight that the others of this page have a share of; 0 while all are equal."""
    weights = page.header.weights
    if not weights and page.header.heaviest <= 1:
        return 0.0
    of_lines = (weights.get(envelope.workflow_id, 1.0) for envelope in page.lines if envelope is not None)
    return max(page.header.heaviest, *of_lines, 0.0)
