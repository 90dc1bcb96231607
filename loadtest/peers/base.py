"""What a system must offer to be measured: ours, the peers and the baselines alike.

A system lives on a database of its own. Its worker processes are started by the harness as its documentation starts them, run
the steps of ``work`` and nothing else, and are killed and started again by number, as a process supervisor would do it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Protocol

from durable_cluster.loadtest.bench import work
from durable_cluster.loadtest.bench.work import Flow
from durable_cluster.loadtest.stage import StageError

READY = "ready"
UP_S_MAX = 60.0
END_S_MAX = 20.0


class Workers(Protocol):
    """The worker processes of a system."""

    @property
    def pids(self) -> list[int]:
        """Of all processes whose CPU time and memory the system's users pay for, this one's excepted."""

    @property
    def thread_id(self) -> int:
        """The kernel's id of a thread of this process that belongs to the system; 0 if there is none."""

    def kill_one(self) -> int:
        """SIGKILL a worker that runs steps, and have it started again as a supervisor would. The pid of the dead."""

    def demand_running(self) -> None:
        """Raise StageError if one ended by itself."""


class System(ABC):
    """One system on one database. A method that ``lacks`` excuses is never called."""

    name: ClassVar[str]
    """As it is called on the command line."""
    package: ClassVar[str | None] = None
    """The distribution on PyPI whose version the report names; None for what is our own."""
    configuration: ClassVar[str]
    """How it is run and why that is its best: a sentence or two, naming its documentation."""
    processes: ClassVar[int] = 4
    """How many worker processes give it the most throughput on two cores."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """Workloads (W1 … W8) it cannot run, and why in a few words."""

    def __init__(self, dsn: str, directory: Path) -> None:
        self.dsn = dsn
        self.directory = directory

    @classmethod
    def version(cls) -> str:
        """Of what is installed."""
        return version(cls.package) if cls.package else "ours"

    @abstractmethod
    def install(self) -> None:
        """Make its schema in the empty database."""

    @abstractmethod
    def start_one(self, flow: Flow) -> None:
        """Start a flow; it is durable on return."""

    @abstractmethod
    def start_many(self, flows: Sequence[Flow]) -> None:
        """Start flows in the fastest way it documents; all are durable on return."""

    def start_sleepers(self, flows: Sequence[Flow], due_s: float) -> None:
        """Start flows that sleep durably until ``due_s`` (time.time()), and only then run their first step."""
        raise NotImplementedError

    def start_fan_out(self, flow: Flow, width: int) -> None:
        """Start a flow whose first step spawns so many flows of one step each; a step after the last of them runs ``flow``."""
        raise NotImplementedError

    @contextmanager
    def workers(self, count: int) -> Iterator[Workers]:
        """So many worker processes, up and waiting for work, for as long as the block lasts."""
        running = WorkerProcesses(self, count)
        try:
            running.start()
            yield running
        finally:
            running.stop()

    def worker_command(self, number: int) -> list[str]:
        """Starts a worker, which writes the line "ready" to its standard output once it takes work.

        ``number`` counts them from 0; one that is started again has the number of the dead.
        """
        return [sys.executable, "-m", f"durable_cluster.loadtest.peers.{self.name}", str(number)]

    def worker_environment(self, number: int) -> dict[str, str]:
        """What a worker finds in its environment, beside ours."""
        return {"DURABLE_BENCH_DSN": self.dsn, work.DIRECTORY: str(self.directory)}

    def close(self) -> None:  # noqa: B027  (most have none)
        """Let go of the client's connections."""


class WorkerProcesses:
    """Worker processes started by command. Their output goes to files, named when one fails."""

    thread_id = 0

    def __init__(self, system: System, count: int) -> None:
        self._system = system
        self._running: list[subprocess.Popen[bytes]] = []
        self._count = count

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._running]

    def start(self) -> None:
        """Return when all are up."""
        self._running = [self._started(number) for number in range(self._count)]
        for number in range(self._count):
            self._await_ready(number)

    def kill_one(self) -> int:
        dead = self._running[0]
        dead.kill()
        dead.wait()
        self._running[0] = self._started(0)
        return dead.pid

    def demand_running(self) -> None:
        for number, process in enumerate(self._running):
            if process.poll() is not None:
                raise StageError(f"a worker of {self._system.name} ended: {self._last_words(number)}")

    def stop(self) -> None:
        """Ask all to end, and kill those that do not within 20 s."""
        for process in self._running:
            process.terminate()
        deadline = time.monotonic() + END_S_MAX
        for process in self._running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _started(self, number: int) -> subprocess.Popen[bytes]:
        output = self._output(number)
        with output.open("wb") as file:
            return subprocess.Popen(
                self._system.worker_command(number),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self._system.directory,
                env={**os.environ, **self._system.worker_environment(number), "PYTHONUNBUFFERED": "1"},
            )

    def _await_ready(self, number: int) -> None:
        deadline = time.monotonic() + UP_S_MAX
        while READY.encode() not in self._output(number).read_bytes().splitlines():
            self.demand_running()
            if time.monotonic() > deadline:
                raise StageError(
                    f"a worker of {self._system.name} is not up after {UP_S_MAX:.0f} s: {self._last_words(number)}"
                )
            time.sleep(0.02)

    def _output(self, number: int) -> Path:
        return self._system.directory / f"worker-{number}.log"

    def _last_words(self, number: int) -> str:
        output = self._output(number)
        return output.read_text("utf-8", errors="replace")[-2000:] or "it said nothing"
