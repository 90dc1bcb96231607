"""The README is true: its first workflow runs as it stands there, on a machine with nothing set up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def first_workflow() -> str:
    found = re.search(r"```python\n(# flows\.py\n.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_first_workflow_prints_what_its_comment_says(tmp_path: Path) -> None:
    program = tmp_path / "flows.py"
    program.write_text(first_workflow())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_")}
    for _ in range(2):  # the second time its key finds the workflow of the first
        done = subprocess.run(
            [sys.executable, "flows.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=False,
            text=True,
            timeout=90,
        )
        assert (done.stdout, done.stderr, done.returncode) == ("HELLO, WORLD\n", "", 0)


def test_every_file_that_the_documents_name_is_there() -> None:
    for document in (README, README.parent / "docs" / "architecture.md", README.parent / "AGENTS.md"):
        for name in re.findall(
            r"`((?:cluster|shards|ops|sql|loadtest|tests|docs|examples)/[\w/.-]+\.\w+)`", document.read_text()
        ):
            assert (README.parent / name).exists(), f"{document.name} names {name}"
