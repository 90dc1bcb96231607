"""A cluster for tests: an app on a database of its own, run in this process, with a clock that stands still until it is moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import msgspec

from durable_cluster import side_statements, statements
from durable_cluster.app import App
from durable_cluster.client import Client, Handle
from durable_cluster.context import short_id
from durable_cluster.durations import Duration, seconds
from durable_cluster.errors import InputError, ResultTimeout, UnknownWorkflow
from durable_cluster.handles import WorkflowHandle
from durable_cluster.runner import Runner
from durable_cluster.settings import environment
from durable_cluster.testing import histories
from durable_cluster.testing import statements as sql
from durable_cluster.testing.clock import StandingClock
from durable_cluster.testing.crashes import AnyStep, Crash, Died
from durable_cluster.testing.databases import databases_on
from durable_cluster.testing.histories import Ended, History
from durable_cluster.testing.patience import Patience

T = TypeVar("T")

PATIENT_S = 7 * 86_400.0
"""For so long a transactional step may stand at a breakpoint: the server ends its transaction then."""
MOVES_MAX = 10_000


class Cluster:
    """Made by ``testing.cluster(app)``. Inside of its ``with`` block the app lives in this database, and nowhere else.

    ``dsn``: of that database, for what a test wants to ask it. Not to be shared between threads.
    """

    def __init__(self, app: App, *, dsn: str | None = None, now: datetime | None = None) -> None:
        self.app = app
        self.dsn = ""
        self._shared = dsn
        self._begin = now
        self._stack = ExitStack()
        self._runner: Runner | None = None
        self._patience = Patience()
        self._crashes: list[Crash] = []
        self._ended: dict[str, Ended] = {}

    def __repr__(self) -> str:
        return f"<testing.Cluster of app '{self.app.name}'>"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            begin = None if self._begin is None else _checked(self._begin)
            if self._shared is not None:
                self.dsn = self._shared
            else:
                databases = databases_on(environment().dsn)
                self.dsn = databases.make()
                stack.callback(databases.give_back, self.dsn)
                begin = begin or datetime.now(UTC).replace(microsecond=0)
            stack.enter_context(_bound(self.app, self.dsn))
            stack.callback(self._stop)
            sql.set_clock(self._connection, begin or self.now)  # a real clock refuses
            self._see_clock()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def now(self) -> datetime:
        """What the clock shows (UTC)."""
        return datetime.fromtimestamp(side_statements.now(self._connection), UTC)

    def run(self) -> int:
        """Run whatever is ready, until nothing is: no time passes. How many steps ran.

        Each time the workflows are taken up as by another process: entered from the top, and fed with what is recorded.
        """
        before, ran = self._steps, 0
        with self._patience.watching(), histories.recorded(self.app, self._ended):
            while True:
                try:
                    self._at_work().run(until_idle=True)
                except Died:
                    ran += self._steps - before
                    self._bury()
                    before = 0
                except BaseException:
                    self._stop()
                    raise
                else:
                    break
        for workflow in histories.workflows_of(self.app):
            workflow.forget_all()
        return ran + self._steps - before

    def advance(self, by: Duration) -> int:
        """Let ``by`` pass ("7d", a timedelta, seconds), from one due time to the next: each finds the clock at its own time.

        Sleeps, timeouts, retries and schedules fire and are run. How many steps ran. Raises InputError.
        """
        until = self.now + timedelta(seconds=seconds(by, what="advance"))
        ran = self.run()
        while (due := sql.next_due(self._connection)) is not None and due <= until:
            ran += self._move(due)
        return ran + self._move(until)

    @overload
    def result(self, handle: WorkflowHandle[T]) -> T: ...
    @overload
    def result(self, handle: Handle) -> Any: ...
    def result(self, handle: Handle) -> Any:
        """What the workflow comes to, as ``handle.result()`` gives or raises it; as much time passes as it takes.

        Raises ResultTimeout when it waits for what no time brings, such as a signal.
        """
        self.run()
        for _ in range(MOVES_MAX):
            if handle.status() != "running":
                return handle.result(timeout=0)
            due = sql.next_due(self._connection)
            if due is None:
                raise ResultTimeout(f"{self._told(handle)}, and no time will end that: {self._help(handle)}")
            self._move(due)
        raise ResultTimeout(f"{self._told(handle)} still, after the clock was moved {MOVES_MAX:,} times")

    @contextmanager
    def crash(
        self,
        *,
        before: AnyStep | None = None,
        after: AnyStep | None = None,
        committed: AnyStep | None = None,
        times: int = 1,
    ) -> Iterator[Crash]:
        """In this block the process dies at a step, ``times`` times, and another one goes on. One of the three, a step or its name.

        ``before`` it: it has not begun. ``after`` it: it ran, and nobody will know: it runs again, and so do the quick steps whose
        page it shares. ``committed``: what it returned is on record, and nothing has come of it yet. Raises AssertionError at the
        end of the block if that has not happened, AppError for what is no step, InputError.
        """
        points = {"before": before, "after": after, "committed": committed}
        given = [(point, step) for point, step in points.items() if step is not None]
        if len(given) != 1 or times < 1:
            raise InputError(
                "crash takes one of before=, after= and committed=, and times=, at least 1: crash(after=charge)"
            )
        crash = Crash(self.app, *given[0], times)  # type: ignore[arg-type]
        self._crashes.append(crash)
        try:
            with crash.armed():
                yield crash
        finally:
            self._crashes.remove(crash)

    def history(self, handle: Handle) -> History:
        """What is recorded of a linear workflow: of one that ended while this cluster ran it, or of one that stands still.

        For ``check_replay``, in a later version of the code. Raises UnknownWorkflow.
        """
        ended = self._ended.get(handle.id) if handle.state().status not in ("running", "stuck") else None
        known = (
            histories.standing(self.app, handle.id) if ended is None else histories.of_ended(self.app, handle.id, ended)
        )
        if known is None:
            raise UnknownWorkflow(
                f"workflow {short_id(handle.id)}… ('{handle.workflow}') has no history here: it did not end in this cluster,"
                " or has not been run yet; call cluster.run() first"
            )
        return known

    # Help.

    @property
    def _connection(self) -> sql.Connection:
        return self.app.client.connection()

    @property
    def _steps(self) -> int:
        return 0 if self._runner is None else self._runner.consumer.steps

    def _at_work(self) -> Runner:
        if self._runner is None:
            self._runner = Runner(self.app)
        return self._runner

    def _move(self, to: datetime) -> int:
        sql.set_clock(self._connection, to)
        self._see_clock()
        return self.run()

    def _see_clock(self) -> None:
        self.app.clock.seen(side_statements.now(self._connection))

    def _bury(self) -> None:
        """What the server and the cluster do about a process that died."""
        for crash in self._crashes:
            crash.stop()
        if self._runner is not None:
            self._runner.consumer.reconnect()
        self._stop()
        for crash in self._crashes:
            crash.revive()

    def _stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _told(self, handle: Handle) -> str:
        places = [place.place for place in statements.locate(self._connection, handle.id)]
        return f"workflow {short_id(handle.id)}… ('{handle.workflow}') is {places[0] if places else 'running'}"

    def _help(self, handle: Handle) -> str:
        names = sql.signals_awaited(self._connection, handle.id)
        if names:
            return f"it waits for a signal: handle.signal({' or '.join(map(repr, names))}, …), then ask again"
        return "see what it waits for, or what its children do"


def cluster(app: App, *, dsn: str | None = None, now: datetime | None = None) -> Cluster:
    """A cluster for tests: ``with testing.cluster(app) as cluster: …``; its database is made for it and dropped at the end.

    Databases are made on a local Postgres that lives as long as this process, or on the server of ``DURABLE_DSN``, never in a
    database that is there. ``dsn``: that of another cluster of the kit that is still open, for two versions of an app on one
    database. ``now``: what its clock shows at first (with a time zone; the real time by default). Raises DatabaseError, InputError.
    """
    return Cluster(app, dsn=dsn, now=now)


@contextmanager
def _bound(app: App, dsn: str) -> Iterator[None]:
    """The app in this database; afterwards it is where it was."""
    before = app.client, app.clock, app.settings, app.secret
    app.client = Client(
        dsn=dsn,
        data=None,
        encode_state=app.encoded_state,
        encode_fork=app.encoded_fork,
        payloads=app.payloads,
    )
    app.clock = StandingClock()
    app.settings = msgspec.structs.replace(app.settings, dead_interval_s=PATIENT_S)
    try:
        yield
    finally:
        app.client.close()
        app.client, app.clock, app.settings, app.secret = before


def _checked(now: datetime) -> datetime:
    if now.utcoffset() is None:
        raise InputError(f"now: {now!r} has no time zone; give one such as datetime(2030, 1, 1, tzinfo=UTC)")
    return now
