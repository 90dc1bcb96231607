"""The keeper of the local Postgres: its parent process, which stops it when the last user is gone, however they went.

    user      flock(users.lock, shared), as many as there are
    keeper    flock(keeper.lock, exclusive) for its life
      ├─ watcher    blocks on flock(users.lock, exclusive), so its end means: nobody is left
      └─ postgres   gets SIGINT (fast shutdown) when the keeper dies

Three kinds of children and one blocking ``waitpid``: no thread, no polling, no signal handler that acts.

It is run by its path and isolated (``python -I -S …/postmaster.py``), and imports nothing but the standard library:
through the package it would load all of the product, and with its folder on sys.path the ``types.py`` there would stand
before the standard one.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CRASHES_MAX = 5
CRASH_MEMORY_S = 60.0
STOP_S = 60
LOG_BYTES_MAX = 16 * 1024 * 1024
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IS_LINUX = sys.platform == "linux"


class Plan(NamedTuple):
    """What the keeper is told, as one JSON list: argument vectors, places, and whom the server runs as.

    ``uid`` is the user to drop to (None: stay); ``is_namespaced`` says that root enters a user namespace, where it no
    longer looks like root. ``keeper_lock_fd`` is the starter's locked file, handed over still locked.
    """

    initdb: list[str]
    create: list[str]
    server: list[str]
    pgdata: str
    log: str
    users_lock: str
    keeper_lock_fd: int
    uid: int | None
    is_namespaced: bool


class Refused(Exception):
    """The server cannot be prepared; the text goes to the starter."""


def unshare_user() -> None:
    """Leave root's name behind: in a namespace without a mapping every uid shows as nobody, and postgres is content."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUSER)")


def bind_to_parent(parent: int, death_signal: signal.Signals) -> None:
    """Get ``death_signal`` when ``parent`` dies; a parent that died before this call is noticed by the changed ppid."""
    if IS_LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def entrance(plan: Plan, death_signal: signal.Signals) -> Callable[[], None]:
    """What a child does between fork and exec. The death signal comes last: a change of credentials would clear it."""
    parent = os.getpid()

    def enter() -> None:
        if plan.is_namespaced:
            unshare_user()
        bind_to_parent(parent, death_signal)

    return enter


def run_to_end(plan: Plan, argv: list[str], text: str = "") -> None:
    """Run one preparing command as the server's user; its output is the reason when it fails."""
    done = subprocess.run(
        argv,
        input=text.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        cwd="/",
        preexec_fn=entrance(plan, signal.SIGKILL),
        user=plan.uid,
        group=plan.uid,
        extra_groups=None if plan.uid is None else [],
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()[-1500:]
        raise Refused(f"{argv[0]} ended with {done.returncode}:\n{said}")


def create(plan: Plan) -> None:
    """Make the data directory, if there is none, beside its place and rename it: what is called pgdata is always whole.

    The database is made in single-user mode before the rename, so nobody ever meets a server without it.
    """
    place = Path(plan.pgdata)
    if place.exists():
        return
    for left in place.parent.glob(f"{place.name}.new-*"):
        shutil.rmtree(left)
    new = tempfile.mkdtemp(prefix=f"{place.name}.new-", dir=place.parent)
    if plan.uid is not None:
        os.chown(new, plan.uid, plan.uid)
    try:
        run_to_end(plan, [*plan.initdb, "-D", new])
        run_to_end(plan, [*plan.create, "-D", new, "postgres"], "create database durable\n")
        Path(new).rename(place)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    parent = os.open(place.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def detach(log: int) -> None:
    """Let go of the starter: of its pipes, whose end it waits for, and of its working directory."""
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir("/")


class Keeper:
    """The parent of one postgres. ``run`` returns when the server has stopped, for good."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.users = os.open(plan.users_lock, os.O_RDWR)
        self.crashes = 0

    def run(self) -> int:
        """Wait for children; what ended says what to do. Returns the exit code: 0 when stopped, 1 when given up."""
        if IS_LINUX:  # orphans of a killed postgres become ours, so that they can be ended and waited for
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.watcher = self.watch()
        self.launch()
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == self.watcher:
                if os.waitstatus_to_exitcode(status) == 0:
                    return self.stop()
                self.watcher = self.watch()
            elif pid == self.server.pid and not self.is_restarted(os.waitstatus_to_exitcode(status)):
                return 1

    def watch(self) -> int:
        """Fork the watcher.

        Its lock belongs to the open file it shares with the keeper, which so keeps it after the watcher's end: whoever
        arrives from then on waits until the server has stopped, and starts a new one.
        """
        keeper = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            bind_to_parent(keeper, signal.SIGKILL)
            os.close(self.plan.keeper_lock_fd)
            fcntl.flock(self.users, fcntl.LOCK_EX)
            os._exit(0)
        finally:
            os._exit(1)

    def launch(self) -> None:
        """Start postgres. Popen returns after the exec: from then on a signal reaches postgres, not a forked Python."""
        self.launched_at = time.monotonic()
        self.server = subprocess.Popen(
            self.plan.server,
            stdin=subprocess.DEVNULL,
            cwd="/",
            preexec_fn=entrance(self.plan, signal.SIGINT),  # noqa: PLW1509 (there is one thread)
            user=self.plan.uid,
            group=self.plan.uid,
            extra_groups=None if self.plan.uid is None else [],
        )

    def is_restarted(self, code: int) -> bool:
        """Bring a crashed server back, with backoff and a limit.

        One that ended by itself has said why in the log and stays down, unless it is the restart of a crashed one: then
        the remains of the crash may be what it could not stand.
        """
        if time.monotonic() - self.launched_at > CRASH_MEMORY_S:
            self.crashes = 0
        if code == 0 or (code > 0 and not self.crashes) or self.crashes == CRASHES_MAX:
            print(f"keeper: postgres ended with {code} after {self.crashes} restarts: giving up", flush=True)
            return False
        self.end_orphans()
        time.sleep(0.1 * 2**self.crashes)
        self.crashes += 1
        print(f"keeper: postgres ended with {code}: restart {self.crashes} of {CRASHES_MAX}", flush=True)
        self.launch()
        return True

    def end_orphans(self) -> None:
        """End the backends of a dead postgres. They are condemned already (each leaves when it notices), but one that
        computes may not notice for hours, and its hold on the shared memory keeps a new server from starting."""
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                if pid != self.watcher:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    def stop(self) -> int:
        """Fast shutdown; one that takes too long becomes an immediate one, which costs a recovery and no data."""
        signal.signal(signal.SIGALRM, lambda *_: os.kill(self.server.pid, signal.SIGQUIT))
        os.kill(self.server.pid, signal.SIGINT)
        signal.alarm(STOP_S)
        os.waitpid(self.server.pid, 0)
        return 0


def main(argument: str) -> int:
    """``probe``: exit 0 if root may enter a user namespace. Else a plan: prepare, leave a keeper behind, return."""
    if argument == "probe":
        unshare_user()
        return 0
    plan = Plan(*json.loads(argument))
    os.set_inheritable(plan.keeper_lock_fd, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the children from waitpid
    try:
        create(plan)
        log_path = Path(plan.log)
        if log_path.exists() and log_path.stat().st_size > LOG_BYTES_MAX:
            log_path.rename(f"{log_path}.old")
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except (OSError, subprocess.SubprocessError, Refused) as error:
        print(error, file=sys.stderr)
        return 1
    if os.fork():
        return 0
    detach(log)
    return Keeper(plan).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
