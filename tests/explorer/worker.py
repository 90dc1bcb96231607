"""A consumer without its clockwork: it claims, runs pages and takes detached steps when told to, by the product's own code."""

from __future__ import annotations

import secrets
from contextlib import suppress
from datetime import timedelta

from psycopg.errors import ObjectInUse

from durable_cluster import App, Settings, executor, side_statements, statements
from durable_cluster.beside import Beside
from durable_cluster.envelope import Envelope, decode_line, decode_page
from durable_cluster.errors import BatchLost
from durable_cluster.executor import Task
from durable_cluster.handoff import Answer, Window
from durable_cluster.page import PageRunner
from durable_cluster.side_results import Detached, Slot
from explorer.actors import ActorConnection

SHARD = 0
LINES_MAX = 1_000
BYTES_MAX = 1 << 20
AT_ONCE = timedelta(0)
SETTINGS = Settings(page_window_ms=10_000)


class _Pages(PageRunner):
    """There is no room for steps beside the pages: whoever takes such a step runs it."""

    def _begin(self, envelope: Envelope | None) -> Slot:
        slot = super()._begin(envelope)
        return Detached(slot.envelope, None) if isinstance(slot, Task) and slot.step.is_beside else slot


class Worker:
    """One incarnation after the other on one session. ``has_fallen``: this one was killed, or lost a window."""

    def __init__(self, connection: ActorConnection, app: App) -> None:
        self.connection = connection
        self.has_fallen = False
        self._app = app
        self._beside = Beside(SETTINGS)
        self._become()

    def _become(self) -> None:
        self.owner = secrets.randbits(63)
        self._member = f"c{self.owner:016x}"
        self._pages = _Pages(self.connection, self._app.machines, SETTINGS, self._beside)
        self.has_fallen = False
        statements.join_shard(self.connection, SHARD, self._member)

    def renew(self, *, is_seen: bool = True) -> None:
        """After a fall: come back as somebody else. ``is_seen``: what was held is free at once, else when others miss its owner."""
        if not self.has_fallen:
            return
        if is_seen:
            statements.abandon(self.connection, self.owner)
            with suppress(ObjectInUse):  # while it holds a window
                statements.leave_shard(self.connection, SHARD, self._member)
        self._become()

    def claim(self, *, takes_over: bool = False, lines_max: int = LINES_MAX) -> str | None:
        """The first page of a window, and how long its pages are. ``takes_over``: every other owner is taken for dead."""
        self._limits = {"lines_max": lines_max, "bytes_max": BYTES_MAX}
        return statements.claim(
            self.connection,
            SHARD,
            member=self._member,
            owner=self.owner,
            dead_interval=AT_ONCE if takes_over else None,
            **self._limits,
        )

    def work(self, *, takes_over: bool = False, lines_max: int = LINES_MAX) -> bool:
        """Claim a window and run it to its end; whether there was one."""
        self.has_fallen = True  # until it comes back
        try:
            text = self.claim(takes_over=takes_over, lines_max=lines_max)
            if text is not None:
                self.run(text)
        except BatchLost:
            return True
        self.has_fallen = False
        return text is not None

    def rescue(self) -> str | None:
        """The first page of a window of somebody else, who is taken for dead. For a worker that has one open: it must not claim."""
        self._limits = {"lines_max": LINES_MAX, "bytes_max": BYTES_MAX}
        return statements.rescue(self.connection, SHARD, owner=self.owner, dead_interval=AT_ONCE, **self._limits)

    def run(self, text: str) -> None:
        """Run a claimed window from this page on. A lost one is forgotten, and so is the incarnation."""
        self.has_fallen = True
        try:
            while True:
                page = decode_page(text)
                if self._pages.run(Window(shard=SHARD, owner=self.owner), page).is_window_finished:
                    break
                text = statements.page(self.connection, batch=page.header.batch, owner=self.owner, **self._limits)
        except BatchLost:
            return
        self.has_fallen = False

    def take(self) -> list[Envelope]:
        """Detached steps that nobody runs, this worker's now."""
        taken = side_statements.take_detached(self.connection, self.owner, limit=100, with_suspect=True)
        return [decode_line(line) for _, line, _, _ in taken]

    def complete(self, envelopes: list[Envelope]) -> None:
        """Run detached steps and hand on those that are still this worker's."""
        answers = []
        for envelope in envelopes:
            task = executor.resolve(self._app.machines, envelope, limit_s=SETTINGS.unroutable_limit_s)
            assert isinstance(task, Task)
            answers.append(Answer(envelope, SHARD, executor.run(task, executor.context_of(task))))
        if answers:
            self._pages.complete(self.owner, answers)
