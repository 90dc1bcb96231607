"""The page of limits: what is limited, what holds and what waits; other numbers than the code's, at once."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import coordination
from durable_cluster.limits import parsed_rate
from durable_cluster.ops import lookups
from durable_cluster.ops.console.access import access_of
from durable_cluster.ops.console.asked import actor_of, given, given_number, placed
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.views import redirected, render


def limits(request: Request) -> Response:
    """Every limit, by name."""
    with access_of(request).connection() as connection:
        found = lookups.limits(connection)
    return render(request, "limits.html", found=found)


def put(request: Request) -> Response:
    """These numbers in place of what the code declares, until they are taken back."""
    name, concurrency, rate = placed(request, "name"), given_number(request, "concurrency"), given(request, "rate")
    if concurrency is None and rate is None:
        raise Refused(
            400, "give how many at once, or a rate such as 100/1s; a limit that is to count as in the code is reset"
        )
    passes, period_s = (None, None) if rate is None else parsed_rate(name, rate)
    with access_of(request).acting(actor_of(request)) as connection:
        coordination.set_limit(connection, name, concurrency=concurrency, rate=passes, period_s=period_s)
    return redirected(request, "/limits", said=f"limit '{name}' is set, in place of what the code declares")


def reset(request: Request) -> Response:
    """What the code declares counts again."""
    name = placed(request, "name")
    with access_of(request).acting(actor_of(request)) as connection:
        has_changed = coordination.reset_limit(connection, name)
    told = "counts again as the code declares it" if has_changed else "was as the code declares it"
    return redirected(request, "/limits", said=f"limit '{name}' {told}")


routes = [
    Route("/limits", limits),
    Route("/limits/{name}/set", put, methods=["POST"]),
    Route("/limits/{name}/reset", reset, methods=["POST"]),
]
