"""Phase 2: the fence, the transactional steps, the successors and the page's commit, in one short transaction.

A page with many transactional steps is handed on in groups of consecutive lines, each a transaction that moves the window's
cursor past it. A step that fails is marked and its group runs again without it, because a failed statement spoils the
transaction for its neighbours. Deadlocks and the like are nobody's fault: the group shrinks and runs again.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
from psycopg.errors import DeadlockDetected, LockNotAvailable, SerializationFailure
from psycopg.pq import TransactionStatus

from durable_cluster import executor, statements
from durable_cluster.envelope import Envelope, Page, encode_chunks
from durable_cluster.errors import HandlerError
from durable_cluster.executor import Result, Task
from durable_cluster.settings import Settings
from durable_cluster.statements import Outcome

logger = logging.getLogger("durable_cluster.handoff")

NOBODYS_FAULT = (DeadlockDetected, SerializationFailure, LockNotAvailable)
CONFLICT_PAUSE_S_MAX = 0.05
GROUP_SHRINKS_TO = 0.25
CONFLICTS_MAX = 8

Slot = Result | Task | None
"""A line's state: its result, its transactional task still to run, or None for a line that is no step event."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Whose page it is: what the fence compares."""

    shard: int
    owner: int


class Conflict(Exception):
    """Nobody's fault: the same lines again, in a smaller group."""


class StepFailed(Exception):
    """The transactional step of slot ``index`` failed; ``outcome`` says how."""

    def __init__(self, index: int, outcome: Outcome) -> None:
        self.index = index
        self.outcome = outcome


class Handoff:
    """Commits pages on one connection; remembers how large a group of transactional steps has gone well."""

    def __init__(self, connection: psycopg.Connection[Any], settings: Settings) -> None:
        self._connection = connection
        self._bytes_max = settings.page_bytes_max
        self._group_max = settings.transactional_steps_max
        self._group = self._group_max

    def commit(self, window: Window, page: Page, slots: list[Slot]) -> list[Slot]:
        """Hand on every slot; the slots with their results. Raises BatchLost: what was committed before it stays."""
        begin = conflicts = 0
        while True:
            end = self._group_end(slots, begin)
            try:
                self._hand_on(window, page, slots, begin, end)
            except Conflict as conflict:
                conflicts += 1
                if self._group == 1 and conflicts > CONFLICTS_MAX:
                    _put_back(slots, begin)
                    continue
                self._group = max(1, int(self._group * GROUP_SHRINKS_TO))
                logger.info(
                    "%s; again, %d transactional steps at a time", type(conflict.__cause__).__name__, self._group
                )
                time.sleep(random.uniform(0, CONFLICT_PAUSE_S_MAX))
                continue
            except StepFailed as failure:
                slots[failure.index] = failure.outcome
                continue
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

    def _hand_on(self, window: Window, page: Page, slots: list[Slot], begin: int, end: int) -> None:
        """Commit the lines from ``begin`` to ``end`` and put their results into ``slots``."""
        results = slots[begin:end]
        tasks = [index for index, slot in enumerate(results) if isinstance(slot, Task)]
        if not tasks:
            self._commit(window, page, results, begin, is_fenced=False)
            return
        try:
            with self._connection.transaction():
                statements.fence(self._connection, batch=page.header.batch, owner=window.owner, done=page.cursor(begin))
                for index in tasks:
                    results[index] = self._run(results[index], begin + index)
                self._settle([begin + index for index in tasks], slots)
                self._commit(window, page, results, begin, is_fenced=True)
        except NOBODYS_FAULT as error:
            raise Conflict from error
        slots[begin:end] = results
        self._group = min(self._group + 1, self._group_max)

    def _run(self, task: Slot, index: int) -> Result:
        """Run one transactional step. Raises StepFailed, or Conflict where it is nobody's fault."""
        assert isinstance(task, Task)
        row_factory, cursor_factory = self._connection.row_factory, self._connection.cursor_factory
        try:
            result = executor.call(task, self._connection)
        except executor.FAILURES as error:
            if any(isinstance(cause, NOBODYS_FAULT) for cause in _causes(error)):
                raise Conflict from error
            if self._connection.broken:
                raise
            raise _failed(task, index, error) from error
        finally:
            self._connection.row_factory, self._connection.cursor_factory = row_factory, cursor_factory
        status = self._connection.info.transaction_status
        if status != TransactionStatus.INTRANS:
            what = (
                "its SQL failed and it went on" if status == TransactionStatus.INERROR else "it ended the transaction"
            )
            raise _failed(
                task,
                index,
                HandlerError(f"step '{task.step.name}': {what}; let the error pass, and never commit ctx.tx"),
            )
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
            raise _failed(slots[tasks[0]], tasks[0], error) from error

    def _commit(self, window: Window, page: Page, results: list[Slot], begin: int, *, is_fenced: bool) -> None:
        end = begin + len(results)
        steps, counts = encode_chunks([r for r in results if isinstance(r, Envelope)], bytes_max=self._bytes_max)
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
            outcomes=[r for r in results if isinstance(r, Outcome)],
        )


def _put_back(slots: list[Slot], begin: int) -> None:
    """The first transactional step from ``begin`` on goes to the end of the log as it is, without an attempt, and its
    neighbours go on: what it waits for may be locked for long.
    """
    index = next(index for index in range(begin, len(slots)) if isinstance(slots[index], Task))
    task = slots[index]
    assert isinstance(task, Task)
    logger.warning("step '%s' of '%s' conflicts again and again; it is put back", task.step.name, task.machine.name)
    slots[index] = task.envelope


def _failed(task: Slot, index: int, error: BaseException) -> StepFailed:
    assert isinstance(task, Task)
    return StepFailed(index, executor.failed(task.envelope, error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
