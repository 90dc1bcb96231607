"""The login and the logout of people; programs send their token with each request."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from durable_cluster.ops.console.security import (
    Doors,
    address_of,
    begin_session,
    form_of,
    local_path,
    visitor_of,
)
from durable_cluster.ops.console.views import redirected, render

NAME_CHARS_MAX = 60


async def show(request: Request) -> Response:
    """The form; whoever is in already goes on."""
    path = local_path(request.query_params.get("next", "/"))
    if visitor_of(request) is not None:
        return RedirectResponse(path, status_code=303)
    return render(request, "login.html", next=path, wrong=None)


async def login(request: Request) -> Response:
    """A token becomes a session."""
    doors: Doors = request.app.state.doors
    form = form_of(request)
    path, name = local_path(str(form.get("next", "/"))), str(form.get("name", "")).strip()
    role = doors.role_of(str(form.get("token", "")).strip(), address_of(request)) if doors.needs_login else None
    if role is None:
        return render(request, "login.html", status_code=403, next=path, wrong="That token opens nothing here.")
    begin_session(request, role, name[:NAME_CHARS_MAX] if name.isprintable() and name else None)
    return RedirectResponse(path, status_code=303)


async def logout(request: Request) -> Response:
    """The session of this browser ends."""
    request.session.clear()
    return redirected(request, "/login")


routes = [
    Route("/login", show, methods=["GET"]),
    Route("/login", login, methods=["POST"]),
    Route("/logout", logout, methods=["POST"]),
]
