"""Steps that no code here knows: they wait in timers, a minute at a time, for a process that does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import psycopg

from durable_cluster import executor, side_statements
from durable_cluster.envelope import NOT_AN_ENVELOPE, decode_line
from durable_cluster.executor import Task
from durable_cluster.machine import Machine

AT_ONCE_MAX = 1_000


def left(
    connection: psycopg.Connection[Any], machines: Mapping[str, Machine], within_s: float, *, limit_s: float
) -> Counter[str] | None:
    """How many of them are due in so many seconds, by workflow; None if anything else is, which is then worth waiting for.

    ``limit_s``: for so long a step waits for code; one that nearly has will be a dead letter soon: that is something else.
    """
    found: Counter[str] = Counter()
    after, at_once = None, 1  # most often the first one is something else
    while timers := side_statements.timers_due(connection, within_s, after=after, limit=at_once):
        for *_, line in timers:
            workflow = _unknown(line, machines, limit_s - within_s)
            if workflow is None:
                return None
            found[workflow] += 1
        after, at_once = timers[-1][:2], min(AT_ONCE_MAX, at_once * 10)
    return found


def _unknown(line: str | None, machines: Mapping[str, Machine], waited_s_max: float) -> str | None:
    """The workflow of a step that was put off and is unknown here too; None for any other timer."""
    try:
        envelope = None if line is None else decode_line(line)
    except NOT_AN_ENVELOPE:
        return None
    if envelope is None or not envelope.unrouted or executor.waited_s(envelope.unrouted) >= waited_s_max:
        return None
    is_known = isinstance(executor.resolve(machines, envelope, limit_s=math.inf), Task)
    return None if is_known else envelope.workflow
