"""``durable-cluster bench``: the harness comes with an extra, and this finds it."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.terminal import Terminal


def bench(terminal: Terminal, options: argparse.Namespace) -> int:
    """Measure, and write the report; the exit code. Raises ConfigurationError where the extra is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError("bench needs the extra 'loadtest': pip install 'durable-cluster[loadtest]'")
    code: int = import_module("durable_cluster.loadtest.bench.command").bench(terminal, options)
    return code
