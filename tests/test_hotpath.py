"""The hot-path benchmark answers every question, and the facts that no machine's speed changes hold."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from durable_cluster.loadtest import hotpath, measure

NUMBERS = [
    "steps_per_s",
    "p_rows_per_s",
    "copy_rows_per_s",
    "heap_rows_per_s",
    "p_ratio",
    "floor_us_per_step",
    "rotations",
    "cpu_us_per_step",
    "wal_bytes_per_step",
    "payload_bytes",
    "changed_rows_per_step",
    "lone_step_ms_p50",
    "lone_step_ms_p99",
    "idle_xids_per_s",
    "seconds",
]


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    command = [sys.executable, "-m", "durable_cluster.loadtest.hotpath"]
    options = ["--json", "--seconds", "1", "--processes", "2", "--shards", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def number(report: dict[str, object], key: str) -> float:
    value = report[key]
    assert isinstance(value, float | int), (key, value)
    return value


def test_the_answer_is_one_object_with_a_number_for_every_question(report: dict[str, object]) -> None:
    assert set(report) == {*NUMBERS, "processes", "shards", "synchronous_commit", "git_commit"}
    for key in NUMBERS:
        assert number(report, key) >= 0
    assert (report["processes"], report["shards"], report["synchronous_commit"]) == (2, 2, "on")
    assert report["git_commit"] is None or isinstance(report["git_commit"], str)


def test_rates_and_latencies_are_positive_and_consistent(report: dict[str, object]) -> None:
    assert number(report, "p_ratio") == pytest.approx(
        number(report, "steps_per_s") / number(report, "p_rows_per_s"), abs=0.001
    )
    assert number(report, "p_ratio") > 0
    assert number(report, "cpu_us_per_step") > 0
    assert 0 < number(report, "lone_step_ms_p50") <= number(report, "lone_step_ms_p99")


def test_a_step_writes_its_line_to_the_wal_once_and_little_else(report: dict[str, object]) -> None:
    """At least half the line, for lz4 may shrink it; at most three times, for the smallest run has the smallest pages."""
    payload_bytes = number(report, "payload_bytes")
    assert 80 < payload_bytes < 200
    assert payload_bytes / 2 < number(report, "wal_bytes_per_step") < 3 * payload_bytes


def test_a_step_changes_no_row(report: dict[str, object]) -> None:
    """A page changes one row and a claim's window another; pages here hold hundreds of steps, where a full one holds 1,000.

    So the gate of 0.01 a step is for full pages, and as much again is allowed for small ones and for falling asleep; on a machine
    that does much else, whose pages are smaller still, 400 rows a second.
    """
    assert number(report, "changed_rows_per_step") <= max(0.02, 400 / number(report, "steps_per_s"))


def test_an_idle_cluster_consumes_no_transaction_ids(report: dict[str, object]) -> None:
    assert number(report, "idle_xids_per_s") == 0


def test_processes_that_cannot_be_spread_evenly_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        hotpath.main(["--processes", "3", "--shards", "2"])
    assert refusal.value.code == 2
    assert "3 processes on 2 shards" in capsys.readouterr().err


def test_a_server_that_refuses_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert hotpath.main(["--dsn", "postgresql://nobody@127.0.0.1:1/none"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hotpath: cannot connect to 127.0.0.1:1/none")


@pytest.mark.parametrize(("part", "value"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_a_quantile_is_one_of_the_values(part: float, value: float) -> None:
    assert measure.quantile([float(n) for n in range(1, 101)], part) == value


@pytest.mark.parametrize(("total", "calls"), [(1, [1]), (10_000, [10_000]), (25_000, [10_000, 10_000, 5_000])])
def test_a_backlog_is_loaded_in_calls_of_bounded_size(total: int, calls: list[int]) -> None:
    assert hotpath.chunks(total) == calls
