"""The bench measures a real system, keeps what it found as CSV, and says of each criterion what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster.loadtest.bench import charts, episodes, meters, plan, report
from durable_cluster.loadtest.bench.cells import Cell, Point, Results, read_csv, write_csv
from durable_cluster.loadtest.bench.environment import environment
from durable_cluster.loadtest.bench.report import Named, Run
from durable_cluster.loadtest.bench.scene import HELD
from durable_cluster.loadtest.bench.throughput import throughput
from durable_cluster.loadtest.bench.verdicts import append_only_changes
from durable_cluster.loadtest.hotpath import Report
from durable_cluster.loadtest.peers.ours import Ours, OursOnOneShard

HOTPATH = Report(
    steps_per_s=100_000.0,
    p_rows_per_s=200_000.0,
    copy_rows_per_s=250_000.0,
    heap_rows_per_s=600_000.0,
    p_ratio=0.5,
    floor_us_per_step=1.0,
    rotations=4,
    cpu_us_per_step=6.0,
    wal_bytes_per_step=120.0,
    payload_bytes=100.0,
    changed_rows_per_step=0.001,
    lone_step_ms_p50=0.9,
    lone_step_ms_p99=4.0,
    idle_xids_per_s=0.0,
    seconds=20.0,
    processes=4,
    shards=4,
    synchronous_commit="on",
    git_commit=None,
)


@pytest.fixture(scope="module")
def results(server: str) -> Results:
    """A second of load on one shard, with a snapshot held for another two."""
    found = Results()
    throughput(OursOnOneShard, server, found, seconds=1.0, held_s=2.0, bucket_s=0.5, condition=HELD)
    return found


def value(results: Results, metric: str) -> float:
    found = results.value("ours_1_shard", "W1", metric, HELD)
    assert found is not None, metric
    return found


def test_a_load_is_counted_and_what_a_step_costs_is_told(results: Results) -> None:
    assert value(results, "steps/s") > 0
    assert value(results, "CPU") == pytest.approx(value(results, "CPU of Postgres") + value(results, "CPU of workers"))
    assert value(results, "CPU of Postgres") > 0
    assert value(results, "WAL") > 20  # a server that has lz4 compresses the lines
    assert 0 < value(results, "changed rows") < 0.2
    assert value(results, "drift") == pytest.approx(
        100 * (1 - value(results, "steps/s at the end") / value(results, "steps/s before"))
    )


def test_a_load_is_looked_at_in_every_bucket(results: Results) -> None:
    series = results.series("ours_1_shard", "W1", "steps/s", HELD)
    assert len(series) == 6
    assert [at_s for at_s, _ in series] == sorted(at_s for at_s, _ in series)


def test_every_table_is_told_and_none_of_the_append_only_ones_was_changed(results: Results) -> None:
    as_ours = Results(cells=[msgspec.structs.replace(cell, system="ours") for cell in results.cells])
    assert append_only_changes(as_ours) == 0
    assert any(cell.metric.startswith("pgque.event_") and cell.metric.endswith(" inserted") for cell in results.cells)
    spoilt = Cell(system="ours", workload="W3", metric="durable.started_20261121 updated", value=3.0, unit="rows")
    assert append_only_changes(Results(cells=[*as_ours.cells, spoilt])) == 3
    assert append_only_changes(Results()) is None


def test_a_killed_workers_flows_go_on_and_the_gap_is_told(server: str) -> None:
    found = Results()
    episodes.recovery(Ours, server, found, kills=1, patience_s=30)
    flows, lost, gap = (found.value("ours", "W6", name) for name in ("flows in hand", "not gone on", "longest gap"))
    assert flows and lost == 0 and gap and 0 < gap < 30


def test_figures_come_back_from_csv_as_they_went(tmp_path: Path) -> None:
    cells = [
        Cell(system="ours", workload="W1", condition="a, b", metric='say "x"', value=1.5, unit="µs/step", round=2),
        Cell(system="dbos", workload="W5", metric="failed", value=None, unit="", note="it said no"),
    ]
    points = [Point(system="ours", workload="W1", metric="steps/s", at_s=0.5, value=12.0)]
    write_csv(tmp_path / "cells.csv", cells)
    write_csv(tmp_path / "points.csv", points)
    assert read_csv(tmp_path / "cells.csv", Cell) == cells
    assert read_csv(tmp_path / "points.csv", Point) == points


def test_several_rounds_count_by_their_median() -> None:
    cells = [
        Cell(system="ours", workload="W1", metric="steps/s", value=rate, unit="steps/s", round=number)
        for number, rate in enumerate((5.0, 1.0, 3.0), 1)
    ]
    assert Results(cells=cells).value("ours", "W1", "steps/s") == 3.0


def test_the_page_says_of_every_criterion_what_was_found(
    conn: psycopg.Connection[Any], tmp_path: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "draw", lambda *_: [])  # the drawing library is an extra
    ours = Named(name="ours", called="durable-cluster", configuration="as it comes", lacks={"W5": "no joins yet"})
    run = Run(
        environment=environment(conn, [Ours]),
        durable=HOTPATH,
        asynchronous=None,
        systems=[ours],
        results=results,
        command="durable-cluster bench",
    )
    page = report.write(tmp_path, [run]).read_text("utf-8")
    assert "| steps/s, durable, four processes, with rotation, P | 0.5 | ≥ 0.6 | ≥ 1 | **gate missed** |" in page
    assert "| CPU a step, Postgres and Python, µs | 6.00 | ≤ 8 | ≤ 5 | kept, goal missed |" in page
    assert "| WAL a step, × payload | 1.20 | ≤ 1.3 | ≤ 1.1 | kept, goal missed |" in page
    assert "| lone chain, a step, p50, ms | 0.9 | ≤ 1.5 | ≤ 1 | goal reached |" in page
    assert "not measured" in page
    assert "no joins yet" in page
    assert f"`synchronous_commit = {run.environment.settings['synchronous_commit']}`" in page
    assert report.read(tmp_path) == [run]

    soak = Cell(system="ours", workload="W1", condition="soak", metric="steps/s", value=4.0, unit="steps/s")
    again = msgspec.structs.replace(results.cells[0], value=4.0)
    later = msgspec.structs.replace(
        run, results=Results(cells=[again, soak]), command="durable-cluster bench --soak 3600"
    )
    both = report.joined([run, later])
    assert [one.results.cells for one in both] == [[*results.cells, soak]]
    page = report.write(tmp_path, both).read_text("utf-8")
    assert "Made by `durable-cluster bench`, and `durable-cluster bench --soak 3600` (commit " in page
    assert "| durable-cluster | soak | 4.00 |" in page


def test_the_harness_is_not_counted_among_what_it_measures(dsn: str) -> None:
    with meters.session(dsn) as own, psycopg.connect(dsn) as other:
        pids = meters.server_pids(own)
        assert pids is not None
        assert other.info.backend_pid in pids
        assert own.info.backend_pid not in pids


def test_a_plan_leaves_out_what_a_system_lacks() -> None:
    jobs = plan.jobs(plan.QUICK, systems=["ours", "ours_dedup", "status_row_set"], workloads=plan.WORKLOADS)
    found = {(job.system, job.workload) for job in jobs}
    assert found >= {("ours", "W1"), ("ours", "W5"), ("ours_dedup", "W1"), ("status_row_set", "W1")}
    assert ("status_row_set", "W5") not in found


def test_the_pictures_are_drawn_of_what_there_is(tmp_path: Path, results: Results) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra 'loadtest'")
    drawn = charts.draw(tmp_path, results, {"ours_1_shard": "one shard"})
    assert drawn == ["held-snapshot", "dead-rows"]
    for stem in drawn:
        assert "one shard" in (tmp_path / f"{stem}.svg").read_text("utf-8")
        assert (tmp_path / f"{stem}.png").stat().st_size > 1000
