"""What the documents hold that can be executed: programs, commands and statements, and what they say.

- `python`: all of a page's blocks are one program, which is run block by block. One that begins with ``# NAME.py`` is a file of
  that name.
- `sh`: run where it stands. A cluster that is started stays, until the page stops it or ends.
- `sql`: statements, for one session.
- `text`, or no language at all: what the block right before it says; ``…`` stands for what differs from run to run.
- `py`: the code of others, and `console`: what nobody should run in a test. Not executed.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import msgspec
import psycopg

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\w+\.py)\b")
KEPT = re.compile(r"\s*\\gset\s*$")
ANY = "…"
LANGUAGES = {"python", "sh", "sql", "text", "", "py", "console"}
WAIT_S = 120
END_S = 30
END_OF_BLOCK = "\x1e"
INTERPRETER = f"""
import ast, sys
for line in sys.stdin:
    exec(compile(ast.literal_eval(line), "page", "exec"))
    print({END_OF_BLOCK!r}, flush=True)
"""


class Block(msgspec.Struct, frozen=True):
    """Statements, and what the page shows as the last result among them, if it does."""

    statements: list[str]
    shown: str | None


def statements_of(text: str) -> list[str]:
    """A statement ends with a line's last ``;`` or with ``\\gset``, outside of ``$$``."""
    found, lines = [], []
    for line in text.splitlines():
        lines.append(line)
        statement = "\n".join(lines).strip()
        if re.search(r"(;|\\gset)$", line) and statement.count("$$") % 2 == 0:
            found.append(statement.removesuffix(";"))
            lines = []
    assert not "".join(lines).strip(), f"a statement without an end: {lines}"
    return found


def blocks_of(page: str) -> list[Block]:
    """The page's ``sql`` blocks; a block without a language right behind one is what it gives."""
    fences = [(found, found[1], found[2]) for found in FENCE.finditer(page)]
    blocks = []
    for (found, language, text), after in zip_longest(fences, fences[1:]):
        if language == "sql":
            is_shown = after is not None and not after[1] and not page[found.end() : after[0].start()].strip()
            blocks.append(Block(statements_of(text), after[2] if is_shown else None))
    return blocks


def rows_of(table: str) -> list[list[str]]:
    """Names and cells of a table as psql draws it."""
    lines = [line for line in table.splitlines() if not re.fullmatch(r"[-+]+", line)]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def fits(shown: str, said: str) -> bool:
    """Whether they are equal, but for what ``…`` stands for."""
    return re.fullmatch(".*".join(map(re.escape, shown.split(ANY))), said, re.DOTALL) is not None


class Psql:
    """What this page uses of psql: ``\\gset``, ``:'name'``, and results as text."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._kept: dict[str, str] = {}

    def run(self, statement: str) -> list[list[str]] | str:
        """Names and rows, or the error as psql says it."""
        query = re.sub(r":'(\w+)'", lambda found: f"'{self._kept[found[1]]}'", KEPT.sub("", statement))
        try:
            cursor = self._connection.execute(query.encode())
        except psycopg.Error as error:
            return f"ERROR:  {error.sqlstate}: {error.diag.message_primary}"
        rows = self._rows(cursor)
        if KEPT.search(statement):
            names, values = rows
            self._kept.update(zip(names, values, strict=True))
        return rows

    def _rows(self, cursor: psycopg.Cursor[Any]) -> list[list[str]]:
        result = cursor.pgresult
        if cursor.description is None or result is None:
            return []
        cells = [
            [(result.get_value(row, column) or b"").decode() for column in range(result.nfields)]
            for row in range(result.ntuples)
        ]
        return [[column.name for column in cursor.description], *cells]


def last_of(results: list[list[list[str]] | str]) -> list[list[str]] | str:
    """The last that is one: a ``commit`` gives none. An error is the last, or not expected."""
    told = [result for result in results if result]
    assert told, "no statement gave a result"
    assert all(isinstance(result, list) for result in told[:-1]), told
    return told[-1]


def compare(said: list[list[str]] | str, shown: str) -> None:
    """Assert that a result is what the page shows."""
    if isinstance(said, str):
        assert fits(shown.strip(), said), said
        return
    expected = rows_of(shown)
    assert len(said) == len(expected), said
    for row, wanted in zip(said, expected, strict=True):
        assert len(row) == len(wanted), said
        assert all(map(fits, wanted, row)), said


def fences_of(page: str) -> list[tuple[str, str]]:
    """Language and text of each block."""
    return [(found[1], found[2]) for found in FENCE.finditer(page)]


class Session:
    """Runs a page in a directory of its own: its files, its program, its commands."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._running: list[subprocess.Popen[str]] = []
        self._program: subprocess.Popen[str] | None = None

    def play(self, page: str) -> None:
        """Run everything, and compare what is said with what the page shows."""
        fences = fences_of(page)
        for (language, text), after in zip_longest(fences, fences[1:]):
            assert language in LANGUAGES, f"a block of '{language}': nobody knows how to run that"
            shown = after[1] if after is not None and after[0] == "text" else None
            if language == "py":
                ast.parse(text)
            elif language == "python" and (named := FILE.match(text)):
                (self._directory / named[1]).write_text(text)
            elif language == "python":
                said = self._run_block(text)
                assert fits(shown or "", said), f"{text}\nsaid:\n{said}\nand not:\n{shown}"
            elif language == "sh" and text.startswith("durable-cluster start"):
                self._begin(["bash", "-c", f"exec {text}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            elif language == "sh":
                said = self._run_command(text)
                assert shown is None or fits(shown, said), f"{text}\nsaid:\n{said}\nand not:\n{shown}"

    def _run_command(self, text: str) -> str:
        """What it writes to its standard output."""
        with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
            code = self._begin(["bash", "-euo", "pipefail", "-c", text], stdout=output, stderr=errors).wait(WAIT_S)
            said, complaint = (read.seek(0) or read.read() for read in (output, errors))
        assert code == 0, f"{text}\nended with {code} and said:\n{said}{complaint}"
        return said

    def _run_block(self, text: str) -> str:
        """What the page's program writes while it runs this block."""
        self._program = program = self._program or self._begin(
            [sys.executable, "-c", INTERPRETER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert program.stdin is not None
        assert program.stdout is not None
        late = threading.Timer(WAIT_S, program.kill)
        late.start()
        program.stdin.write(f"{text!r}\n")
        program.stdin.flush()
        said = []
        for line in program.stdout:
            if line.endswith(END_OF_BLOCK + "\n"):
                late.cancel()
                return "".join(said) + line.removesuffix(END_OF_BLOCK + "\n")
            said.append(line)
        raise AssertionError(f"{text}\nended its program and said:\n{''.join(said)}")

    def _begin(self, words: list[str], **streams: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, cwd=self._directory, env=self._environment, start_new_session=True, text=True, **streams
        )
        self._running.append(process)
        return process

    def end(self) -> None:
        """End what still runs."""
        for process in self._running:
            for word in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, word)
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=END_S)
                    break


@contextmanager
def session(directory: Path, **variables: str) -> Iterator[Session]:
    """A session with these variables and no others of ours; ``python`` and ``durable-cluster`` are those of the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    made = Session(directory, {**kept, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **variables})
    try:
        yield made
    finally:
        made.end()
