"""What bad input gets on the command line: one line that says what, which and what next; nothing half-installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from durable_cluster.ops.cli import main

FLOWS = """
import msgspec
from durable_cluster import App, Context, Continuation


class Sum(msgspec.Struct):
    numbers: list[int]


app = App("sums")
empty = App("empty")
no_app = 3
add = app.machine("add")
unfinished = app.machine("unfinished")


@add.step(start=True)
def total(ctx: Context, of: Sum) -> Continuation:
    return ctx.done(sum(of.numbers))
"""
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Say]:
    """Runs a command in a directory with an app: its exit code and what it said on stderr."""
    (tmp_path / "flows_of_bad_input.py").write_text(FLOWS)
    (tmp_path / "raises_on_import.py").write_text("\n1 / 0\n")
    (tmp_path / "latin.json").write_bytes(b'"caf\xe9"')
    (tmp_path / "large.json").write_text('{"numbers": [' + "1, " * 200_000 + "1]}")
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("DURABLE_DSN", "DURABLE_DATA"):
        monkeypatch.delenv(name, raising=False)
    path = list(sys.path)

    def run(*words: str) -> tuple[int, str]:
        try:
            code = main(words)
        except SystemExit as exited:
            code = int(exited.code or 0)
        said = capsys.readouterr()
        assert said.out == "" or code == 0
        return code, said.err

    yield run
    sys.path[:] = path
    for name in ("flows_of_bad_input", "raises_on_import"):
        sys.modules.pop(name, None)


def demand(said: tuple[int, str], code: int, *parts: str) -> None:
    """Exit code, and an error of one line with every part."""
    assert said[0] == code, said
    assert said[1].startswith("durable-cluster: error: ")
    assert said[1].count("\n") == 1, said
    for part in parts:
        assert part in said[1], said


APP = ("--app", "flows_of_bad_input:app")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["COMMAND", "durable-cluster --help"]),
        (["begin"], ["'begin'", "start"]),
        (["status", "--wrong"], ["--wrong", "durable-cluster status --help"]),
        (["start", "--shards", "0"], ["--shards", "'0'", "1 to 64"]),
        (["start", "--shards", "65"], ["--shards", "'65'", "1 to 64"]),
        (["start", "--shards", "eight"], ["--shards", "'eight'"]),
        (["start", "--consumers-per-shard", "0"], ["--consumers-per-shard", "'0'"]),
        (["start", *APP, "--set", "patience=1"], ["--set patience=1", "no setting 'patience'", "drain_grace_s"]),
        (["start", *APP, "--set", "drain_grace_s=soon"], ["'soon'", "float"]),
        (["start", *APP, "--set", "dead_interval_s=0"], ["dead_interval_s=0", "above zero"]),
        (["run", "add", *APP, "--input", "{numbers}"], ["--input is not JSON", "quote it"]),
        (["run", "add", *APP, "--input", "@missing.json"], ["@missing.json", "No such file"]),
        (["run", "add", *APP, "--input", "@."], ["@.", "directory"]),
        (["run", "add", *APP, "--input", "@latin.json"], ["@latin.json", "not UTF-8"]),
        (["run", "add", *APP, "--input", '"\udcff"'], ["--input is not JSON"]),
        (["run", "add", *APP, "--count", "2", "--key", "k"], ["--key", "--count 2"]),
        (["run", "add", *APP, "--count", "0"], ["--count", "'0'"]),
        (["run", "add", *APP, "--timeout", "soon"], ["--timeout", "'soon'"]),
        (["list", "--limit", "0"], ["--limit", "'0'"]),
        (["list", "--status", "done"], ["--status", "'done'", "completed"]),
        (["show", "xyz"], ["'xyz'", "hex digits", "durable-cluster list"]),
        (["show", "a" * 33], ["'aaaaaaaaaaaa'", "hex digits"]),
        (["list", "--dsn", "postgresqlx//me:hunter2@host/db"], ["--dsn cannot be read", "postgresql://"]),
        (["list", "--dsn", ""], ["--dsn is empty"]),
    ],
)
def test_a_command_line_that_cannot_be_meant_exits_2(say: Say, words: list[str], parts: list[str]) -> None:
    said = say(*words)
    demand(said, 2, *parts)
    assert "hunter2" not in said[1]
    assert not Path(".durable").exists()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("nowhere_to_be_found:app", ["no module 'nowhere_to_be_found'", "to import from"]),
        (
            "raises_on_import:app",
            ["importing 'raises_on_import' failed at", "raises_on_import.py:2", "ZeroDivisionError"],
        ),
        ("flows_of_bad_input:missing", ["'missing'", "is not there", "flows_of_bad_input:app"]),
        ("flows_of_bad_input:no_app", ["'no_app'", "is not an App", "flows_of_bad_input:app"]),
        ("json:loads", ["'loads'", "it holds no App at all"]),
        ("flows_of_bad_input:empty", ["app 'empty' has no workflow"]),
        ("flows_of_bad_input.py", ["is no module name", "module:app"]),
        ("", ["is no module name"]),
    ],
)
def test_an_app_that_cannot_be_loaded_is_named_and_nothing_is_started(say: Say, address: str, parts: list[str]) -> None:
    demand(say("start", "--app", address), 1, *parts)
    assert not Path(".durable").exists()


BAD_STARTS = [
    (["nope"], ["no workflow 'nope'", "add"]),
    (["two\nlines"], ["workflow name 'two\\nlines'"]),
    (["unfinished"], ["'unfinished' has no first step"]),
    (["add", "--input", '{"numbers": ["one"]}'], ["'add' does not fit Sum", "numbers[0]", "int"]),
    (["add", "--input", '{"numbers": [], "more": 1}'], ["a field 'more' that Sum does not know"]),
    (["add"], ["'add' does not fit Sum", "null"]),
    (["add", "--input", "@large.json"], ["bytes, the limit is 262,144"]),
    (["add", "--input", '{"numbers": []}', "--key", "two\nlines"], ["a key has 1 to 255 characters"]),
    (["add", "--input", '{"numbers": []}', "--key", ""], ["a key has 1 to 255 characters"]),
]


def test_a_workflow_that_cannot_be_started_leaves_nothing(say: Say, dsn: str) -> None:
    for words, parts in BAD_STARTS:
        demand(say("run", *words, "--dsn", dsn, *APP), 1, *parts)
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select count(*) from durable.started").fetchone() == (0,)


def test_a_server_that_refuses_is_named_without_the_password(say: Say) -> None:
    said = say("status", "--dsn", "postgresql://me:hunter2@localhost:1/shop")
    demand(said, 1, "cannot connect to localhost:1/shop", "refused")
    assert "hunter2" not in said[1]


def test_an_environment_that_cannot_be_read_is_named_without_the_password(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DURABLE_DSN", "postgresqlx//me:hunter2@host/db")
    for words in (["status"], ["start", *APP]):
        said = say(*words)
        demand(said, 2, "DURABLE_DSN", "cannot be read")
        assert "hunter2" not in said[1]


def test_there_is_no_local_database_before_the_first_start(say: Say) -> None:
    for command in (["status"], ["list"], ["show", "abc"], ["doctor"], ["psql"], ["uninstall", "--yes"]):
        demand(say(*command), 1, "no local database in .durable", "durable-cluster start", "--dsn")
    assert not Path(".durable").exists()


def test_a_data_directory_that_is_a_file_is_refused(say: Say) -> None:
    demand(say("start", *APP, "--data", "a_file"), 1, "--data a_file cannot be used")
    demand(say("status", "--data", "a_file"), 1, "no local database in a_file")
    demand(say("stop", "--data", "a_file"), 1, "a_file/cluster.pid")


def test_stop_without_a_cluster_says_so_also_beside_a_stale_pid_file(say: Say, tmp_path: Path) -> None:
    demand(say("stop"), 1, "no cluster runs from .durable", "--data")
    (tmp_path / ".durable").mkdir()
    (tmp_path / ".durable" / "cluster.pid").write_text("1\n")
    demand(say("stop"), 1, "no cluster runs from .durable")


def test_a_real_database_without_the_schema_names_init_and_stays_empty(say: Say, empty_dsn: str) -> None:
    for words in (
        ["start", *APP],
        ["run", "add", "--input", '{"numbers": []}', *APP],
        ["status"],
        ["list"],
        ["show", "abc"],
    ):
        demand(say(*words, "--dsn", empty_dsn), 1, "lacks the durable schema", "durable-cluster init")
    assert schemas(empty_dsn) == set()


def test_the_bundled_examples_ask_for_their_tables_in_a_real_database(say: Say, dsn: str) -> None:
    demand(say("start", "--dsn", dsn), 1, "durable-cluster init --examples", "--app")
    assert "orders" not in schemas(dsn)
    assert say("init", "--examples", "--dsn", dsn, "--json") == (0, "")
    assert "orders" in schemas(dsn)


def test_another_number_of_shards_names_reshard(say: Say, dsn: str) -> None:
    demand(say("start", *APP, "--shards", "3", "--dsn", dsn), 1, "laid out for 2 shards, not 3", "reshard")
    demand(say("init", "--shards", "3", "--dsn", dsn), 1, "laid out for 2 shards, not 3", "reshard")
    assert say("init", "--dsn", dsn)[0] == 0


def test_a_database_of_another_schema_version_says_which_way_to_go(
    say: Say, dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute("insert into durable.migration (name, digest) values ('999_future', '')")
    for words in (["status"], ["start", *APP], ["init"]):
        demand(say(*words, "--dsn", dsn), 1, "newer schema", "upgrade durable-cluster")
    conn.execute("delete from durable.migration where name = '999_future'")
    row = conn.execute("delete from durable.migration where name like '002%' returning name").fetchone()
    assert row is not None
    demand(say("status", "--dsn", dsn), 1, "older schema", "durable-cluster init")


def test_a_schema_that_is_not_ours_is_left_alone(say: Say, empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute("create schema pgque")
    demand(say("init", "--dsn", empty_dsn), 1, "schema 'pgque' exists and is not ours")
    assert schemas(empty_dsn) == {"pgque"}


def test_a_role_that_may_not_installs_nothing(say: Say, empty_dsn: str, server: str) -> None:
    role = "durable_test_nobody"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"drop role if exists {role}")
        admin.execute(f"create role {role} login")
    try:
        theirs = make_conninfo(empty_dsn, user=role)
        demand(say("init", "--dsn", theirs), 1, "permission denied", "nothing was installed", "--no-roles")
        assert schemas(empty_dsn) == set()
        demand(say("demo", "--dsn", theirs), 1, "durable_demo", "CREATEDB")
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"drop role {role}")


def test_uninstall_asks_before_it_removes_and_then_removes_everything(say: Say, dsn: str) -> None:
    demand(say("uninstall", "--dsn", dsn), 2, "--yes")
    assert {"durable", "pgque"} <= schemas(dsn)
    assert say("uninstall", "--yes", "--dsn", dsn)[0] == 0
    assert schemas(dsn) == set()
    demand(say("uninstall", "--yes", "--dsn", dsn), 1, "there is no durable schema", "nothing was removed")


def schemas(dsn: str) -> set[str]:
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select nspname from pg_namespace where nspname in ('durable', 'pgque', 'orders')")
        return {name for (name,) in rows}
