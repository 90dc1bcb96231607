"""What type checkers make of steps and workflows: the cases in ``typing/``, read by pyright in its strict mode."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "typing"
ROOMS = ("shards", "sql", "ops", "examples", "loadtest")
MARK = re.compile(r"# error: (.+)$")
PYRIGHT = (sys.executable, "-m", "pyright")

Found = dict[tuple[str, int], list[str]]
"""The rules that are broken, by file and line."""


class Position(msgspec.Struct):
    line: int


class Range(msgspec.Struct):
    start: Position


class Diagnostic(msgspec.Struct, kw_only=True):
    file: str
    severity: str
    message: str
    range: Range
    rule: str = ""


class Report(msgspec.Struct, rename="camel"):
    general_diagnostics: list[Diagnostic]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where checkers find the package: they do not follow the import hook of an editable install."""
    asked = subprocess.run([*PYRIGHT, "--version"], capture_output=True, text=True, check=False, timeout=300)
    if asked.returncode != 0:
        pytest.skip(f"TYPES WERE NOT CHECKED: pyright does not run here: {asked.stderr.strip()[-200:]}")
    root = tmp_path_factory.mktemp("types")
    inside = root / "durable_cluster"
    inside.mkdir()
    for module in (ROOT / "cluster").iterdir():
        (inside / module.name).symlink_to(module)
    for room in ROOMS:
        (inside / room).symlink_to(ROOT / room)
    return root


def checked(package: Path, *paths: str) -> tuple[Found, str]:
    """What pyright finds in these, strict; and all of it in its own words."""
    config = {
        "include": list(paths),
        "extraPaths": ["."],
        "pythonVersion": "3.11",
        "typeCheckingMode": "strict",
        "reportMissingTypeStubs": False,
    }
    (package / "pyrightconfig.json").write_bytes(msgspec.json.encode(config))
    words = [*PYRIGHT, "--outputjson", "--project", str(package), "--pythonpath", sys.executable]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    report = msgspec.json.decode(done.stdout, type=Report).general_diagnostics
    found: Found = {}
    for one in report:
        rules = found.setdefault((Path(one.file).name, one.range.start.line + 1), [])
        rules += [one.rule] if one.rule not in rules else []
    told = "\n".join(f"{one.file}:{one.range.start.line + 1}: {one.message} ({one.rule})" for one in report)
    return {at: sorted(rules) for at, rules in found.items()}, told


def test_signatures_survive_the_decorators_and_what_does_not_fit_them_is_refused(package: Path) -> None:
    (package / "cases").symlink_to(CASES)
    found, told = checked(package, "cases")
    marked = {
        (path.name, number): sorted(mark[1].split(", "))
        for path in CASES.glob("*.py")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if (mark := MARK.search(line))
    }
    assert len(marked) > 25
    assert found == marked, told


def test_the_examples_are_clean_under_the_strict_mode(package: Path) -> None:
    found, told = checked(package, "durable_cluster/examples")
    assert not found, told
