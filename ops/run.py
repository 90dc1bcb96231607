"""``run``: start workflows and, if asked, wait for their results. The one command that prints whole ids."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from durable_cluster import schema
from durable_cluster.client import Handle
from durable_cluster.context import short_id
from durable_cluster.errors import DurableError, ResultTimeout, WorkflowCancelled, WorkflowFailed, WorkflowStuck
from durable_cluster.machine import Machine
from durable_cluster.notes import Scalar
from durable_cluster.ops.start import EXAMPLES, loaded
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import BadUsage, Terminal, pretty
from durable_cluster.settings import checked_name

START_MANY = 1_000
INPUT_BYTES_MAX = 64 << 20


class Started(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A started workflow, and its end if that was waited for."""

    id: str
    workflow: str
    status: str = "running"
    result: Any = None
    error: str | None = None


def run(
    terminal: Terminal,
    target: Target,
    *,
    workflow: str,
    text: str,
    count: int,
    key: str | None,
    attributes: dict[str, Scalar] | None,
    app_address: str | None,
    is_waiting: bool,
    timeout_s: float | None,
) -> int:
    """Start ``count`` workflows with one input; the ids, and the results if they are waited for."""
    if key is not None and count > 1:
        raise BadUsage(f"--key names one workflow, --count {count} are more; leave one of the two out")
    value = parsed(text)
    app = loaded(EXAMPLES if app_address is None else app_address)
    machine = app.named(checked_name("workflow", workflow))
    with target.opened(app=app):
        try:
            schema.demand_installed(app.client.connection())
            handles = _started(terminal, machine, value, count=count, key=key, attributes=attributes)
            terminal.say(handle.id for handle in handles)
            ended = _awaited(terminal, handles, timeout_s) if is_waiting else [_running(one) for one in handles]
        finally:
            app.close()
    return _answered(terminal, ended, is_single=count == 1)


def parsed(text: str, *, option: str = "--input") -> Any:
    """The JSON of ``option``, or of the file that ``@file`` names (``@-``: standard input). Raises BadUsage."""
    source = option
    if text.startswith("@"):
        source = f"{option} {text}"
        text = _read(text[1:], option)
    try:
        return msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadUsage(
            f"{source} is not JSON: {error}; quote it for the shell, as in {option} '{{\"name\": 1}}', or use @file"
        ) from error


def _read(name: str, option: str) -> str:
    try:
        raw = sys.stdin.buffer.read(INPUT_BYTES_MAX) if name == "-" else Path(name).read_bytes()
        return raw.decode()
    except OSError as error:
        raise BadUsage(f"{option} @{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadUsage(f"{option} @{name} is not UTF-8: {error}") from error


def _started(
    terminal: Terminal,
    machine: Machine,
    value: Any,
    *,
    count: int,
    key: str | None,
    attributes: dict[str, Scalar] | None,
) -> list[Handle]:
    if count == 1:
        return [machine.start(value, key=key, attributes=attributes)]
    handles: list[Handle] = []
    with terminal.progress("started", count) as progress:
        while len(handles) < count:
            some = machine.start_many([value] * min(START_MANY, count - len(handles)), attributes=attributes)
            handles += some
            progress.advance(len(some))
    return handles


def _awaited(terminal: Terminal, handles: list[Handle], timeout_s: float | None) -> list[Started]:
    """Every workflow with its end, or with what kept it from ending before the timeout that all share."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    ended = []
    with terminal.progress("ended", len(handles)) as progress:
        for handle in handles:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended.append(_ended(handle, left))
            progress.advance()
    return ended


def _ended(handle: Handle, timeout_s: float | None) -> Started:
    started = _running(handle)
    try:
        result = handle.result(timeout=timeout_s)
    except WorkflowCancelled as error:
        return msgspec.structs.replace(started, status="cancelled", error=str(error))
    except WorkflowFailed as error:
        return msgspec.structs.replace(started, status="failed", error=str(error))
    except WorkflowStuck as error:
        return msgspec.structs.replace(started, status="stuck", error=str(error))
    except ResultTimeout:
        what = f"workflow {short_id(handle.id)} did not end in time; it goes on: see 'durable-cluster show {short_id(handle.id)}'"
        return msgspec.structs.replace(started, error=what)
    return msgspec.structs.replace(started, status="completed", result=result)


def _running(handle: Handle) -> Started:
    return Started(id=handle.id, workflow=handle.workflow)


def _answered(terminal: Terminal, ended: list[Started], *, is_single: bool) -> int:
    is_shown = is_single and ended[0].status == "completed"
    terminal.answer(ended[0] if is_single else ended, [pretty(ended[0].result)] if is_shown else [])
    errors = [one.error for one in ended if one.error is not None]
    if errors:
        many = "" if is_single else f"{len(errors):,} of {len(ended):,} did not complete; the first: "
        raise DurableError(f"{many}{errors[0]}")
    return 0
