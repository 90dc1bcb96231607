"""The console as a server: a socket, the settings, and uvicorn, which keeps no log of addresses asked for."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import msgspec
import uvicorn

from durable_cluster import schema
from durable_cluster.app import App
from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.console.access import Access
from durable_cluster.ops.console.application import application
from durable_cluster.ops.console.pulse import warm
from durable_cluster.ops.console.settings import LOOPBACK_NAMES, ConsoleSettings, is_loopback
from durable_cluster.ops.target import Database
from durable_cluster.ops.terminal import Terminal
from durable_cluster.settings import environment

BACKLOG = 128
CONNECTIONS_MAX = 500
STOP_S = 2


class Up(msgspec.Struct, frozen=True, kw_only=True):
    """What a console says once it can be reached."""

    url: str
    database: str
    login: str


def serve(terminal: Terminal, database: Database, options: argparse.Namespace, app: App | None) -> int:
    """Until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s console %(levelname)s %(message)s")
    with database.connect("console check") as connection:
        schema.demand_installed(connection)
    checked = _settings(database, options, app, port=options.port)  # before anything is bound
    with _bound(checked.host, options.port) as listener:
        settings = msgspec.structs.replace(checked, port=listener.getsockname()[1])
        web = application(settings)
        access: Access = web.state.access
        access.open()
        threading.Thread(target=warm, args=(access,), name="console-warm", daemon=True).start()
        config = uvicorn.Config(
            web,
            access_log=False,  # addresses hold what somebody looked for
            server_header=False,
            log_config=None,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=STOP_S,
        )
        server = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _noted)  # uvicorn ends by them, and then hands them on to whoever had them before
        if options.until_eof:
            threading.Thread(target=_end_at_eof, args=(server,), daemon=True).start()
        _say_up(terminal, database, settings)
        server.run(sockets=[listener])
    return 0


def _noted(number: int, frame: FrameType | None) -> None:
    """Nothing is left to be done."""


def _end_at_eof(server: uvicorn.Server) -> None:
    sys.stdin.buffer.read()
    server.should_exit = True


def _settings(database: Database, options: argparse.Namespace, app: App | None, *, port: int) -> ConsoleSettings:
    here = environment()
    return ConsoleSettings(
        dsn=database.dsn,
        host=options.host,
        port=port,
        operator_token=here.console_token,
        viewer_token=here.console_viewer_token,
        hosts=_hosts(options.host, options.allow_host),
        is_https=options.https,
        redact=tuple(options.redact),
        metrics=tuple(options.metrics_from),
        app=app,
    )


def _hosts(host: str, allowed: list[str]) -> tuple[str, ...]:
    """The names that are answered. Behind a login from elsewhere any is, unless some are named: a session has its name."""
    if not is_loopback(host) and not allowed:
        return ()
    return (*LOOPBACK_NAMES, host.lower(), *(name.lower() for name in allowed))


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"the console cannot listen on {host}:{port} ({error.strerror}): choose another with --host and --port"
        ) from error
    with listener:
        yield listener


def _say_up(terminal: Terminal, database: Database, settings: ConsoleSettings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    login = "with a token" if settings.needs_login else "nobody needs a token; only this machine reaches it"
    up = Up(url=f"http://{host}:{settings.port}/", database=database.name, login=login)
    terminal.answer(up, [f"console: {up.url}", f"  database  {up.database}", f"  login     {up.login}"])
    if not is_loopback(settings.host) and not settings.is_https:
        terminal.note(
            "tokens and pages go over the network unencrypted: put a proxy with TLS in front, and say --https"
        )
