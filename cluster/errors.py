"""The one tree of errors, and the one place where SQLSTATEs become exceptions.

DurableError
├── ConfigurationError        a setting, a name or an option that cannot be
│   └── AppError              the app module, a machine, a step or a handler's signature
├── InputError                a value that does not fit its type or its limit (``path`` says where)
├── CodecError                a payload that the App's codec cannot make, or that no codec here can read
│   └── Unreadable            … the state or the signal of a step event: the step waits for a process that can read it
├── UnknownWorkflow           no workflow with that id or key, or none that this code knows
├── InvalidState              the workflow is in no state in which that can be done; the message says what to do first
├── DatabaseError             the database cannot be used as it is
│   ├── NotInstalled          the schema is not there
│   ├── SchemaMismatch        another schema version, or another number of shards
│   ├── ConnectionFailed      the DSN refuses
│   └── EmbeddedError         the local Postgres
├── BatchLost                 the page belongs to somebody else now: roll back, forget
├── HandlerError              a step returned something that is no continuation
├── NonDeterminismError       a linear workflow's code no longer asks for what is recorded of it
├── StepFailed                what a linear workflow sees of a step that failed for good, where its own exception cannot be made
├── StepTimeout               a step did not end within its timeout
├── TerminalError             what a step raises to end its workflow: no retry, no dead letter
├── WorkflowFailed            what ``result()`` raises for a failed workflow
│   └── WorkflowCancelled     … for one that was cancelled
├── WorkflowStuck             what ``result()`` raises for a workflow with a dead letter; a retry takes it up again
└── ResultTimeout             ``result(timeout=…)`` ran out; the workflow goes on
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg


class DurableError(Exception):
    """The root of every error this package raises on purpose."""


class ConfigurationError(DurableError):
    """A setting, a name or an option that cannot be."""


class AppError(ConfigurationError):
    """The app module, a machine, a step or a handler's signature is wrong."""


class InputError(DurableError):
    """A value does not fit its type or its limit."""


class CodecError(DurableError):
    """A payload that the App's codec cannot make, or that no codec here can read. A codec's own may say more."""


class Unreadable(CodecError):
    """The state of a step event, or the signal that it brings."""


class UnknownWorkflow(DurableError):
    """No workflow with that id or key. Unknown, expired and not-yours read the same."""


class InvalidState(DurableError):
    """The workflow is in no state in which that can be done; the message says what to do first."""


class DatabaseError(DurableError):
    """The database cannot be used as it is."""


class NotInstalled(DatabaseError):
    """The durable schema is not in this database."""


class SchemaMismatch(DatabaseError):
    """The database holds another schema version, or is laid out for another number of shards."""


class ConnectionFailed(DatabaseError):
    """The server refused, or is not there."""


class EmbeddedError(DatabaseError):
    """The local Postgres could not be started, attached or stopped."""


class BatchLost(DurableError):
    """The page belongs to somebody else now: roll back and forget it."""


class HandlerError(DurableError):
    """A step returned something that is not a continuation."""


class NonDeterminismError(DurableError):
    """A linear workflow's code asks for something else than what is recorded. It is stuck until the code fits, and then retried."""


class StepFailed(DurableError):
    """A step failed for good with an exception of the class ``kind`` (its full name), which this process cannot make again."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class StepTimeout(DurableError, TimeoutError):
    """A step did not end within its timeout."""


class TerminalError(DurableError):
    """What a step raises to end its workflow as failed, for ``reason``: it is not tried again and leaves no dead letter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class WorkflowFailed(DurableError):
    """The workflow ended in failure; ``reason`` is what the step said."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChildFailed(DurableError):
    """A child has no output: it failed, was cancelled, or has not ended."""


class WorkflowCancelled(WorkflowFailed):
    """The workflow was cancelled; ``reason`` is why."""


class WorkflowStuck(DurableError):
    """The workflow has not ended: its step cannot go on by itself. ``reason`` is what the step said; a retry takes it up again."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ResultTimeout(DurableError, TimeoutError):
    """``result(timeout=…)`` ran out; the workflow goes on."""


NOT_RETRIED = (HandlerError, ConfigurationError, InputError, NonDeterminismError)
"""Mistakes in the code: another attempt would fail the same way; a dead letter waits for a better version."""

STEP_FAILURES = (Exception, SystemExit)
"""What a function of a user's may raise that is a failure of its own."""

BY_SQLSTATE: dict[str, type[DurableError]] = {
    "DC001": BatchLost,
    "DC002": InputError,
    "DC003": UnknownWorkflow,
    "DC004": ConfigurationError,
    "DC005": SchemaMismatch,
    "DC006": InvalidState,
    "3F000": NotInstalled,  # invalid_schema_name
    "42P01": NotInstalled,  # undefined_table
    "42883": NotInstalled,  # undefined_function
}


@contextmanager
def translated() -> Iterator[None]:
    """Turn what Postgres raised inside our own statements into this tree; everything else passes."""
    try:
        yield
    except psycopg.Error as error:
        known = BY_SQLSTATE.get(error.sqlstate or "")
        if known is None:
            raise
        message = error.diag.message_primary or str(error)
        if known is NotInstalled:
            message = f"the database lacks the durable schema ({message}); run 'durable-cluster init' on it first"
        raise known(message) from error
