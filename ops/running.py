"""Which cluster runs from a data directory: one at a time, known by a locked file with its process id.

The lock is the kernel's and ends with its process however that ends, so a stale file means nothing. The file is emptied, never
removed: two who opened it before and after a removal would each hold the lock of their own file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from durable_cluster.embedded import is_locked, open_lock, pauses
from durable_cluster.errors import ConfigurationError, DurableError
from durable_cluster.ops.terminal import Terminal

PID_FILE = "cluster.pid"


class Stopped(msgspec.Struct, frozen=True):
    """The answer of ``stop``."""

    pid: int
    seconds: float


@contextlib.contextmanager
def registered(data: Path) -> Iterator[None]:
    """Be the cluster that runs from ``data``. Raises ConfigurationError while another does."""
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open_lock(data / PID_FILE)
    except OSError as error:
        raise ConfigurationError(f"--data {data} cannot be used: {error.strerror}; choose another directory") from error
    try:
        if not is_locked(lock, fcntl.LOCK_EX):
            raise ConfigurationError(
                f"a cluster runs from {data} already (pid {_said_pid(data)}): stop it with"
                f" 'durable-cluster stop --data {data}', or choose another --data"
            )
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def running_pid(data: Path) -> int | None:
    """The process id of the supervisor that runs from ``data``."""
    with _opened(data) as lock:
        return None if lock is None or is_locked(lock, fcntl.LOCK_SH) else _said_pid(data)


def stop(terminal: Terminal, data: Path, *, is_now: bool, timeout_s: float) -> int:
    """Ask the cluster of ``data`` to drain (``is_now``: to end its children at once) and wait until it is gone."""
    began = time.monotonic()
    pid = running_pid(data)
    if pid is None:
        raise ConfigurationError(
            f"no cluster runs from {data}; name its directory with --data, or press Ctrl-C where it was started"
        )
    try:
        os.kill(pid, signal.SIGTERM)
        if is_now:
            os.kill(pid, signal.SIGINT)  # another number: a second SIGTERM would melt into the first
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise ConfigurationError(f"process {pid} is not ours to stop; run this as the user who started it") from error
    with _opened(data) as lock:
        for _ in pauses(began + timeout_s):
            if lock is None or is_locked(lock, fcntl.LOCK_SH):
                gone = Stopped(pid, round(time.monotonic() - began, 3))
                terminal.answer(gone, [f"stopped (pid {pid}, after {gone.seconds:.1f} s)"])
                return 0
    raise DurableError(
        f"the cluster (pid {pid}) is still draining after {timeout_s:g} s: wait for it, or end it with"
        " 'durable-cluster stop --now' (committed work is safe, the rest runs again)"
    )


@contextlib.contextmanager
def _opened(data: Path) -> Iterator[int | None]:
    try:
        lock = os.open(data / PID_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise ConfigurationError(f"{data / PID_FILE} cannot be opened: {error.strerror}") from error
    try:
        yield lock
    finally:
        os.close(lock)


def _said_pid(data: Path) -> int | None:
    text = (data / PID_FILE).read_text().strip()
    return int(text) if text.isdigit() else None
