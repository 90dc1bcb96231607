"""Write every dashboard's JSON file beside this one."""

from __future__ import annotations

from pathlib import Path

from durable_cluster.ops.dashboards import cluster, reliability, shard, workflow
from durable_cluster.ops.dashboards.panels import json_of

BOARDS = {
    "cluster.json": cluster.BOARD,
    "shard.json": shard.BOARD,
    "workflow.json": workflow.BOARD,
    "reliability.json": reliability.BOARD,
}


def main() -> None:
    """Write them."""
    for name, board in BOARDS.items():
        Path(__file__).with_name(name).write_text(json_of(board), "utf-8")


if __name__ == "__main__":
    main()
