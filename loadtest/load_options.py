"""What the load test's users are told on Locust's command line, the database and cluster that they meet, the errors they count."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psycopg

from durable_cluster import schema
from durable_cluster.errors import DurableError, ResultTimeout
from durable_cluster.examples.orders import northwind
from durable_cluster.loadtest import mixes
from durable_cluster.ops.target import Database, Target
from durable_cluster.settings import environment

END_TO_END = "end to end"
"""What Locust calls the time from the call of a start to the result."""
APP = f"{mixes.__name__}:app"
WIDTH_MAX = 10_000
TURNS_MAX = 1_000
ANSWER_S_MAX = 5.0
IDS = re.compile(r"\b[0-9a-f]{12}\b…?")


def declare(parser: Any, **_: object) -> None:
    """Our options, beside Locust's own. Its web page shows none of a group: the DSN may hold a password."""
    add = parser.add_argument_group("durable-cluster").add_argument
    add("--dsn", metavar="DSN", help="the database (default: DURABLE_DSN, else the local one in --data)")
    add("--data", type=Path, metavar="DIR", help="where the local database is (default: DURABLE_DATA, else .durable)")
    said = "address of a console, whose REST API the users called ApiCustomer ask; its token is DURABLE_CONSOLE_TOKEN"
    add("--api", type=address, metavar="URL", help=said)
    said = "starts a second by each user, at most; 0: the next as soon as the last has ended (0)"
    add("--rate", type=number(0, 1_000), default=0.0, metavar="N", help=said)
    add("--width", type=whole(1, WIDTH_MAX), default=20, metavar="N", help="children of a fan-out (20)")
    add("--turns", type=whole(1, TURNS_MAX), default=4, metavar="N", help="turns of an agent (4)")
    said = "seconds that a model takes for a turn, and a person for an approval (0.2)"
    add("--think", type=number(0, 3_600), default=0.2, metavar="S", help=said)
    said = "seconds after which a workflow that has not ended is an error (60)"
    add("--timeout", type=number(0.1, 86_400), default=60.0, metavar="S", help=said)


def prepared(options: Any, *, of_api: Sequence[bool]) -> ExitStack:
    """The database that ``options`` name, ready, and held until it is closed; ``options.dsn`` is then what workers need.

    ``of_api``: whether they ask the REST API, of each kind of users; those need no database. Ends the program, saying why, if there
    is none, no API, or no cluster answers.
    """
    held = ExitStack()
    try:
        if any(of_api):
            demand_api(options.api)
        if not all(of_api):
            options.dsn = demand_database(options, held)
    except (DurableError, psycopg.Error) as error:
        held.close()
        sys.exit(f"locust: error: {error}")
    return held


def demand_database(options: Any, held: ExitStack) -> str:
    """The DSN of a database where the mixes run. Raises DurableError and psycopg.Error."""
    database = held.enter_context(Target(options.dsn, options.data).opened(app=mixes.app))
    with database.connect("loadtest") as connection:
        schema.demand_installed(connection)
        northwind.prepare(connection)
        warn_of_too_many(connection, options.num_users or 1)
    demand_cluster(database)
    return database.dsn


def demand_api(url: str | None) -> None:
    """Raise DurableError if no console answers there, or not to us."""
    if url is None:
        raise DurableError("ApiCustomer asks a REST API: name it with --api, such as http://127.0.0.1:8100")
    try:
        with urlopen(Request(f"{url}/api/workflows?limit=1", headers=api_headers()), timeout=ANSWER_S_MAX):
            pass
    except HTTPError as error:
        said = "set DURABLE_CONSOLE_TOKEN to an operator's token" if error.code in {401, 403} else "is it a console?"
        raise DurableError(f"{url} answered {error.code}: {said}") from None
    except (OSError, HTTPException) as error:
        raise DurableError(
            f"nobody answers at {url} ({getattr(error, 'reason', error)}): start 'durable-cluster console', or mend --api"
        ) from None


def api_headers() -> dict[str, str]:
    """What each request to the API brings: its type, and the token of a console that demands one."""
    token = environment().console_token
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}


def demand_cluster(database: Database) -> None:
    """Raise DurableError if no cluster runs the mixes there: one tiny workflow is to come back."""
    handle = mixes.part.start(1)
    try:
        handle.result(timeout=ANSWER_S_MAX)
    except ResultTimeout:
        handle.cancel("no cluster ran it")
        raise DurableError(
            f"no cluster on {database.name} ran a workflow within {ANSWER_S_MAX:g} s: start one with"
            f" 'durable-cluster start --app {APP}' and the same --dsn or --data"
        ) from None


def warn_of_too_many(connection: psycopg.Connection[Any], users: int) -> None:
    """Each user holds a connection; behind a pooler the server's limit is not the users'."""
    row = connection.execute(
        "select current_setting('max_connections')::int - count(*) from pg_stat_activity where backend_type = 'client backend'"
    ).fetchone()
    left = row[0] if row else 0
    if users > left:
        print(
            f"locust: {users} users hold a connection each, and the server has {left} left: expect errors, unless a pooler"
            " stands before it; choose fewer with -u, or raise max_connections",
            file=sys.stderr,
        )


def told(error: Exception) -> str:
    """What is counted of an error: the same words for the same error, whichever workflow it met."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {IDS.sub('…', first)}"


def address(text: str) -> str:
    """Reads where an API is."""
    found = urlsplit(text)
    if found.scheme in {"http", "https"} and found.netloc and "@" not in found.netloc:
        return text.rstrip("/")
    raise argparse.ArgumentTypeError("it is no address such as http://127.0.0.1:8100")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number in these bounds."""

    def read(text: str) -> int:
        if text.isdecimal() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least:,} to {most:,}")

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """Reads a number in these bounds."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if least <= found <= most:
            return found
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:,g}")

    return read
