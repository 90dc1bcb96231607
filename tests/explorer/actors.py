"""An actor: code of the product on a session of its own, which stops before each statement until it is told to go on.

All actors live in one thread. Their connections hand control to the scheduler where any other connection would wait for its
socket, so neither the product's code nor its statements know that they are driven.
"""

from __future__ import annotations

import re
import select
from collections.abc import Callable, Generator
from enum import Enum
from typing import Any

import greenlet
from psycopg.waiting import Ready, Wait

from durable_cluster.database import StepCursor, WorkerConnection, connect
from durable_cluster.handoff import NOBODYS_FAULT

PATIENCE_MS = 2
TRIES_MAX = 10
EVENTS = {Wait.R: select.POLLIN, Wait.W: select.POLLOUT, Wait.RW: select.POLLIN | select.POLLOUT}


class Status(Enum):
    """Whether an actor may go on, waits for another session's lock, or has ended."""

    READY = "ready"
    BLOCKED = "blocked"
    DONE = "done"


class Killed(BaseException):
    """The process of this actor dies here."""


class ActorConnection(WorkerConnection):
    """A worker's connection that asks its actor before each statement; without one it is an ordinary one."""

    actor: Actor | None = None

    def wait(self, gen: Generator[Any, Any, Any], interval: float = 0.0, timeout: float | None = None) -> Any:
        if self.actor is None or self.actor.is_dying:
            return super().wait(gen)
        # Nothing depends on when a transaction begins: its snapshots and locks are its statements'.
        if gen.__name__ != "_enter_gen" and self.actor.is_killed_before(_said_by(gen)):
            self._die(gen)
        return self.actor.complete(gen, self.pgconn.socket)

    def _die(self, gen: Generator[Any, Any, Any]) -> None:
        """What a server does when its client is gone. Then psycopg's own end of a transaction finds none, and is content."""
        self.pgconn.exec_(b"rollback")
        if gen.__name__ == "_exit_gen":
            super().wait(gen)
        raise Killed


def connect_actor(dsn: str, name: str) -> ActorConnection:
    """A session for an actor: as a worker's, with deadlocks found at once and no commit that waits for a disk."""
    connection = connect(dsn, name=name, kind=ActorConnection)
    assert isinstance(connection, ActorConnection)
    connection.cursor_factory = StepCursor
    connection.execute(
        "select set_config('deadlock_timeout', '5ms', false), set_config('synchronous_commit', 'off', false),"
        " set_config('jit', 'off', false), set_config('lock_timeout', '5s', false)"
    )
    return connection


class Actor:
    """``act`` with a session. ``is_mortal``: it may also be killed before any of its statements."""

    def __init__(
        self,
        letter: str,
        act: Callable[[ActorConnection], None],
        connection: ActorConnection,
        *,
        is_mortal: bool,
        is_blocked: Callable[[int], bool],
    ) -> None:
        self.letter = letter
        self.status = Status.READY
        self.error: Exception | None = None
        self.is_mortal = is_mortal
        self.is_dying = False
        self.next_statement = ""
        self._act = act
        self._connection = connection
        self._is_blocked = is_blocked
        self._poll = select.poll()
        self._scheduler = greenlet.getcurrent()
        self._self = greenlet.greenlet(self._live)

    def begin(self) -> None:
        """Run up to the first statement."""
        self._connection.actor = self
        self._self.switch()

    def go_on(self, *, is_killed: bool = False) -> None:
        """Make the next statement, or die before it; come back before the one after it, at a lock, or at the end."""
        self._self.switch(is_killed)

    def look(self) -> None:
        """An actor that is blocked goes on if it no longer is; see ``go_on``."""
        if self._poll.poll(0) or not self._is_blocked(self._connection.info.backend_pid):
            self._self.switch()

    def await_answer(self, seconds: float) -> bool:
        """Whether the statement of a blocked actor is answered in that time: after a deadlock, one is."""
        return bool(self._poll.poll(seconds * 1000))

    # In the actor's own greenlet.

    def is_killed_before(self, statement: str) -> bool:
        """Wait for what the scheduler decides."""
        self.next_statement = statement
        self.is_dying = bool(self._scheduler.switch())
        return self.is_dying

    def complete(self, gen: Generator[Any, Any, Any], descriptor: int) -> Any:
        """The answer of a statement; the scheduler has the floor for as long as it waits for a lock."""
        try:
            wanted = next(gen)
            while True:
                self._poll.register(descriptor, EVENTS[wanted])
                wanted = gen.send(self._answered())
        except StopIteration as end:
            return end.value

    def _answered(self) -> Ready:
        while not (events := self._poll.poll(PATIENCE_MS)):
            if self._is_blocked(self._connection.info.backend_pid):
                self.status = Status.BLOCKED
                self._scheduler.switch()
                self.status = Status.READY
        is_read, is_written = events[0][1] & ~select.POLLOUT, events[0][1] & select.POLLOUT
        return Ready.RW if is_read and is_written else Ready.R if is_read else Ready.W

    def _live(self) -> None:
        try:
            self._try_to_act()
        except Killed:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._connection.actor = None
            if not self._connection.closed:
                self._connection.rollback()
            self.status = Status.DONE

    def _try_to_act(self) -> None:
        """Conflicts are nobody's fault: the product tries again, and so does an actor."""
        for tries_left in reversed(range(TRIES_MAX)):
            try:
                self._act(self._connection)
                return
            except NOBODYS_FAULT:
                if not tries_left:
                    raise


def _said_by(gen: Generator[Any, Any, Any]) -> str:
    """A few words for the statement that a generator of psycopg's makes."""
    frame = gen.gi_frame
    query = frame.f_locals.get("query") if frame is not None else None
    if query is None:
        return {"_exit_gen": "end of transaction", "_commit_gen": "commit", "_rollback_gen": "rollback"}.get(
            gen.__name__, gen.__name__
        )
    text = query if isinstance(query, str) else query.decode() if isinstance(query, bytes) else str(query)
    called = re.search(r"(durable|pgque)\.\w+", text)
    return called[0] if called else " ".join(text.split())[:60]


def is_a_deadlock_of(actors: list[Actor]) -> bool:
    """Whether nobody can go on and somebody has not ended."""
    return all(actor.status is not Status.READY for actor in actors) and any(
        actor.status is Status.BLOCKED for actor in actors
    )
