"""``console`` and ``start --console``, as they are typed: what they say, when they refuse, how they end."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from console import OPERATOR_TOKEN
from said import Said, Say

from durable_cluster.ops.cli import main
from durable_cluster.ops.console import command

SAYS_S = 60
COMMAND = [sys.executable, "-m", "durable_cluster.ops"]
APP = """
from durable_cluster import App

app = App("small")

@app.workflow
async def nothing(n: int) -> int:
    return n
"""


@contextmanager
def begun(*words: str, home: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command, until the block ends. No variable of ours but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_")}
    with subprocess.Popen(
        [*COMMAND, *words],
        cwd=home,
        env={**kept, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """The command in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Said:
        code = main(words)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def test_it_says_where_it_is_and_ends_when_it_is_told(dsn: str, tmp_path: Path) -> None:
    with begun("console", "--port", "0", "--json", home=tmp_path, DURABLE_DSN=dsn) as console:
        assert console.stdout is not None
        up = msgspec.json.decode(console.stdout.readline())
        assert httpx.get(f"{up['url']}api/workflows").json() == {"workflows": [], "next": None}
        console.send_signal(signal.SIGTERM)
        said, complaint = console.communicate(timeout=20)
        assert (console.returncode, said, complaint) == (0, "", "")


def test_elsewhere_than_on_loopback_it_wants_its_token(dsn: str, tmp_path: Path) -> None:
    with begun("console", "--host", "0.0.0.0", "--port", "0", home=tmp_path, DURABLE_DSN=dsn) as console:
        _, complaint = console.communicate(timeout=60)
        assert console.returncode == 1
        assert "needs a token: set DURABLE_CONSOLE_TOKEN" in complaint
    variables = {"DURABLE_DSN": dsn, "DURABLE_CONSOLE_TOKEN": OPERATOR_TOKEN}
    with begun("console", "--host", "0.0.0.0", "--port", "0", "--json", home=tmp_path, **variables) as console:
        assert console.stdout is not None
        address = msgspec.json.decode(console.stdout.readline())["url"].replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}api/workflows").status_code == 401
        authorized = {"authorization": f"Bearer {OPERATOR_TOKEN}", "host": "console.example.com"}
        assert httpx.get(f"{address}api/workflows", headers=authorized).status_code == 200
        console.terminate()
        _, complaint = console.communicate(timeout=20)
        assert "unencrypted" in complaint
        assert OPERATOR_TOKEN not in complaint


def test_a_port_that_is_taken_is_told(dsn: str, say: Say) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = say("console", "--dsn", dsn, "--port", port)
    assert said.code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said.err


def test_a_database_without_the_schema_is_told(empty_dsn: str, say: Say) -> None:
    said = say("console", "--dsn", empty_dsn, "--port", "0")
    assert said.code == 1
    assert "durable-cluster init" in said.err


def test_without_the_extra_it_says_what_to_install(dsn: str, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    said = say("console", "--dsn", dsn)
    assert said.code == 1
    assert "pip install 'durable-cluster[console]'" in said.err


def test_no_other_command_loads_the_web() -> None:
    program = "import sys, durable_cluster.ops.cli; print({'starlette', 'uvicorn', 'jinja2', 'psycopg_pool'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("8200", ("127.0.0.1", 8200)),
        (":8200", ("127.0.0.1", 8200)),
        ("0", ("127.0.0.1", 0)),
        ("0.0.0.0", ("0.0.0.0", 8100)),
        ("my-host.example:81", ("my-host.example", 81)),
        ("[::1]:81", ("::1", 81)),
    ],
)
def test_an_address_has_a_host_a_port_or_both(text: str, where: tuple[str, int]) -> None:
    assert command.address(text) == where


@pytest.mark.parametrize("text", ["::1", "a:b", "1.2.3.4:99999", "user@host:1", "host/path", "[::1", "host:1?x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        command.address(text)


def test_beside_a_cluster_it_is_a_process_of_its_own_that_ends_even_if_the_cluster_is_killed(
    dsn: str, tmp_path: Path, eventually: Callable[..., None]
) -> None:
    (tmp_path / "small.py").write_text(APP)
    words = ("start", "--app", "small:app", "--console", "127.0.0.1:0", "--data", str(tmp_path / "data"))
    with begun(*words, home=tmp_path, DURABLE_DSN=dsn) as cluster:
        address = said_by(cluster, "console", "up")["console"]
        body = {"workflow": "nothing", "input": 7}
        started = httpx.post(f"{address}api/workflows", json=body, timeout=20).json()
        found = httpx.get(f"{address}api/workflows/{started['id']}", params={"wait_s": 20}, timeout=30).json()
        assert found["output"] == 7
        assert (
            httpx.post(f"{address}api/workflows", json=body | {"input": "x"}).status_code == 422
        )  # it has the cluster's app
        cluster.kill()
        eventually(lambda: not is_answering(address), seconds=20, what="the console's end")


def said_by(process: subprocess.Popen[str], *heads: str) -> dict[str, str]:
    """What follows each of ``heads`` in its lines; a cluster and its console say theirs in either order."""
    assert process.stdout is not None
    late = threading.Timer(SAYS_S, process.kill)
    late.start()
    said: dict[str, str] = {}
    for line in process.stdout:
        head, _, rest = line.strip().partition(": ")
        said[head] = rest
        if said.keys() >= set(heads):
            late.cancel()
            return said
    raise AssertionError(f"it ended, or was killed after {SAYS_S} s, and said {said}")


def is_answering(address: str) -> bool:
    """Whether anybody listens there."""
    try:
        httpx.get(f"{address}api/openapi.json")
    except httpx.TransportError:
        return False
    return True
