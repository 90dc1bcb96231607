"""The web application: pages, API and static files behind one gate.

Headers ── Session ── Gate ── routes: pages (ops/console/pages), login, API, static
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import psycopg
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from durable_cluster.errors import DurableError
from durable_cluster.ops.console import api, login, pages
from durable_cluster.ops.console.access import Access
from durable_cluster.ops.console.answers import Headers, failed, refused
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.security import SESSION_S, Doors, Gate
from durable_cluster.ops.console.settings import ConsoleSettings
from durable_cluster.ops.console.views import STATIC, compile_templates


def application(settings: ConsoleSettings) -> Starlette:
    """The console as an ASGI application; it connects when it is started."""
    doors = Doors(settings)
    access = Access(settings.dsn, app=settings.app)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        access.open()
        await run_in_threadpool(compile_templates)
        try:
            yield
        finally:
            await run_in_threadpool(access.close)

    app = Starlette(
        routes=[*pages.routes, *login.routes, *api.routes(), Mount("/static", StaticFiles(directory=STATIC))],
        middleware=[
            Middleware(Headers),
            Middleware(
                SessionMiddleware,
                secret_key=settings.secret,
                session_cookie=f"durable_console_{settings.port}",  # browsers do not keep ports apart
                max_age=SESSION_S,
                same_site="strict",
                https_only=settings.is_https,
            ),
            Middleware(Gate, settings=settings, doors=doors, refused=refused),
        ],
        exception_handlers={
            kind: failed if kind is Exception else refused
            for kind in (Refused, DurableError, psycopg.Error, HTTPException, Exception)
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.settings, app.state.doors, app.state.access = settings, doors, access
    app.state.waiters = api.Waiters()
    return app
