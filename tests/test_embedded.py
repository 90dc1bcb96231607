"""The local Postgres: real servers, real kills. Every wait is for a condition, with a deadline."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable_cluster import premises, schema
from durable_cluster.embedded import EmbeddedPostgres, is_locked, open_lock, pauses
from durable_cluster.errors import EmbeddedError
from durable_cluster.pidfile import read_pidfile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at through Linux's /proc")

NOBODY_UID = 65534
ATTACH = """
import sys
from pathlib import Path
from durable_cluster.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
print(server.start(), flush=True)
sys.stdin.read()
"""
# A seccomp filter (load the number; unshare: EPERM; else allow): what containers do to root.
DENY_UNSHARE = """
import ctypes, platform, struct
number = {"x86_64": 272, "aarch64": 97}[platform.machine()]
code = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, number, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(code)
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    for _ in pauses(time.monotonic() + seconds):
        if found := condition():
            return found
    raise AssertionError(f"not within {seconds:g} s: {what}")


def postmaster_pid(home: Path) -> int:
    found = until(lambda: read_pidfile(home / "pgdata"), "a pid file")
    return int(found.pid)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_free(home: Path, lock_name: str, kind: int) -> bool:
    lock = open_lock(home / lock_name)
    try:
        return is_locked(lock, kind)
    finally:
        os.close(lock)


def is_down(home: Path) -> bool:
    return is_free(home, "keeper.lock", fcntl.LOCK_EX) and not (home / "pgdata" / "postmaster.pid").exists()


def run(dsn: str, sql: str) -> Any:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]


def answer(dsn: str, sql: str) -> Any:
    """What ``sql`` gives once the server is back; None while it is not."""
    try:
        return run(dsn, sql)
    except psycopg.OperationalError:
        return None


def attach(home: Path, python: str = sys.executable, prelude: str = "", **how: Any) -> subprocess.Popen[str]:
    """A user in a process of its own: prints the DSN once attached, leaves when its stdin is closed."""
    command = [python, "-c", prelude + ATTACH, str(home)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how)


def dsn_of(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    line = user.stdout.readline().strip()
    assert line.startswith("host="), f"the user did not attach: {line!r}"
    return line


def leave(user: subprocess.Popen[str]) -> None:
    user.communicate(timeout=30)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory, to be copied: an initdb for each test would be half of their time."""
    home = tmp_path_factory.mktemp("made") / "home"
    with EmbeddedPostgres(home) as server:
        run(server.dsn, "create table kept (v int)")
        run(server.dsn, "insert into kept values (41), (1)")
    until(lambda: is_down(home), "the server stops")
    return home


@pytest.fixture
def home(made_once: Path, tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(made_once / "pgdata", home / "pgdata")
    yield home
    until(lambda: is_down(home), "the test leaves no server behind")


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user can reach, which pytest's are not."""
    place = Path(tempfile.mkdtemp(prefix="durable-test-", dir="/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def test_it_starts_from_nothing_and_keeps_data_across_restarts(tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    with EmbeddedPostgres(home) as server:
        first = postmaster_pid(home)
        run(server.dsn, "create table t as select 42 as v")
        assert run(server.dsn, "select current_database()") == "durable"
        dsn = server.dsn
    until(lambda: is_down(home), "the server stops")
    with EmbeddedPostgres(home) as server:
        assert server.dsn == dsn
        assert postmaster_pid(home) != first
        assert run(server.dsn, "select v from t") == 42
    until(lambda: is_down(home), "the server stops again")


def test_it_listens_on_a_private_unix_socket_only_and_is_crash_safe(home: Path) -> None:
    with EmbeddedPostgres(home, options={"work_mem": "7MB"}) as server:
        settings = ("listen_addresses", "fsync", "full_page_writes", "synchronous_commit", "work_mem")
        assert [run(server.dsn, f"show {name}") for name in settings] == ["", "on", "on", "on", "7MB"]
        socket_dir = Path(run(server.dsn, "show unix_socket_directories")).stat()
        assert socket_dir.st_mode & 0o777 == 0o700
        assert socket_dir.st_uid == os.geteuid()


def test_two_users_share_one_server_and_it_stops_with_the_last(home: Path) -> None:
    first, second = EmbeddedPostgres(home), EmbeddedPostgres(home)
    assert first.start() == second.start()
    pid = postmaster_pid(home)
    first.stop()
    assert run(second.dsn, "select sum(v) from kept") == 42
    assert not is_free(home, "users.lock", fcntl.LOCK_EX)
    assert postmaster_pid(home) == pid
    second.stop()
    until(lambda: not is_running(pid), "the server stops with its last user")


def test_users_that_come_first_at_the_same_time_get_the_same_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    users = [attach(home) for _ in range(4)]
    assert len({dsn_of(user) for user in users}) == 1
    log = (home / "postgres.log").read_text()
    assert log.count("database system is ready to accept connections") == 1
    for user in users:
        leave(user)
    until(lambda: is_down(home), "the server stops")


def test_stop_is_safe_twice_and_before_start(home: Path) -> None:
    server = EmbeddedPostgres(home)
    server.stop()
    with pytest.raises(EmbeddedError, match=r"call start\(\) first"):
        server.dsn
    server.start()
    server.stop()
    server.stop()


def test_a_killed_user_lets_go_of_the_server(home: Path) -> None:
    user = attach(home)
    dsn = dsn_of(user)
    assert run(dsn, "select 1") == 1
    pid = postmaster_pid(home)
    user.kill()
    until(lambda: not is_running(pid), "the server stops after the SIGKILL of its only user")
    user.communicate(timeout=10)


def test_a_child_of_a_user_does_not_count_as_a_user(home: Path) -> None:
    user = EmbeddedPostgres(home)
    user.start()
    pid = postmaster_pid(home)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        user.stop()
        until(lambda: not is_running(pid), "the server stops although the user's child lives")
        child.kill()


def test_a_user_that_attaches_while_the_server_stops_gets_a_new_one(home: Path) -> None:
    last, newcomer = EmbeddedPostgres(home), EmbeddedPostgres(home)
    last.start()
    pid = postmaster_pid(home)
    os.kill(pid, signal.SIGSTOP)  # it will take the order to stop, and not obey yet
    last.stop()
    until(lambda: not is_free(home, "users.lock", fcntl.LOCK_SH), "the keeper takes the users' lock to itself")
    starting = threading.Thread(target=newcomer.start)
    starting.start()
    os.kill(pid, signal.SIGCONT)
    starting.join(30)
    assert postmaster_pid(home) != pid
    assert run(newcomer.dsn, "select sum(v) from kept") == 42
    newcomer.stop()


def test_a_killed_postgres_comes_back_at_the_same_place_with_its_data(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        run(server.dsn, "insert into kept values (58)")
        pid = postmaster_pid(home)
        orphan = spin(server.dsn)
        try:
            os.kill(pid, signal.SIGKILL)
            until(lambda: answer(server.dsn, "select sum(v) from kept") == 100, "the keeper restarts it")
            assert postmaster_pid(home) != pid
            assert not is_running(orphan)
        finally:
            if is_running(orphan):
                os.kill(orphan, signal.SIGKILL)


def test_a_killed_postgres_gives_no_number_twice_that_the_schema_has_given_out(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            schema.install(connection, shards=2)
            used = [connection.execute("select pgque.consumer_id(%s)", (f"c{n}",)).fetchone() for n in range(12)]
        os.kill(postmaster_pid(home), signal.SIGKILL)
        until(lambda: answer(server.dsn, "select true"), "the keeper restarts it")
        assert (run(server.dsn, "select pgque.consumer_id('a new one')"),) not in used


def spin(dsn: str) -> int:
    """The pid of a backend that computes for ever, and so would not notice the death of its postmaster."""
    connection = psycopg.connect(dsn, autocommit=True)
    pid = connection.info.backend_pid
    threading.Thread(
        target=ends_badly, args=(connection, "do $$ begin loop null; end loop; end $$"), daemon=True
    ).start()
    until(lambda: run(dsn, f"select state = 'active' from pg_stat_activity where pid = {pid}"), "it computes")
    return pid


def ends_badly(connection: psycopg.Connection[Any], sql: str) -> None:
    with connection, pytest.raises(psycopg.OperationalError):
        connection.execute(sql.encode())


def test_restarts_are_bounded_and_a_new_start_begins_again(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        for _ in range(6):
            pid = until(lambda: answer(server.dsn, "select 1") and postmaster_pid(home), "it is up")
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: not is_running(pid), "it is dead")
        until(lambda: is_free(home, "keeper.lock", fcntl.LOCK_EX), "the keeper gives up")
        assert "giving up" in (home / "postgres.log").read_text()
        server.start()
        assert run(server.dsn, "select sum(v) from kept") == 42


def test_a_killed_keeper_takes_postgres_along_and_the_next_start_recovers(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        dsn, pid = server.dsn, postmaster_pid(home)
        run(dsn, "insert into kept values (58)")
        keeper = parent_of(pid)
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not is_running(keeper), "the keeper is dead")  # a kill returns before that
        assert server.start() == dsn
        assert postmaster_pid(home) != pid
        assert not is_running(pid)
        assert run(dsn, "select sum(v) from kept") == 100


def test_a_keeper_and_a_postgres_killed_together_are_recovered(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        pid = postmaster_pid(home)
        run(server.dsn, "insert into kept values (58)")
        keeper = parent_of(pid)
        os.kill(keeper, signal.SIGSTOP)  # or it could restart postgres between the two kills
        os.kill(pid, signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not is_running(keeper) and not is_running(pid), "both are dead")
        server.start()
        assert run(server.dsn, "select sum(v) from kept") == 100


def test_a_pid_file_whose_number_another_program_has_now_is_no_obstacle(home: Path) -> None:
    (home / "pgdata" / "postmaster.pid").write_text(f"{os.getpid()}\n{home}/pgdata\n0\n5432\n\n\n0 0\nready   \n")
    with EmbeddedPostgres(home) as server:
        assert run(server.dsn, "select sum(v) from kept") == 42


def test_an_interrupted_initdb_leaves_nothing_half_done(tmp_path: Path) -> None:
    home = tmp_path / "home"
    user = attach(home)
    until(lambda: [*home.glob("pgdata.new-*/base")], "initdb is at work")
    half_done = next(home.glob("pgdata.new-*"))
    preparing = [int(pid) for pid in Path(f"/proc/{user.pid}/task/{user.pid}/children").read_text().split()]
    for pid in (user.pid, *preparing):
        os.kill(pid, signal.SIGKILL)
    user.communicate(timeout=10)
    assert half_done.exists() and not (home / "pgdata").exists()
    with EmbeddedPostgres(home) as server:
        assert run(server.dsn, "select current_database()") == "durable"
        assert not half_done.exists()
    until(lambda: is_down(home), "the server stops")


def test_data_of_another_major_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    older = premises.wheel_binaries().parents[1] / "pginstall" / "bin"
    with EmbeddedPostgres(home, older) as server:
        assert run(server.dsn, "show server_version").startswith("16.")
    until(lambda: is_down(home), "the server stops")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 16.* PostgreSQL 18.*DURABLE_PG_BIN") as refused:
        EmbeddedPostgres(home).start()
    assert str(home / "pgdata") in str(refused.value)
    with EmbeddedPostgres(home, older) as server:
        assert run(server.dsn, "select current_database()") == "durable"
    until(lambda: is_down(home), "the server stops")


@pytest.mark.parametrize("name", ["n" * 150, "with, a comma and 'quotes'"])
def test_a_path_that_a_socket_cannot_have_works(home: Path, name: str) -> None:
    awkward = home.parent / name
    home.rename(awkward)
    with EmbeddedPostgres(awkward) as server, EmbeddedPostgres(awkward) as other:
        assert run(other.dsn, "select sum(v) from kept") == 42
        socket_dir = Path(run(server.dsn, "show unix_socket_directories"))
    until(lambda: is_down(awkward), "the server stops")
    socket_dir.rmdir()
    awkward.rename(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")
def test_a_socket_directory_that_somebody_else_made_is_refused(home: Path) -> None:
    long = home.parent / ("n" * 150)
    home.rename(long)
    planted = Path("/tmp") / f"durable-0-{premises.short_hash(long)}"
    planted.mkdir(mode=0o700)
    try:
        os.chown(planted, NOBODY_UID, NOBODY_UID)
        with pytest.raises(EmbeddedError, match="somebody else may have made it"):
            EmbeddedPostgres(long).start()
        os.chown(planted, 0, 0)
        planted.chmod(0o777)
        with pytest.raises(EmbeddedError, match="mode 0700"):
            EmbeddedPostgres(long).start()
    finally:
        planted.rmdir()
    long.rename(home)


def test_a_server_that_is_not_ours_is_refused_and_left_alone(home: Path) -> None:
    arguments = ["-D", str(home / "pgdata"), "-k", str(home), "-c", "listen_addresses="]
    enter = ["unshare", "-U"] if os.geteuid() == 0 else []
    foreign = subprocess.Popen(
        [*enter, str(premises.wheel_binaries() / "postgres"), *arguments], stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: (found := read_pidfile(home / "pgdata")) and found.status == "ready", "the other server is up")
        with pytest.raises(EmbeddedError, match=rf"not started by durable-cluster \(pid {foreign.pid}\)"):
            EmbeddedPostgres(home).start()
        assert foreign.poll() is None
    finally:
        foreign.send_signal(signal.SIGINT)
        foreign.wait(20)


def test_a_server_that_cannot_start_says_why(home: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"(?s)ended at its start.*no_such_setting"):
        EmbeddedPostgres(home, options={"no_such_setting": "1"}).start()
    until(lambda: is_down(home), "nothing is left behind")
    with EmbeddedPostgres(home) as server:
        assert run(server.dsn, "select sum(v) from kept") == 42


def test_a_server_that_is_not_up_in_time_is_named_with_its_log(home: Path) -> None:
    (home / "postgres.log").write_text("still replaying\n")
    starter = open_lock(home / "keeper.lock")
    assert is_locked(starter, fcntl.LOCK_EX)
    with pytest.raises(EmbeddedError, match=r"(?s)did not answer within 0.2 s.*still replaying") as late:
        EmbeddedPostgres(home, start_timeout_s=0.2).start()
    os.close(starter)
    assert str(home) in str(late.value)
    assert is_free(home, "users.lock", fcntl.LOCK_EX), "a failed start does not leave a user behind"


def test_missing_binaries_and_impossible_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"holds no initdb.*DURABLE_PG_BIN"):
        EmbeddedPostgres(tmp_path / "a", tmp_path).start()
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match=r"cannot use .*file/b .*choose another --data"):
        EmbeddedPostgres(tmp_path / "file" / "b").start()
    (tmp_path / "c" / "pgdata").mkdir(parents=True)
    with pytest.raises(EmbeddedError, match="holds no Postgres data"):
        EmbeddedPostgres(tmp_path / "c").start()


def test_an_initdb_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("initdb", "postgres"):
        (binaries / name).write_text("#!/bin/sh\necho 'No space left on device' >&2\nexit 1\n")
        (binaries / name).chmod(0o755)
    with pytest.raises(EmbeddedError, match=r"(?s)could not be made.*No space left on device"):
        EmbeddedPostgres(tmp_path / "home", binaries).start()
    assert not [*(tmp_path / "home").glob("pgdata*")]
    assert is_down(tmp_path / "home")


def python_for_nobody() -> str:
    """A Python of this minor version that the user nobody can run; root's own often stands in a closed home."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            subprocess.run([python, "-I", "-c", ""], user=NOBODY_UID, cwd="/", check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return python
    pytest.skip(f"NOT TESTED as an ordinary user: no Python {version} here that nobody can run")


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user: every other test here shows it")
def test_an_ordinary_user_starts_it_without_further_ado(open_place: Path) -> None:
    python = python_for_nobody()
    copied = open_place / "packages"
    for name in (
        "psycopg",
        "psycopg_binary",
        "psycopg_binary.libs",
        "msgspec",
        premises.WHEEL,
        f"{premises.WHEEL}.libs",
    ):
        found = Path(psycopg.__file__).parents[1] / name
        if found.exists():
            shutil.copytree(found, copied / name, ignore=shutil.ignore_patterns("pginstall", "include"))
    (copied / "durable_cluster").mkdir()
    for module in ("embedded", "premises", "pidfile", "postmaster", "errors"):
        shutil.copy(Path(premises.__file__).with_name(f"{module}.py"), copied / "durable_cluster")
    shutil.copy(Path(psycopg.__file__).parents[1] / "typing_extensions.py", copied)
    own = open_place / "own"
    own.mkdir()
    os.chown(own, NOBODY_UID, NOBODY_UID)
    how = {"user": NOBODY_UID, "group": NOBODY_UID, "extra_groups": [], "cwd": "/", "env": {"PYTHONPATH": str(copied)}}
    user = attach(own / "home", python, **how)
    dsn = dsn_of(user)
    pid = postmaster_pid(own / "home")
    assert Path(f"/proc/{pid}").stat().st_uid == NOBODY_UID
    assert run(dsn, "select current_database()") == "durable"
    leave(user)
    until(lambda: not is_running(pid), "the server stops with its user")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused by postgres")
def test_root_without_user_namespaces_runs_it_as_nobody(open_place: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    closed = tmp_path / "site" / premises.WHEEL  # pytest's directories are 0700, as root's home is
    wheel = premises.wheel_binaries().parents[1]
    shutil.copytree(wheel / "pginstall18", closed / "pginstall18", ignore=shutil.ignore_patterns("include"))
    shutil.copytree(wheel.with_name(f"{wheel.name}.libs"), closed.with_name(f"{closed.name}.libs"))
    elsewhere = "\n".join(
        (
            "from pathlib import Path",
            "from durable_cluster import premises",
            f"premises.NOBODY_HOME = Path({str(open_place)!r})",
            f"premises.wheel_binaries = lambda: Path({str(closed)!r}, 'pginstall18', 'bin')",
        )
    )
    for expected in (1, 2):
        user = attach(home, prelude=DENY_UNSHARE + elsewhere)
        dsn = dsn_of(user)
        pid = postmaster_pid(home)
        assert Path(f"/proc/{pid}").stat().st_uid == NOBODY_UID
        assert Path(f"/proc/{pid}/exe").readlink().is_relative_to(open_place)
        run(dsn, "create table if not exists kept (v int)")
        run(dsn, "insert into kept values (1)")
        assert run(dsn, "select count(*) from kept") == expected
        leave(user)
        until(lambda pid=pid: not is_running(pid), "the server stops with its user")
    until(lambda: is_down(home), "the keeper is gone")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_data_of_another_user_is_refused(home: Path) -> None:
    os.chown(home / "pgdata", 1, 1)
    with pytest.raises(EmbeddedError, match=r"belongs to uid 1 and this is uid 0: run as its owner"):
        EmbeddedPostgres(home).start()
