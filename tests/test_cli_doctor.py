"""``doctor``: what is wrong in a database is found, named, and has a next step."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import psycopg
import pytest

from durable_cluster.ops import checks
from durable_cluster.ops.checks import Finding
from durable_cluster.ops.cli import main

Examine = Callable[[], tuple[int, dict[str, Finding]]]


@pytest.fixture
def examine(dsn: str, capsys: pytest.CaptureFixture[str]) -> Examine:
    """The exit code of ``doctor`` and its findings by their names."""

    def run() -> tuple[int, dict[str, Finding]]:
        code = main(["doctor", "--json", "--dsn", dsn])
        findings = msgspec.json.decode(capsys.readouterr().out)["findings"]
        return code, {one.check: one for one in msgspec.convert(findings, list[Finding])}

    return run


def test_a_fresh_database_without_a_cluster_has_nothing_wrong_but_what_its_server_risks(examine: Examine) -> None:
    _, found = examine()
    assert {name for name, one in found.items() if one.verdict == "wrong"} <= {"crash safety"}
    assert found["consumers"].verdict == "note"
    assert all(one.next_step for one in found.values() if one.verdict != "ok")


def test_work_that_nobody_reads_and_windows_that_nobody_takes_over_are_wrong(
    examine: Examine, conn: psycopg.Connection
) -> None:
    conn.execute("select durable.start('anything', 1, 'first', 'null')")
    conn.execute(
        "insert into durable.win (batch, shard, owner, s0, s1, active)"
        " values (1, 1, 7, pg_current_snapshot(), pg_current_snapshot(), '-infinity')"
    )
    code, found = examine()
    assert code == 1
    assert found["consumers"].verdict == "wrong"
    assert "no cluster is connected, and work waits in shard" in found["consumers"].says
    assert found["windows"].verdict == "wrong"
    assert "1 silent (shard 1)" in found["windows"].says


def test_a_log_that_is_not_this_servers_or_not_kept_up_is_wrong(examine: Examine, conn: psycopg.Connection) -> None:
    conn.execute("select durable.start('anything', 1, 'first', 'null')")
    conn.execute("update pgque.tick set tick_snapshot = '900000000000:900000000000:' where tick_queue = 1")
    conn.execute("update pgque.queue set queue_switch_time = now() - interval '2 hours'")
    conn.execute("drop table durable.finished_" + str(conn.execute("select durable.today() + 1").fetchone()[0]))  # type: ignore[index]
    code, found = examine()
    assert code == 1
    assert found["log"].verdict == "wrong"
    assert found["rotation"].verdict == "wrong"
    assert found["partitions"].verdict == "wrong"
    assert "for 0 days ahead only" in found["partitions"].says


def test_a_snapshot_held_for_long_is_wrong_and_its_session_named(
    examine: Examine, dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "HORIZON_S_MAX", 0.0)
    with psycopg.connect(dsn, application_name="a report") as report:
        report.execute("set transaction isolation level repeatable read")
        report.execute("select 1 from durable.cluster")
        code, found = examine()
        pid = report.info.backend_pid
    assert code == 1
    assert found["snapshots"].verdict == "wrong"
    assert f"session {pid} (a report, idle in transaction)" in found["snapshots"].says
    assert found["snapshots"].next_step == f"end it: select pg_terminate_backend({pid})"


def test_settings_of_the_database_that_surprise_are_noted(examine: Examine, conn: psycopg.Connection) -> None:
    name = conn.info.dbname
    conn.execute(f"alter database {name} set default_transaction_isolation = 'repeatable read'")
    conn.execute(f"alter database {name} set synchronous_commit = off")
    _, found = examine()
    assert found["isolation"].verdict == "note"
    assert "repeatable read by default" in found["isolation"].says
    assert found["commits"].verdict == "note"


def test_a_database_without_the_schema_is_wrong_and_init_is_next(
    empty_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--dsn", empty_dsn]) == 1
    said = capsys.readouterr().out
    assert "  wrong  schema" in said
    assert "next: durable-cluster init" in said
    assert said.rstrip().endswith("checks found something wrong")
