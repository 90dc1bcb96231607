"""What a cluster survives, in figures: ``python -m durable_cluster.loadtest.survival [--json] [NAME …]``.

Each measurement runs the product on a database of its own; its figures stand beside the limits they must keep. The exit code is
0 only if all do. Measurements, in this order; without a name, all of them:
    sleepers   a million workflows asleep for 30 to 365 days: what that costs while nothing is due
    due        beside those, 10,000 that are due in one moment: how late the last of them runs
    crowd      a start, a signal, a cancel beside a million sleepers and 100,000 that wait for a signal, and 100,000 due at once
    fanout     one workflow with 100,000 children, spawned in waves of 1,024: how fast, and what memory a process takes for it
    page       999 quick lines in one page with a step of 30 s: until the last of them is done, from the commit of their start
    beside     chains on a process that has 1,000 calls of 10 s in flight, against the same chains alone, by turns
    recovery   consumers killed (SIGKILL) with a window and detached steps in hand: until others go on with both
    host       a supervisor killed with all its children while another host lives: until that one goes on with its work
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

import msgspec

from durable_cluster.errors import DurableError
from durable_cluster.loadtest import alongside, crowd, fanout, recovery, sleepers, stage, survival_flows
from durable_cluster.loadtest.figures import Figure, say

NAMES = ("sleepers", "due", "crowd", "fanout", "page", "beside", "recovery", "host")


def measured(options: argparse.Namespace, dsn: str, name: str) -> list[Figure]:
    """One measurement, on an empty database."""
    if name == "sleepers":
        due_after_s = options.due_after if "due" in options.names else []
        return sleepers.sleepers(
            dsn,
            count=options.sleepers,
            shards=options.shards,
            idle_s=options.idle,
            due=options.due,
            due_after_s=due_after_s,
        )
    if name == "crowd":
        return crowd.crowd(
            dsn,
            asleep=options.sleepers,
            waiting=options.waiting,
            shards=options.shards,
            idle_s=options.idle,
            due=options.crowd_due,
        )
    if name == "fanout":
        return fanout.fanout(dsn, children=options.children, shards=options.fan_shards)
    if name in {"page", "beside"}:
        return _measured_alongside(options, dsn, name)
    if name == "recovery":
        return recovery.recovery(dsn, kills=options.kills)
    return recovery.host(dsn, deaths=options.deaths, dead_interval_s=options.dead_interval)


def _measured_alongside(options: argparse.Namespace, dsn: str, name: str) -> list[Figure]:
    if name == "page":
        return alongside.page(dsn, lines=options.lines, slow_s=options.slow, rounds=options.pages)
    return alongside.beside(dsn, naps=options.naps, rounds=options.rounds, seconds=options.seconds)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with 2 for those that make no measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m durable_cluster.loadtest.survival", description="Measure what a cluster survives, and how fast."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)} (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--dsn", help="a server where databases may be made (default: a local Postgres of its own)")
    parser.add_argument("--log-level", default="error")
    for name, default, help_ in (
        ("sleepers", 1_000_000, "workflows asleep"),
        ("shards", 8, "shards beside the sleepers"),
        ("idle", 10.0, "seconds to look on while they sleep"),
        ("due", 10_000, "workflows due at once"),
        ("waiting", 100_000, "workflows that wait for a signal, in the crowd"),
        ("crowd-due", 100_000, "workflows due at once beside the crowd"),
        ("children", 100_000, "children of one workflow"),
        ("fan-shards", 2, "shards that they run on"),
        ("lines", 1_000, "lines of the page with a slow step"),
        ("slow", 30.0, "seconds that the slow step takes"),
        ("pages", 5, "such pages of each kind"),
        ("naps", 1_000, "calls in flight beside the chains"),
        ("rounds", 4, "rounds of chains with and without them"),
        ("seconds", 6.0, "of each such round"),
        ("kills", 60, "consumers to kill"),
        ("deaths", 5, "windows of killed hosts to see go on"),
        ("dead-interval", 3.0, "seconds of silence after which a host is dead"),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, metavar="N", help=f"{help_} ({default:,})"
        )
    parser.add_argument(
        "--due-after", type=float, nargs="+", default=[5.0, 62.0], metavar="S", help="how long those due sleep (5 62)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no measurement {sorted(unknown)[0]!r}; there are {', '.join(NAMES)}")
    options.names = options.names or list(NAMES)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 if a limit is not kept or a measurement failed."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a host in a group of its own must end too
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(message)s")
    runs = [name for name in NAMES if name in options.names or (name == "sleepers" and "due" in options.names)]
    figures: list[Figure] = []
    try:
        for name in (name for name in runs if name != "due"):
            say(f"{name}: begins; load {os.getloadavg()[0]:.1f}")
            with stage.fresh_database(options.dsn, is_asynchronous=False) as dsn:
                survival_flows.app.client.use(dsn)
                some = measured(options, dsn, name)
            for figure in some if not options.json else ():
                print(figure.told(), flush=True)
            figures += some
    except DurableError as error:
        say(f"survival: {error}")
        return 1
    if options.json:
        print(msgspec.json.encode(figures).decode())
    return 0 if all(figure.is_kept for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
