"""A Postgres for tests: its data are in memory where there is room, nothing is flushed to a disk, and it is gone with its user."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from durable_cluster.embedded import EmbeddedPostgres

MEMORY = Path("/dev/shm")
MEMORY_FREE_BYTES_MIN = 2 << 30
STOP_S_MAX = 30.0
FAST = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}


@contextmanager
def server_in_memory(otherwise: Path | None = None, bin_dir: Path | None = None) -> Iterator[str]:
    """The DSN of a server of this process; where memory is scarce its data are in ``otherwise``, or in a temporary directory.

    ``bin_dir``: whose binaries, in place of the wheel's. Raises EmbeddedError.
    """
    own = _in_memory() or (None if otherwise else _new_home(None))
    home = own or otherwise
    assert home is not None
    try:
        with EmbeddedPostgres(home, bin_dir, FAST) as embedded:
            yield embedded.dsn
    finally:
        if own is not None:
            _await_end(own)
            shutil.rmtree(own, ignore_errors=True)


def _in_memory() -> Path | None:
    """A new directory in memory, after those of killed processes were removed; None where there is little room."""
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return None
    for old in MEMORY.glob("durable-test-*"):
        found = re.match(r"durable-test-(\d+)-", old.name)
        if found and not Path(f"/proc/{found[1]}").exists() and old.stat().st_uid == os.geteuid():
            shutil.rmtree(old, ignore_errors=True)
    return None if shutil.disk_usage(MEMORY).free < MEMORY_FREE_BYTES_MIN else _new_home(MEMORY)


def _new_home(place: Path | None) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"durable-test-{os.getpid()}-", dir=place))


def _await_end(home: Path) -> None:
    deadline = time.monotonic() + STOP_S_MAX
    while (home / "pgdata" / "postmaster.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
