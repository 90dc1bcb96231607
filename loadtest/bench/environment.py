"""On what a run took place: the machine, the server with what was set there, the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from durable_cluster.loadtest.bench.meters import Connection
from durable_cluster.loadtest.hotpath import git_commit
from durable_cluster.loadtest.peers.base import System

GIB = 1 << 30
SETTINGS = """
select name, case when unit is null then setting else setting || ' ' || unit end from pg_settings
where source not in ('default', 'override', 'client', 'session')
    and category not like all (array['File Locations', 'Reporting%', 'Client Connection Defaults / Locale%'])
    and name not like all (array['unix\\_socket%', 'log\\_%', 'cluster_name'])
union select name, setting from pg_settings where name in ('fsync', 'synchronous_commit', 'full_page_writes', 'wal_compression')
order by 1
"""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a reader needs to judge a figure."""

    at: str
    commit: str | None
    processor: str
    cores: int
    memory_gib: float
    disk: str
    system: str
    python: str
    postgres: str
    settings: dict[str, str]
    versions: dict[str, str]

    @property
    def postgres_version(self) -> str:
        """Such as "18.1"."""
        return self.postgres.split()[1]


def environment(connection: Connection, systems: Iterable[type[System]]) -> Environment:
    """Of this machine and the server of ``connection``."""
    row = connection.execute("select version(), current_setting('data_directory', true)").fetchone()
    assert row is not None
    return Environment(
        at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=git_commit(),
        processor=_processor(),
        cores=os.cpu_count() or 0,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        disk=_disk(Path(row[1])) if row[1] else "of the server",
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        postgres=row[0].split(",")[0].split(" on ")[0],
        settings=dict(connection.execute(SETTINGS.encode()).fetchall()),
        versions={
            "durable-cluster": version("durable-cluster"),
            **{kind.package: version(kind.package) for kind in systems if kind.package},
        },
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


def _disk(folder: Path) -> str:
    """File system and device of the longest mount point above ``folder``; empty where that cannot be told."""
    try:
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    above = [mount for mount in mounts if folder.is_relative_to(mount[1])]
    device, _, kind = max(above, key=lambda mount: len(mount[1]), default=["", "", "unknown"])
    return f"{kind} on {device}" if device else ""
