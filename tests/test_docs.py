"""The documents are true: each statement of docs/sql.md is executed, in order, and gives the result that stands below it.

So are the programs of docs/linear.md and docs/guide.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import App, errors

DOCS = Path(__file__).parent.parent / "docs"
SQL_PAGE = (DOCS / "sql.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KEPT = re.compile(r"\s*\\gset\s*$")
FILE = re.compile(r"# (\w+\.py)\n")
ANY = "…"
PROGRAMS = ["linear.md", *sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("guide/*.md"))]

OFFERED = (
    "select distinct p.proname from pg_proc p cross join lateral aclexplode(p.proacl) a"
    " where p.pronamespace = 'durable'::regnamespace"
    " and a.grantee in ('durable_client'::regrole, 'durable_operator'::regrole, 'durable_viewer'::regrole)"
)


ARGUMENTS = (
    "select p.proname, array(select substr(a.name, 3) from unnest(p.proargnames) with ordinality a(name, o)"
    " where a.o <= p.pronargs order by a.o) from pg_proc p where p.pronamespace = 'durable'::regnamespace"
)


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


def run_what_waits(shop: App, dsn: str) -> None:
    """What the cluster of the page does between two blocks."""
    with psycopg.connect(dsn) as other:
        (has_work,) = other.execute("select bool_or(has_work) from durable.shard_status()").fetchone() or (None,)
    if has_work:
        shop.run(until_idle=True)


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


@pytest.fixture
def shop(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """The shop of the page, on a fresh database; the role that the page makes goes with it."""
    monkeypatch.setenv("DURABLE_DSN", dsn)
    program = re.search(r"```python\n(# shop\.py.*?)```", SQL_PAGE, re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(program[1], "shop.py", "exec", dont_inherit=True), names)
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("drop role if exists shop_web")
        yield names["app"]
        admin.execute("drop owned by shop_web")
        admin.execute("drop role shop_web")
    names["app"].close()


def test_every_statement_of_the_page_does_what_the_page_shows(shop: App, conn: psycopg.Connection, dsn: str) -> None:
    psql = Psql(conn)
    shop.run(until_idle=True)
    blocks = blocks_of(SQL_PAGE)
    assert sum(block.shown is not None for block in blocks) > 25
    for block in blocks:
        results = [psql.run(statement) for statement in block.statements]
        if block.shown is None:
            assert all(isinstance(result, list) for result in results), results
        else:
            compare(last_of(results), block.shown)
        run_what_waits(shop, dsn)


def test_the_page_names_whatever_a_client_an_operator_or_a_viewer_may_call(conn: psycopg.Connection) -> None:
    offered = {name for (name,) in conn.execute(OFFERED)}
    assert len(offered) > 30
    assert (
        sorted(name for name in offered if f"durable.{name}(" not in SQL_PAGE and f"`durable.{name}`" not in SQL_PAGE)
        == []
    )


def test_the_page_names_their_arguments_as_they_are(conn: psycopg.Connection) -> None:
    known = {(name, ", ".join(arguments)) for name, arguments in conn.execute(ARGUMENTS)}
    said = re.findall(r"`durable\.(\w+)\(([a-z_, ]+)\)`", SQL_PAGE)
    assert len(said) > 30
    assert [call for call in said if call not in known] == []


def test_the_page_explains_every_error_of_ours() -> None:
    assert [state for state in errors.BY_SQLSTATE if f"`{state}`" not in SQL_PAGE] == []


@pytest.mark.parametrize(
    ("shown", "said", "is_same"), [("a", "a", True), ("a", "b", False), ("a…c", "abc", True), ("a…c", "abcd", False)]
)
def test_dots_stand_for_what_differs_and_for_nothing_else(shown: str, said: str, is_same: bool) -> None:
    assert fits(shown, said) is is_same


def test_a_result_that_is_not_shown_as_it_is_is_found() -> None:
    with pytest.raises(AssertionError):
        compare([["status"], ["failed"]], "  status\n-----------\n completed\n")
    with pytest.raises(AssertionError):
        compare([["status"]], "  status\n-----------\n completed\n")
    with pytest.raises(AssertionError):
        compare([["status"], ["completed"]], "ERROR:  DC003: …\n")


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in [
        DOCS.parent / "README.md",
        *DOCS.glob("*.md"),
        *DOCS.glob("guide/*.md"),
        *(DOCS.parent / "examples").rglob("*.md"),
    ]:
        text = document.read_text("utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)\s]*)?\)", text):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
        headings = {
            re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }
        for anchor in re.findall(r"\]\(#([^)\s]+)\)", text):
            assert anchor in headings, f"{document.name} links to #{anchor}"


@pytest.mark.parametrize("page", PROGRAMS)
def test_a_page_runs_as_one_program_and_prints_what_stands_below(dsn: str, tmp_path: Path, page: str) -> None:
    fences = [(found[1], found[2]) for found in FENCE.finditer((DOCS / page).read_text("utf-8"))]
    blocks = [text for language, text in fences if language == "python"]
    for file, text in [(found[1], text) for text in blocks if (found := FILE.match(text))]:
        (tmp_path / file).write_text(text)
    program = tmp_path / "page.py"
    program.write_text("\n".join(text for text in blocks if not FILE.match(text)))
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env={**os.environ, "DURABLE_DSN": dsn},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout == "".join(text for language, text in fences if language == "text")
