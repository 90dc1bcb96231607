"""One workflow with 100,000 children, spawned in waves: how fast, whether late waves are slower, what memory a process takes."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

from durable_cluster.database import connect
from durable_cluster.joins import CHILDREN_MAX
from durable_cluster.loadtest import stage, survival_flows
from durable_cluster.loadtest.figures import Figure
from durable_cluster.loadtest.measure import Connection

END_S_MAX = 1_200.0
PARTS = 4
SLOWDOWN_MAX = 1.5
GROWTH_MB_MAX = 100.0


def fanout(dsn: str, *, children: int, shards: int) -> list[Figure]:
    """Spawn ``children`` in waves of 1,024, gather them, read their outputs. Raises StageError for fewer than a wave a part."""
    if children < PARTS * CHILDREN_MAX:
        raise stage.StageError(
            f"{children:,} children are too few to compare their waves; give {PARTS * CHILDREN_MAX:,}"
        )
    with (
        stage.running_cluster(dsn, processes=shards, shards=shards, app=survival_flows.__name__ + ":app") as cluster,
        connect(dsn, name="durable-loadtest") as connection,
    ):
        survival_flows.fan.start({"left": CHILDREN_MAX, "all": CHILDREN_MAX}).result(timeout=END_S_MAX)
        before_mb = [_peak_mb(pid) for pid in cluster.pids]
        begun = time.perf_counter()
        parent = survival_flows.fan.start({"left": children, "all": children})
        total = parent.result(timeout=END_S_MAX)
        seconds = time.perf_counter() - begun
        grown_mb = [_peak_mb(pid) - before for pid, before in zip(cluster.pids, before_mb, strict=True)]
        parts_s = _parts_s(connection, parent.id, children)
        cluster.demand_whole()
    if total != sum(range(children)):
        raise stage.StageError(f"the outputs of {children:,} children come to {total}, not to {sum(range(children))}")
    return [
        Figure(of="fanout", what=f"{children:,} children spawned, run, gathered and read", value=seconds, unit="s"),
        Figure(of="fanout", what="children a second", value=children / seconds, unit="/s"),
        Figure(
            of="fanout",
            what=f"the last {1 / PARTS:.0%} of them spawned, as a multiple of the second",
            value=parts_s[-1] / parts_s[1],
            unit="×",
            limit=SLOWDOWN_MAX,
        ),
        Figure(
            of="fanout",
            what="peak memory of a process, beyond that of 1,024 children",
            value=max(grown_mb),
            unit="MB",
            limit=GROWTH_MB_MAX,
        ),
        Figure(
            of="fanout",
            what="peak memory of a process",
            value=max(map(sum, zip(before_mb, grown_mb, strict=True))),
            unit="MB",
        ),
    ]


def _parts_s(connection: Connection, parent_id: str, children: int) -> list[float]:
    """Seconds that each part of the children took to be spawned."""
    edges = [children * part // PARTS for part in range(PARTS)] + [children - 1]
    rows = connection.execute(
        "select extract(epoch from at)::float8 from durable.started where parent = %s and number = any (%s) order by number",
        (parent_id, edges),
    ).fetchall()
    return [later - earlier for (earlier,), (later,) in pairwise(rows)]


def _peak_mb(pid: int) -> float:
    """The most memory that a process has had at once."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0
