"""Exceptions of steps as a linear workflow's memo records them, and as its lines see them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec

from durable_cluster.envelope import encode
from durable_cluster.errors import StepFailed, StepTimeout
from durable_cluster.memo import Failure
from durable_cluster.retry import full_name

if TYPE_CHECKING:
    from durable_cluster.executor import Task


def timed_out(step: str, timeout_s: float) -> StepTimeout:
    """The error of a step that ran too long."""
    return StepTimeout(f"step '{step}' did not end within its timeout of {timeout_s:g} s")


def told_of(task: Task, error: BaseException) -> BaseException:
    """``error`` with words: the interruption of a thread that ran too long comes without."""
    is_wordless = type(error) is StepTimeout and not error.args
    return timed_out(task.step.name, task.step.timeout_s) if is_wordless else error


def is_in(error: BaseException, among: BaseException) -> bool:
    """Whether it is this one, or of this group."""
    if isinstance(among, BaseExceptionGroup):
        return any(is_in(error, one) for one in among.exceptions)
    return error is among


def failure_of(error: BaseException) -> Failure:
    """What is recorded of an exception; its arguments, where they are JSON."""
    args: tuple[Any, ...] = ()
    try:
        args = tuple(msgspec.json.decode(encode(list(error.args))))
        message = str(error)
    except Exception:
        message = f"{type(error).__name__} (it cannot be printed)" if not args else str(args)
    return Failure(full_name(type(error)), message, args)


def rebuilt(failure: Failure) -> Exception:
    """The exception as its class makes it from what was recorded, where this process has imported the class; else StepFailed."""
    kind = _class_of(failure.kind)
    if kind is not None:
        try:
            error = kind(*failure.args)
            if str(error) == failure.message:
                return error
        except Exception:
            pass  # its class wants something else: the general one tells as much
    return StepFailed(failure.kind, failure.message)


def _class_of(full_name: str) -> type[Exception] | None:
    parts = full_name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is None:
            continue
        found: Any = module
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found if isinstance(found, type) and issubclass(found, Exception) else None
    return None
