"""What a step does, the same in every system that is measured, and how the harness hears of it.

A step counts itself in memory that the harness maps, pauses if it was told to (an answer from somewhere is awaited), and
stamps the time into a file of its thread if it was told to, or if it is its flow's last. So nothing that is measured depends
on what a system records in its tables, and all of them pay the same: 0.2 µs a step for the count, 2 µs for a stamp.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

STEPS = 10
DIRECTORY = "DURABLE_BENCH_DIR"  # environment of a worker: where its counts and stamps go
COUNT = struct.Struct("<q")


class Flow(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of a flow before its next step.

    ``number``: the flow's own, given by the harness; ``step``: which comes next, from 1; ``of``: how many there are in all;
    ``pause_ms``: what each waits for; ``is_told``: whether every step is stamped; ``ballast``: so many bytes to carry along.
    """

    number: int
    step: int = 1
    of: int = STEPS
    pause_ms: int = 0
    is_told: bool = False
    ballast: str = ""

    @property
    def is_last(self) -> bool:
        """Whether no step comes after the next."""
        return self.step >= self.of


TEN_STEPS = Flow(0)
"""What most flows are like."""


class Stamp(msgspec.Struct, frozen=True):
    """A step was there. ``at_s``: by time.time(), in the process ``pid``."""

    number: int
    step: int
    at_s: float
    pid: int


def step(flow: Flow) -> Flow | None:
    """One step: the state for the next; None after the last."""
    if flow.pause_ms:
        time.sleep(flow.pause_ms / 1000)
    return _done(flow)


async def step_beside(flow: Flow) -> Flow | None:
    """The same for systems whose steps are coroutines."""
    if flow.pause_ms:
        await asyncio.sleep(flow.pause_ms / 1000)
    return _done(flow)


def _done(flow: Flow) -> Flow | None:
    here = _here()
    here.count()
    is_last = flow.is_last
    if is_last or flow.is_told:
        here.stamp(flow)
    if is_last:
        return None
    return Flow(flow.number, flow.step + 1, flow.of, flow.pause_ms, flow.is_told, flow.ballast)


class Here:
    """The count and the stamps of one thread: threads that shared a count would lose some of it."""

    def __init__(self, directory: Path) -> None:
        self.pid = os.getpid()
        name = f"{self.pid}-{next(_NUMBERS)}"
        with (directory / f"{name}.count").open("w+b") as file:
            file.truncate(COUNT.size)
            self._memory = mmap.mmap(file.fileno(), COUNT.size)
        self._stamps = os.open(directory / f"{name}.stamps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._steps = 0

    def count(self) -> None:
        """One more step."""
        self._steps += 1
        COUNT.pack_into(self._memory, 0, self._steps)

    def stamp(self, flow: Flow) -> None:
        """This step was here now."""
        os.write(self._stamps, b"%d %d %.6f\n" % (flow.number, flow.step, time.time()))


_THREAD = threading.local()
_NUMBERS = itertools.count(1)


def _here() -> Here:
    """Of this thread: a forked child opens its own."""
    here: Here | None = getattr(_THREAD, "here", None)
    if here is None or here.pid != os.getpid():
        here = _THREAD.here = Here(Path(os.environ[DIRECTORY]))
    return here


class Ledger:
    """The harness's side: what all processes counted and stamped in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Path, int] = {}

    def steps(self) -> int:
        """Steps run so far, in all processes, also in those that have died."""
        return sum(COUNT.unpack(raw)[0] for raw in self._counts())

    def _counts(self) -> Iterator[bytes]:
        for path in self.directory.glob("*.count"):
            raw = path.read_bytes()
            if len(raw) == COUNT.size:
                yield raw

    def new_stamps(self) -> list[Stamp]:
        """The stamps since the last call, in no order."""
        found = []
        for path in self.directory.glob("*.stamps"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                raw = file.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            pid = int(path.stem.partition("-")[0])
            for line in whole.splitlines():
                number, at, at_s = line.split()
                found.append(Stamp(int(number), int(at), float(at_s), pid))
        return found
