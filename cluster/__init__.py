"""Durable, crash-proof workflows on the Postgres you already run.

The contract: at-least-once step execution, exactly-once transactional handoff, idempotent external effects.
"""

from durable_cluster.app import App, Machine
from durable_cluster.client import Handle
from durable_cluster.context import Context, short_id
from durable_cluster.continuation import Continuation
from durable_cluster.errors import (
    AppError,
    BatchLost,
    ChildFailed,
    ConfigurationError,
    ConnectionFailed,
    DatabaseError,
    DurableError,
    EmbeddedError,
    HandlerError,
    InputError,
    NotInstalled,
    ResultTimeout,
    SchemaMismatch,
    StepTimeout,
    TerminalError,
    UnknownWorkflow,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowStuck,
)
from durable_cluster.joins import Child, ChildResult, Results
from durable_cluster.limits import Limit
from durable_cluster.retry import Retry
from durable_cluster.schedule_statements import Schedule
from durable_cluster.search import Listed
from durable_cluster.settings import Settings
from durable_cluster.statements import State

__all__ = [
    "App",
    "AppError",
    "BatchLost",
    "Child",
    "ChildFailed",
    "ChildResult",
    "ConfigurationError",
    "ConnectionFailed",
    "Context",
    "Continuation",
    "DatabaseError",
    "DurableError",
    "EmbeddedError",
    "Handle",
    "HandlerError",
    "InputError",
    "Limit",
    "Listed",
    "Machine",
    "NotInstalled",
    "ResultTimeout",
    "Results",
    "Retry",
    "Schedule",
    "SchemaMismatch",
    "Settings",
    "State",
    "StepTimeout",
    "TerminalError",
    "UnknownWorkflow",
    "WorkflowCancelled",
    "WorkflowFailed",
    "WorkflowStuck",
    "short_id",
]
