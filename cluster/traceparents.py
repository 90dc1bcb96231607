"""In whose span a workflow was started: a W3C traceparent, given or that of the current span; imports no OpenTelemetry."""

from __future__ import annotations

import re
import sys

from durable_cluster.errors import InputError

TRACEPARENT = re.compile(
    "(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    "(?P<more>-.*)?"
)


def traceparent_of(given: str | None) -> str | None:
    """A traceparent that the database takes: the one that is given, else that of the current span; None without one.

    What is given and is none is ignored, as its standard demands of whoever gets such a header. Raises InputError for no text.
    """
    if given is None:
        return current()
    if not isinstance(given, str):
        raise InputError(
            f"traceparent: {type(given).__name__} is no text; pass what the header says: 00-<trace>-<span>-01"
        )
    ids = ids_of(given)
    return None if ids is None else written(*ids)


def ids_of(traceparent: str) -> tuple[int, int, int] | None:
    """Trace id, span id and flags; None for what is no traceparent. Later versions than 00 may say more, which is passed over."""
    found = TRACEPARENT.fullmatch(traceparent)
    if found is None or (found["more"] and found["version"] == "00"):
        return None
    return int(found["trace"], 16), int(found["span"], 16), int(found["flags"], 16)


def written(trace_id: int, span_id: int, flags: int) -> str:
    """As text of version 00."""
    return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"


def current() -> str | None:
    """That of the span that is current here, if this program uses OpenTelemetry and there is one."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    span = trace.get_current_span().get_span_context()
    return written(span.trace_id, span.span_id, span.trace_flags) if span.is_valid else None
