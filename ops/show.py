"""``list`` and ``show``: which workflows there are, and what is known of one. Ids come truncated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import psycopg

from durable_cluster import schema, search, side_statements, statements
from durable_cluster.app import App
from durable_cluster.codec import Where, is_coded
from durable_cluster.context import SHORT_ID_DIGITS, short_id
from durable_cluster.envelope import encode
from durable_cluster.errors import InvalidState, UnknownWorkflow
from durable_cluster.ops import looks, lookups
from durable_cluster.ops.coded import CODED, app_of, payload_lines
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal, table
from durable_cluster.search import Which
from durable_cluster.statements import Place, State

THEN = {"sleeping": "sleeping", "waiting": "waiting for a signal", "joining": "waiting for its children"}


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``show``. ``places``: where a running workflow stands in the log; ``failure``: of a failed or stuck one.

    ``parent``: whose child it is; ``origin``: what it was replayed or forked from; both truncated.
    """

    id: str
    workflow: str
    version: int
    status: str
    started_at: datetime
    finished_at: datetime | None
    places: list[Place]
    attributes: dict[str, Any] = {}
    progress: Any = None
    output: Any = None
    failure: dict[str, Any] | None = None
    parent: str | None = None
    origin: str | None = None


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A workflow as the database has it. ``id``: whole; ``progress``, ``attributes``: JSON, of which the former may be coded."""

    id: str
    state: State
    places: list[Place]
    progress: str | None
    attributes: str


def list_(terminal: Terminal, target: Target, *, which: Which, limit: int, after: str | None) -> int:
    """Workflows, newest first."""
    with target.opened() as database, database.connect("list") as connection:
        schema.demand_installed(connection)
        found = search.listed(connection, which, limit=limit, after=after)
    rows = [
        (one.id, one.workflow, one.status, moment(one.started_at), _took(one), one.key, _told(one.attributes) or None)
        for one in found
    ]
    lines = table(("id", "workflow", "status", "started", "took", "key", "attributes"), rows)
    terminal.answer(found, lines if found else ["no workflows"])
    if len(found) >= limit:
        terminal.note(f"the newest {len(found):,}; go on with --after {found[-1].cursor}")
    return 0


def show(terminal: Terminal, target: Target, *, prefix: str, app_address: str | None) -> int:
    """One workflow, by its id or the first digits of it; ``app_address``: who reads what is coded."""
    digits = checked_prefix(prefix)
    app = app_of(app_address)
    with target.opened(app=app) as database, database.connect("show") as connection:
        schema.demand_installed(connection)
        workflow_id = whole_id(connection, digits)
        found = read(connection, workflow_id)
        kin = looks.known(connection, workflow_id)
    shown = told(found, app)
    if kin is not None:
        shown = msgspec.structs.replace(shown, parent=kin.parent, origin=kin.origin)
    terminal.answer(shown, _lines(shown))
    return 0


def checked_prefix(text: str) -> str:
    """The hex digits of an id or its beginning. Raises BadUsage."""
    digits = text.strip().lower().replace("-", "").rstrip("…")
    if not re.fullmatch("[0-9a-f]{1,32}", digits):
        raise BadUsage(
            f"'{text[:SHORT_ID_DIGITS]}' is no workflow id: those are up to 32 hex digits; see 'durable-cluster list'"
        )
    return digits


def whole_id(connection: psycopg.Connection[Any], digits: str) -> str:
    """The id that begins with these digits. Raises UnknownWorkflow for none, InvalidState for several."""
    found = lookups.by_prefix(connection, digits)
    if not found:
        raise UnknownWorkflow(
            f"no workflow begins with {short_id(digits)} in this database; see 'durable-cluster list'"
        )
    if len(found) > 1:
        raise InvalidState(ambiguous(found, digits))
    return found[0]


def ambiguous(found: Sequence[str], digits: str, what: str = "workflow") -> str:
    """That these digits mean several, of which as many were looked for as ``lookups.by_prefix`` does, and what to say instead."""
    shorts = list(dict.fromkeys(map(short_id, found)))
    count, more = (f"{len(found)} or more", ", …") if len(found) >= lookups.PREFIXED_MAX else (str(len(found)), "")
    if len(shorts) > 1:
        some = ", ".join(shorts) + more
        return f"{count} {what}s begin with {short_id(digits)} ({some}): give more digits of the one that is meant"
    return (
        f"{count} {what}s have the same first {SHORT_ID_DIGITS} digits, {shorts[0]}: only a whole id tells them apart,"
        " which durable-cluster takes, and the console's API as the header Workflow-Id"
    )


def read(connection: psycopg.Connection[Any], workflow_id: str, *, may_locate: bool = True) -> Found:
    """What the database knows of a workflow. Raises UnknownWorkflow. ``may_locate``: whether the role may see where it stands."""
    state = statements.state_of(connection, workflow_id)
    if state is None:
        raise UnknownWorkflow(f"there is no workflow {short_id(workflow_id)}…")
    # A workflow that ends between the two looks stands nowhere: look again at what became of it.
    is_located = state.status == "running" and may_locate
    places = statements.locate(connection, workflow_id) if is_located else []
    if state.status == "running" and not places:
        state = statements.state_of(connection, workflow_id) or state
    return Found(
        id=workflow_id,
        state=state,
        places=places,
        progress=side_statements.progress_of(connection, workflow_id),
        attributes=side_statements.attributes_of(connection, workflow_id),
    )


def told(found: Found, app: App | None) -> Shown:
    """The same with its payloads read; ``app``: by whose codec. Raises CodecError."""
    state = found.state
    value = None if state.output is None else msgspec.json.decode(state.output)
    progress = None if found.progress is None else msgspec.json.decode(found.progress)
    if app is not None:
        value = app.payloads.ended(state.workflow, found.id, state.status, value)
        progress = app.payloads.value(progress, Where(state.workflow, "progress", found.id))
    is_failed = state.status in ("failed", "stuck", "cancelled")
    return Shown(
        id=short_id(found.id),
        workflow=state.workflow,
        version=state.version,
        status=state.status,
        started_at=datetime.fromisoformat(state.started_at),
        finished_at=None if state.finished_at is None else datetime.fromisoformat(state.finished_at),
        places=found.places,
        attributes=msgspec.json.decode(found.attributes),
        progress=progress,
        output=None if is_failed else value,
        failure=value if is_failed else None,
    )


def _lines(shown: Shown) -> list[str]:
    lines = [
        f"{shown.id}  {shown.workflow} (version {shown.version})  {shown.status}",
        f"  started   {moment(shown.started_at)}",
    ]
    if shown.finished_at is not None:
        lines.append(f"  finished  {moment(shown.finished_at)} ({_seconds(shown.finished_at - shown.started_at)})")
    if shown.parent is not None:
        lines.append(f"  child of  {shown.parent}")
    if shown.origin is not None:
        lines.append(f"  made of   {shown.origin}, which it replays or is a fork of")
    if shown.attributes:
        lines.append(f"  found by  {_told(shown.attributes)}")
    if shown.progress is not None:
        lines.append(f"  progress  {CODED if is_coded(shown.progress) else encode(shown.progress).decode()}")
    lines += [f"  stands    {_standing(place, shown.id)}" for place in shown.places if place.place != "stuck"]
    if shown.status == "running" and not shown.places:
        lines.append("  stands    between two steps at the moment of looking")
    if shown.failure is not None:
        step, seq = shown.failure.get("step", "?"), shown.failure.get("seq", "?")
        where = "before" if shown.status == "cancelled" else "in"
        lines.append(f"  {shown.status:9} {where} step {seq} '{step}': {shown.failure.get('reason', 'unknown')}")
        lines += [f"    {line}" for line in str(shown.failure.get("traceback", "")).splitlines()]
        if shown.failure.get("purged"):
            lines.append("  purged    its dead letter was not retried but ended")
    if shown.status == "stuck":
        lines.append(
            f"  next      {PROGRAM} dead-letters retry {shown.id}; its state: {PROGRAM} dead-letters show {shown.id}"
        )
    elif shown.status == "completed":
        lines += payload_lines("output", shown.output)
    return lines


def _standing(place: Place, of: str) -> str:
    at = f"at step {place.seq} '{place.step}', shard {place.shard}"
    until = "" if place.due is None else f" until {moment(datetime.fromisoformat(place.due))}"
    if place.place in THEN:
        return f"{THEN[place.place]}{until}, then {at[3:]}"
    if place.place == "detached":
        return f"{'waiting for room beside the pages' if place.owner_is_silent else 'running beside the pages'} {at}"
    if place.place == "limited":
        return f"waiting for a permit {at}; see '{PROGRAM} limits list'"
    if place.place == "paused":
        return f"paused {at}; go on with '{PROGRAM} resume {of}'"
    silent = ", whose consumer is gone: another takes it over" if place.owner_is_silent else ""
    return f"{place.place} {at}{silent}"


def _told(attributes: dict[str, Any]) -> str:
    return " ".join(f"{key}={encode(value).decode()}" for key, value in sorted(attributes.items()))


def _took(listed: search.Listed) -> str | None:
    return None if listed.finished_at is None else _seconds(listed.finished_at - listed.started_at)


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():.3f} s"


def moment(at: datetime) -> str:
    """A time as people of this place read it."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
