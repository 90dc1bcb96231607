"""The pages of what stands still: who waits for what since when, and what the clock does next."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import figures
from durable_cluster.ops import looks
from durable_cluster.ops import waiting as waits
from durable_cluster.ops.console.access import access_of
from durable_cluster.ops.console.asked import address, asked
from durable_cluster.ops.console.views import render

ROWS = 50
DUE_ROWS = 10


def waiting(request: Request) -> Response:
    """Workflows that stand still, the longest first, and the first of what is due."""
    place = asked(request, "place", among=waits.PLACES)
    workflow, signal = asked(request, "workflow"), asked(request, "signal")
    after = asked(request, "after")
    with access_of(request).connection() as connection:
        found = waits.waiting(connection, place=place, workflow=workflow, signal=signal, limit=ROWS, after=after)
        types = [] if after else waits.types(connection)
        aside, due_s = figures.aside(connection), looks.beat(connection, since=None).due_s
        due, _ = waits.due_next(connection, workflow=workflow, limit=DUE_ROWS) if not after else ([], None)
    filters = {"place": place, "workflow": workflow, "signal": signal}
    return render(
        request,
        "waiting.html",
        found=found,
        types=types,
        is_cut=sum(one.workflows for one in types) >= waits.COUNTED_MAX,
        counted_max=waits.COUNTED_MAX,
        aside=aside,
        due_s=due_s,
        due=due,
        filters=filters,
        places=waits.PLACES,
        first=address("/waiting", filters) if after else None,
        following=address("/waiting", filters | {"after": found[-1].cursor}) if len(found) >= ROWS else None,
        due_address=address("/due", {"workflow": workflow}),
    )


def due(request: Request) -> Response:
    """What the clock does next, by its time."""
    workflow, after = asked(request, "workflow"), asked(request, "after")
    with access_of(request).connection() as connection:
        found, cursor = waits.due_next(connection, workflow=workflow, limit=ROWS, after=after)
    return render(
        request,
        "due.html",
        found=found,
        workflow=workflow,
        first=address("/due", {"workflow": workflow}) if after else None,
        following=address("/due", {"workflow": workflow, "after": cursor}) if cursor else None,
    )


routes = [Route("/waiting", waiting), Route("/due", due)]
