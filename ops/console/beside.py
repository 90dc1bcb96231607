"""``start --console``: the console of a cluster, in a process of its own, so that it slows nothing; it ends with the cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

from durable_cluster.ops.console.command import demand_extra
from durable_cluster.ops.target import Database
from durable_cluster.ops.terminal import Terminal

logger = logging.getLogger("durable_cluster.console")

ENDS_S_MAX = 5.0


@contextlib.contextmanager
def console_beside(
    terminal: Terminal, database: Database, address: tuple[str, int] | None, *, app_address: str, metrics: str | None
) -> Iterator[None]:
    """A console at ``address``, while this lasts; without an address none. ``metrics``: the cluster's page, where it has one.

    Raises ConfigurationError where the extra is missing.
    """
    if address is None:
        yield
        return
    demand_extra()
    host, port = address
    words = ["console", "--host", host, "--port", str(port), "--app", app_address, "--until-eof"]
    words += [] if metrics is None else ["--metrics-from", metrics]
    process = subprocess.Popen(
        [sys.executable, "-m", "durable_cluster.ops", *words],
        env={**os.environ, "DURABLE_DSN": database.dsn},  # there may be a password in it: not for the list of processes
        stdin=subprocess.PIPE,  # ends when this process ends, however it does
        stdout=sys.stderr if terminal.is_json else None,
        start_new_session=True,  # Ctrl-C drains the cluster, and somebody may look on
    )
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(process, is_over), name="console", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        process.terminate()
        try:
            process.wait(ENDS_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _watch(process: subprocess.Popen[bytes], is_over: threading.Event) -> None:
    code = process.wait()
    if not is_over.is_set():
        logger.warning("the console has ended (%s); the cluster goes on without it", code)
