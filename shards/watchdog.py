"""A thread beside a consumer: sees which step runs, says that the process lives while a long one does, ends it when one hangs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from durable_cluster.beside import Run
from durable_cluster.consumer import Consumer
from durable_cluster.context import short_id
from durable_cluster.executor import Task
from durable_cluster.shards.endings import EXIT_HUNG

logger = logging.getLogger("durable_cluster.watchdog")

LOOK_S = 0.5
LOOK_S_MAX = 2.0


class Watchdog(threading.Thread):
    """Looks at which step runs in the consumer's own thread. Python cannot interrupt that one: its process ends with it."""

    def __init__(self, consumer: Consumer, *, grace_s: float, on_look: Callable[[], None]) -> None:
        super().__init__(name="durable-watchdog", daemon=True)
        self._consumer = consumer
        self._grace_s = grace_s
        self._on_look = on_look

    def run(self) -> None:
        """Look twice a second, for as long as the process lives."""
        seen: Task | None = None
        lasted, looked_at = 0.0, time.monotonic()
        while True:
            time.sleep(LOOK_S)
            now = time.monotonic()
            # Time through which this process did not live, because somebody had stopped it, is no hang.
            passed, looked_at = min(now - looked_at, LOOK_S_MAX), now
            task = self._consumer.inline
            self._consumer.meters.look(task)
            if task is not None:
                self._on_look()
            if task is None or task is not seen:
                seen, lasted = task, 0.0
                continue
            lasted += passed
            if lasted > task.step.timeout_s + self._grace_s:
                end_process(task)


def end_hanging(run: Run) -> NoReturn:
    """The last resort against a step beside the pages that did not let itself be interrupted."""
    end_process(run.task)


def end_process(task: Task) -> NoReturn:
    """End this process, because this step hangs; says so first."""
    envelope = task.envelope
    logger.error(
        "step '%s' of '%s' %s… hangs beyond its timeout of %g s: the process ends with it and is started again",
        envelope.step,
        envelope.workflow,
        short_id(envelope.workflow_id),
        task.step.timeout_s,
    )
    logging.shutdown()
    os._exit(EXIT_HUNG)
