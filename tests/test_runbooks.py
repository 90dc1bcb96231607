"""The runbooks are true: each command exists as it stands there, and each statement runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import psycopg
import pytest

from durable_cluster.ops.arguments import parser

PAGES = sorted((Path(__file__).parent.parent / "ops" / "runbooks").glob("*.md"))
TEXTS = {page.stem: page.read_text("utf-8") for page in PAGES}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Those of blocks, a line each, and those in the text."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines() if line.strip()]
    flowing = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inside = [" ".join(said.split()) for said in re.findall(r"`(durable-cluster [^`]+)`", flowing)]
    return [line for line in [*lines, *inside] if line.startswith("durable-cluster ")]


def statements(text: str) -> list[str]:
    flowing = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inside = [said for said in re.findall(r"`(select [^`]+)`", flowing) if "(PID)" not in said]
    return [one for block in blocks(text, "sql") for one in re.split(r";\s*\n", block) if one.strip()] + inside


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


def test_the_pages_name_commands_and_statements() -> None:
    assert len(COMMANDS) > 30
    assert sum(len(statements(text)) for text in TEXTS.values()) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_of_ours(command: str) -> None:
    """With placeholders such as ID and N for what is chosen at the time."""
    _, *words = shlex.split(re.sub(r"--shard N\b", "--shard 0", command), comments=True)
    _, rest = parser().parse_known_args(words)
    assert rest == []


def test_a_command_that_is_not_ours_is_found() -> None:
    with pytest.raises(Exception, match="invalid choice"):
        test_a_command_is_one_of_ours("durable-cluster mend")


@pytest.mark.parametrize("page", TEXTS)
def test_each_statement_runs(page: str, conn: psycopg.Connection) -> None:
    for statement in statements(TEXTS[page]):
        conn.execute(statement.encode())
