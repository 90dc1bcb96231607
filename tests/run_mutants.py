"""Break one invariant at a time and expect the tests to notice.

Each ``tests/mutants/*.patch`` is a unified diff (``patch -p1``) under a head of comments: which invariant it breaks, and the
tests that must go red. Each is applied to a copy of the repository, and those tests are run there, on that copy's code.

    python tests/run_mutants.py [NAME …]        all, or those whose file name contains one of the names
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "durable_cluster"
ROOMS = ("shards", "sql", "ops", "examples", "loadtest")
COPIED = ("cluster", *ROOMS, "tests", "pyproject.toml", "README.md", "docs")
AT_ONCE = 2
TIMEOUT_S = 300
TIMEOUT_OF_ALL_S = 3_600  # all of those tests, one after the other
SCHEDULES = "100"  # of each race, so that chance spares no mutant
ALL_FAILED, NOTHING_FAILED = 1, 0  # pytest's exit codes: some tests failed, all passed

# Runs inside the copy; says whose code it imported, so that an editable install cannot stand in for it.
WHOSE = f"import {PACKAGE}.sql; print({PACKAGE}.__file__); print({PACKAGE}.sql.__file__)"


@dataclass(frozen=True)
class Mutant:
    """A patch, the invariant it breaks, and the tests that must notice."""

    path: Path
    invariant: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed, or why not."""

    mutant: Mutant
    is_killed: bool
    what: str
    seconds: float


class Unusable(Exception):
    """A patch or a copy that cannot be tested."""


def read_mutant(path: Path) -> Mutant:
    """The head of a patch: ``# Invariant: …`` once, ``# Red: tests/…::…`` once or more."""
    head = path.read_text("utf-8").partition("\n--- ")[0]
    invariants = re.findall(r"^# Invariant: (.+)$", head, re.MULTILINE)
    tests = re.findall(r"^# Red: (\S.*)$", head, re.MULTILINE)
    if len(invariants) != 1 or not tests:
        raise Unusable(f"{path.name}: its head names no invariant (# Invariant: …) or no test (# Red: …)")
    return Mutant(path, invariants[0], tuple(tests))


@contextmanager
def copy_of_the_repository() -> Iterator[tuple[Path, dict[str, str]]]:
    """A copy of the code and the environment in which Python imports it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        repo, package = Path(name) / "repo", Path(name) / "path" / PACKAGE
        repo.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, repo / part, ignore=ignored)
            elif source.exists():
                shutil.copy(source, repo / part)
        package.mkdir(parents=True)
        for module in (repo / "cluster").iterdir():
            (package / module.name).symlink_to(module)
        for room in ROOMS:
            (package / room).symlink_to(repo / room)
        environment = {"DURABLE_EXPLORE_SCHEDULES": SCHEDULES, **os.environ}
        environment |= {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        said = subprocess.run(
            [sys.executable, "-c", WHOSE], cwd=repo, env=environment, capture_output=True, text=True, check=False
        )
        if said.returncode or not all(line.startswith(name) for line in said.stdout.splitlines()):
            raise Unusable(f"the copy is not what is imported: {said.stdout}{said.stderr}")
        yield repo, environment


def run_tests(
    repo: Path, environment: dict[str, str], tests: Sequence[str], *, timeout_s: float = TIMEOUT_S
) -> tuple[int, str, str]:
    """pytest's exit code, its last line, and all it said."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command += ["--tb=line", "-q", *tests]
    try:
        done = subprocess.run(
            command, cwd=repo, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return -1, f"still running after {timeout_s:g} s", ""
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return done.returncode, lines[-1].strip("= ") if lines else "no summary", done.stdout + done.stderr


def apply(patch: Path, repo: Path) -> None:
    command = ["patch", "-p1", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "--input", str(patch)]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unusable(f"the patch does not apply: {' '.join(done.stdout.split())[:160]}")


def judge(mutant: Mutant) -> Verdict:
    """Apply one mutant to a fresh copy and run its tests."""
    begin = time.monotonic()
    try:
        with copy_of_the_repository() as (repo, environment):
            apply(mutant.path, repo)
            code, summary, _ = run_tests(repo, environment, mutant.tests)
    except Unusable as error:
        return Verdict(mutant, False, str(error), time.monotonic() - begin)
    is_killed = code == ALL_FAILED and " failed" in f" {summary}" and "error" not in summary
    return Verdict(mutant, is_killed, summary, time.monotonic() - begin)


@contextmanager
def server() -> Iterator[None]:
    """One server for all runs, unless one is given."""
    if os.environ.get("DURABLE_TEST_DSN"):
        yield
        return
    from durable_cluster.testing.server import server_in_memory

    bin_dir = os.environ.get("DURABLE_PG_BIN")
    with (
        tempfile.TemporaryDirectory(prefix="mutants-pg-") as folder,
        server_in_memory(Path(folder), Path(bin_dir) if bin_dir else None) as dsn,
    ):
        os.environ["DURABLE_TEST_DSN"] = dsn
        yield


def main(names: Sequence[str]) -> int:
    paths = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
    mutants = [read_mutant(path) for path in paths if not names or any(name in path.name for name in names)]
    if not mutants:
        print("no mutants")
        return 1
    with server():
        with copy_of_the_repository() as (repo, environment):
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            code, summary, said = run_tests(repo, environment, tests, timeout_s=TIMEOUT_OF_ALL_S)
        print(f"unmutated: {summary}", flush=True)
        if code != NOTHING_FAILED:
            print(said)
            print("the tests that are to notice must be green before anything is broken")
            return 1
        survived = 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for verdict in pool.map(judge, mutants):
                survived += not verdict.is_killed
                word = "killed" if verdict.is_killed else "SURVIVED"
                mutant = verdict.mutant
                print(
                    f"{word:8}  {mutant.name:44}  {mutant.invariant:34}  {verdict.seconds:5.1f} s  {verdict.what}",
                    flush=True,
                )
    print(f"{len(mutants)} mutants: {len(mutants) - survived} killed, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Unusable as unusable:
        sys.exit(str(unusable))
