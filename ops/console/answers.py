"""Answers that are the same everywhere: the headers of all, and what is refused, as a page or as problem+json."""

from __future__ import annotations

import logging
from urllib.parse import quote

import msgspec
import psycopg
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from durable_cluster.ops.console.refusals import PROBLEM, Problem, Refusal, refusal_of
from durable_cluster.ops.console.security import API, path_of
from durable_cluster.ops.console.views import render

logger = logging.getLogger("durable_cluster.console")

YEAR_S = 365 * 86_400
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    # Not no-referrer: with that browsers hide from us, too, where a form was sent from.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Headers:
    """Gives every answer the headers that it has not got yet."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_static = scope["path"].startswith("/static/") and scope["query_string"].startswith(b"v=")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                defaults = dict(HEADERS)
                if is_static and message["status"] == 200:
                    defaults["cache-control"] = (
                        f"public, max-age={YEAR_S}, immutable"  # its address changes with the file
                    )
                known = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in defaults.items()
                        if name.encode() not in known
                    ),
                ]
            await send(message)

        await self._app(scope, receive, with_headers)


def refused(request: Request, error: Exception) -> Response:
    """The answer to a request that is refused or failed."""
    refusal = _refusal(error)
    if path_of(request).startswith(API):
        problem = Problem(status=refusal.status, title=refusal.title, detail=refusal.detail)
        return Response(
            msgspec.json.encode(problem) + b"\n", refusal.status, headers=refusal.headers, media_type=PROBLEM
        )
    if refusal.status == 401 and request.method in ("GET", "HEAD"):
        query = request.scope["query_string"].decode("latin-1")
        asked = f"{quote(path_of(request))}?{query}" if query else quote(path_of(request))
        return RedirectResponse(f"/login?next={quote(asked, safe='')}", status_code=303)
    page = render(request, "error.html", status_code=refusal.status, refusal=refusal)
    page.headers.update(refusal.headers)
    return page


def failed(request: Request, error: Exception) -> Response:
    """The answer where nothing else stands between an error and the server."""
    answer = refused(request, error)
    for name, value in HEADERS.items():
        answer.headers.setdefault(name, value)
    return answer


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        detail = {404: "there is nothing here", 405: "this address does not take that method"}.get(error.status_code)
        return Refusal(status=error.status_code, detail=detail or error.detail, headers=headers)
    refusal = refusal_of(error)
    if refusal.status >= 500 and isinstance(error, psycopg.Error):
        logger.warning(
            "the database refused: %s (%s)", error.diag.message_primary or type(error).__name__, error.sqlstate
        )
    return refusal
