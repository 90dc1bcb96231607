"""The OpenAPI document (3.1) of the REST API, made of its operations and the types of what they take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from durable_cluster.ops.console import shapes
from durable_cluster.ops.console.operations import Call
from durable_cluster.ops.console.refusals import PROBLEM, TITLES, Problem

REFERENCE = "#/components/schemas/{name}"
WHOLE_ID = "Workflow-Id"
ABOUT = (
    "Starts workflows, looks at them and acts on them. An address has the first 12 hex digits of an id: addresses end up in logs,"
    " and a whole id is a capability. The header Workflow-Id takes a whole one. Errors are application/problem+json."
)
ALWAYS = (400, 429, 503)
WITH_LOGIN = (401,)
WITH_ID = (404, 409, 422)
WITH_QUERY = (422,)
WITH_BODY = (403, 404, 408, 409, 413, 415, 422)


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What can be asked for. ``asked``: of the query, ``body``: of the body, ``answer``: of what it gives; Structs."""

    method: str
    path: str
    handler: Callable[[Call], Any]
    answer: type
    asked: type | None = None
    body: type | None = None
    makes: bool = False

    @property
    def has_id(self) -> bool:
        """Whether it is about one workflow."""
        return "{id}" in self.path


def document(operations: Sequence[Operation], *, needs_login: bool) -> dict[str, Any]:
    """The document, as plain values. ``needs_login``: whether a token has to be shown."""
    bodies = [one.body for one in operations if one.body is not None]
    types = list(dict.fromkeys([Problem, *bodies, *(one.answer for one in operations)]))
    _, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method.lower()] = _told(one, needs_login=needs_login)
    bearer = {"type": "http", "scheme": "bearer", "description": "DURABLE_CONSOLE_TOKEN, or the viewers' token."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "durable-cluster", "version": version("durable-cluster"), "description": ABOUT},
        "paths": paths,
        "components": {"schemas": components, **({"securitySchemes": {"bearer": bearer}} if needs_login else {})},
        "security": [{"bearer": []}] if needs_login else [],
    }


def _told(one: Operation, *, needs_login: bool) -> dict[str, Any]:
    name = one.handler.__name__.rstrip("_")
    told: dict[str, Any] = {
        "operationId": name,
        "summary": (one.handler.__doc__ or "").strip(),
        "parameters": [*(_id_parameters() if one.has_id else []), *_parameters(one.asked)],
        "responses": {str(status): answer for status, answer in _answers(one, needs_login=needs_login)},
    }
    if one.body is not None:
        is_needed = any(field.required for field in msgspec.structs.fields(one.body))
        told["requestBody"] = {"required": is_needed, "content": {"application/json": {"schema": _reference(one.body)}}}
    return told


def _id_parameters() -> list[dict[str, Any]]:
    whole = "A whole id, where the first digits are not enough, or to be shown values."
    return [
        {"name": "id", "in": "path", "required": True, "schema": msgspec.json.schema(shapes.ShortId)},
        {"name": WHOLE_ID, "in": "header", "description": whole, "schema": msgspec.json.schema(shapes.WholeId)},
    ]


def _parameters(asked: type | None) -> Iterator[dict[str, Any]]:
    for field in () if asked is None else msgspec.structs.fields(asked):
        schema = msgspec.json.schema(field.type)
        given = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
        yield {"name": field.name, "in": "query", "schema": given[0] if len(given) == 1 else {"anyOf": given}}


def _answers(one: Operation, *, needs_login: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    content = {"application/json": {"schema": _reference(one.answer)}}
    yield 200, {"description": "what was asked for", "content": content}
    if one.makes:
        location = {"description": "where it is", "schema": {"type": "string"}}
        yield 201, {"description": "it is new", "content": content, "headers": {"Location": location}}
    statuses = {
        *ALWAYS,
        *(WITH_LOGIN if needs_login else ()),
        *(WITH_ID if one.has_id else ()),
        *(WITH_QUERY if one.asked is not None else ()),
        *(WITH_BODY if one.body is not None else ()),
        403,
    }
    for status in sorted(statuses):
        yield status, {"description": TITLES[status], "content": {PROBLEM: {"schema": _reference(Problem)}}}


def _reference(type_: type) -> dict[str, str]:
    return {"$ref": REFERENCE.format(name=type_.__name__)}
