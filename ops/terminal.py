"""What commands say: one answer on stdout, for people or as one JSON document; everything else on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from durable_cluster.errors import ConfigurationError

PROGRAM = "durable-cluster"
BAR_CELLS = 28
REDRAW_S = 0.1
LINE_S = 5.0
# What would move the cursor or ring the bell; a newline and a tab are text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class BadUsage(ConfigurationError):
    """The command line cannot be what was meant."""


class Terminal:
    """One command's way to the outside."""

    def __init__(self, *, is_json: bool = False) -> None:
        self.is_json = is_json

    def answer(self, document: object, lines: Iterable[str]) -> None:
        """What was asked for: ``document`` (any msgspec can encode) with ``--json``, else ``lines``."""
        if self.is_json:
            print(msgspec.json.encode(document).decode(), flush=True)
            return
        self.say(lines)

    def say(self, lines: Iterable[str]) -> None:
        """A part of the answer that people should have before the rest; with ``--json`` it waits for the document."""
        if not self.is_json:
            for line in lines:
                print(harmless(line))
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Something worth knowing that is not the answer."""
        print(harmless(text), file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Why the command failed: one line. What follows it, such as the end of a server's log, is set in."""
        first, *rest = harmless(text).splitlines() or [""]
        print("\n  ".join([f"{PROGRAM}: error: {first}", *rest]), file=sys.stderr, flush=True)

    def is_interactive(self) -> bool:
        """Whether somebody can answer a question."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def asks(self, question: str) -> bool:
        """Ask; only yes is yes."""
        print(f"{harmless(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def progress(self, what: str, total: int) -> Progress:
        """A bar for long work; on a terminal it is redrawn, elsewhere it is a line now and then."""
        return Progress(what, total, is_live=sys.stderr.isatty())


class Progress:
    """So much of ``total`` is done. Safe to advance past the total; drawn on stderr."""

    def __init__(self, what: str, total: int, *, is_live: bool) -> None:
        self._what = what
        self._total = total
        self._is_live = is_live
        self._done = 0
        self._began_at = self._drawn_at = time.monotonic()
        self._is_drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_drawn:
            self._draw("\n")

    def advance(self, by: int = 1) -> None:
        """So many more are done."""
        self._done += by
        now = time.monotonic()
        if now - self._drawn_at >= (REDRAW_S if self._is_live else LINE_S):
            self._drawn_at = now
            self._draw("" if self._is_live else "\n")

    def _draw(self, end: str) -> None:
        self._is_drawn = True
        share = min(1.0, self._done / max(1, self._total))
        rate = self._done / max(0.001, time.monotonic() - self._began_at)
        text = f"{self._what} {self._done:,} of {self._total:,}, {rate:,.0f}/s"
        if self._is_live:
            text = f"\r{bar(share)} {text}\x1b[K"
        print(text, end=end, file=sys.stderr, flush=True)


def bar(share: float) -> str:
    """A bar of fixed width, filled to ``share`` (0 to 1)."""
    filled = round(share * BAR_CELLS)
    return "█" * filled + "░" * (BAR_CELLS - filled)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines with aligned columns; numbers stand to the right, None is a dash."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(head)]
    is_number = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, is_number, strict=True)]
        return "  ".join(padded).rstrip()

    return [line(head), *(line(row) for row in cells)]


def harmless(text: str) -> str:
    """``text`` without the power to command a terminal: it may come from a workflow's input or failure."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def pretty(value: object) -> str:
    """JSON for people."""
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def elapsed(seconds: float) -> str:
    """A duration as people say it: 0.4 s, 3 min, 2 h, 5 d."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"
