"""What a handle can do again: start a workflow over, start a new one from a point of it, and read what it has behind it."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Self

import msgspec

from durable_cluster import replay_statements, timeline_statements
from durable_cluster.asynchronous import asynchronous
from durable_cluster.errors import InputError
from durable_cluster.timeline_statements import Timeline
from durable_cluster.transactions import Transaction

if TYPE_CHECKING:
    from durable_cluster.client import Client

HISTORY_MAX = 1_000
KEPT: Any = object()
"""What it was, and nothing in its place: None is a state, and an input."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An await of a linear workflow, and what it came to.

    ``number``: from 1, in the order of their ends. ``path``: where in the code, and what was asked for ("3 charge", in branches
    "1.2 charge"): what ``fork`` takes. ``status``: 'completed', 'failed' (``error`` says why), 'cancelled' (from here on it
    cleaned up), or 'open': here it stands; the path is "now" where it may wait for several. ``value``: plain JSON values; None for
    all others.
    """

    number: int
    path: str
    status: str
    value: Any = None
    error: str | None = None

    @property
    def name(self) -> str:
        """What was asked for: the step's name, "sleep", "wait_for(approved)", "child"."""
        return self.path.partition(" ")[2] or self.path


class Replayable:
    """The part of a handle that starts again. Its database role has to be an operator, for ``history`` a client."""

    _client: Client
    _away_since: float | None
    workflow: str
    id: str

    def replay(self, *, actor: str | None = None, tx: Transaction | None = None) -> Self:
        """Start over, with the same input and nothing of what was recorded; the handle of what runs now.

        A stuck workflow does so itself, under its id. Of one that has ended a new one is started, with its input and attributes and
        no key, as the code is now. With ``tx`` in that transaction. Raises InvalidState for one that goes on by itself (cancel it
        first) or has children alive, UnknownWorkflow, InputError.
        """
        where = self._client.joining(tx)
        workflow_id, _ = replay_statements.replay(where, self.id, actor=actor)
        return self._of(workflow_id)

    def fork(
        self,
        at: str | None = None,
        input: Any = KEPT,
        *,
        actor: str | None = None,
        tx: Transaction | None = None,
    ) -> Self:
        """Start a new workflow from a point of this one, which goes on, or stays, as it is; the handle of the new one.

        ``at``: a path of ``history()``, or its position alone ("3"): what was recorded before that await is kept, that and what
        follows happens anew. Of a machine: a step; ``input`` is its state then, and may be left out if it is stuck there. None:
        from the beginning. "now": with all that is recorded. ``input``: in place of the workflow's own. Signals that nobody awaited
        are not taken along; children that were started before have to have ended. Raises InvalidState, UnknownWorkflow, InputError
        (for an unknown path it names those that there are).
        """
        encoded = None if input is KEPT else self._client.encode_fork(self.workflow, at, input)
        where = self._client.joining(tx)
        return self._of(replay_statements.fork(where, self.id, at=at, input=encoded, actor=actor))

    def history(self, limit: int = HISTORY_MAX) -> list[Recorded]:
        """The recorded awaits of a linear workflow, in the order in which they ended, the newest ``limit`` of them.

        Of one that has ended: if its memo was kept (see ``App.workflow``), else InvalidState. A machine records none. What a turn
        of ``loop`` or a ``scope`` recorded is forgotten with it. Raises UnknownWorkflow.
        """
        if limit < 1:
            raise InputError(f"history(limit={limit}): it is 1 or more")
        rows = replay_statements.history(self._client.connection(), self.id, limit=limit)
        return [recorded(number, path, status, value) for number, path, status, value in rows]

    def timeline(self) -> Timeline:
        """When each of its steps ran, for how long, which attempt it was, and what it came to; as far as that is recorded.

        Recorded it is where the workflow's kind is declared with ``history=True``, or ``history_sample`` says so; a second or so
        later. Of others: the start, where it stands, the end. No payloads. Raises UnknownWorkflow.
        """
        return timeline_statements.timeline(self._client.connection(), self.id)

    timeline_async = asynchronous(timeline)
    replay_async = asynchronous(replay)
    fork_async = asynchronous(fork)
    history_async = asynchronous(history)

    def _of(self, workflow_id: str) -> Self:
        again = copy(self)
        again.id, again._away_since = workflow_id, None
        return again


def recorded(number: int, path: str, status: str, value: str | None) -> Recorded:
    """A row of ``durable.history``."""
    known: Any = None if value is None else msgspec.json.decode(value)
    if status != "failed":
        return Recorded(number=number, path=path, status=status, value=known)
    kind, message, *_ = known
    return Recorded(number=number, path=path, status=status, error=f"{kind.rpartition('.')[2]}: {message}")
