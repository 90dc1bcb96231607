"""One workflow as it is told: what was read of it, with payloads decoded and masked, for one who may see so much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from durable_cluster.app import App
from durable_cluster.codec import Where, is_coded
from durable_cluster.context import short_id
from durable_cluster.errors import CodecError
from durable_cluster.ops.coded import CODED
from durable_cluster.ops.console import formats
from durable_cluster.ops.console.formats import Payload
from durable_cluster.ops.console.gantt import Chart, chart
from durable_cluster.ops.console.reading import Path, Reading
from durable_cluster.ops.console.redaction import redacted
from durable_cluster.ops.looks import Descendant, Known
from durable_cluster.replays import recorded
from durable_cluster.statements import Place
from durable_cluster.timeline_statements import Timeline

LANES_MAX = 200
TOLD_CHARS_MAX = 200
AT_CHARS_MAX = 200
UNREAD = "is not for the console's database role, or took the database too long to read"
NOT_FOR_VIEWER = "is not shown to a viewer"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why it is stuck, failed or was cancelled."""

    told: str
    step: str | None = None
    seq: int | None = None
    attempt: int | None = None
    traceback: str = ""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded await, at which a fork can begin. ``value``: on one line; None where it is not for who asks."""

    path: str
    status: str
    value: str | None

    @property
    def at(self) -> str:
        """What a link to fork it says: the path, or where that is long its position alone, which names it as well."""
        return self.path if len(self.path) <= AT_CHARS_MAX else self.path.partition(" ")[0]


class Dossier(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow. ``id`` truncated. A payload that is a text says why it is not shown.

    ``timeline``, ``chart``, ``family``: None where they cannot be read.
    """

    id: str
    known: Known
    places: list[Place]
    timeline: Timeline | None
    chart: Chart | None
    failure: Failure | None
    input: Payload | str
    output: Payload | str | None
    progress: Payload | str | None
    family: list[Descendant] | None
    group: tuple[int, int, int] | None
    points: list[Point]
    points_told: str


class Teller:
    """Tells one who asks. ``is_trusted``: whether payloads are for them; ``names``: masked besides the usual ones."""

    def __init__(self, app: App | None, *, is_trusted: bool, names: Sequence[str]) -> None:
        self._app = app
        self._is_trusted = is_trusted
        self._names = names

    def dossier(self, of: Reading) -> Dossier:
        """What was read, told."""
        workflow = of.known.workflow
        is_completed = of.known.status == "completed"
        return Dossier(
            id=short_id(of.id),
            known=msgspec.structs.replace(of.known, attributes=redacted(of.known.attributes, self._names)),
            places=of.places,
            timeline=of.timeline,
            chart=None if of.timeline is None else self._chart(of, of.timeline),
            failure=self._failure(of),
            input=self._payload(of.input, Where(workflow, "input")),  # it was coded before there was an id
            output=self._payload(of.outcome, Where(workflow, "result", of.id)) if is_completed else None,
            progress=None if of.progress is None else self._payload(of.progress, Where(workflow, "progress", of.id)),
            family=of.family,
            group=of.group,
            points=[self._point(row, has_value=of.has_values) for row in of.paths],
            points_told=of.paths_told,
        )

    def _chart(self, of: Reading, timeline: Timeline) -> Chart:
        last = timeline.finished_at or of.at
        moments = [
            one if one.error is None else msgspec.structs.replace(one, error=redacted(one.error, self._names))
            for one in timeline.moments
        ]
        return chart(moments, first=timeline.started_at, last=max(last, timeline.started_at), lanes_max=LANES_MAX)

    def _failure(self, of: Reading) -> Failure | None:
        if of.known.status not in ("stuck", "failed", "cancelled"):
            return None
        outcome = None if of.outcome is None else msgspec.json.decode(of.outcome)
        said: Any = outcome if of.letter is None else of.letter.details
        if said is None:
            return Failure(told=f"why {UNREAD}")
        if self._app is not None:
            said = self._app.payloads.unveiled(said, Where(of.known.workflow, "failure", of.id))
        said = redacted(said, self._names) if isinstance(said, dict) else {}
        told = str(said.get("reason", "coded" if said else "unknown"))
        return Failure(
            told=told if self._is_trusted else told[:TOLD_CHARS_MAX],
            step=said.get("step"),
            seq=said.get("seq"),
            attempt=said.get("attempt"),
            traceback=str(said.get("traceback") or "") if self._is_trusted else "",
        )

    def _payload(self, text: str | None, where: Where) -> Payload | str:
        """The value as it may be shown, or why it is not."""
        if not self._is_trusted:
            return NOT_FOR_VIEWER
        if text is None:
            return UNREAD
        try:
            value = msgspec.json.decode(text)
            if self._app is not None:
                value = self._app.payloads.value(value, where)
        except CodecError as error:
            return str(error)
        return CODED if is_coded(value) else formats.payload(redacted(value, self._names))

    def _point(self, row: Path, *, has_value: bool) -> Point:
        if not has_value:
            _, path, status, _ = row
            return Point(path=path, status=status, value=None)
        one = recorded(*row)
        if one.status == "open":
            return Point(path=one.path, status=one.status, value="")
        if one.error is not None:
            return Point(path=one.path, status=one.status, value=formats.line(redacted(one.error, self._names)))
        value = "coded" if is_coded(one.value) else formats.line(redacted(one.value, self._names))
        return Point(path=one.path, status=one.status, value=value)
