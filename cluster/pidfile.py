"""What a Postgres says of itself in postmaster.pid, and whether the processes agree."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from durable_cluster.errors import EmbeddedError

PROC = Path("/proc")
HANDOVER_S = 2.0


class PidFile(msgspec.Struct, frozen=True, kw_only=True):
    """The lines of postmaster.pid that we use; ``status`` is starting, ready or stopping, or still empty."""

    pid: int
    socket_dir: str
    status: str


def read_pidfile(pgdata: Path) -> PidFile | None:
    """The pid file of ``pgdata``; None without one, and while one is being written."""
    try:
        lines = (pgdata / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    lines += [""] * (8 - len(lines))
    if not lines[0].isdigit():
        return None
    return PidFile(pid=int(lines[0]), socket_dir=lines[4], status=lines[7].strip())


def await_absence(pgdata: Path, pauses: Iterable[None]) -> None:
    """Return once no Postgres is left in ``pgdata``, for a caller that holds keeper.lock, so that no keeper is alive.

    What a killed keeper leaves is stopping, or will be in a moment; what a killed keeper *and* postmaster leave are
    backends, which go when they notice. A postmaster that is ready and stays so is somebody else's: EmbeddedError, as
    when the pauses end.
    """
    left: list[int] = []
    foreign_after = time.monotonic() + HANDOVER_S
    for _ in pauses:
        found = read_pidfile(pgdata)
        owner = found.pid if found is not None and is_postmaster_of(pgdata, found.pid) else None
        left = sorted({*backends_in(pgdata), *([] if owner is None else [owner])})
        if not left:
            return
        if owner is not None and found is not None and found.status != "stopping" and time.monotonic() > foreign_after:
            raise EmbeddedError(
                f"{pgdata} is in use by a Postgres that was not started by durable-cluster (pid {owner}): stop it "
                f"(kill -INT {owner}) and start again, connect to it with --dsn, or choose another --data"
            )
    raise EmbeddedError(
        f"Postgres processes of an earlier server are still at work in {pgdata}: {left}. Start again when they have "
        f"ended; to end them: kill -9 {' '.join(map(str, left))} (committed data is safe)"
    )


def drop_stale(lock_file: Path) -> None:
    """Remove a lock file of a server that is gone (see ``await_absence``) if its number seems to live.

    Postgres only asks whether the number lives, and it does when another program has it now, and when the dead server is a
    zombie because the container's first process does not reap. A number that is free is left to postgres, which also checks
    the shared memory named in the file.
    """
    if lock_file.exists():
        number = lock_file.read_text().partition("\n")[0]
        if number.isdigit() and is_alive(int(number)):
            lock_file.unlink()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_postmaster_of(pgdata: Path, pid: int) -> bool:
    """Whether ``pid`` is a live postgres that works in ``pgdata``.

    Where the kernel hides its directory, or has no /proc, a postgres or a live number has to do.
    """
    if not (PROC / "self").exists():
        return is_alive(pid)
    try:
        return is_postgres(pid) and (PROC / str(pid) / "cwd").samefile(pgdata)
    except PermissionError:
        return True
    except (FileNotFoundError, ProcessLookupError):
        return False


def backends_in(pgdata: Path) -> Iterator[int]:
    """Every postgres process that works in ``pgdata``, as far as we may look."""
    for entry in PROC.glob("[0-9]*"):
        try:
            if is_postgres(int(entry.name)) and (entry / "cwd").samefile(pgdata):
                yield int(entry.name)
        except OSError:  # gone, or not ours to see
            continue


def is_postgres(pid: int) -> bool:
    return (PROC / str(pid) / "comm").read_text().strip() == "postgres"
