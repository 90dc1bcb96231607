"""``start --reload``, for development: the cluster in a process of its own, drained and started anew when Python files change.

this process ── watches files, passes signals on, keeps the local Postgres
└─ the cluster, in a process group of its own: Ctrl-C reaches it through this process alone, once
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from durable_cluster.embedded import kept_alive
from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal

EXIT_USAGE = 2
ROUND_MS = 200
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def start(
    terminal: Terminal, target: Target, *, words: Sequence[str], app_address: str, directories: Sequence[Path]
) -> int:
    """Run ``start`` with these words until it ends by itself or by a signal. Raises ConfigurationError, BadUsage."""
    if find_spec("watchfiles") is None:
        raise ConfigurationError("--reload needs the extra 'reload': pip install 'durable-cluster[reload]'")
    watchfiles = import_module("watchfiles")
    watched = [directory.resolve() for directory in directories] or [directory_of(app_address)]
    for directory in watched:
        if not directory.is_dir():
            raise BadUsage(f"--reload-dir {directory} is no directory")
    changes = watchfiles.watch(
        *watched,
        watch_filter=watchfiles.PythonFilter(),
        rust_timeout=ROUND_MS,
        yield_on_timeout=True,
        raise_interrupt=False,
    )
    with kept_alive(target.data), Cluster(terminal, words).running() as cluster:
        terminal.note(f"Python files below {' and '.join(map(str, watched))} are watched")
        return cluster.follow({Path(path) for _, path in some} for some in changes)


class Cluster:
    """The process of the cluster, while there is one: between two edits it may have ended."""

    def __init__(self, terminal: Terminal, words: Sequence[str]) -> None:
        self._terminal = terminal
        self._command = [sys.executable, "-m", "durable_cluster.ops", *_without_reload(words)]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_draining = False
        self._signals = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Cluster]:
        """Started; ended with this, whatever happens."""
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            self._launch()
            yield self
        finally:
            if self._process is not None:
                self._process.terminate()
                self._process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def follow(self, rounds: Iterable[set[Path]]) -> int:
        """Do what the changed files of each round ask for, until the cluster is over; its exit code."""
        for changed in rounds:
            if changed and not self._signals:
                self._change(changed)
            code = self._ended()
            if self._process is not None:
                continue
            if self._signals or (code in (0, EXIT_USAGE) and not self._is_draining):
                return max(0, code or 0)
            if self._is_draining:
                self._launch()
            elif code is not None:
                self._terminal.note("waiting for an edit to start again")
        return 0

    def _change(self, changed: set[Path]) -> None:
        names = ", ".join(sorted({path.name for path in changed}))
        wrong = next((said for path in sorted(changed) if (said := mistake_in(path))), None)
        if wrong is not None:
            goes_on = "waiting for the next edit" if self._process is None else "the cluster goes on as it was"
            self._terminal.note(f"{wrong}; {goes_on}")
        elif self._process is None:
            self._terminal.note(f"{names} changed")
            self._launch()
        elif not self._is_draining:
            self._terminal.note(f"{names} changed: the cluster drains and starts again")
            self._is_draining = True
            self._process.terminate()

    def _launch(self) -> None:
        self._is_draining = False
        self._process = subprocess.Popen(self._command, start_new_session=True)

    def _ended(self) -> int | None:
        """Its exit code, once."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            self._process = None
        return code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """The first signal drains it, the second ends it: another number, or the two would melt into one."""
        self._signals += 1
        if self._process is not None:
            self._process.send_signal(signal.SIGINT if self._signals > 1 or self._is_draining else signal.SIGTERM)


def directory_of(app_address: str) -> Path:
    """Where the app's files are: the working directory, if its module lies there, else its package."""
    top = app_address.partition(":")[0].partition(".")[0]
    here = Path.cwd()
    found = find_spec(top) if top.isidentifier() and not (here / top).is_dir() else None
    elsewhere = here if found is None or found.origin is None else Path(found.origin).resolve().parent
    return here if (here / f"{top}.py").exists() else elsewhere


def mistake_in(path: Path) -> str | None:
    """What keeps Python from reading a file that is there, such as one that is half edited."""
    try:
        compile(path.read_bytes(), path, "exec", dont_inherit=True)
    except FileNotFoundError:
        return None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        return f"{path.name}{line}: {error.args[0]}"
    return None


def _without_reload(words: Sequence[str]) -> list[str]:
    """The command line of the cluster itself."""
    parser = ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--reload", action="store_true")
    parser.add_argument("--reload-dir", action="append")
    return parser.parse_known_args(words)[1]
