"""One consumer: fire timers, claim a window of a shard, run its pages, tend the steps beside them, wait when there is nothing.

All of it in one thread and on one connection; slow handlers have threads of their own (see ``beside``).

A process that lost a window is a new incarnation: it comes back with a new owner's bits and a new name, because the engine
still knows the old name as the holder of the window that somebody else now reads.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.errors import ObjectInUse

from durable_cluster import schema, side_statements, statements
from durable_cluster.aside import Aside, OnHang
from durable_cluster.beside import Beside
from durable_cluster.database import connect_worker
from durable_cluster.envelope import AmbiguousPage, decode_page, header_of
from durable_cluster.errors import BatchLost
from durable_cluster.executor import Task
from durable_cluster.handoff import NOBODYS_FAULT, Window
from durable_cluster.listener import POLL_S_MIN, Listener
from durable_cluster.page import PageRunner
from durable_cluster.settings import Settings
from durable_cluster.timed import page_of, steps_of

if TYPE_CHECKING:
    from durable_cluster.machine import Machine
    from durable_cluster.telemetry import Tracing

logger = logging.getLogger("durable_cluster.consumer")

AFTERMATH_POLL_S = 0.25
TURN_S = 0.25
LINES_MIN = 16


class Consumer:
    """Reads one home shard, and any shard it is told to adopt."""

    def __init__(
        self,
        dsn: str,
        shard: int,
        machines: Mapping[str, Machine],
        settings: Settings,
        *,
        on_hang: OnHang | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.home = shard
        self.shards = [shard]
        self.owner = 0
        self.steps = 0
        self._dsn = dsn
        self._machines = machines
        self._settings = settings
        self._limits = {"lines_max": settings.page_lines_max, "bytes_max": settings.page_bytes_max}
        self._lines_min = min(LINES_MIN, settings.page_lines_max)
        self._dead = timedelta(seconds=settings.dead_interval_s)
        self._connection = self._connected("starting")
        self._listener = Listener(self._connection, settings, shards=schema.installed_shards(self._connection) or 1)
        self._steps = steps_of(tracing, machines, settings)
        beside = self._beside = Beside(settings, steps=self._steps)
        secret = side_statements.secret(self._connection)
        for machine in machines.values():
            machine.app.secret = secret
        self._see_clock()
        self._pages = PageRunner(self._connection, machines, settings, beside, steps=self._steps)
        self.meters = self._pages.meters
        self._aside = Aside(self._connection, machines, settings, beside=beside, pages=self._pages, on_hang=on_hang)
        self._joined: list[int] = []
        self._has_appended: dict[int, bool] = {}
        self._open: dict[int, list[int]] = {}
        self._released: set[int] = set()
        self._seen_due_s: float | None = None
        self._has_looked = False
        self._probe_takeover_at = self._sweep_at = 0.0
        self._member = ""
        self.reincarnate()

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The one connection; what runs between pages may use it."""
        return self._connection

    @property
    def inline(self) -> Task | None:
        """The step that runs in the consumer's own thread now; another thread may ask."""
        return self._pages.inline

    def reincarnate(self) -> None:
        """Take new owner's bits and a new member name."""
        new = secrets.randbits(63)
        if self.owner:  # until that went through, it is who it was
            statements.reincarnate(self._connection, self.owner, new)
        self.owner = self._aside.owner = new
        self._member = f"c{new:016x}"
        self._joined = []
        self._open.clear()
        self._name_session()

    def reconnect(self) -> None:
        """Go on, as the same owner, on a new connection after the old one was lost. Raises ConnectionFailed, OperationalError.

        Whether a commit that was on its way went through is asked of the database; nothing is handed on again unasked.
        """
        self._connection.close()
        self._connection = self._connected(self._member)
        self._open = {}
        for shard, batch in statements.holdings(self._connection, self.owner):
            self._open.setdefault(shard, []).append(batch)
        self._see_clock()
        self._pages.use(self._connection)
        self._aside.use(self._connection)
        self._listener.use(self._connection)
        self._joined = []  # maintenance may have swept the name of a process that was away for long
        self._has_appended.clear()
        self._has_looked = False
        self._probe_takeover_at = self._sweep_at = 0.0

    def _connected(self, member: str) -> psycopg.Connection[Any]:
        return connect_worker(self._dsn, name=f"durable-cluster shard {self.home} {member}", settings=self._settings)

    def _see_clock(self) -> None:
        now_s = side_statements.now(self._connection)
        for machine in self._machines.values():
            machine.app.clock.seen(now_s)

    def _name_session(self) -> None:
        self._connection.execute(
            "select set_config('application_name', %s, false)", (f"durable-cluster shard {self.home} {self._member}",)
        )

    def adopt(self, shard: int) -> None:
        """Read ``shard`` too, beginning with the windows that its dead consumer left."""
        if shard not in self.shards:
            self.shards = [*self.shards, shard]
        self._has_looked = False
        self._released.discard(shard)
        self._probe_takeover_at = 0.0
        self._aside.look_soon()

    def release(self, shard: int) -> None:
        """Stop reading ``shard``, unless it is home: after one more claim, and when the window that gave is read to its end."""
        if shard != self.home:
            self._released.add(shard)

    def _forget_released(self) -> None:
        gone = self._released - self._open.keys()
        if not gone:
            return
        self._listener.leave(gone)
        self._released -= gone
        self.shards = [shard for shard in self.shards if shard not in gone]

    def work(self, should_stop: Callable[[], bool], on_page: Callable[[], None]) -> bool:
        """One claim on each of its shards and the pages of what that gave, for a quarter of a second. Whether there was anything.

        With several shards it is one page each, by turns: however large the window of one, the others go on, and so do timers and
        detached steps. ``should_stop`` is asked between pages; ``on_page`` is called before each. What is left of a window stays
        its owner's, and the next call goes on with it. A claim takes a transaction id: an idle caller waits for ``wait``.
        """
        self._listener.unmark()
        self._has_looked = False
        turn_ends = time.monotonic() + TURN_S

        def is_over() -> bool:
            return len(self.shards) > 1 or time.monotonic() > turn_ends or should_stop()

        found = [self._drain(shard, is_over, on_page) for shard in tuple(self.shards)]
        has_swept = self._sweep()
        self._forget_released()
        return bool(self._aside.tend()) or has_swept or any(found)

    def wait(self, idle_s: float, wakeups: Sequence[int] = ()) -> bool:
        """Wait until there may be work, or one of the file descriptors ``wakeups`` is ready, or a pause is over.

        ``idle_s``: seconds since the last work, which set the pause: milliseconds at first (``busy_poll_s``), then up to one second
        with the shards marked, so that appenders notify; never longer than until the next timer is due, which is fired here.
        Whether there is work.
        """
        listener = self._listener
        if idle_s > listener.awake_s and listener.mark(self.shards):
            self._has_looked = False  # what was appended before the mark, nobody has told
        has_work, due_s = (False, self._seen_due_s) if self._has_looked else self._look()
        if not has_work:
            self._forget_released()
            pause_s = listener.pause_s(idle_s)
            if due_s is not None:
                pause_s = min(pause_s, max(POLL_S_MIN, due_s))
            told = listener.pause(pause_s, (self._beside.fileno(), *wakeups))
            has_work = bool(self._aside.tend(is_taking=False))
            if told & (listener.marked | self._open.keys()):
                listener.woken(self.meters.newest_commit_s)
                self._aside.look_soon()
                has_work = True
            else:
                found, self._seen_due_s = self._look()
                has_work |= found
        self._has_looked = not has_work  # at once the next call would only see the same
        return has_work

    def expects_work(self, within_s: float) -> bool:
        """Whether there is work, a detached step runs here, a timer is due in so many seconds, or the dead left something."""
        has_work, due_s = self._look()
        is_due = due_s is not None and due_s <= within_s
        return has_work or self._aside.is_busy or is_due or side_statements.has_orphans(self._connection)

    def close(self, *, grace_s: float = 0.0) -> None:
        """Give detached steps ``grace_s`` seconds to end, set free what it holds, and close the connection; safe twice."""
        if self._connection.closed:
            return
        try:
            self._listener.unmark()
            stop_at = time.monotonic() + grace_s
            while self._aside.is_busy and time.monotonic() < stop_at:
                self._aside.tend(is_taking=False)
                self._listener.pause(
                    min(AFTERMATH_POLL_S, max(0.0, stop_at - time.monotonic())), (self._beside.fileno(),)
                )
            statements.abandon(self._connection, self.owner)
            for shard in self._joined:
                self._leave(shard)
        except psycopg.Error as error:
            logger.warning("shard %d: its windows could not be handed back: %s", self.home, type(error).__name__)
        self._beside.close()
        for newest in self._machines.values():
            for machine in newest.versions.values():
                machine.forget_all()
        self._connection.close()

    def _leave(self, shard: int) -> None:
        try:
            statements.leave_shard(self._connection, shard, self._member)
        except ObjectInUse:
            logger.debug("shard %d: a window still bears this name; maintenance sweeps it later", shard)

    def _drain(self, shard: int, should_stop: Callable[[], bool], on_page: Callable[[], None]) -> bool:
        """Run the pages of the window that is still open, or of a new one. A living owner's window is nobody else's."""
        try:
            batches = self._open.get(shard)
            text = (self._rescued(shard) or self._read(batches[0])) if batches else self._claim(shard)
            if text is None:
                return False
            while text is not None:
                on_page()
                text = self._run_page(shard, text, should_stop)
        except BatchLost as lost:
            logger.warning("shard %d: %s", shard, lost)
            self.reincarnate()
        except NOBODYS_FAULT as conflict:
            logger.info("shard %d: %s in a claim; again", shard, type(conflict).__name__)
        return True

    def _run_page(self, shard: int, text: str, should_stop: Callable[[], bool]) -> str | None:
        """Run one page; the text of the window's next, or None when it is finished or we are to stop."""
        batch = header_of(text).batch
        batches = self._open.setdefault(shard, [])
        if batch not in batches:
            batches.append(batch)
        try:
            page = decode_page(text)
        except AmbiguousPage:
            alone = self._read(batch, lines_max=1)
            if alone is None:
                return None
            page = decode_page(alone)
        try:
            with page_of(self._steps, shard, page):
                done = self._pages.run(Window(shard=shard, owner=self.owner), page)
        except NOBODYS_FAULT as conflict:
            logger.info("shard %d: %s; the page is read again", shard, type(conflict).__name__)
            return None if should_stop() else self._read(batch)
        self.steps += done.steps
        self._fit_pages(done.steps, len(page.lines))
        self._has_appended[shard] = done.appended > 0
        batches.remove(batch)
        if not done.is_window_finished:
            batches.append(batch)  # several windows are read by turns
        elif not batches:
            del self._open[shard]
        return None if done.is_window_finished or should_stop() else self._read(batch)

    def _fit_pages(self, begun: int, read: int) -> None:
        """Read about as many lines a page as begin within its time: what is left of it would be read and decoded again."""
        lines_max = self._limits["lines_max"]
        if begun < read:
            self._limits["lines_max"] = max(self._lines_min, min(lines_max, 4 * begun))
        elif read == lines_max:
            self._limits["lines_max"] = min(self._settings.page_lines_max, 2 * lines_max)

    def _read(self, batch: int, *, lines_max: int | None = None) -> str | None:
        limits = self._limits if lines_max is None else {**self._limits, "lines_max": lines_max}
        return statements.page(self._connection, batch=batch, owner=self.owner, **limits)

    def _rescued(self, shard: int) -> str | None:
        """While a window is open, which may be long: a page of a silent owner's, if it is time to look for one."""
        if not self._is_probing(shard):
            return None
        return statements.rescue(self._connection, shard, owner=self.owner, dead_interval=self._dead, **self._limits)

    def _claim(self, shard: int) -> str | None:
        if shard not in self._joined:
            statements.join_shard(self._connection, shard, self._member)
            self._joined.append(shard)
        is_probing = self._is_probing(shard)
        began = time.perf_counter()
        text = statements.claim(
            self._connection,
            shard,
            member=self._member,
            owner=self.owner,
            dead_interval=self._dead if is_probing else None,
            is_expected=self._has_appended.pop(shard, False),
            **self._limits,
        )
        if text is not None:
            self.meters.claimed(shard, began)
        return text

    def _is_probing(self, shard: int | None = None) -> bool:
        """Whether it is time to look for windows of silent owners; a while later again, once the last of its shards was it."""
        is_due = time.monotonic() >= self._probe_takeover_at
        if is_due and shard == self.shards[-1]:
            self._probe_takeover_at = time.monotonic() + self._settings.takeover_probe_s
        return is_due

    def _look(self) -> tuple[bool, float | None]:
        """Whether there is anything to do, and in how many seconds the next timer is due. What is due is fired."""
        is_probing = self._is_probing()
        has_work, due_s = statements.look(
            self._connection,
            self.shards,
            dead_interval=self._dead if is_probing else None,
            may_take=self._aside.room > 0,
            with_suspect=self._aside.may_take_suspect,
        )
        if due_s is not None and due_s <= 0:
            self._sweep_at = 0.0
            has_work |= self._sweep()
        if has_work:
            self._aside.look_soon()  # and a claim follows, which probes for takeovers if it is time
        elif is_probing:
            self._probe_takeover_at = time.monotonic() + self._settings.takeover_probe_s
        return has_work, due_s

    def _sweep(self) -> bool:
        """Fire the timers that are due, if it is time to look. Whether there were any."""
        now = time.monotonic()
        if now < self._sweep_at:
            return False
        self._sweep_at = now + self._settings.sweep_s
        try:
            fired = side_statements.sweep(self._connection)
        except NOBODYS_FAULT as conflict:
            logger.info("%s in a sweep; again", type(conflict).__name__)
            return False
        if fired:
            self._sweep_at = 0.0
        return fired > 0
