"""``start --reload`` against a real cluster: what is edited runs, what runs is drained, and what cannot be read is waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from durable_cluster import App
from durable_cluster.ops import reload
from durable_cluster.ops.cli import main

pytest.importorskip("watchfiles", reason="RELOAD WAS NOT TESTED: watchfiles is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

Eventually = Callable[..., None]
FLOWS = """
import asyncio
from pathlib import Path

from durable_cluster import App, Settings

app = App("edited", settings=Settings(drain_grace_s=20))


@app.step
async def version(gate: str) -> str:
    if gate:
        Path(gate).with_suffix(".reached").touch()
        while not Path(gate).exists():
            await asyncio.sleep(0.01)
    return "VERSION"


@app.workflow
async def told(gate: str) -> str:
    return await version(gate)
"""


class Development:
    """The command, and what it has said so far."""

    def __init__(self, home: Path, dsn: str, *words: str) -> None:
        self.home = home
        self.write("one")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "durable_cluster.ops", "start", "--app", "edited:app", "--reload", *words],
            cwd=home,
            env={**os.environ, "DURABLE_DSN": dsn},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.said: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def write(self, version: str, more: str = "") -> None:
        new = self.home / "edited.new"
        new.write_text(FLOWS.replace("VERSION", version) + more)
        new.rename(self.home / "edited.py")

    def count(self, of: str) -> int:
        return sum(of in line for line in self.said)

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._thread.join(10)
        return code

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))


@pytest.fixture
def app(dsn: str) -> Iterator[App]:
    """The same workflow, for a client."""
    made = App("edited", dsn=dsn)

    @made.workflow
    async def told(gate: str) -> str:
        raise AssertionError("it runs in the cluster")

    yield made
    made.close()


@pytest.fixture
def development(tmp_path: Path, dsn: str, eventually: Eventually) -> Iterator[Development]:
    made = Development(tmp_path, dsn)
    try:
        eventually(lambda: made.count("up:") == 1, seconds=30, what=f"up: {made.said}")
        yield made
    finally:
        if made.process.poll() is None:
            made.end()


def test_what_is_edited_runs_and_what_was_running_is_drained_first(
    development: Development, app: App, eventually: Eventually, tmp_path: Path
) -> None:
    told = app.named("told")
    assert told.start("").result(timeout=10) == "one"
    gate = tmp_path / "gate"
    running = told.start(str(gate))
    eventually(gate.with_suffix(".reached").exists, what="a step that runs")
    development.write("another")
    eventually(lambda: development.count("edited.py changed: the cluster drains and starts again"), what="the edit")
    gate.touch()
    assert running.result(timeout=20) == "one"
    assert told.start("").result(timeout=30) == "another"
    assert development.end() == 0
    assert development.count("the cluster has stopped") == 2


def test_a_half_edited_file_leaves_the_cluster_as_it_was_and_one_that_fails_is_waited_for(
    development: Development, app: App, eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    told = app.named("told")
    development.write("half", "\ndef half(")
    eventually(lambda: development.count("'(' was never closed; the cluster goes on as it was"), what="the mistake")
    assert told.start("").result(timeout=10) == "one"
    development.write("failing", "\n1 / 0")
    eventually(lambda: development.count("waiting for an edit to start again"), seconds=20, what="the failure")
    assert development.count("ZeroDivisionError") == 1
    waiting = told.start("")
    development.write("mended")
    assert waiting.result(timeout=30) == "mended"
    assert main(["stop", "--data", str(development.home / ".durable")]) == 0, capsys.readouterr().err
    assert development.process.wait(20) == 0, "it is not started again"


def test_other_directories_are_watched_when_they_are_named_and_a_signal_ends_also_a_wait_for_an_edit(
    tmp_path: Path, dsn: str, eventually: Eventually
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    made = Development(tmp_path, dsn, "--reload-dir", str(elsewhere))
    try:
        eventually(lambda: made.count("up:") == 1, seconds=30, what=f"{made.said}")
        made.write("failing", "\n1 / 0")
        (elsewhere / "notes.txt").write_text("no Python")
        (elsewhere / "prices.py").write_text("TEA = 3")
        eventually(lambda: made.count("waiting for an edit"), seconds=30, what=f"{made.said}")
        assert made.count("prices.py changed") == 1
        assert made.count("edited.py changed") == made.count("notes.txt") == 0
    finally:
        code = made.end(signal.SIGTERM)
    assert code == 0


def test_a_command_line_that_is_wrong_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "--reload-dir", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no directory" in capsys.readouterr().err


def test_without_watchfiles_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reload, "find_spec", lambda name: None)
    assert main(["start", "--reload"]) == 1
    assert "pip install 'durable-cluster[reload]'" in capsys.readouterr().err


def test_the_directory_of_an_app_is_the_working_directory_or_that_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").touch()
    (tmp_path / "shops").mkdir()
    assert reload.directory_of("shop:app") == reload.directory_of("shops.flows") == tmp_path
    assert reload.directory_of("nowhere:app") == reload.directory_of("no name") == tmp_path
    assert reload.directory_of("msgspec:app").name == "msgspec"
