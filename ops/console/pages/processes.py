"""The page of processes: who is connected, which windows they hold, what they run, shard by shard."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster.ops import lookups, processes
from durable_cluster.ops.console.access import access_of
from durable_cluster.ops.console.views import render
from durable_cluster.ops.processes import Process

OURS = ("consumer", "maintenance", "supervisor", "gone")
SHOWN_MAX = 300
SLOW_STEPS = 50


def show(request: Request) -> Response:
    """Hosts, processes, shards and slow steps."""
    with access_of(request).connection() as connection:
        found = processes.processes(connection)
        shards = lookups.shard_statuses(connection)
        slow = processes.slow_steps(connection, limit=SLOW_STEPS)
        untold_to = processes.untold_to(connection)
    ours = [one for one in found if one.role in OURS]
    others = [one for one in found if one.role not in OURS]
    return render(
        request,
        "processes.html",
        hosts=_hosts(ours),
        ours=ours[:SHOWN_MAX],
        count=len(ours),
        others=others[:SHOWN_MAX],
        shards=shards,
        slow=slow,
        untold_to=untold_to,
    )


def _hosts(found: list[Process]) -> list[tuple[str | None, list[Process]]]:
    """Who is connected from where; a socket of the server's own machine, and what is not told, is None."""
    addresses = sorted({one.address for one in found if one.role != "gone"}, key=lambda address: address or "")
    return [(address, [one for one in found if one.address == address and one.role != "gone"]) for address in addresses]


routes = [Route("/processes", show)]
