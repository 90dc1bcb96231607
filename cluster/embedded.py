"""The local Postgres of one directory: whoever comes first starts it, others attach, it stops with the last of them.

A user is whoever holds a shared lock on ``users.lock``; the kernel lets go of it however the user ends, so nothing is
counted. ``keeper.lock`` is held by whoever is responsible for the server: the starter while it prepares, then the
keeper (postmaster.py), to which it hands the open file. Who finds it free starts; who finds it taken waits.

    two first users         one gets keeper.lock, the other waits for the server
    attach while it stops   the keeper has users.lock to itself until the server is down; a newcomer waits, then starts
    keeper killed           postgres gets SIGINT; the next start finds keeper.lock free, waits for its end, starts anew
    postgres killed         the keeper restarts it, at the same place
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from psycopg import pq
from psycopg.conninfo import make_conninfo

from durable_cluster import postmaster
from durable_cluster.errors import EmbeddedError
from durable_cluster.pidfile import await_absence, drop_stale, read_pidfile
from durable_cluster.premises import SOCKET_NAME, Premises, settle

LOG_LINES_SHOWN = 12
PORT = "5432"  # only part of the socket's name; said aloud, or PGPORT would decide it
SETTINGS = {
    "listen_addresses": "",
    "port": PORT,
    "cluster_name": "durable",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "jit": "off",  # statements here take microseconds, compiling one takes milliseconds
    # A server that lives with its users has no replica to feed; less WAL, and it still recovers from every crash.
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


class EmbeddedPostgres:
    """One user of the local Postgres in ``data``. Not to be shared between threads.

    Binaries are the wheel's, or those of ``bin_dir``; they and ``options`` (server settings) count for the user that
    starts the server.
    """

    def __init__(
        self,
        data: Path,
        bin_dir: Path | None = None,
        options: Mapping[str, str] | None = None,
        *,
        start_timeout_s: float = 90.0,
    ) -> None:
        self._home = data.absolute()
        self._bin_dir = bin_dir
        self._options = {**SETTINGS, **(options or {})}
        self._start_timeout_s = start_timeout_s
        self._users: int | None = None
        self._dsn: str | None = None

    @property
    def dsn(self) -> str:
        """The libpq connection string. It stays the same over restarts of the server."""
        if self._dsn is None:
            raise EmbeddedError(f"the local Postgres in {self._home} has no DSN before start(): call start() first")
        return self._dsn

    def start(self) -> str:
        """Start the server or attach to it, and return its DSN once it answers.

        Called again, it repairs: a server whose keeper was killed is started anew. EmbeddedError says what is in the
        way; the user is then not attached.
        """
        deadline = time.monotonic() + self._start_timeout_s
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._home = self._home.resolve()
            self._join(deadline)
            self._dsn = conninfo(self._served_socket(deadline))
        except OSError as error:
            self.stop()
            raise EmbeddedError(
                f"the local Postgres cannot use {self._home} as uid {os.geteuid()}: {error}. Make room or give access "
                "there, run as the directory's owner, or choose another --data"
            ) from error
        except BaseException:
            self.stop()
            raise
        return self._dsn

    def stop(self) -> None:
        """Detach; the server stops with its last user, which this does not wait for. Safe twice, and before start.

        The file is closed, never unlocked: unlocking in a forked child would let go of the parent's lock too.
        """
        if self._users is not None:
            os.close(self._users)
        self._users = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _join(self, deadline: float) -> None:
        """Become a user. Only a keeper that is stopping the server makes this wait."""
        if self._users is not None:
            return
        self._users = open_lock(self._home / "users.lock")
        for _ in pauses(deadline):
            if is_locked(self._users, fcntl.LOCK_SH):
                return
        raise EmbeddedError(
            f"the server in {self._home} has been stopping for more than {self._start_timeout_s:g} s: start again "
            f"later, and see {self._home}/postgres.log{self._log_tail()}"
        )

    def _served_socket(self, deadline: float) -> str:
        """The socket directory of a server that answers, started by us if there is none."""
        is_starter = False
        for _ in pauses(deadline):
            responsible = open_lock(self._home / "keeper.lock")
            try:
                if is_locked(responsible, fcntl.LOCK_EX):
                    if is_starter:
                        raise EmbeddedError(
                            f"the local Postgres in {self._home} ended at its start; mend what its log says and start "
                            f"again{self._log_tail()}"
                        )
                    self._launch(responsible, deadline)
                    is_starter = True
            finally:
                os.close(responsible)
            found = read_pidfile(self._home / "pgdata")
            if found is not None and found.status == "ready" and is_answering(found.socket_dir):
                return found.socket_dir
        raise EmbeddedError(
            f"the local Postgres in {self._home} did not answer within {self._start_timeout_s:g} s; it may still be "
            f"recovering: start again, and see {self._home}/postgres.log{self._log_tail()}"
        )

    def _launch(self, responsible: int, deadline: float) -> None:
        """Prepare the places and leave a keeper behind that holds ``responsible`` from now on."""
        premises = settle(self._home, self._bin_dir)
        await_absence(premises.pgdata, pauses(deadline))
        drop_stale(premises.pgdata / "postmaster.pid")
        drop_stale(premises.socket_dir / f"{SOCKET_NAME}.lock")
        plan = json.dumps(self._plan(premises, responsible))
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", postmaster.__file__, plan],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(responsible,),
                start_new_session=True,  # a Ctrl-C at the terminal is not for the server
                check=False,
                timeout=max(1.0, deadline - time.monotonic()),
            )
        except subprocess.TimeoutExpired as error:
            raise EmbeddedError(
                f"the data directory {premises.pgdata} was not made within {self._start_timeout_s:g} s: start again, "
                "or choose a --data on a faster disk"
            ) from error
        if done.returncode:
            raise EmbeddedError(
                f"the data directory {premises.pgdata} could not be made; nothing was left behind, start again when "
                f"this is mended: {done.stderr.decode(errors='replace').strip()}"
            )

    def _plan(self, premises: Premises, responsible: int) -> postmaster.Plan:
        initdb, postgres = str(premises.bin_dir / "initdb"), str(premises.bin_dir / "postgres")
        settings = [word for name, value in self._options.items() for word in ("-c", f"{name}={value}")]
        return postmaster.Plan(
            initdb=[initdb, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-instructions"],
            create=[postgres, "--single", "-c", "exit_on_error=on"],
            server=[postgres, "-D", str(premises.pgdata), "-k", str(premises.socket_dir), *settings],
            pgdata=str(premises.pgdata),
            log=str(self._home / "postgres.log"),
            users_lock=str(self._home / "users.lock"),
            keeper_lock_fd=responsible,
            uid=premises.uid,
            is_namespaced=premises.is_namespaced,
        )

    def _log_tail(self) -> str:
        log = self._home / "postgres.log"
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:] if log.exists() else []
        return "; the last lines of its log:\n" + "\n".join(lines)


@contextlib.contextmanager
def kept_alive(data: Path) -> Iterator[None]:
    """The local Postgres of ``data``, once somebody starts it, stays while this lasts, though its users come and go."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    users = open_lock(data / "users.lock")
    try:
        fcntl.flock(users, fcntl.LOCK_SH)  # waits for a server that is just stopping
        yield
    finally:
        os.close(users)


def open_lock(path: Path) -> int:
    """A lock file, made at need. Not inherited by an exec (Python opens everything so): a child is no user."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def is_locked(lock: int, kind: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_answering(socket_dir: str) -> bool:
    """Whether a server accepts connections there. A ping, not a connection: a server that is full is up."""
    return pq.PGconn.ping(conninfo(socket_dir).encode()) == pq.Ping.OK


def conninfo(socket_dir: str) -> str:
    return make_conninfo(host=socket_dir, port=PORT, user="postgres", dbname="durable")


def pauses(deadline: float) -> Iterator[None]:
    """Turns of a waiting loop: one at once, then with growing pauses (5 to 100 ms) until ``deadline`` (monotonic)."""
    pause_s = 0.005
    while True:
        yield
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(pause_s, left_s))
        pause_s = min(0.1, pause_s * 1.5)
