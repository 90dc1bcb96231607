"""Loggers that say which workflow speaks, by its truncated id, and are silent where it only repeats itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any


class WorkflowLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger of ``durable_cluster.workflow.<name>``; each record begins with the id's first digits.

    It has them as ``workflow_id``, besides ``workflow``, ``step`` and ``attempt``.
    """

    def __init__(
        self,
        workflow: str,
        short_id: str,
        *,
        step: str | None = None,
        attempt: int = 1,
        is_silent: Callable[[], bool] = lambda: False,
    ) -> None:
        said = {"workflow": workflow, "workflow_id": short_id, "step": step, "attempt": attempt}
        super().__init__(logging.getLogger(f"durable_cluster.workflow.{workflow}"), said)
        self._is_silent = is_silent

    def isEnabledFor(self, level: int) -> bool:
        """Whether a record of this level is written now."""
        return not self._is_silent() and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The message with whose it is; the caller's ``extra`` goes along."""
        said = self.extra or {}
        step = "" if said["step"] is None else f" {said['step']}"
        return f"{said['workflow_id']}…{step}: {msg}", {**kwargs, "extra": {**said, **kwargs.get("extra", {})}}
