"""What a cluster's processes write to standard error, whoever logs it: lines as ever, in colours for a terminal, or JSON.

Records of a step say whose it is (see docs/telemetry.md for the fields). What a program has set up in ``logging`` by itself stays.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from durable_cluster import traceparents
from durable_cluster.context import short_id
from durable_cluster.dead_letters import without_id
from durable_cluster.running import RUNNING, Running
from durable_cluster.settings import environment

if TYPE_CHECKING:
    from durable_cluster.executor import Task

PLAIN = "%(asctime)s %(processName)s %(levelname)s %(message)s"
STEP_FIELDS = ("workflow", "workflow_id", "step", "attempt", "trace_id", "span_id")
OF_ANY_RECORD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
OURS, OF_WORKFLOWS = "durable_cluster.", "durable_cluster.workflow."


def chosen(asked: str | None) -> str:
    """The format: what is asked for, else ``DURABLE_LOG_FORMAT``, else pretty on a terminal and plain elsewhere."""
    return asked or environment().log_format or ("pretty" if sys.stderr.isatty() else "plain")


def configure(level: str, form: str) -> Output | None:
    """Give the root logger its handler, unless it has one: then that stays, and None is the answer."""
    root = logging.getLogger()
    if root.handlers:
        return None
    output = Output()
    output.setFormatter(logging.Formatter(PLAIN) if form == "plain" else _structured(form))
    root.addHandler(output)
    root.setLevel(level)
    return output


class Output(logging.StreamHandler[Any]):
    """Standard error, for records that say whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self._inline: Callable[[], Task | None] = lambda: None
        self._inline_thread: int | None = None

    def follow(self, inline: Callable[[], Task | None]) -> None:
        """From now on ``inline`` says which step runs in the thread that calls this, where nobody else says it."""
        self._inline, self._inline_thread = inline, threading.get_ident()

    def format(self, record: logging.LogRecord) -> str:
        """The record with what its step is, and without the whole id of that step's workflow."""
        running = RUNNING.get() or self._running_inline(record.name)
        if running is None:
            return super().format(record)
        for name, value in _fields(running).items():
            record.__dict__.setdefault(name, value)
        return without_id(super().format(record), running.envelope)

    def _running_inline(self, logger: str) -> Running | None:
        """What the thread of the pages runs. Our own records there may be of another step already; they say of which."""
        is_ours = logger.startswith(OURS) and not logger.startswith(OF_WORKFLOWS)
        if is_ours or threading.get_ident() != self._inline_thread or (task := self._inline()) is None:
            return None
        step, attempt = task.step.name, task.envelope.attempt
        if task.machine.is_linear:  # one event may run several steps, and between them lines of the workflow's own
            step, attempt = task.machine.runs_now or ("", attempt)
        return Running(task.envelope, step, attempt)


def _fields(running: Running) -> dict[str, Any]:
    envelope = running.envelope
    fields: dict[str, Any] = {"workflow": envelope.workflow, "workflow_id": short_id(envelope.workflow_id)}
    if running.step:
        fields |= {"step": running.step, "attempt": running.attempt}
    traceparent = traceparents.current()
    ids = None if traceparent is None else traceparents.ids_of(traceparent)
    if ids is not None and ids[2] & 1:
        fields |= {"trace_id": f"{ids[0]:032x}", "span_id": f"{ids[1]:016x}"}
    return fields


def _structured(form: str) -> logging.Formatter:
    """By structlog, which is imported only where it is asked for; what is logged through it by the user may come here too."""
    import structlog

    stdlib, processors, dev = structlog.stdlib, structlog.processors, structlog.dev
    if form == "json":
        rendering: list[Any] = [processors.format_exc_info, processors.JSONRenderer(serializer=_json)]
    else:
        # The usual traceback: one that shows variables would show payloads.
        renderer = dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=dev.plain_traceback)
        rendering = [renderer]
    return stdlib.ProcessorFormatter(
        foreign_pre_chain=[_with_extra],
        processors=[_with_fields, stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )


def _json(event: object, **how: Any) -> str:
    """As one line; half a character, as a broken text may end with, is none of JSON's."""
    return json.dumps(event, ensure_ascii=False, **how).encode("utf-8", "replace").decode()


def _with_extra(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog's: what its caller gave a record as ``extra``."""
    for name, value in event["_record"].__dict__.items():
        if name not in OF_ANY_RECORD:
            event.setdefault(name, value)
    return event


def _with_fields(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog's: the fields that every record has, and those of its step."""
    record: logging.LogRecord = event["_record"]
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    event.update(timestamp=at.replace("+00:00", "Z"), level=record.levelname.lower())
    event.update(logger=record.name, process=record.processName)
    for name in STEP_FIELDS:
        value = event.pop(name, getattr(record, name, None))
        if value is not None:
            event[name] = value
    if record.name.startswith(OF_WORKFLOWS):  # what a plain line says ahead is in fields here
        ahead = f"{event.get('workflow_id')}…" + (f" {event['step']}" if "step" in event else "")
        event["event"] = str(event["event"]).removeprefix(f"{ahead}: ")
    return event
