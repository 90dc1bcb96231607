"""``schedules``: what starts by itself; look at it, make, pause and end it, fill a period in, run it now."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg

from durable_cluster import schedule_statements, schema
from durable_cluster.app import App
from durable_cluster.codec import Where
from durable_cluster.context import short_id
from durable_cluster.cron import Cron
from durable_cluster.errors import DatabaseError
from durable_cluster.ops.coded import app_of, payload_lines
from durable_cluster.ops.run import parsed
from durable_cluster.ops.show import moment
from durable_cluster.ops.start import EXAMPLES, loaded
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal, elapsed, table
from durable_cluster.schedule_statements import Schedule
from durable_cluster.schedules import Schedules

COMING = 3


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``show``. ``coming``: its next due times; ``input``: only for a role that may see payloads."""

    schedule: Schedule
    coming: list[datetime]
    is_input_shown: bool
    input: msgspec.Raw | None


class Done(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a schedule. ``id``: truncated, of the workflow that was started; ``started``: how many were."""

    name: str
    outcome: str
    id: str | None = None
    started: int | None = None


def list_(terminal: Terminal, target: Target) -> int:
    """All schedules, by their names."""
    with _opened(target) as (schedules, _):
        found = schedules.list()
    rows = [
        (one.name, one.workflow, one.cron, one.zone, _state(one), _moment(one.next_due), _moment(one.last_due))
        for one in found
    ]
    lines = table(("schedule", "workflow", "cron", "zone", "state", "next", "last"), rows)
    terminal.answer(found, lines if found else ["no schedules"])
    return 0


def show(terminal: Terminal, target: Target, *, name: str, app_address: str | None) -> int:
    """One, with what is known of it; ``app_address``: who reads its input, if that is coded."""
    app = app_of(app_address)
    with _opened(target, app) as (schedules, connection):
        known = schedules.get(name)
        now = schedule_statements.now(connection)
        is_shown = schedule_statements.may_see_inputs(connection)
        payload = schedule_statements.payload(connection, name) if is_shown else None
    if app is not None and payload is not None:
        payload = app.payloads.plain(payload.encode(), Where(known.workflow, "input")).decode()
    coming = (
        [] if known.paused_at is not None else list(itertools.islice(Cron(known.cron, known.zone).later(now), COMING))
    )
    shown = Shown(
        schedule=known,
        coming=coming,
        is_input_shown=is_shown,
        input=None if payload is None else msgspec.Raw(payload.encode()),
    )
    terminal.answer(shown, _lines(shown))
    return 0


def create(
    terminal: Terminal,
    target: Target,
    *,
    name: str,
    cron: str,
    workflow: str,
    text: str,
    zone: str,
    overlap: str,
    catch_up: str,
    due_as: str | None,
    app_address: str | None,
) -> int:
    """Make a schedule of a workflow that the app has."""
    value = parsed(text)
    app = loaded(EXAMPLES if app_address is None else app_address)
    with _opened(target, app) as (schedules, _):
        schedules.create(
            name,
            cron,
            workflow,
            value,
            zone=zone,
            overlap=overlap,
            catch_up=int(catch_up) if catch_up.isdecimal() else catch_up,
            due_as=due_as,
        )
        due = schedules.get(name).next_due
    terminal.answer(Done(name=name, outcome="made"), [f"schedule '{name}' is made; '{workflow}' starts {_moment(due)}"])
    return 0


def pause(terminal: Terminal, target: Target, *, name: str, reason: str | None) -> int:
    """From now on nothing of it starts."""
    with _opened(target) as (schedules, _):
        is_new = schedules.pause(name, reason)
    told = f"paused; go on with '{PROGRAM} schedules resume {name}'" if is_new else "paused already"
    return _answered(terminal, name, "paused", told)


def resume(terminal: Terminal, target: Target, *, name: str) -> int:
    """Go on with the next due time."""
    with _opened(target) as (schedules, _):
        was_paused = schedules.resume(name)
    told = "goes on; what was due meanwhile is for 'backfill'" if was_paused else "was not paused"
    return _answered(terminal, name, "resumed", told)


def delete(terminal: Terminal, target: Target, *, name: str, is_agreed: bool) -> int:
    """End it. What it has started goes on."""
    with _opened(target) as (schedules, _):
        known = schedules.get(name)
        if not is_agreed:
            if not terminal.is_interactive():
                raise BadUsage(f"this ends schedule '{name}': say --yes if that is meant")
            if not terminal.asks(f"end schedule '{name}' of '{known.workflow}' ({known.cron} {known.zone})?"):
                raise DatabaseError("nothing was deleted")
        schedules.delete(name)
    again = f"; it comes back with the next start of app '{known.app}', which declares it" if known.is_in_code else ""
    return _answered(terminal, name, "deleted", f"deleted{again}")


def backfill(terminal: Terminal, target: Target, *, name: str, begin: str, end: str) -> int:
    """Start what was due in a period and was not started."""
    period = _time(begin, "FROM"), _time(end, "TO")
    with _opened(target) as (schedules, _):
        started = schedules.backfill(name, *period)
    what = "1 workflow" if started == 1 else f"{started:,} workflows"
    terminal.answer(Done(name=name, outcome="backfilled", started=started), [f"schedule '{name}': started {what}"])
    return 0


def trigger(terminal: Terminal, target: Target, *, name: str, overlap: str | None) -> int:
    """Run it now, or what its overlap policy does instead."""
    with _opened(target) as (schedules, _):
        done = schedules.trigger(name, overlap=overlap)
    short = None if done.handle is None else short_id(done.handle.id)
    told = {
        "started": f"started {short}…; see '{PROGRAM} show {short}'",
        "queued": "waits for the end of the run that lives",
        "skipped": "skipped: a run of it lives, and its overlap policy starts no other; see --overlap",
    }[done.outcome]
    terminal.answer(Done(name=name, outcome=done.outcome, id=short), [f"schedule '{name}': {told}"])
    return 0


@contextmanager
def _opened(target: Target, app: App | None = None) -> Iterator[tuple[Schedules, psycopg.Connection[Any]]]:
    """The schedules of the database. Without an app of the user's, one that knows no workflow does for what needs none."""
    app = app or App("schedules")
    with target.opened(app=app if app.machines else None) as database:
        app.client.use(database.dsn)
        try:
            connection = app.client.connection()
            schema.demand_installed(connection)
            yield app.schedules, connection
        finally:
            app.close()


def _answered(terminal: Terminal, name: str, outcome: str, told: str) -> int:
    terminal.answer(Done(name=name, outcome=outcome), [f"schedule '{name}': {told}"])
    return 0


def _time(text: str, what: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadUsage(f"{what}: '{text}' is no time; write it as 2026-03-01T00:00:00+01:00") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _state(one: Schedule) -> str:
    if one.paused_at is not None:
        return "paused"
    return "not in code" if one.app is not None and not one.is_in_code else "on"


def _moment(at: datetime | None) -> str | None:
    return None if at is None else moment(at)


def _lines(shown: Shown) -> list[str]:
    one = shown.schedule
    reason = f": {one.pause_reason}" if one.pause_reason else ""
    paused = [f"  paused    since {_moment(one.paused_at)}{reason}"] if one.paused_at is not None else []
    latest = f", the last for {_moment(one.last_due)} as {one.last_id}" if one.last_due is not None else ""
    queued = f"; the run of {_moment(one.queued)} waits" if one.queued is not None else ""
    missed = (
        [f"  missed    from {_moment(one.missed_from)} to before {_moment(one.missed_until)}"]
        if one.missed_from
        else []
    )
    return [
        f"{one.name}  {one.workflow}  {one.cron} {one.zone}",
        f"  made      {_origin(one)}",
        *paused,
        *(f"  {'next' if n == 0 else '':9} {_moment(due)}" for n, due in enumerate(shown.coming)),
        f"  overlap   {one.overlap}; {one.running} running{queued}",
        f"  catch-up  {_catch_up(one)}",
        f"  fired     {one.fired:,}{latest}; skipped {one.skipped:,}",
        *missed,
        *_input(shown),
    ]


def _origin(one: Schedule) -> str:
    if one.app is None:
        return "at run time"
    if one.is_in_code:
        return f"in the code of app '{one.app}'"
    return f"by app '{one.app}', whose code declares it no longer: '{PROGRAM} schedules delete {one.name}' ends it"


def _catch_up(one: Schedule) -> str:
    if one.catch_up_s is not None:
        return f"what was missed in the last {elapsed(one.catch_up_s)}"
    times = "due time" if one.catch_up_max == 1 else "due times"
    return f"at most the newest {one.catch_up_max:,} missed {times}"


def _input(shown: Shown) -> list[str]:
    if shown.input is None:
        return []
    due = [f"  due as    {shown.schedule.due_as}"] if shown.schedule.due_as else []
    return [*due, *payload_lines("input", shown.input)]
