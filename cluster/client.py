"""Starting workflows and looking at them, from any process: one connection a thread, opened when it is needed."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from durable_cluster import coordination, schema, side_statements, statements
from durable_cluster.answers import answer_of
from durable_cluster.asynchronous import asynchronous, in_a_thread
from durable_cluster.codec import Payloads, Where, state_of
from durable_cluster.context import short_id
from durable_cluster.database import CONNECTION_LOST, connect_client
from durable_cluster.embedded import EmbeddedPostgres
from durable_cluster.envelope import encode
from durable_cluster.errors import ConnectionFailed, InputError, ResultTimeout, UnknownWorkflow
from durable_cluster.joins import ChildResult, Results
from durable_cluster.notes import Attributes, encoded_attributes
from durable_cluster.polling import pauses
from durable_cluster.replays import KEPT, Replayable
from durable_cluster.settings import checked_name, environment
from durable_cluster.statements import State
from durable_cluster.traceparents import traceparent_of
from durable_cluster.transactions import Transaction, joined

OUTAGE_S_MAX = 30.0
Encode = Callable[..., str]


class Client:
    """The connections of one App, and its ``payloads``.

    ``encode_state``, ``encode_fork``: a state for a step, an input for a fork, as the database gets it, if it fits; see ``App``.
    """

    def __init__(
        self, *, dsn: str | None, data: Path | None, encode_state: Encode, encode_fork: Encode, payloads: Payloads
    ) -> None:
        self.payloads = payloads
        self._dsn = dsn
        self._data = data
        self.encode_state = encode_state
        self.encode_fork = encode_fork
        self._embedded: EmbeddedPostgres | None = None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[tuple[int, threading.Thread, psycopg.Connection[Any]]] = []

    def use(self, dsn: str) -> None:
        """From now on this database: what a cluster's processes say, whatever the program said."""
        self._dsn = dsn

    @property
    def is_embedded(self) -> bool:
        """Whether the database is the local one: no argument and no DURABLE_DSN named another."""
        return not (self._dsn or environment().dsn)

    @property
    def dsn(self) -> str:
        """The database's DSN. If nothing else was named: the local Postgres, started and with the schema in it."""
        with self._lock:
            known = self._dsn or environment().dsn
            if known:
                return known
            if self._embedded is None:
                here = environment()
                embedded = EmbeddedPostgres(self._data or here.data, here.pg_bin)
                schema.install_if_needed(embedded.start())
                self._embedded = embedded
            return self._embedded.dsn

    def connection(self) -> psycopg.Connection[Any]:
        """This thread's connection. Never one inherited over a fork: closing that would end the parent's session."""
        known, pid = getattr(self._local, "connection", None), getattr(self._local, "pid", None)
        if known is None or pid != os.getpid() or known.closed or known.broken:
            known = connect_client(self.dsn, name="durable-cluster client")
            self._local.connection, self._local.pid = known, os.getpid()
            with self._lock:
                self._keep(known)
        return known

    def joining(self, tx: Transaction | None) -> statements.Connection:
        """The connection of a call that was given ``tx``: that one, or this thread's. Raises InputError for what is none."""
        return self.connection() if tx is None else joined(tx)

    def _keep(self, connection: psycopg.Connection[Any]) -> None:
        """Remember a connection until ``close``; those of threads that have ended are closed now."""
        here = os.getpid()
        ended = [one for pid, thread, one in self._open if pid == here and not thread.is_alive()]
        self._open = [kept for kept in self._open if kept[0] == here and kept[1].is_alive()]
        self._open.append((here, threading.current_thread(), connection))
        for one in ended:
            one.close()

    def start(
        self,
        workflow: str,
        version: int,
        step: str,
        payload: str,
        *,
        key: str | None,
        begin: timedelta | datetime | None,
        attributes: str | None,
        tx: Transaction | None,
        priority: float = 1,
        traceparent: str | None = None,
    ) -> str:
        """The id of the started (or, by its key, known) workflow."""
        workflow_id, _ = statements.start(
            self.joining(tx),
            workflow,
            version=version,
            step=step,
            payload=payload,
            key=key,
            begin=begin,
            attributes=attributes,
            traceparent=traceparent_of(traceparent),
            priority=priority,
        )
        return workflow_id

    def start_many(
        self,
        workflow: str,
        version: int,
        step: str,
        payloads: Sequence[str],
        *,
        keys: Sequence[str] | None,
        begin: timedelta | datetime | None,
        attributes: Sequence[str] | None,
        tx: Transaction | None,
        priority: float = 1,
        traceparent: str | None = None,
    ) -> list[str]:
        """The ids, in the order of ``payloads``."""
        rows = statements.start_many(
            self.joining(tx),
            workflow,
            version=version,
            step=step,
            payloads=payloads,
            keys=keys,
            begin=begin,
            attributes=attributes,
            traceparent=traceparent_of(traceparent),
            priority=priority,
        )
        return [workflow_id for workflow_id, _ in rows]

    def by_key(self, workflow: str, key: str) -> Handle:
        """The handle of the workflow with ``key``. Raises UnknownWorkflow."""
        found = statements.find(self.connection(), workflow, key)
        if found is None:
            raise UnknownWorkflow(f"no workflow '{workflow}' with the key {key!r}")
        return Handle(self, workflow, found)

    def by_id(self, workflow_id: str) -> Handle:
        """The handle of the workflow with this whole id. Raises UnknownWorkflow."""
        if re.fullmatch("[0-9a-f]{32}", workflow_id):
            state = statements.state_of(self.connection(), workflow_id)
            if state is not None:
                return Handle(self, state.workflow, workflow_id)
        raise UnknownWorkflow(f"no workflow with the id {short_id(workflow_id)}…")

    def children(self, parent_id: str, first: int, limit: int) -> list[ChildResult]:
        """So many of the children that a workflow spawned last, from number ``first`` on."""
        found = coordination.children_of(self.connection(), [parent_id], first=first, limit=limit)[parent_id]
        return [self.payloads.child(child) for child in found]

    def close(self) -> None:
        """Close every connection of this process, then let go of the local Postgres."""
        with self._lock:
            connections, self._open = self._open, []
            embedded, self._embedded = self._embedded, None
        for pid, _, connection in connections:
            if pid == os.getpid():  # one inherited over a fork is the parent's to close
                connection.close()
        if embedded is not None:
            embedded.stop()


class Handle(Replayable):
    """A started workflow. ``id`` is a capability: whoever holds it can read the result."""

    def __init__(self, client: Client, workflow: str, workflow_id: str) -> None:
        self._client = client
        self.workflow = workflow
        self.id = workflow_id
        self._away_since: float | None = None

    def __repr__(self) -> str:
        return f"<Handle {self.workflow} {short_id(self.id)}…>"

    def state(self) -> State:
        """Status, times and output. Raises UnknownWorkflow, also while the starting transaction has not committed; CodecError."""
        state = self._state()
        if state.output is None:
            return state
        held = msgspec.json.decode(state.output)
        value = self._ended(state.status, held)
        return state if value is held else msgspec.structs.replace(state, output=encode(value).decode())

    def status(self) -> str:
        """'running', 'stuck' (it has a dead letter), 'completed', 'failed' or 'cancelled'."""
        return self._state().status

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, at most ``timeout`` seconds, and return the output (plain JSON values).

        Raises WorkflowFailed, WorkflowCancelled, ResultTimeout, WorkflowStuck while a dead letter stands for it, and CodecError for
        an output that cannot be read here. Reads only: every 2 to 20 ms for the first second, then up to every 250 ms. A server
        that is away for less than 30 s is waited for.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for pause in pauses():
            known = self._outcome()
            if known is not None:
                return self._answer(*known)
            time.sleep(self._pause(pause, deadline, timeout))
        raise AssertionError("unreachable: pauses never end")

    async def wait(self, timeout: float | None = None) -> Any:
        """As ``result``, without blocking the event loop."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for pause in pauses():
            known = await in_a_thread(self._outcome)
            if known is not None:
                return self._answer(*known)
            await asyncio.sleep(self._pause(pause, deadline, timeout))
        raise AssertionError("unreachable: pauses never end")

    def signal(
        self,
        name: str,
        payload: Any = None,
        *,
        key: str | None = None,
        token: str | None = None,
        actor: str | None = None,
        tx: Transaction | None = None,
    ) -> None:
        """Send a signal (``payload``: JSON) to the workflow, which waits for it now or later; with ``tx`` in that transaction.

        ``key``: of signals with one key the first counts. ``token``: what the wait demands, if it does. ``actor``: who sends it.
        Raises UnknownWorkflow for a workflow that has ended, and for a wrong or used token; InputError, CodecError.
        """
        checked_name("signal", name)
        try:
            encoded = self._client.payloads.coded(encode(payload), self._where("signal"))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the payload of signal '{name}' is not JSON: {error}") from error
        where = self._client.joining(tx)
        side_statements.signal(where, self.id, name, encoded.decode(), key=key, token=token, actor=actor)

    def cancel(
        self,
        reason: str = "cancelled",
        *,
        actor: str | None = None,
        cascade: bool = True,
        tx: Transaction | None = None,
    ) -> bool:
        """Ask the workflow to end: its ``on_cancel`` step runs in place of its next one. Whether it lived.

        ``cascade``: its children too, and theirs.

        Reaches steps that are queued, sleeping, waiting, running beside the pages, and dead letters; a step that runs in its page
        ends first. With ``tx`` the cancel is sent in that transaction. Raises UnknownWorkflow, InputError.
        """
        where = self._client.joining(tx)
        return side_statements.cancel(where, self.id, reason=reason, actor=actor, cascade=cascade)

    def set_priority(self, priority: float) -> bool:
        """A weight from 0.1 to 10 (1 is usual) from its next step on. Whether the workflow lives. Raises InputError."""
        return coordination.set_priority(self._client.connection(), [self.id], priority) > 0

    def pause(self, *, actor: str | None = None) -> bool:
        """From its next step on the workflow stands still, until ``resume``. Whether that is new.

        Signals, timers and cancels still reach it. The database role has to be an operator. Raises UnknownWorkflow.
        """
        return coordination.pause(self._client.connection(), "workflow", self.id, actor=actor)

    def resume(self, *, actor: str | None = None) -> bool:
        """Go on after a pause. Whether there was one. Raises UnknownWorkflow."""
        return coordination.resume(self._client.connection(), "workflow", self.id, actor=actor) is not None

    def set_attributes(
        self, attributes: Attributes, *, actor: str | None = None, tx: Transaction | None = None
    ) -> None:
        """Change what the workflow is found by: the given names (texts, numbers, booleans), None takes one away.

        Seen once a cluster has come by; with ``tx`` sent in that transaction. Raises UnknownWorkflow, InputError.
        """
        where = self._client.joining(tx)
        side_statements.set_attributes(where, self.id, encoded_attributes(attributes), actor=actor)

    def attributes(self) -> dict[str, Any]:
        """What it is found by."""
        found: dict[str, Any] = msgspec.json.decode(side_statements.attributes_of(self._client.connection(), self.id))
        return found

    def progress(self) -> Any:
        """What it last published with ``ctx.set_progress`` (plain JSON values); None if it never did. Raises CodecError."""
        published = side_statements.progress_of(self._client.connection(), self.id)
        return (
            None if published is None else self._client.payloads.value(msgspec.Raw(published), self._where("progress"))
        )

    def children(self) -> Results:
        """The children that it spawned last, and what became of them."""
        return Results(partial(self._client.children, self.id))

    def retry(self, state: Any = KEPT) -> None:
        """Take a stuck workflow up again where it stopped: the same step, its attempts counted anew, its history kept.

        ``state``: an edited one in place of the state as it was; it has to fit the step, if this program knows it. The database
        role has to be an operator. Raises UnknownWorkflow when there is no dead letter (any more), and InputError; nothing has
        changed then.
        """
        connection = self._client.connection()
        if state is KEPT:
            side_statements.retry_dead_letter(connection, self.id)
            return
        known = statements.outcome(connection, self.id)
        if known is None or known[0] != "stuck":
            raise UnknownWorkflow(f"workflow {short_id(self.id)}… ('{self.workflow}') has no dead letter to retry")
        letter = msgspec.json.decode(known[1])
        where = state_of(self.workflow, self.id, letter["seq"], letter["attempt"])
        payload = self._client.encode_state(self.workflow, letter["step"], state, where)
        side_statements.retry_dead_letter(connection, self.id, state=payload, seq=letter["seq"])

    def __await__(self) -> Generator[Any, None, Any]:
        return self.wait().__await__()

    state_async = asynchronous(state)
    status_async = asynchronous(status)
    progress_async = asynchronous(progress)
    attributes_async = asynchronous(attributes)
    signal_async = asynchronous(signal)
    cancel_async = asynchronous(cancel)
    set_attributes_async = asynchronous(set_attributes)
    set_priority_async = asynchronous(set_priority)
    pause_async = asynchronous(pause)
    resume_async = asynchronous(resume)
    retry_async = asynchronous(retry)

    def _where(self, kind: str) -> Where:
        return Where(self.workflow, kind, self.id)

    def _state(self) -> State:
        state = statements.state_of(self._client.connection(), self.id)
        if state is None:
            raise UnknownWorkflow(f"no workflow with the id {short_id(self.id)}…")
        return state

    def _ended(self, status: str, held: Any) -> Any:
        return self._client.payloads.ended(self.workflow, self.id, status, held)

    def _answer(self, status: str, output: str) -> Any:
        return answer_of(self.workflow, self.id, status, self._ended(status, msgspec.json.decode(output)))

    def _outcome(self) -> tuple[str, str] | None:
        """Status and output, or None; also while the server is away, for so long as a restart or a failover may take."""
        try:
            known = statements.outcome(self._client.connection(), self.id)
        except (ConnectionFailed, *CONNECTION_LOST):
            self._away_since = self._away_since or time.monotonic()
            if time.monotonic() - self._away_since > OUTAGE_S_MAX:
                raise
            return None
        self._away_since = None
        return known

    def _pause(self, pause: float, deadline: float | None, timeout: float | None) -> float:
        if deadline is None:
            return pause
        left = deadline - time.monotonic()
        if left <= 0:
            raise ResultTimeout(
                f"workflow {short_id(self.id)}… ('{self.workflow}') did not end within {timeout} s; it goes on: ask again, or"
                f" see 'durable-cluster show {short_id(self.id)}'"
            )
        return min(pause, left)
