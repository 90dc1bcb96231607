"""The pages of schedules: what starts by itself and when, what became of it; pause, resume, run now, fill a period in."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import schedule_statements
from durable_cluster.app import App
from durable_cluster.context import short_id
from durable_cluster.cron import Cron
from durable_cluster.errors import UnknownWorkflow
from durable_cluster.ops.console.access import Connection, access_of
from durable_cluster.ops.console.asked import actor_of, address, asked, given, given_moment, placed
from durable_cluster.ops.console.views import redirected, render
from durable_cluster.schedule_statements import Run, Schedule
from durable_cluster.schedules import OVERLAPS
from durable_cluster.settings import checked_name

ROWS = 100
COMING = 5
PAST = 10
PAST_DAYS_MAX = 400


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """A due time that is over. ``run``: what it started; None: nothing."""

    due: datetime
    run: Run | None


def list_(request: Request) -> Response:
    """All schedules, by their names."""
    after, workflow = asked(request, "after"), asked(request, "workflow")
    with access_of(request).connection() as connection:
        known = schedule_statements.schedules(connection)
        now = schedule_statements.now(connection)
    matching = [one for one in known if workflow in (None, one.workflow) and one.name > (after or "")]
    shown = matching[:ROWS]
    filters = {"workflow": workflow}
    return render(
        request,
        "schedules.html",
        found=[(one, _coming(one, now, 2)) for one in shown],
        count=len(known),
        filters=filters,
        first=address("/schedules", filters) if after else None,
        following=address("/schedules", filters | {"after": shown[-1].name}) if len(matching) > ROWS else None,
    )


def one(request: Request) -> Response:
    """One, its due times to come and what became of those that were."""
    with access_of(request).connection() as connection:
        schedule = _known(connection, placed(request, "name"))
        now = schedule_statements.now(connection)
        dues = Cron(schedule.cron, schedule.zone).newest(PAST, after=now - timedelta(days=PAST_DAYS_MAX), until=now)
        runs = {run.due: run for run in schedule_statements.runs_of(connection, schedule.name, dues)}
    return render(
        request,
        "schedule.html",
        one=schedule,
        coming=_coming(schedule, now, COMING),
        past=[Past(due=due, run=runs.get(due)) for due in reversed(dues)],
        overlaps=OVERLAPS,
        begin=(now - timedelta(days=1)).astimezone(UTC),
        end=now.astimezone(UTC),
    )


def pause(request: Request) -> Response:
    """From now on nothing of it starts."""
    name = placed(request, "name")
    with access_of(request).acting(actor_of(request)) as connection:
        is_new = schedule_statements.pause(connection, name, reason=given(request, "reason"))
    return _back(request, name, "is paused" if is_new else "was paused already")


def resume(request: Request) -> Response:
    """It goes on with the next due time."""
    name = placed(request, "name")
    with access_of(request).acting(actor_of(request)) as connection:
        was_paused = schedule_statements.resume(connection, name)
    return _back(request, name, "goes on; what was due meanwhile can be filled in" if was_paused else "was not paused")


def trigger(request: Request) -> Response:
    """Run it now, or what its overlap policy does instead."""
    name, overlap = placed(request, "name"), given(request, "overlap", among=OVERLAPS)
    with access_of(request).acting(actor_of(request)) as connection:
        outcome, workflow_id = schedule_statements.trigger(connection, name, overlap=overlap)
    told = {
        "started": f"started {short_id(workflow_id or '')}",
        "queued": "waits for the end of the run that lives",
        "skipped": "left it out: a run of it lives, and its overlap policy starts no other",
    }[outcome]
    return _back(request, name, told)


def backfill(request: Request) -> Response:
    """Start what was due in a period and was not started."""
    name, begin, end = placed(request, "name"), given_moment(request, "begin"), given_moment(request, "end")
    with access_of(request).acting(actor_of(request)) as connection:
        started = App("console").schedules.backfill(name, begin, end, tx=connection)
    return _back(request, name, f"started {started:,} {'workflow' if started == 1 else 'workflows'}")


def _known(connection: Connection, name: str) -> Schedule:
    found = schedule_statements.schedules(connection, checked_name("schedule", name))
    if not found:
        raise UnknownWorkflow(f"no schedule '{name}': somebody deleted it, or there never was one")
    return found[0]


def _coming(one: Schedule, now: datetime, count: int) -> list[datetime]:
    if one.paused_at is not None:
        return []
    return list(itertools.islice(Cron(one.cron, one.zone).later(now), count))


def _back(request: Request, name: str, told: str) -> Response:
    return redirected(request, f"/schedules/{name}", said=f"schedule '{name}' {told}")


routes = [
    Route("/schedules", list_),
    Route("/schedules/{name}", one),
    *(
        Route(f"/schedules/{{name}}/{action.__name__}", action, methods=["POST"])
        for action in (pause, resume, trigger, backfill)
    ),
]
