"""The newcomer's way: no database named, so the command makes a local one, and the bundled examples run on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

COMMAND = [sys.executable, "-m", "durable_cluster.ops"]


def test_start_alone_runs_the_examples_on_a_local_database_that_keeps_its_data(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("DURABLE_DSN", "DURABLE_DATA")}

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words], cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=90
        )

    starting = [*COMMAND, "start", "--shards", "1", "--metrics", "0"]
    with subprocess.Popen(starting, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE) as cluster:
        assert cluster.stdout is not None
        up = [cluster.stdout.readline() for _ in range(5)]
        assert re.match(r"up: 1 shards?, 3 processes, 3 connections, \d+ MiB", up[0])
        assert "(order, restock)" in up[1]
        assert "local Postgres in .durable" in up[2]
        page = re.search(r"http://127\.0\.0\.1:[0-9]+/metrics", up[3])
        assert f"(pid {cluster.pid})" in up[4]
        assert page is not None
        with urllib.request.urlopen(page[0], timeout=5) as answer:
            assert b'durable_processes{role="consumer"} 1.0' in answer.read()

        done = ask("run", "restock", "--input", '{"product_id": 1, "delivery": 0}', "--wait", "--json")
        assert msgspec.json.decode(done.stdout)["status"] == "completed", done.stderr
        assert ask("psql", "-XAtc", "select count(*) from durable.finished").stdout == "1\n"

        second = ask("start")
        assert second.returncode == 1
        assert f"a cluster runs from .durable already (pid {cluster.pid})" in second.stderr
        assert ask("stop").returncode == 0
        assert cluster.wait(10) == 0

    assert len(msgspec.json.decode(ask("list", "--json").stdout)) == 1
    refused = ask("start", "--shards", "2")
    assert refused.returncode == 1
    assert "laid out for 1 shards, not 2" in refused.stderr
    assert "reshard" in refused.stderr


@pytest.mark.slow
def test_the_demo_stays_exact_while_its_consumers_and_its_postgres_are_killed(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("DURABLE_DSN", "DURABLE_DATA")}
    done = subprocess.run(
        [*COMMAND, "demo", "--chaos", "--times", "5", "--json"],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    books = msgspec.json.decode(done.stdout)
    assert books["is_exact"] is True
    assert books["found"]["orders"] == books["parcels"]["booked"] == 5 * 830
    assert books["havoc"]["server_kills"] == 2, done.stderr
    assert books["havoc"]["stops_woken"] >= 1, done.stderr
    assert books["rows_changed"] is None, "Postgres counts anew after a crash"
