"""Durable, crash-proof workflows on the Postgres you already run.

The contract: at-least-once step execution, exactly-once transactional handoff, idempotent external effects.
"""

from durable_cluster.app import App
from durable_cluster.awaits import (
    Running,
    Turn,
    at_least,
    compensation,
    continue_as_new,
    current,
    first,
    gather,
    loop,
    now,
    patched,
    random,
    scope,
    select,
    set_attributes,
    set_progress,
    side_effect,
    sleep,
    uuid4,
    wait_for,
)
from durable_cluster.client import Handle
from durable_cluster.codec import Codec, Where
from durable_cluster.context import Context, short_id
from durable_cluster.continuation import Continuation
from durable_cluster.errors import (
    AppError,
    BatchLost,
    ChildFailed,
    CodecError,
    ConfigurationError,
    ConnectionFailed,
    DatabaseError,
    DurableError,
    EmbeddedError,
    HandlerError,
    InputError,
    InvalidState,
    NonDeterminismError,
    NotInstalled,
    ResultTimeout,
    SchemaMismatch,
    StepFailed,
    StepTimeout,
    TerminalError,
    UnknownWorkflow,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowStuck,
)
from durable_cluster.functions import StepFunction
from durable_cluster.handles import ChildHandle, WorkflowHandle
from durable_cluster.joins import Child, ChildResult, Results
from durable_cluster.limits import Limit
from durable_cluster.linear import Workflow
from durable_cluster.machine import Machine
from durable_cluster.replays import Recorded
from durable_cluster.retry import Retry
from durable_cluster.schedule_statements import Schedule
from durable_cluster.search import Listed
from durable_cluster.settings import Settings
from durable_cluster.signals import Signal
from durable_cluster.statements import State
from durable_cluster.timeline_statements import Moment, Timeline

__all__ = [
    "App",
    "AppError",
    "BatchLost",
    "Child",
    "ChildFailed",
    "ChildHandle",
    "ChildResult",
    "Codec",
    "CodecError",
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
    "InvalidState",
    "Limit",
    "Listed",
    "Machine",
    "Moment",
    "NonDeterminismError",
    "NotInstalled",
    "Recorded",
    "ResultTimeout",
    "Results",
    "Retry",
    "Running",
    "Schedule",
    "SchemaMismatch",
    "Settings",
    "Signal",
    "State",
    "StepFailed",
    "StepFunction",
    "StepTimeout",
    "TerminalError",
    "Timeline",
    "Turn",
    "UnknownWorkflow",
    "Where",
    "Workflow",
    "WorkflowCancelled",
    "WorkflowFailed",
    "WorkflowHandle",
    "WorkflowStuck",
    "at_least",
    "compensation",
    "continue_as_new",
    "current",
    "first",
    "gather",
    "loop",
    "now",
    "patched",
    "random",
    "scope",
    "select",
    "set_attributes",
    "set_progress",
    "short_id",
    "side_effect",
    "sleep",
    "uuid4",
    "wait_for",
]
