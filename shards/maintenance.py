"""What somebody must do now and then: partitions ahead, rotation, names of the dead, days whose retention is over.

There is no leader: every host runs this. What is due is found by a read; it is done under a try-lock of the transaction and is
idempotent, so two hosts at once do it once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from psycopg.errors import DeadlockDetected, LockNotAvailable

from durable_cluster.settings import Settings
from durable_cluster.shards import upkeep

logger = logging.getLogger("durable_cluster.maintenance")

Connection = psycopg.Connection[Any]


def duties(settings: Settings) -> list[tuple[str, Callable[[Connection], bool], Callable[[Connection], int]]]:
    """What each is called, the read that finds it due, and the call that does it."""
    days, lag_s = settings.retention_days, settings.history_lag_max_s
    return [
        ("partitions", upkeep.needs_partitions, upkeep.add_partitions),
        (
            "late timelines",
            partial(upkeep.is_timeline_late, lag_s=lag_s),
            partial(upkeep.skip_timelines, lag_s=lag_s),
        ),
        ("rotation", upkeep.needs_upkeep, partial(upkeep.keep_up, lag_s=lag_s)),
        ("timers", upkeep.needs_timer_rotation, upkeep.rotate_timers),
        ("chunks", upkeep.needs_spill_rotation, upkeep.rotate_spill),
        ("members", upkeep.has_dead_members, upkeep.sweep_members),
        ("cancels", upkeep.has_ended_cancels, upkeep.sweep_cancels),
        ("limits", upkeep.has_unused_limits, upkeep.sweep_limits),
        (
            "audit",
            partial(upkeep.needs_audit_upkeep, days=settings.audit_days),
            partial(upkeep.keep_audit, days=settings.audit_days),
        ),
        (
            "timeline",
            partial(upkeep.needs_timeline_upkeep, days=days),
            partial(upkeep.keep_timeline, days=days),
        ),
        ("retention", partial(upkeep.needs_expiry, days=days), partial(upkeep.expire, days=days)),
    ]


def run_once(
    connection: Connection,
    settings: Settings | None = None,
    *,
    between: Callable[[Connection], object] = lambda connection: None,
) -> None:
    """Do what is due, and ``between`` two duties what cannot wait.

    A lock that somebody holds is no error: the next round tries again.
    """
    for name, is_due, act in duties(settings or Settings()):
        between(connection)
        try:
            if is_due(connection):
                logger.info("%s: %s", name, act(connection))
        except (LockNotAvailable, DeadlockDetected):
            logger.info("%s: somebody holds the lock; next round", name)
