"""``psql``: a prompt in the command's database."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.target import Database, Target


def psql(target: Target, arguments: Sequence[str]) -> int:
    """Run psql to its end; its exit code."""
    with target.opened() as database:
        program = _program(database)
        command = [program, f"--dbname={_open_conninfo(database.dsn)}", *arguments]
        if not database.is_local:
            os.execv(program, command)
        # The local server runs while somebody holds it, and an exec would let go of it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the prompt is for psql, which has its own handler
        return subprocess.run(command, check=False).returncode


def _program(database: Database) -> str:
    """The local server's own psql, else the one on the PATH."""
    if database.bin_dir is not None and os.access(database.bin_dir / "psql", os.X_OK):
        return str(database.bin_dir / "psql")
    found = shutil.which("psql")
    if found is None:
        raise ConfigurationError("there is no psql on the PATH: install a PostgreSQL client")
    return found


def _open_conninfo(dsn: str) -> str:
    """``dsn`` without its password, which goes by the environment: arguments are for everybody to see."""
    parts = conninfo_to_dict(dsn)
    password = parts.pop("password", None)
    if password is not None:
        os.putenv("PGPASSWORD", str(password))
    return make_conninfo("", **parts)
