"""One child as its supervisor sees it: spawned, heard, told, drained, killed, reaped. Kills once; every call is safe twice."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from multiprocess import resource_tracker
from multiprocess.connection import Connection
from multiprocess.context import SpawnContext

from durable_cluster.shards.messages import FromChild, ToChild, decode_from_child, encode

Target = Callable[[bytes, int | None, Connection, int], None]


class Child:
    """A spawned process and its pipe."""

    def __init__(self, context: SpawnContext, target: Target, config: bytes, *, name: str, shard: int | None) -> None:
        self.name = name
        self.shard = shard
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(config, shard, theirs, os.getpid()), name=name)
        with _interrupts_held():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process id; it belongs to the child until it is reaped."""
        return int(self._process.pid)

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        code: int | None = self._process.exitcode
        return code

    @property
    def is_frozen(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP): it lives, but its work is better done elsewhere. Linux."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[:1] == ["T"]

    @property
    def waitables(self) -> list[object]:
        """What becomes ready when the child dies or speaks."""
        return [self._process.sentinel] if self._pipe.closed else [self._process.sentinel, self._pipe]

    def heard(self) -> list[FromChild]:
        """What it has said since the last time; also what a dead child said before."""
        said: list[FromChild] = []
        try:
            while not self._pipe.closed and self._pipe.poll():
                said.append(decode_from_child(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            self._pipe.close()
        return said

    def tell(self, message: ToChild) -> None:
        """Send it a message; a child that is dying does not hear it."""
        try:
            if not self._pipe.closed:
                self._pipe.send_bytes(encode(message))
        except OSError:
            self._pipe.close()

    def drain(self) -> None:
        """Ask it to finish its page and go."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        self._signal(signal.SIGKILL)

    def reap(self) -> None:
        """Collect a child that has ended."""
        self._process.join()
        self._pipe.close()
        self._process.close()

    def _signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """What is spawned inside begins with SIGINT blocked, until it says what it makes of it.

    Ctrl-C reaches the whole process group: a child that is still importing would die of it, with a traceback.
    """
    resource_tracker.ensure_running()  # started by the spawn itself, it would unblock the signal on its way
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 where it has none any more, or the system does not say (Linux does)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def resident_memory_mib(pids: list[int]) -> float:
    """The sum of the processes' resident memory, in MiB (Linux; elsewhere this process's peak)."""
    total = sum(map(resident_bytes, pids))
    return (total or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / (1 << 20)
