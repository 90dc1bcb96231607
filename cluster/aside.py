"""The detached steps of one consumer as the database knows them: taken, kept alive, handed on when they end, handed back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster import dead_letters, executor, side_statements, statements
from durable_cluster.beside import Beside, Run
from durable_cluster.context import short_id
from durable_cluster.envelope import Envelope, decode_line, encode
from durable_cluster.executor import Task
from durable_cluster.failures import timed_out
from durable_cluster.handoff import NOBODYS_FAULT, Answer
from durable_cluster.page import PageRunner
from durable_cluster.settings import Settings
from durable_cluster.timing import timed
from durable_cluster.traced import told

if TYPE_CHECKING:
    from durable_cluster.machine import Machine

logger = logging.getLogger("durable_cluster.aside")

REPORT_S = 1.0
REPORT_SOON_S = 0.05
LOOK_S = 0.25

OnHang = Callable[[Run], None]


class Aside:
    """Looks after what runs beside the pages; ``owner`` is the consumer's, and changes when it reincarnates."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        machines: Mapping[str, Machine],
        settings: Settings,
        *,
        beside: Beside,
        pages: PageRunner,
        on_hang: OnHang | None,
    ) -> None:
        self.connection = connection
        self.owner = 0
        self._machines = machines
        self._settings = settings
        self._beside = beside
        self._pages = pages
        self._on_hang = on_hang
        self._answers: list[Answer] = []
        self._look_at = self._report_at = self._report_soon_at = self._keep_at = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether anything runs or waits to be handed on."""
        return bool(self._answers or self._beside.in_flight)

    @property
    def room(self) -> int:
        """How many more steps may run here."""
        return max(0, self._settings.detached_max - self._beside.in_flight)

    @property
    def may_take_suspect(self) -> bool:
        """Whether no suspect runs here: they run one at a time."""
        return not self._beside.has_suspect

    def look_soon(self) -> None:
        """There may be steps to take."""
        self._look_at = 0.0

    def tend(self, *, is_taking: bool = True) -> int:
        """Hand on what has ended, take what nobody runs, write progress, keep the lease. How many steps were handed on or taken."""
        done = self._hand_on()
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._end_overdue()
            if is_taking and self.room:
                done += self._take()
        if self._beside.in_flight:
            if now >= self._report_soon_at:
                self._report_soon_at = now + REPORT_SOON_S
                self._report(self._beside.detached(), is_soon=True)
            if now >= self._report_at:
                self._report_at = now + REPORT_S
                self._report(self._beside.detached())
                self._publish()
                self._end_taken()
            if now >= self._keep_at:
                self._keep_at = now + self._settings.dead_interval_s / 4
                statements.heartbeat(self.connection, [self.owner])
        return done

    def use(self, connection: psycopg.Connection[Any]) -> None:
        """Go on with a new connection, after the old one was lost: what the database holds for us and we do not run is set free."""
        self.connection = connection
        lost = side_statements.disown(connection, self.owner, running=sorted(self._known()))
        if lost:
            logger.info("%d detached steps whose commit was not heard of may be taken by others", lost)

    def _known(self) -> set[str]:
        return {run.key for run in self._beside.known()} | {answer.envelope.key for answer in self._answers}

    def _hand_on(self) -> int:
        for run in self._beside.ended(self._settings.page_lines_max - len(self._answers)):
            assert run.result is not None
            self._answers.append(Answer(run.task.envelope, run.shard, run.result))
        if not self._answers:
            return 0
        try:
            ours = self._pages.complete(self.owner, self._answers)
        except NOBODYS_FAULT as conflict:
            logger.info("%s while detached steps were handed on; again", type(conflict).__name__)
            return 0
        if ours < len(self._answers):
            logger.info("%d answers were dropped: their steps were given to others", len(self._answers) - ours)
        self._answers = []
        return ours

    def _take(self) -> int:
        limit = min(self.room, self._settings.page_lines_max)
        taken = side_statements.take_detached(
            self.connection, self.owner, limit=limit, with_suspect=self.may_take_suspect
        )
        runs: list[Run] = []
        known = self._known()
        for shard, line, crashes, progress in taken:
            envelope = decode_line(line)
            if envelope.key in known:
                continue  # it was given away while this process was silent, and nobody had taken it
            if progress is not None:
                envelope = msgspec.structs.replace(envelope, progress=msgspec.json.decode(progress))
            task = self._resolved(envelope, crashes)
            if isinstance(task, Task):
                runs.append(Run(task, shard, crashes))
            else:
                self._answers.append(Answer(envelope, shard, task))
        self._beside.begin(runs, as_detached=True)
        return len(taken)

    def _resolved(self, envelope: Envelope, crashes: int) -> Task | executor.Result | None:
        if crashes > self._settings.max_crashes:
            return told(self._pages.steps, dead_letters.crashed(envelope, crashes - 1))
        task = executor.resolve(self._machines, envelope, limit_s=self._settings.unroutable_limit_s)
        return task if isinstance(task, Task) else told(self._pages.steps, task)

    def _end_overdue(self) -> None:
        """A handler that did not let itself be interrupted: its process ends, or where that cannot be, its answer is dropped."""
        for run in self._beside.overdue():
            envelope = run.task.envelope
            logger.error(
                "step '%s' of '%s' %s… hangs: it goes on long after its timeout of %g s",
                envelope.step,
                envelope.workflow,
                short_id(envelope.workflow_id),
                run.task.step.timeout_s,
            )
            if self._on_hang is not None:
                side_statements.single_out(self.connection, self.owner, run.key)
                self._on_hang(run)
            self._beside.drop([run])
            late = timed_out(envelope.step, run.task.step.timeout_s)
            self._pages.steps.tell(envelope, str(late))
            result = executor.failed(run.task, late, run.context)
            self._answers.append(Answer(envelope, run.shard, timed(run.context, envelope, result)))

    def _end_taken(self) -> None:
        """Steps whose rows a cancel or another process has taken run for nothing."""
        running = {run.key: run for run in self._beside.detached() if run.is_recorded}
        if running:
            gone = side_statements.taken_away(self.connection, self.owner, list(running))
            self._beside.drop(running[key] for key in gone)

    def _publish(self) -> None:
        """What onlookers are told of steps that run; their ends tell the last of it themselves."""
        news = [(run, run.context.published) for run in self._beside.detached() if run.is_recorded]
        told = [(run, of) for run, of in news if of is not None and of is not run.published]
        if not told:
            return
        side_statements.publish_detached(self.connection, self.owner, {run.key: bytes(of).decode() for run, of in told})
        for run, of in told:
            run.published = of

    def _report(self, runs: Sequence[Run], *, is_soon: bool = False) -> None:
        """What runs have said since the last time, for whoever runs them next."""
        said: dict[str, Run] = {}
        for run in runs:
            if run.context.said is not run.reported and (run.task.step.is_reported_soon or not is_soon):
                said[run.key] = run
        if not said:
            return
        news = {key: run.context.said for key, run in said.items()}
        lost = side_statements.report_progress(
            self.connection, self.owner, {key: encode(of).decode() for key, of in news.items()}
        )
        for key, run in said.items():
            run.reported = news[key]
        self._beside.drop(said[key] for key in lost)
