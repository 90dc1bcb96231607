"""How soon the console shows something over a million workflows: first contentful paint in a real browser, and what its pages take.

    python -m durable_cluster.loadtest.console_paint [--workflows N] [--dsn …]

The database is made for it, and dropped; without --dsn on a local Postgres of its own, on disk. Needs the extra 'console',
playwright, and the system's Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from statistics import median
from typing import Any

import uvicorn

from durable_cluster import schema
from durable_cluster.database import connect
from durable_cluster.errors import ConfigurationError
from durable_cluster.loadtest import stage
from durable_cluster.ops.console.application import application
from durable_cluster.ops.console.settings import ConsoleSettings

WORKFLOWS = 1_000_000
LIVING_PART = 0.02
SHARDS = 8
ROUNDS = 7
PAINT_MS_MAX = 300.0
UP_S_MAX = 20.0
PAGES = (
    *("/", "/workflows", "/workflows?status=running", "/waiting", "/due", "/dead-letters", "/schedules", "/limits"),
    *("/pauses", "/processes", "/cost", "/settings"),
)
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"

# 30 days, twenty types; the newest part lives: it waits for signals, sleeps or is a dead letter.
FILL = (
    "select sum(durable.add_day(t, durable.today() - d)) from unnest(array['started', 'finished']) t, generate_series(0, 30) d",
    "create temp table made as select durable.new_id(q.at) as id, q.at, 'type_' || q.n %% 20 as workflow, q.n"
    " from (select n, now() - (%(count)s - n) * interval '30 days' / %(count)s as at from generate_series(1, %(count)s) n) q",
    "insert into durable.started (id, day, workflow, version, input, at)"
    " select id, durable.day_of(id), workflow, 1, '{\"order\": 10248}', at from made",
    "insert into durable.finished (id, day, status, output, at) select id, durable.day_of(id),"
    " case when n %% 1000 = 7 then 'failed' when n %% 5000 = 11 then 'cancelled' else 'completed' end, '1',"
    " at + interval '1 second' from made where n <= %(ended)s",
    "insert into durable.wait (id, seq, line, due, since, names)"
    " select id, 2, durable.line(id, 2, workflow, 'go_on', 1, '{}'), now() + n %% 1000 * interval '1 hour', at,"
    "  case when n %% 3 = 0 then array['approved', 'rejected'] end from made where n > %(ended)s and n %% 50 <> 1",
    "insert into durable.timer_0 (due, workflow_id, seq) select due, id, seq from durable.wait",
    "insert into durable.dead_letter (id, seq, workflow, step, attempt, reason, details, line, at)"
    " select id, 1, workflow, 'charge', 5, 'attempts', '{\"reason\": \"the card was refused\"}',"
    " durable.line(id, 1, workflow, 'charge', 1, '{}'), at from made where n > %(ended)s and n %% 50 = 1",
    "drop table made",
)


def main() -> int:
    """Measure; 1 if the first page is too slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workflows", type=int, default=WORKFLOWS, metavar="N")
    parser.add_argument("--dsn", help="a server on which databases can be made")
    options = parser.parse_args()
    with stage.fresh_database(options.dsn, is_asynchronous=True) as dsn:
        _fill(dsn, options.workflows)
        with _served(dsn) as url:
            painted = paints(url)
    for path, (paint_ms, server_ms) in painted.items():
        print(f"{path:28} first paint {paint_ms:5.0f} ms, of that the server {server_ms:5.0f} ms")
    overview_ms, _ = painted["/"]
    print(f"the overview over {options.workflows:,} workflows: {overview_ms:.0f} ms, {PAINT_MS_MAX:.0f} at most")
    return 0 if overview_ms <= PAINT_MS_MAX else 1


def paints(url: str) -> dict[str, tuple[float, float]]:
    """By page: the medians of the first contentful paint and of when its last byte had come, both in ms from the request on."""
    chromium = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if chromium is None:
        raise ConfigurationError("there is no Chromium here: apt-get install chromium")
    with import_module("playwright.sync_api").sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(base_url=url, viewport={"width": 1280, "height": 900})
        return {path: _painted(page, path) for path in PAGES}


def _painted(page: Any, path: str) -> tuple[float, float]:
    paints_ms, servers_ms = [], []
    for _ in range(ROUNDS):
        page.goto("about:blank")
        page.goto(path)
        # Asked again and again from here: the page's policy lets nothing be evaluated inside of it.
        stage.until(lambda: page.evaluate(PAINTED) is not None, what="the first paint")
        paints_ms.append(float(page.evaluate(PAINTED)))
        servers_ms.append(float(page.evaluate("performance.getEntriesByType('navigation')[0].responseEnd")))
    return median(paints_ms), median(servers_ms)


def _fill(dsn: str, count: int) -> None:
    begun = time.perf_counter()
    values = {"count": count, "ended": int(count * (1 - LIVING_PART))}
    with connect(dsn, name="durable-loadtest") as connection:
        schema.install(connection, shards=SHARDS)
        for statement in FILL:
            connection.execute(
                statement.encode() if "%" not in statement else statement, values if "%" in statement else None
            )
        connection.execute("vacuum (analyze)")
    print(f"{count:,} workflows made in {time.perf_counter() - begun:.0f} s")


@contextmanager
def _served(dsn: str) -> Iterator[str]:
    """The address of a console on it."""
    server = uvicorn.Server(
        uvicorn.Config(application(ConsoleSettings(dsn=dsn)), port=0, log_level="error", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        stage.until(lambda: server.started or not thread.is_alive(), what="the console")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(UP_S_MAX)


if __name__ == "__main__":
    sys.exit(main())
