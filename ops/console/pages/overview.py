"""The first page: throughput, what is wrong, what each process has in hand, what ended badly; and its live parts."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from durable_cluster.ops.console.access import access_of
from durable_cluster.ops.console.live import Live
from durable_cluster.ops.console.pulse import Overview, Pulse
from durable_cluster.ops.console.views import drawn, render

PARTS = ("figures", "wrong", "heat", "ended", "newest")


class Board:
    """The overview of one console: what it reads, and who follows it."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self.live = Live(lambda: parts(pulse.overview()))


def parts(overview: Overview) -> dict[str, str]:
    """Each part of the page, drawn: for the page and for those who follow, alike."""
    return {name: drawn(f"overview/{name}.html", overview=overview) for name in PARTS}


def overview(request: Request) -> Response:
    """The page, whole: it needs no script."""
    return render(request, "overview.html", parts=parts(_board(request).pulse.overview()))


async def follow(request: Request) -> Response:
    """Its parts, again and again."""
    return StreamingResponse(
        _board(request).live.follow(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


def _board(request: Request) -> Board:
    """This application's; made when it is first looked at."""
    state = request.app.state
    if not hasattr(state, "board"):
        state.board = Board(Pulse(access_of(request)))
    board: Board = state.board
    return board


routes = [Route("/", overview), Route("/live", follow)]
