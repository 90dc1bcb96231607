"""The guard against regressions: ``make bench-smoke``, under 90 seconds.

Holds the gates that are ratios and counts, which any machine must keep; never an absolute time. What misses a gate is measured
once more, because a busy machine can spoil a ratio, and must keep it then. Prints the keys of ``loadtest.hotpath``.
"""

from __future__ import annotations

import logging
import sys

import msgspec

from durable_cluster.errors import DurableError
from durable_cluster.loadtest import hotpath, stage
from durable_cluster.loadtest.bench.cells import Results
from durable_cluster.loadtest.bench.command import line
from durable_cluster.loadtest.bench.episodes import chain
from durable_cluster.loadtest.bench.scene import HELD
from durable_cluster.loadtest.bench.throughput import throughput
from durable_cluster.loadtest.bench.verdicts import Verdict, verdicts
from durable_cluster.loadtest.peers.ours import Ours

TRIES = 2
HOTPATH_S = 5.0
FREE_S = 3.0
HELD_S = 6.0
BUCKET_S = 1.0


def measured(server: str) -> tuple[hotpath.Report, list[Verdict]]:
    """Everything that a gate stands on."""
    report, results = hotpath.measured(server, seconds=HOTPATH_S), Results()
    throughput(Ours, server, results, seconds=FREE_S, held_s=HELD_S, bucket_s=BUCKET_S, condition=HELD)
    chain(Ours, server, results, seconds=FREE_S, held_s=HELD_S, bucket_s=BUCKET_S)
    return report, [one for one in verdicts(report, None, results) if one.is_portable and one.value is not None]


def main() -> int:
    """The exit code: 0, or 1 if a gate is missed twice or nothing could be measured."""
    logging.basicConfig(level="ERROR")
    missed: set[str] | None = None
    try:
        with stage.some_server(None) as server:
            for _ in range(TRIES):
                report, found = measured(server)
                for one in found:
                    print(line(one), file=sys.stderr)
                again = {one.what for one in found if one.is_kept is False}
                missed = again if missed is None else missed & again
                if not missed:
                    break
    except DurableError as error:
        print(f"bench-smoke: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(report).decode())
    for what in sorted(missed or ()):
        print(f"bench-smoke: gate missed twice: {what}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
