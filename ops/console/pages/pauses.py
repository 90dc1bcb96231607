"""The page of pauses: what stands still because somebody said so; begin a pause of a type or a shard, end any."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import coordination
from durable_cluster.context import SHORT_ID_DIGITS, short_id
from durable_cluster.ops import lookups
from durable_cluster.ops.console.access import Connection, access_of
from durable_cluster.ops.console.asked import actor_of, given
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.views import redirected, render
from durable_cluster.ops.show import checked_prefix, whole_id

SCOPES = ("type", "shard", "workflow")
SHOWN_MAX = 200


def pauses(request: Request) -> Response:
    """What is paused, the oldest first."""
    with access_of(request).connection() as connection:
        found = lookups.pauses(connection)
        shards = lookups.installed(connection).shards
    return render(request, "pauses.html", found=found[:SHOWN_MAX], count=len(found), shards=shards)


def pause(request: Request) -> Response:
    """Let no step of it begin."""
    with access_of(request).acting(actor_of(request)) as connection:
        scope, name, shown = _meant(request, connection)
        is_new = coordination.pause(connection, scope, name, actor=actor_of(request))
    return redirected(request, "/pauses", said=f"{shown} {'is paused' if is_new else 'was paused already'}")


def resume(request: Request) -> Response:
    """Let it go on."""
    with access_of(request).acting(actor_of(request)) as connection:
        scope, name, shown = _meant(request, connection)
        freed = coordination.resume(connection, scope, name, actor=actor_of(request))
    told = "was not paused" if freed is None else f"goes on; {freed:,} steps had been held"
    return redirected(request, "/pauses", said=f"{shown} {told}")


def _meant(request: Request, connection: Connection) -> tuple[str, str, str]:
    """The scope, the name as the database knows it, and both in words."""
    scope, name = given(request, "scope", among=SCOPES), given(request, "name")
    if scope is None or name is None:
        raise Refused(400, "say what: the name of a workflow type, or the number of a shard")
    if scope == "workflow":
        whole = whole_id(connection, checked_prefix(name)[:SHORT_ID_DIGITS])
        return scope, whole, f"workflow {short_id(whole)}"
    return scope, name, f"workflow type '{name}'" if scope == "type" else f"shard {name}"


routes = [
    Route("/pauses", pauses),
    Route("/pauses/pause", pause, methods=["POST"]),
    Route("/pauses/resume", resume, methods=["POST"]),
]
