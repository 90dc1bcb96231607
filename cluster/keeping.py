"""What is kept of a linear workflow's memo when it has ended, for whoever reads its history or forks it: all, or nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster.chunks import Chunks
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import DurableError
from durable_cluster.failures import failure_of
from durable_cluster.memo import carried_decoder, failed, with_entries

if TYPE_CHECKING:
    from durable_cluster.execution import Execution
    from durable_cluster.linear import Workflow


def kept_of(execution: Execution) -> bytes:
    """What it has behind it; nothing if that is coded, or more than a payload may have. Raises HandlerError, Unreadable."""
    payloads = execution.workflow.app.payloads
    if payloads.codec is not None or execution.recorded.size > payloads.bytes_max:
        return b""
    memo = execution.history()
    return memo if len(memo) <= payloads.bytes_max else b""


def kept_with_failure(workflow: Workflow[Any, Any], envelope: Envelope, error: BaseException) -> bytes:
    """What this step event carries, and the await that it is the answer of as failed; nothing where that cannot be read."""
    payloads = workflow.app.payloads
    if payloads.codec is not None:
        return b""
    try:
        carried = carried_decoder.decode(workflow.cleanup_state(envelope))
        if carried.chain is not None and carried.chain.size > payloads.bytes_max:
            return b""
        whole = Chunks(workflow.app, workflow.name, envelope.workflow_id).whole(carried)
    except (msgspec.DecodeError, DurableError, psycopg.Error):
        return b""  # somebody put the line into the log by hand, or what it refers to cannot be had now
    if whole.asked is not None:
        whole = with_entries(whole, [failed(whole.asked.key, failure_of(error))])
    memo = encode(whole)
    return memo if len(memo) <= payloads.bytes_max else b""
