"""The survival measurements run and report every figure; how large the figures are is for a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from durable_cluster.loadtest import survival
from durable_cluster.loadtest.figures import Figure

TINY = {
    "sleepers": [
        "sleepers",
        "due",
        "--sleepers",
        "100",
        "--shards",
        "2",
        "--idle",
        "0.2",
        "--due",
        "20",
        "--due-after",
        "0.5",
    ],
    "fanout": ["fanout", "--children", "4096"],
    "page": ["page", "--lines", "20", "--slow", "0.3", "--pages", "1"],
    "beside": ["beside", "--naps", "10", "--rounds", "1", "--seconds", "0.1"],
    "recovery": ["recovery", "--kills", "2"],
    "host": ["host", "--deaths", "1", "--dead-interval", "1"],
}
FIGURES = {
    "sleepers": {"sleepers": 5, "due": 3},
    "fanout": {"fanout": 5},
    "page": {"page": 4},
    "beside": {"beside": 6},
    "recovery": {"recovery": 4},
    "host": {"host": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_each_measurement_reports_all_its_figures(name: str, server: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "durable_cluster.loadtest.survival", "--json", "--dsn", server, *TINY[name]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    figures = [Figure(**one) for one in json.loads(done.stdout)]
    told = Counter(figure.of for figure in figures)
    assert all(told[of] >= count for of, count in FIGURES[name].items()), figures
    assert all(figure.told() for figure in figures)
    assert done.returncode == (0 if all(figure.is_kept for figure in figures) else 1)


def test_a_figure_beyond_its_limit_is_told_apart() -> None:
    kept, missed = (Figure(of="page", what="done", value=ms, unit="ms", limit=200.0) for ms in (200.0, 200.1))
    assert (kept.told()[0], missed.told()[0]) == ("✓", "✗")
    assert Figure(of="page", what="worth knowing", value=float("inf"), unit="ms").is_kept


def test_a_measurement_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        survival.main(["slepers"])
    assert refusal.value.code == 2
    assert "sleepers, due, crowd, fanout, page" in capsys.readouterr().err
