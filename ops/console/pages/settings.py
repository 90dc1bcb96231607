"""The page of settings: what counts, its defaults and what each is for; what is installed. Nothing is set here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import schema
from durable_cluster.ops import lookups
from durable_cluster.ops.console.access import Connection, access_of
from durable_cluster.ops.console.views import render
from durable_cluster.settings import MEANINGS, Settings

UNITS = {"s": "s", "ms": "ms", "bytes": "bytes", "days": "days"}
SERVER = (
    *("server_version", "max_connections", "synchronous_commit", "wal_level", "shared_buffers", "max_wal_size"),
    *("autovacuum", "idle_in_transaction_session_timeout", "statement_timeout", "default_transaction_isolation"),
)


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A setting. ``value``: what the app of this console says; None where the console has none."""

    name: str
    meaning: str
    default: float
    value: float | None
    unit: str


def show(request: Request) -> Response:
    """Settings, the database's layout, the server."""
    access = access_of(request)
    with access.connection() as connection:
        installed = lookups.installed(connection)
        server = [(name, _of_server(connection, name)) for name in SERVER]
        audit, _ = lookups.audit_state(connection)
        is_current = schema.is_current(connection)
    return render(
        request,
        "settings.html",
        settings=_shown(None if access.app is None else access.app.settings),
        app=None if access.app is None else access.app.name,
        installed=installed,
        is_current=is_current,
        audit=audit,
        server=server,
        version=_version(),
    )


def _of_server(connection: Connection, name: str) -> str:
    """What a setting is when a session begins: the console has limits of its own in each transaction."""
    row = connection.execute(
        "select case source when 'session' then concat_ws(' ', reset_val, unit) else current_setting(name) end"
        " from pg_settings where name = %s",
        (name,),
    ).fetchone()
    assert row is not None
    return str(row[0])


def _shown(known: Settings | None) -> list[Shown]:
    defaults = Settings()
    return [
        Shown(
            name=name,
            meaning=meaning,
            default=getattr(defaults, name),
            value=None if known is None else getattr(known, name),
            unit=_unit(name),
        )
        for name, meaning in MEANINGS.items()
    ]


def _unit(name: str) -> str:
    """The unit that stands in the name: last, or before what says that it is a limit."""
    return next((UNITS[word] for word in reversed(name.split("_")) if word in UNITS), "")


def _version() -> str | None:
    try:
        return version("durable-cluster")
    except PackageNotFoundError:
        return None


routes = [Route("/settings", show)]
