"""``console``: what the command line says, and whether all is there that it needs. Loads nothing of the web before that."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from urllib.parse import urlsplit

from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.coded import app_of
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import Terminal
from durable_cluster.ops.values import between

HOST = "127.0.0.1"
PORT = 8100
PORT_MAX = 65_535
NEEDED = ("starlette", "uvicorn", "jinja2", "itsdangerous", "psycopg_pool")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What ``console`` takes."""
    parser.add_argument("--host", default=HOST, help=f"where to listen ({HOST}); elsewhere people need a token")
    parser.add_argument(
        "--port", type=between(0, PORT_MAX), default=PORT, metavar="N", help=f"({PORT}; 0: any free one)"
    )
    parser.add_argument(
        "--app", metavar="MODULE:APP", help="whose codec reads payloads, and whose types inputs have to fit"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which it is reached, as by a proxy; may be repeated",
    )
    parser.add_argument(
        "--https", action="store_true", help="browsers reach it by https, through a proxy: no cookie goes without"
    )
    parser.add_argument(
        "--until-eof", action="store_true", help=argparse.SUPPRESS
    )  # of standard input, for 'start --console'
    parser.add_argument(
        "--redact", action="append", default=[], metavar="NAME", help="mask values of this name, too; may be repeated"
    )
    parser.add_argument(
        "--metrics-from",
        action="append",
        type=metrics_page,
        default=[],
        metavar="URL",
        help="the metrics page of a cluster, which knows the processor time of types; may be repeated",
    )


def add_start_option(parser: argparse.ArgumentParser) -> None:
    """What ``start`` takes."""
    where, at = (HOST, PORT), f"{HOST}:{PORT}"
    parser.add_argument(
        "--console", nargs="?", type=address, const=where, metavar="HOST:PORT", help=f"serve the console, too ({at})"
    )


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``HOST`` or ``PORT``; the host of an IPv6 address stands in brackets."""
    try:
        parts = urlsplit(f"//:{text}" if text.isdecimal() else f"//{text}")
        host, port = parts.hostname or HOST, PORT if parts.port is None else parts.port
    except ValueError:
        parts, host, port = None, HOST, PORT
    if parts is None or "@" in parts.netloc or parts.path or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is no address: write it as {HOST}:{PORT}, or as {PORT}")
    return host, port


def metrics_page(text: str) -> str:
    """An address of http or https."""
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_one = False
    if not is_one:
        raise argparse.ArgumentTypeError(
            f"'{text[:80]}' is no address of a page: write it as http://127.0.0.1:9464/metrics"
        )
    return text


def console(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    """Serve the console until SIGTERM or SIGINT."""
    demand_extra()
    app = app_of(options.app)
    with target.opened(app=app) as database:
        code: int = import_module("durable_cluster.ops.console.server").serve(terminal, database, options, app)
    return code


def demand_extra() -> None:
    """Raises ConfigurationError where the extra is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"the console needs the extra 'console' ({', '.join(missing)} missing): pip install 'durable-cluster[console]'"
        )
