"""``durable-cluster bench``: the harness comes with an extra, and this finds it."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.terminal import Terminal
from durable_cluster.ops.values import seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.epilog = (
        "It makes databases of its own and drops them: on --dsn, else on a local Postgres that is gone afterwards."
    )
    parser.add_argument("--quick", action="store_true", help="a taste of everything, in about ten minutes (else hours)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-report"), metavar="DIR", help="where to (./bench-report)"
    )
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--workloads", nargs="+", default=[], metavar="W", help="only these of W1 to W8")
    parser.add_argument("--seconds", type=seconds, metavar="S", help="the length of a load (20); others in proportion")
    parser.add_argument("--soak", type=seconds, default=0.0, metavar="S", help="at the end, a load that lasts so long")
    parser.add_argument(
        "--pg-bin",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="binaries of a Postgres; may be repeated",
    )
    parser.add_argument(
        "--render",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="measure nothing; write the report there anew, with what further reports have beside it",
    )


def bench(terminal: Terminal, options: argparse.Namespace) -> int:
    """Measure, and write the report; the exit code. Raises ConfigurationError where the extra is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError("bench needs the extra 'loadtest': pip install 'durable-cluster[loadtest]'")
    code: int = import_module("durable_cluster.loadtest.bench.command").bench(terminal, options)
    return code
