"""The REST API over HTTP: one table of operations, of which its routes and its OpenAPI document are made.

Addresses have the first 12 digits of an id: they end up in logs, and a whole id is a capability. Whoever holds one may send it as
the header ``Workflow-Id``, which also tells apart what begins alike, and shows the values to whoever else may only look.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import statements
from durable_cluster.errors import UnknownWorkflow
from durable_cluster.ops.console import openapi, operations, shapes
from durable_cluster.ops.console.access import access_of
from durable_cluster.ops.console.openapi import WHOLE_ID, Operation
from durable_cluster.ops.console.operations import Answer, Call
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.security import body_of, visitor_of

WAITERS_MAX = 100
PAUSE_S_MIN = 0.05
PAUSE_S_MAX = 0.5
PAUSE_GROWTH = 1.5
UNKNOWN = "there is no workflow with that id that takes this: it may be unknown, have ended, or want another token"
NO_TEXT = {"integer": "a whole number", "number": "a number"}


ONE = "/api/workflows/{id}"

OPERATIONS: Sequence[Operation] = (
    Operation(
        method="POST",
        path="/api/workflows",
        handler=operations.start,
        body=shapes.Start,
        answer=shapes.Started,
        makes=True,
    ),
    Operation(
        method="GET",
        path="/api/workflows",
        handler=operations.list_,
        asked=shapes.Filters,
        answer=shapes.Workflows,
    ),
    Operation(method="GET", path=ONE, handler=operations.get, asked=shapes.Wait, answer=shapes.Workflow),
    Operation(
        method="GET",
        path=f"{ONE}/history",
        handler=operations.history,
        asked=shapes.HistoryLimit,
        answer=shapes.History,
    ),
    Operation(method="POST", path=f"{ONE}/signal", handler=operations.signal, body=shapes.Signal, answer=shapes.Done),
    Operation(method="POST", path=f"{ONE}/cancel", handler=operations.cancel, body=shapes.Cancel, answer=shapes.Done),
    Operation(method="POST", path=f"{ONE}/retry", handler=operations.retry, body=shapes.Retry, answer=shapes.Done),
    Operation(
        method="POST",
        path=f"{ONE}/replay",
        handler=operations.replay,
        body=shapes.Replay,
        answer=shapes.Started,
        makes=True,
    ),
    Operation(
        method="POST",
        path=f"{ONE}/fork",
        handler=operations.fork,
        body=shapes.Fork,
        answer=shapes.Started,
        makes=True,
    ),
    Operation(method="POST", path=f"{ONE}/pause", handler=operations.pause, body=shapes.Pause, answer=shapes.Done),
    Operation(method="POST", path=f"{ONE}/resume", handler=operations.resume, body=shapes.Pause, answer=shapes.Done),
    Operation(
        method="GET",
        path="/api/dead-letters",
        handler=operations.dead_letters,
        asked=shapes.LetterFilters,
        answer=shapes.Letters,
    ),
)


class Waiters:
    """How many requests wait for an end: each is a question now and then, and no thread."""

    def __init__(self) -> None:
        self._waiting = 0

    async def until_ended(self, request: Request, call: Call) -> None:
        """Return when the workflow has ended or is stuck, when nobody waits any more, or after the time that was asked for.

        At once where too many wait already: whoever asks sees that it still runs, and asks again.
        """
        stop_at = time.monotonic() + call.asked.wait_s
        if self._waiting >= WAITERS_MAX or not call.asked.wait_s:
            return
        self._waiting += 1
        try:
            pause_s = PAUSE_S_MIN
            while not await run_in_threadpool(_has_ended, call) and not await request.is_disconnected():
                left_s = stop_at - time.monotonic()
                if left_s <= 0:
                    return
                await asyncio.sleep(min(pause_s, left_s))
                pause_s = min(pause_s * PAUSE_GROWTH, PAUSE_S_MAX)
        finally:
            self._waiting -= 1


def _has_ended(call: Call) -> bool:
    with call.access.connection() as connection:
        return statements.outcome(connection, call.workflow_id(connection)) is not None


def document(request: Request) -> Response:
    """The API, told to programs."""
    told = openapi.document(OPERATIONS, needs_login=request.app.state.settings.needs_login)
    return _json(told)


def routes() -> list[Route]:
    """A route for each address, so that one that is asked in another way can say in which it may be."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_path.setdefault(operation.path, {})[operation.method] = operation
    made = [Route(path, _endpoint(known), methods=list(known)) for path, known in by_path.items()]
    return [Route("/api/openapi.json", document, methods=["GET"]), *made]


def _endpoint(known: dict[str, Operation]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        operation = known.get("GET" if request.method == "HEAD" else request.method)
        if operation is None:
            raise HTTPException(405, headers={"allow": ", ".join(known)})
        call = _call(request, operation)
        try:
            if isinstance(call.asked, shapes.Wait):
                await request.app.state.waiters.until_ended(request, call)
            given = await run_in_threadpool(operation.handler, call)
        except UnknownWorkflow as error:
            raise Refused(404, UNKNOWN) from error
        said = given if isinstance(given, Answer) else Answer(status=200, value=given)
        return _json(said.value, said.status, said.headers)

    return answer


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A line: terminals are where these are read, too."""
    return Response(msgspec.json.encode(value) + b"\n", status, headers, media_type="application/json")


def _call(request: Request, operation: Operation) -> Call:
    """What was asked for. Raises Refused for what the operation does not know."""
    visitor = visitor_of(request)
    assert visitor is not None  # the gate lets nobody else in
    return Call(
        access=access_of(request),
        visitor=visitor,
        id=_checked_id(request.path_params["id"]) if operation.has_id else "",
        whole_id=_whole_id(request) if operation.has_id else None,
        asked=_asked(request, operation.asked),
        body=None if operation.body is None else _body(request, operation.body),
    )


def _checked_id(text: str) -> str:
    if re.fullmatch("[0-9a-f]{12}", text):
        return text
    raise Refused(
        404 if len(text) < 12 else 422,
        "an address has the first 12 hex digits of an id and not more: it ends up in logs, and a whole id is a capability",
    )


def _whole_id(request: Request) -> str | None:
    given = request.headers.get(WHOLE_ID)
    if given is not None and not re.fullmatch("[0-9a-f]{32}", given):
        raise Refused(422, f"the header {WHOLE_ID} is a whole id: 32 hex digits")
    return given


def _asked(request: Request, type_: type | None) -> Any:
    """The query as a Struct. What is a number there is written as JSON, everything else as it is."""
    known = {} if type_ is None else {field.name: field for field in msgspec.structs.fields(type_)}
    given: dict[str, Any] = {}
    for name in request.query_params:
        texts = request.query_params.getlist(name)
        if name not in known:
            raise Refused(422, f"there is no parameter '{name[:40]}' here; there are {', '.join(known) or 'none'}")
        kind = msgspec.json.schema(known[name].type).get("type")
        if len(texts) > 1 and kind != "array":
            raise Refused(422, f"parameter '{name}' was given {len(texts)} times")
        given[name] = texts if kind == "array" else _number(name, texts[0], kind) if kind in NO_TEXT else texts[0]
    try:
        return None if type_ is None else msgspec.convert(given, type_)
    except msgspec.ValidationError as error:
        raise Refused(422, f"a parameter does not fit: {error}") from error


def _number(name: str, text: str, kind: str) -> Any:
    try:
        return msgspec.json.decode(text.encode(), type=int if kind == "integer" else float)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Refused(422, f"parameter '{name}' is {NO_TEXT[kind]}") from error


def _body(request: Request, type_: type) -> Any:
    """The body as a Struct; none at all is one that says nothing."""
    body = body_of(request) or b"{}"
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and (kind or body_of(request)):
        raise Refused(415, "a body is JSON: send it as application/json")
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        raise Refused(422, f"the body does not fit: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
