"""The documents are true: each statement of docs/sql.md is executed, in order, and gives the result that stands below it.

So are the programs and commands of docs/linear.md, docs/guide and docs/coming-from.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psycopg
import pytest
from documents import Psql, blocks_of, compare, fits, last_of, session

from durable_cluster import App, errors

DOCS = Path(__file__).parent.parent / "docs"
SQL_PAGE = (DOCS / "sql.md").read_text("utf-8")
PAGES = [
    DOCS / "linear.md",
    DOCS / "timeline.md",
    DOCS / "console.md",
    *sorted((DOCS / "guide").glob("*.md")),
    *sorted((DOCS / "coming-from").glob("*.md")),
]
FROM_NOTHING = "quickstart.md"
CONSOLE_PORT = ":8100"

OFFERED = (
    "select distinct p.proname from pg_proc p cross join lateral aclexplode(p.proacl) a"
    " where p.pronamespace = 'durable'::regnamespace"
    " and a.grantee in ('durable_client'::regrole, 'durable_operator'::regrole, 'durable_viewer'::regrole)"
)


ARGUMENTS = (
    "select p.proname, array(select substr(a.name, 3) from unnest(p.proargnames) with ordinality a(name, o)"
    " where a.o <= p.pronargs order by a.o) from pg_proc p where p.pronamespace = 'durable'::regnamespace"
)


def free_port() -> int:
    """One that nobody listens on: a page's own may be taken."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def run_what_waits(shop: App, dsn: str) -> None:
    """What the cluster of the page does between two blocks."""
    with psycopg.connect(dsn) as other:
        (has_work,) = other.execute("select bool_or(has_work) from durable.shard_status()").fetchone() or (None,)
    if has_work:
        shop.run(until_idle=True)


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


def headings_of(document: Path) -> set[str]:
    """The anchors of its headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_documents_leads_somewhere() -> None:
    written = [page for part in ("docs", "examples", "ops") for page in (DOCS.parent / part).rglob("*.md")]
    for document in [DOCS.parent / "README.md", *written]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text("utf-8")):
            found = document.parent / target if target else document
            assert found.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in headings_of(found), f"{document.name} links to {target}#{anchor}"


def test_the_pages_are_found() -> None:
    assert {page.parent.name for page in PAGES} == {"docs", "guide", "coming-from"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_page_does_what_it_shows(page: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each on a database of its own; the first page of all on a machine where nothing has been set up."""
    if "curl " in page.read_text("utf-8") and shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    variables = {} if page.name == FROM_NOTHING else {"DURABLE_DSN": request.getfixturevalue("dsn")}
    with session(tmp_path, **variables) as played:
        played.play(page.read_text("utf-8").replace(CONSOLE_PORT, f":{free_port()}"))


@pytest.mark.parametrize(
    ("page", "is_true"),
    [
        ("```sh\necho 1\n```\n```text\n1\n```\n", True),
        ("```sh\necho 1\n```\n```text\n2\n```\n", False),
        ("```sh\nfalse\n```\n", False),
        ("```python\nprint(1)\n```\n```text\n1\n```\n```python\nprint(2)\n```\n```text\n2\n```\n", True),
        ("```python\nprint(1)\n```\n```text\n1\n```\n```python\nprint(2)\n```\n", False),
        ("```python\n# one.py\nx = 1\n```\n```sh\npython -c 'import one; print(one.x)'\n```\n```text\n1\n```\n", True),
        ("```ruby\nputs 1\n```\n", False),
    ],
)
def test_a_page_that_says_something_else_is_found(tmp_path: Path, page: str, is_true: bool) -> None:
    with session(tmp_path) as played, nullcontext() if is_true else pytest.raises(AssertionError):
        played.play(page)
