"""Phase 2: the fence, the transactional steps, the successors and the page's commit, in one short transaction.

A page with many transactional steps is handed on in groups of consecutive lines, each a transaction that moves the window's
cursor past it. A step that fails is marked and its group runs again without it, because a failed statement spoils the
transaction for its neighbours. Deadlocks and the like are nobody's fault: the group shrinks and runs again.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
from psycopg.errors import DeadlockDetected, LockNotAvailable, QueryCanceled, SerializationFailure
from psycopg.pq import TransactionStatus

from durable_cluster import (
    dead_letters,
    executor,
    noting,
    side_results,
    side_statements,
    statements,
    timeline,
    timeline_statements,
)
from durable_cluster.context import Context
from durable_cluster.envelope import Envelope, Page, encode_chunks
from durable_cluster.errors import HandlerError
from durable_cluster.executor import Result, Task
from durable_cluster.failures import timed_out
from durable_cluster.memo import Spilled
from durable_cluster.meters import Meters
from durable_cluster.notes import Noted
from durable_cluster.settings import Settings
from durable_cluster.side_results import NOT_IN_THE_LOG, Detached, Slot
from durable_cluster.statements import Outcome
from durable_cluster.timed import as_recorded
from durable_cluster.timing import Timed, taken, timed
from durable_cluster.traced import Steps, told

logger = logging.getLogger("durable_cluster.handoff")

NOBODYS_FAULT = (DeadlockDetected, SerializationFailure, LockNotAvailable)
CONFLICT_PAUSE_S_MAX = 0.05
GROUP_SHRINKS_TO = 0.25
CONFLICTS_MAX = 8


class Answer(msgspec.Struct, frozen=True):
    """What a detached step of a workflow on ``shard`` came to."""

    envelope: Envelope
    shard: int
    result: Result | Timed | None


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Whose page it is: what the fence compares."""

    shard: int
    owner: int


class Conflict(Exception):
    """Nobody's fault: the same lines again, in a smaller group."""


class StepFailed(Exception):
    """The transactional step of slot ``index`` failed; ``result`` says what becomes of it."""

    def __init__(self, index: int, result: Slot) -> None:
        self.index = index
        self.result = result


class Handoff:
    """Commits pages on one connection; remembers how large a group of transactional steps has gone well."""

    def __init__(
        self, connection: psycopg.Connection[Any], settings: Settings, *, meters: Meters, steps: Steps = executor
    ) -> None:
        self._connection = connection
        self._meters = meters
        self._steps = steps
        self._breaks: Counter[str] = Counter()
        self._breaks_max = settings.max_crashes
        self._bytes_max = settings.page_bytes_max
        self._group_max = settings.transactional_steps_max
        self._group = self._group_max
        self._timeout_s = settings.step_timeout_s
        self._on_task: Callable[[Task | None], None] = lambda _: None
        self._has_permits = False

    def use(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection."""
        self._connection = connection

    def commit(
        self,
        window: Window,
        page: Page,
        slots: list[Slot],
        *,
        first: int = 0,
        on_task: Callable[[Task | None], None] = lambda _: None,
        has_permits: bool = False,
    ) -> list[Slot]:
        """Hand on the lines of ``page`` from ``first`` on, a slot each; the slots with their results.

        ``has_permits``: some of the lines ran with a permit, which is given back.
        ``on_task`` hears of each transactional step before it runs, and when none does. Raises BatchLost: what was committed before
        it stays.
        """
        self._on_task = on_task
        self._has_permits = has_permits
        begin = conflicts = 0
        may_put_back = bool(page.header.weights) or page.header.heaviest > 1
        while True:
            end = self._group_end(slots, begin)
            began = time.perf_counter()
            try:
                self._hand_on(window, page, slots, begin=begin, end=end, first=first)
            except Conflict as conflict:
                conflicts += 1
                if self._group == 1 and conflicts > CONFLICTS_MAX:
                    _put_back(slots, begin, conflict)
                    may_put_back = True
                    continue
                self._group = max(1, int(self._group * GROUP_SHRINKS_TO))
                logger.info(
                    "%s; again, %d transactional steps at a time", type(conflict.__cause__).__name__, self._group
                )
                time.sleep(random.uniform(0, CONFLICT_PAUSE_S_MAX))
                continue
            except StepFailed as failure:
                slots[failure.index] = failure.result
                continue
            if begin < end:
                lines = page.lines[first + begin : first + end]
                self._meters.committed(window.shard, began)
                self._meters.handed_on(window.shard, lines, slots[begin:end], may_put_back=may_put_back)
            begin, conflicts = end, 0
            if begin == len(slots):
                return slots

    def _group_end(self, slots: list[Slot], begin: int) -> int:
        """Where the lines of one commit end: before a transactional step too many."""
        transactional = 0
        for index in range(begin, len(slots)):
            transactional += isinstance(slots[index], Task)
            if transactional > self._group:
                return index
        return len(slots)

    def _hand_on(self, window: Window, page: Page, slots: list[Slot], *, begin: int, end: int, first: int) -> None:
        """Commit the slots from ``begin`` to ``end`` and put their results into ``slots``. Slot 0 is the page's line ``first``."""
        results = slots[begin:end]
        kinds = set(map(type, results))
        recorded: dict[int, Timed] = {}
        if Timed in kinds:
            recorded = taken(results)
            kinds = set(map(type, results))
        spilled: list[Spilled] = []
        if Noted in kinds:
            spilled = _rows(noting.spilled(results))
            kinds = set(map(type, results))
        tasks = [index for index, slot in enumerate(results) if isinstance(slot, Task)] if Task in kinds else []
        if not (tasks or recorded or self._has_permits) and kinds.isdisjoint(NOT_IN_THE_LOG):
            self._commit(window, page, results, first + begin, spilled, is_fenced=False)
            slots[begin:end] = results
            return
        try:
            with self._connection.transaction():
                done = page.cursor(first + begin)
                statements.fence(self._connection, batch=page.header.batch, owner=window.owner, done=done)
                for index in tasks:
                    results[index] = self._run(results[index], begin + index)
                if tasks:
                    self._settle([begin + index for index in tasks], slots)
                    recorded |= taken(results)
                    spilled += _rows(noting.spilled(results))
                if refused := noting.write(self._connection, results):
                    index = min(refused)
                    raise StepFailed(begin + index, _again(recorded.get(index), refused[index]))
                lines = page.lines[first + begin : first + end]
                giving = side_results.giving(lines, results) if self._has_permits else []
                side_results.write(self._connection, results, shard=window.shard, owner=window.owner, giving=giving)
                if recorded:
                    body, count = timeline.encoded(recorded, results, page, first + begin)
                    timeline_statements.record_steps(self._connection, shard=window.shard, body=body, count=count)
                self._commit(window, page, results, first + begin, spilled, is_fenced=True)
        except NOBODYS_FAULT as error:
            raise Conflict from error
        finally:
            self._on_task(None)
        slots[begin:end] = results
        for slot in results:
            if isinstance(slot, Detached) and slot.run is not None:
                slot.run.is_recorded = True
        if tasks:
            self._group = min(self._group + 1, self._group_max)

    def complete(self, owner: int, answers: Sequence[Answer]) -> int:
        """Hand on what detached steps answered, in one transaction; how many of them were still ``owner``'s.

        The others' answers are dropped: somebody else was given those steps.
        """
        with self._connection.transaction():
            still = side_statements.complete_detached(
                self._connection, owner=owner, keys=[one.envelope.key for one in answers]
            )
            # Of two answers for one step, of which the process has lost count, one counts.
            ours = list({one.envelope.key: one for one in answers if one.envelope.key in still}.values())
            slots: list[Slot] = [as_recorded(self._steps, one.envelope, one.result) for one in ours]
            recorded = taken(slots)
            spilled = noting.spilled(slots)
            for index, letter in noting.write(self._connection, slots).items():
                slots[index] = letter
                spilled.pop(index, None)  # its state is that of before
            done: list[tuple[int, list[Envelope], list[Slot]]] = []
            for shard in sorted({one.shard for one in ours}):
                of_shard = [index for index, one in enumerate(ours) if one.shard == shard]
                results = [slots[index] for index in of_shard]
                lines = [ours[index].envelope for index in of_shard]
                done.append((shard, lines, results))
                giving = side_results.giving(lines, results)
                side_results.write(self._connection, results, shard=shard, owner=owner, giving=giving)
                steps, counts, outcomes = self._for_the_log(results)
                if of_shard_recorded := {n: recorded[index] for n, index in enumerate(of_shard) if index in recorded}:
                    body, count = timeline.encoded(of_shard_recorded, results)
                    timeline_statements.record_steps(self._connection, shard=shard, body=body, count=count)
                rows = _rows({index: spilled[index] for index in of_shard if index in spilled})
                statements.hand_on(
                    self._connection, shard=shard, steps=steps, counts=counts, outcomes=outcomes, spilled=rows
                )
        for shard, lines, results in done:
            self._meters.handed_on(shard, lines, results)
        return len(ours)

    def _run(self, task: Slot, index: int) -> Result:
        """Run one transactional step. Raises StepFailed, or Conflict where it is nobody's fault."""
        assert isinstance(task, Task)
        row_factory, cursor_factory = self._connection.row_factory, self._connection.cursor_factory
        key = task.envelope.key
        if self._breaks[key] >= self._breaks_max:
            letter = dead_letters.crashed(task.envelope, self._breaks[key], "the connection was lost")
            raise StepFailed(index, as_recorded(self._steps, task.envelope, told(self._steps, letter)))
        context = executor.context_of(task, self._connection)
        self._on_task(task)
        self._connection.is_of_a_step = True  # type: ignore[attr-defined]
        try:
            with self._limited(task):
                result = self._steps.call(task, context)
        except executor.FAILURES as error:
            if any(isinstance(cause, NOBODYS_FAULT) for cause in _causes(error)):
                raise Conflict from error
            if self._connection.broken:
                self._breaks[key] += 1
                raise
            is_late = any(isinstance(cause, QueryCanceled) for cause in _causes(error))
            late = timed_out(task.step.name, task.step.timeout_s)
            raise _failed(task, index, late if is_late else error, context) from error
        finally:
            self._connection.is_of_a_step = False  # type: ignore[attr-defined]
            self._connection.row_factory, self._connection.cursor_factory = row_factory, cursor_factory
        status = self._connection.info.transaction_status
        if status != TransactionStatus.INTRANS:
            what = (
                "its SQL failed and it went on" if status == TransactionStatus.INERROR else "it ended the transaction"
            )
            wrong = HandlerError(f"step '{task.step.name}': {what}; let the error pass, and never commit ctx.tx")
            raise self._failed_after_all(task, index, wrong, context)
        return result

    def _settle(self, tasks: list[int], slots: list[Slot]) -> None:
        """Let deferred constraints speak now, while it can only be about the steps, and not at the commit.

        They do not say whose fault it is: smaller groups find out.
        """
        try:
            self._connection.execute("set constraints all immediate")
        except psycopg.Error as error:
            if self._connection.broken or isinstance(error, NOBODYS_FAULT):
                raise
            if len(tasks) > 1:
                raise Conflict from error
            only = slots[tasks[0]]
            assert isinstance(only, Task)
            raise self._failed_after_all(only, tasks[0], error, executor.context_of(only)) from error

    def _failed_after_all(self, task: Task, index: int, error: BaseException, context: Context) -> StepFailed:
        """Its own code was content."""
        self._steps.tell(task.envelope, dead_letters.brief_of(task.machine, error))
        failure = _failed(task, index, error, context)
        failure.result = as_recorded(self._steps, task.envelope, failure.result)
        return failure

    def _commit(
        self,
        window: Window,
        page: Page,
        results: list[Slot],
        begin: int,
        spilled: Sequence[Spilled],
        *,
        is_fenced: bool,
    ) -> None:
        end = begin + len(results)
        steps, counts, outcomes = self._for_the_log(results)
        statements.commit_page(
            self._connection,
            is_fenced=is_fenced,
            shard=window.shard,
            batch=page.header.batch,
            owner=window.owner,
            done=page.cursor(begin),
            next_cursor=page.cursor(end),
            is_last=page.header.last and end == len(page.lines),
            steps=steps,
            counts=counts,
            outcomes=outcomes,
            spilled=spilled,
        )

    def _for_the_log(self, results: Sequence[Slot]) -> tuple[str, list[int], list[Outcome]]:
        steps, counts = encode_chunks([r for r in results if type(r) is Envelope], bytes_max=self._bytes_max)
        return steps, counts, [r for r in results if type(r) is Outcome]

    @contextmanager
    def _limited(self, task: Task) -> Iterator[None]:
        """While it runs, no statement of the step may take longer than its timeout; the default's limit is the connection's own."""
        if task.step.timeout_s == self._timeout_s:
            yield
            return
        self._limit_statements(task.step.timeout_s)
        yield
        if self._connection.info.transaction_status == TransactionStatus.INTRANS:
            self._limit_statements(self._timeout_s)

    def _limit_statements(self, timeout_s: float) -> None:
        self._connection.execute("select set_config('statement_timeout', %s, true)", (str(int(timeout_s * 1000) or 1),))


def _rows(spilled: Mapping[int, Sequence[Spilled]]) -> list[Spilled]:
    return [row for rows in spilled.values() for row in rows]


def _put_back(slots: list[Slot], begin: int, conflict: Conflict) -> None:
    """The first transactional step from ``begin`` on goes to the end of the log as it is, without an attempt, and its
    neighbours go on: what it waits for may be locked for long.
    """
    index = next((index for index in range(begin, len(slots)) if isinstance(slots[index], Task)), None)
    task = None if index is None else slots[index]
    if index is None or not isinstance(task, Task):
        raise conflict.__cause__ or conflict
    logger.warning("step '%s' of '%s' conflicts again and again; it is put back", task.step.name, task.machine.name)
    slots[index] = task.envelope


def _failed(task: Task, index: int, error: BaseException, context: Context) -> StepFailed:
    return StepFailed(index, timed(context, task.envelope, executor.failed(task, error, context)))


def _again(recorded: Timed | None, result: Result) -> Slot:
    """Something else became of a step event than it came to."""
    return result if recorded is None else msgspec.structs.replace(recorded, result=result)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
