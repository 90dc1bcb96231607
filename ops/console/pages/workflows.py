"""The list of workflows: what is asked for in the address, found newest first, a page at a time."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from urllib.parse import urlencode

import msgspec
import psycopg
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from durable_cluster import search
from durable_cluster.context import short_id
from durable_cluster.errors import DurableError
from durable_cluster.notes import Scalar
from durable_cluster.ops import looks, lookups
from durable_cluster.ops.console.access import access_of
from durable_cluster.ops.console.asked import asked, moment
from durable_cluster.ops.console.redaction import redacted
from durable_cluster.ops.console.refusals import Refusal, Refused, refusal_of
from durable_cluster.ops.console.views import render
from durable_cluster.ops.looks import Known
from durable_cluster.ops.show import ambiguous, checked_prefix
from durable_cluster.ops.values import attribute
from durable_cluster.search import STATUSES, Listed, Which

ROWS = 50
ATTRIBUTES_MAX = 8
NAMES = ("workflow", "status", "key", "parent", "origin", "from", "to")
IDS = ("parent", "origin")


class Typed(msgspec.Struct, frozen=True):
    """What somebody typed into the form, as they did: shown again, whether it can be meant or not."""

    id: str
    values: Mapping[str, str]
    attributes: list[str]

    @property
    def is_narrowed(self) -> bool:
        """Whether anything but everything is asked for."""
        return bool(self.values or self.attributes)

    def address(self, **more: str | None) -> str:
        """The list of this, with ``more``."""
        pairs = [*self.values.items(), *(("attribute", one) for one in self.attributes)]
        pairs += [(name, value) for name, value in more.items() if value is not None]
        return f"/workflows?{urlencode(pairs)}" if pairs else "/workflows"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the list. ``problem``: why there is none."""

    rows: list[Listed] = []
    following: str | None = None
    problem: Refusal | None = None


def list_(request: Request) -> Response:
    """Those that match; of one that is named by the beginning of its id, the page."""
    typed = _typed(request)
    if typed.id:
        return _by_id(request, typed)
    after = request.query_params.get("after") or None
    return _page(request, typed, _found(request, typed, after), after=after)


def _found(request: Request, typed: Typed, after: str | None) -> Found:
    try:
        which = _which(request, typed)
        with access_of(request).connection() as connection:
            rows = search.listed(connection, which, limit=ROWS, after=after)
    except (Refused, DurableError, psycopg.errors.QueryCanceled) as error:
        return Found(problem=refusal_of(error))
    names = request.app.state.settings.redact
    shown = [msgspec.structs.replace(one, attributes=redacted(one.attributes, names)) for one in rows]
    return Found(rows=shown, following=typed.address(after=rows[-1].cursor) if len(rows) >= ROWS else None)


def _by_id(request: Request, typed: Typed) -> Response:
    """No more than 12 digits are looked at: by asking again and again nobody learns more of an id than a list shows."""
    try:
        digits = checked_prefix(typed.id)
    except DurableError:
        said = "that is no beginning of an id: those are hex digits, as the list has them"
        return _page(request, typed, Found(problem=Refusal(status=400, detail=said)))
    with access_of(request).connection() as connection:
        ids = lookups.by_prefix(connection, digits)
        rows = [_listed(one, known) for one in ids if (known := looks.known(connection, one)) is not None]
    if len(rows) == 1:
        return RedirectResponse(f"/workflows/{rows[0].id}", status_code=303)
    if not rows:
        problem = Refusal(status=404, detail=f"no workflow begins with {digits}")
        return _page(request, typed, Found(problem=problem))
    return _page(request, typed, Found(rows=rows), few=ambiguous(ids, digits))


def _page(request: Request, typed: Typed, found: Found, *, after: str | None = None, few: str = "") -> Response:
    return render(
        request,
        "workflows.html",
        status_code=200 if found.problem is None else found.problem.status,
        typed=typed,
        found=found,
        few=few,
        statuses=STATUSES,
        first=typed.address() if after else None,
    )


def _typed(request: Request) -> Typed:
    """What cannot even be shown again is refused."""
    values = {name: text for name in NAMES if (text := asked(request, name)) is not None}
    values |= {name: _first_digits(values[name]) for name in IDS if name in values}
    attributes = [text.strip() for text in request.query_params.getlist("attribute") if text.strip()]
    if len(attributes) > ATTRIBUTES_MAX:
        raise Refused(400, f"at most {ATTRIBUTES_MAX} attributes can be asked for at once")
    if any("\x00" in one or len(one) > 1_000 for one in attributes):
        raise Refused(400, "attribute: a text of up to 1,000 characters is asked for, without zeros")
    return Typed(_first_digits(asked(request, "id") or ""), values, attributes)


def _first_digits(text: str) -> str:
    """Of a whole id that somebody pasted only so much is shown again and stands in addresses."""
    return short_id(text.replace("-", ""))


def _which(request: Request, typed: Typed) -> Which:
    asked(request, "status", among=STATUSES)
    of = typed.values.get
    return Which(
        workflow=of("workflow"),
        status=of("status"),
        attributes=dict(_attribute(one) for one in typed.attributes) or None,
        started_from=moment("from", of("from")),
        started_to=moment("to", of("to")),
        parent=of("parent"),
        key=of("key"),
        origin=of("origin"),
    )


def _attribute(text: str) -> tuple[str, Scalar]:
    try:
        return attribute(text)
    except ArgumentTypeError as error:
        raise Refused(400, f"attribute: {error}") from error


def _listed(workflow_id: str, known: Known) -> Listed:
    return Listed(
        id=short_id(workflow_id),
        workflow=known.workflow,
        version=known.version,
        status=known.status,
        key=known.key,
        started_at=known.started_at,
        finished_at=known.finished_at,
        attributes={},
        parent=known.parent,
        cursor="",
        origin=known.origin,
    )


routes = [Route("/workflows", list_)]
