"""What one host's cluster tells monitors: the sums of its processes' counts, the processes themselves, the database's figures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from durable_cluster import metric_export, metrics
from durable_cluster.figures import Reader
from durable_cluster.shards import metrics_page
from durable_cluster.shards.metrics_page import Address
from durable_cluster.shards.place import Place
from durable_cluster.shards.process import resident_bytes
from durable_cluster.shards.supervisor import Supervisor

SUPERVISOR = "supervisor"


class Monitor:
    """Says how the cluster of ``supervisor`` is. Any thread may ask."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._reader = Reader(supervisor.config.dsn)

    def families(self) -> metrics.Families:
        """Every metric, now."""
        places, shards = self._supervisor.places, self._supervisor.config.shards
        told = [place.told for place in places]
        found = metrics.Families()
        metrics.put_build(found)
        metrics.put_totals(found, [totals for one in told for totals in (one.gone, one.totals)], shards)
        metrics.put_detached(found, [one.now.detached for one in told], shards)
        metrics.put_step_cpu(found, [one.step_cpu_s for one in told])
        found.put("durable_spans_dropped_total", sum(one.spans_dropped for one in told))
        for place in places:
            _put_process(found, place)
        found.put("durable_processes", 1, SUPERVISOR)
        found.put("durable_processes_expected", 1, SUPERVISOR)
        found.put("durable_process_memory_bytes", resident_bytes(os.getpid()), SUPERVISOR, "")
        found.put("durable_process_cpu_seconds_total", time.process_time(), SUPERVISOR, "")
        metrics.put_database(found, self._reader.latest())
        return found


def _put_process(found: metrics.Families, place: Place) -> None:
    shard = "" if place.shard is None else place.shard
    pid = place.pid
    found.put("durable_processes", place.is_up, place.role)
    found.put("durable_processes_expected", 1, place.role)
    found.put("durable_process_restarts_total", place.restarts, place.role, shard)
    found.put("durable_process_cpu_seconds_total", place.told.cpu_s, place.role, shard)
    if pid is not None:
        found.put("durable_process_memory_bytes", resident_bytes(pid), place.role, shard)


@contextmanager
def monitored(supervisor: Supervisor, page: Address | None) -> Iterator[metrics_page.Page | None]:
    """Inside, the metrics page is served at that address, if one is given, and metrics are sent where the environment says.

    Raises ConfigurationError.
    """
    monitor = Monitor(supervisor)
    with ExitStack() as stack:
        served = None
        if page is not None:
            serving = metrics_page.served(page, families=monitor.families, unread=lambda: supervisor.unread)
            served = stack.enter_context(serving)
        stack.enter_context(metric_export.exported(monitor.families, role=SUPERVISOR))
        yield served
