"""What a supervisor says to systemd, over a real socket; and the unit that systemd reads."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from durable_cluster import Settings
from durable_cluster.ops.start import EXAMPLES
from durable_cluster.settings import ServiceManager, service_manager
from durable_cluster.shards.systemd import Notifier

UNIT = Path(__file__).parent.parent / "ops" / "deploy" / "durable-cluster@.service"
ANALYZE = shutil.which("systemd-analyze")

Listener = tuple[str, Callable[[], str]]


@pytest.fixture(params=["in the file system", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    """An address as systemd gives it, and what was said there next (waits for it)."""
    name = f"@durable-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        heard.settimeout(30)
        yield name, lambda: heard.recv(4096).decode()


def test_a_cluster_says_that_it_is_up_that_it_lives_and_that_it_stops(
    listener: Listener, run_cluster: Callable[..., object], dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, heard = listener
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    cluster = run_cluster(dsn, app=EXAMPLES, settings=Settings(drain_grace_s=10))
    said = [heard()]
    while not said[-1].startswith("READY"):
        said.append(heard())
    assert set(said[:-1]) <= {"WATCHDOG=1"}
    assert said[-1] == "READY=1\nSTATUS=2 shards, 4 processes"
    assert heard() == "WATCHDOG=1"
    cluster.stop()  # type: ignore[attr-defined]
    while (last := heard()) == "WATCHDOG=1":
        pass
    assert last == "STOPPING=1\nSTATUS=draining"


def test_the_watchdog_hears_of_it_twice_as_often_as_it_looks(listener: Listener) -> None:
    address, heard = listener
    notifier = Notifier(ServiceManager(address=address, watchdog_s=10))
    for second in range(13):
        notifier.alive(100 + second)
    notifier.stopping()
    assert [heard() for _ in range(4)] == ["WATCHDOG=1"] * 3 + ["STOPPING=1\nSTATUS=draining"]


def test_nobody_who_listens_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier(ServiceManager()).up("well")
    assert caplog.text == ""
    Notifier(ServiceManager(address=str(tmp_path / "gone"))).up("well")
    assert "systemd was not told 'READY=1'" in caplog.text


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("2500000", None, 2.5),
        ("2500000", "own", 2.5),
        ("2500000", "1", None),
        ("0", None, None),
        ("often", None, None),
    ],
)
def test_only_the_process_that_is_meant_feeds_the_watchdog(
    usec: str, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert service_manager().watchdog_s == seconds


def test_systemd_is_more_patient_than_the_drain() -> None:
    patience = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text("utf-8"), re.MULTILINE)
    assert patience is not None
    assert int(patience[1]) >= Settings().drain_grace_s + 10


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not here: apt-get install systemd")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    """Of an instance, with a program that is there: systemd looks for it."""
    unit = tmp_path / "durable-cluster@shop.service"
    unit.write_text(
        UNIT.read_text("utf-8").replace("/opt/durable-cluster/bin/durable-cluster", sys.executable), "utf-8"
    )
    found = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
