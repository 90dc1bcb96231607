"""What somebody must do now and then: partitions ahead, rotation, names of the dead.

There is no leader: every host runs this. What is due is found by a read; it is done under a try-lock of the transaction and is
idempotent, so two hosts at once do it once.
"""

from __future__ import annotations

import logging
from typing import Any

import psycopg
from psycopg.errors import LockNotAvailable

from durable_cluster import statements

logger = logging.getLogger("durable_cluster.maintenance")


def run_once(connection: psycopg.Connection[Any]) -> None:
    """Do what is due. A lock that somebody holds is no error: the next round tries again."""
    for is_due, act in (
        (statements.needs_partitions, statements.add_partitions),
        (statements.needs_upkeep, statements.keep_up),
        (statements.has_dead_members, statements.sweep_members),
    ):
        try:
            if is_due(connection):
                logger.info("%s: %s", act.__name__, act(connection))
        except LockNotAvailable:
            logger.info("%s: somebody holds the lock; next round", act.__name__)
