"""What ``result()`` says of a workflow that has ended, or is stuck."""

from __future__ import annotations

from typing import Any

from durable_cluster.context import short_id
from durable_cluster.errors import WorkflowCancelled, WorkflowFailed, WorkflowStuck


def answer_of(workflow: str, workflow_id: str, status: str, value: Any) -> Any:
    """The output of one that is completed. Raises WorkflowFailed, WorkflowCancelled, WorkflowStuck with what is said of it."""
    if status == "completed":
        return value
    reason, step = value.get("reason", "unknown"), value.get("step", "?")
    short = short_id(workflow_id)
    if status == "stuck":
        raise WorkflowStuck(_stuck(workflow, short, reason, step, value.get("attempt", 1)), reason=reason)
    if status == "cancelled":
        raise WorkflowCancelled(
            f"workflow {short}… ('{workflow}') was cancelled before step '{step}': {reason}", reason=reason
        )
    raise WorkflowFailed(f"workflow {short}… ('{workflow}') failed in step '{step}': {reason}", reason=reason)


def _stuck(workflow: str, short: str, reason: str, step: str, attempts: int) -> str:
    return (
        f"workflow {short}… ('{workflow}') is stuck in step '{step}' after {attempts}"
        f" {'attempt' if attempts == 1 else 'attempts'}: {reason}; see 'durable-cluster dead-letters show {short}', retry it"
        f" with 'durable-cluster dead-letters retry {short}'"
    )
