"""``make loadtest``: Locust's users on a cluster of its own for a while, and how long workflows took from end to end.

    python -m durable_cluster.loadtest.load [--seconds 30] [--users 24] [MIX …]

The cluster and its Postgres are started and stopped here, in a directory of their own: what runs on the machine already is left
alone. What Locust wrote is kept in ``--report``. The exit code is 0 only if no call and no workflow failed, none is stuck, and no
process of the cluster had to be started again.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from durable_cluster.database import connect
from durable_cluster.errors import DurableError
from durable_cluster.loadtest.bench.environment import environment
from durable_cluster.loadtest.figures import say
from durable_cluster.loadtest.load_options import END_TO_END
from durable_cluster.loadtest.stage import fresh_database, running_cluster
from durable_cluster.ops import lookups
from durable_cluster.ops.terminal import harmless, table

APP = "durable_cluster.loadtest.mixes:app"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
FILES = "loadtest"
"""What the names of Locust's files begin with."""
LINES_SHOWN = 5
LEAVE_S = 30
"""So long a workflow that was started may take after the last second of load."""
END_S = 5
INTERRUPTED = 130
PERCENTILES = ("50%", "95%", "99%", "100%")


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of one mix, from the start's call to the result, in ms; Locust rounds percentiles to two digits."""

    mix: str
    ended: int
    failed: int
    a_second: float
    percentiles: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(level="ERROR", format="%(asctime)s %(message)s")
    options.report.mkdir(parents=True, exist_ok=True)
    try:
        return loaded(options)
    except DurableError as error:
        say(f"loadtest: {error}")
        return 1
    except KeyboardInterrupt:
        say("loadtest: stopped, and with it all that it had started")
        return INTERRUPTED


def loaded(options: argparse.Namespace) -> int:
    """Start what is needed, let the users in, and say how it went."""
    with (
        fresh_database(options.dsn, is_asynchronous=False) as dsn,
        running_cluster(dsn, processes=options.shards, shards=options.shards, app=APP) as cluster,
        connect(dsn, name="durable-loadtest") as connection,
    ):
        say(machine(connection))
        say(f"{options.shards} shards, {options.users} users for {options.seconds} s; load {os.getloadavg()[0]:.1f}")
        code = let_in(options, dsn)
        cluster.demand_whole()
        wrong = failed_workflows(connection)
    latencies, errors = read(options)
    print("\n".join(told(latencies)), flush=True)
    for line in [*errors, *wrong]:
        print(f"✗ {harmless(line)}")
    if code or errors or wrong or not latencies:
        print(f"✗ not all went well; see {log_of(options)}")
        return 1
    print(f"✓ no call failed, no workflow failed or is stuck; the report is {options.report / FILES}.html")
    return 0


def let_in(options: argparse.Namespace, dsn: str) -> int:
    """Run Locust. Its exit code."""
    named = options.report / FILES
    for old in options.report.glob(f"{FILES}*"):
        old.unlink()
    words = ["-f", LOCUSTFILE, "--headless", "--only-summary", "--csv", named, "--html", f"{named}.html"]
    bounds = ["-u", options.users, "-r", max(1, options.users // 2), "-t", f"{options.seconds}s"]
    with (
        log_of(options).open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "locust", *map(str, [*words, *bounds, "--stop-timeout", LEAVE_S, *options.mixes])],
            env={**os.environ, "DURABLE_DSN": dsn},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as locust,
    ):
        try:
            return locust.wait()
        finally:
            end(locust)


def end(locust: subprocess.Popen[bytes]) -> None:
    """End it before its cluster ends: users whose workflows nobody runs any more would wait for them. Safe when it has ended."""
    locust.terminate()
    try:
        locust.wait(END_S)
    except subprocess.TimeoutExpired:
        locust.kill()
        locust.wait()


def log_of(options: argparse.Namespace) -> Path:
    """What Locust said."""
    return Path(f"{options.report / FILES}.log")


def read(options: argparse.Namespace) -> tuple[list[Latency], list[str]]:
    """What Locust wrote: how long workflows took, by mix, and which errors there were. Raises DurableError if it wrote nothing."""
    stats, failures = (Path(f"{options.report / FILES}_{what}.csv") for what in ("stats", "failures"))
    if not stats.exists():
        said = log_of(options).read_text("utf-8", "replace").splitlines()[-LINES_SHOWN:]
        raise DurableError("\n".join(["Locust did not begin; the last that it said:", *said]))
    with stats.open(newline="") as file:
        latencies = [
            Latency(
                mix=row["Name"],
                ended=int(row["Request Count"]) - int(row["Failure Count"]),
                failed=int(row["Failure Count"]),
                a_second=float(row["Requests/s"]),
                percentiles=[float(row[name]) for name in PERCENTILES],
            )
            for row in csv.DictReader(file)
            if row["Type"] == END_TO_END
        ]
    with failures.open(newline="") as file:
        errors = [
            f"{row['Name']}, {row['Method']}: {row['Error']} ({row['Occurrences']} times)"
            for row in csv.DictReader(file)
        ]
    return latencies, errors


def told(latencies: Sequence[Latency]) -> list[str]:
    """A table for people."""
    rows = [
        (one.mix, one.ended, one.failed, round(one.a_second, 1), *(round(found) for found in one.percentiles))
        for one in latencies
    ]
    return table(("end to end", "ended", "failed", "a second", "p50 ms", "p95 ms", "p99 ms", "most ms"), rows)


def failed_workflows(connection: psycopg.Connection[Any]) -> list[str]:
    """Which kinds of workflows failed, or are stuck."""
    return [
        f"{one.workflows} of '{one.workflow}' {'are' if one.workflows > 1 else 'is'} {one.status}"
        for one in lookups.totals(connection)
        if one.status not in ("completed", "running")
    ]


def machine(connection: psycopg.Connection[Any]) -> str:
    """On what this runs."""
    here = environment(connection, ())
    return f"{here.cores} × {here.processor}, {here.memory_gib:g} GiB, PostgreSQL {here.postgres_version}, Python {here.python}"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with 2 for those that make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m durable_cluster.loadtest.load", description="A bounded load test, on a cluster of its own."
    )
    parser.add_argument("mixes", nargs="*", metavar="MIX", help="OrderFlow, Approvals, AgentLoop, FanOut (all)")
    parser.add_argument("--users", type=int, default=24, metavar="N", help="at once (24)")
    parser.add_argument("--seconds", type=int, default=30, metavar="N", help="of load (30)")
    parser.add_argument("--shards", type=int, default=4, metavar="N", help="a process each (4)")
    parser.add_argument("--report", type=Path, default=Path("loadtest-report"), metavar="DIR", help="(loadtest-report)")
    parser.add_argument("--dsn", help="a server where databases may be made (default: a local Postgres of its own)")
    options = parser.parse_args(arguments)
    if min(options.users, options.seconds, options.shards) < 1:
        parser.error("--users, --seconds and --shards are 1 or more")
    if find_spec("locust") is None:
        parser.error("this needs Locust: pip install 'durable-cluster[loadtest]'")
    return options


if __name__ == "__main__":
    sys.exit(main())
