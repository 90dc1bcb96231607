"""The pages of dead letters: which there are, one of them, and taking them up again, one or all that match."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable_cluster import side_statements
from durable_cluster.codec import TEXTS, Where, is_coded, state_of
from durable_cluster.context import SHORT_ID_DIGITS, short_id
from durable_cluster.errors import CodecError, InvalidState
from durable_cluster.ops import letters
from durable_cluster.ops.coded import CODED
from durable_cluster.ops.console.access import Access, Connection, access_of
from durable_cluster.ops.console.asked import (
    actor_of,
    address,
    asked,
    given,
    given_moment,
    given_number,
    moment,
    placed,
)
from durable_cluster.ops.console.dossier import TOLD_CHARS_MAX
from durable_cluster.ops.console.formats import Payload, payload
from durable_cluster.ops.console.redaction import redacted
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.security import visitor_of
from durable_cluster.ops.console.views import redirected, render
from durable_cluster.ops.dead_letters import WHY, known
from durable_cluster.ops.letters import REASONS, Filter, WholeLetter
from durable_cluster.ops.show import checked_prefix

ROWS = 50
PREVIEWED = 5
COUNTED_MAX = 10_000
AT_ONCE_S = 4.0
"""So long one request takes letters up; for what is left then it asks again."""


def list_(request: Request) -> Response:
    """Dead letters that match, newest first."""
    which, before = _asked(request), asked(request, "before")
    with access_of(request).connection() as connection:
        found = letters.listed(connection, which, limit=ROWS, before=moment("before", before))
        count, _ = letters.total(connection, which, most=COUNTED_MAX + 1)
    filters = _values(which)
    return render(
        request,
        "dead_letters.html",
        found=found,
        count=count,
        counted_max=COUNTED_MAX,
        filters=filters,
        reason_choices=list(WHY.items()),
        why=WHY,
        first=address("/dead-letters", filters) if before else None,
        following=address("/dead-letters", filters | {"before": found[-1].at.isoformat()})
        if len(found) >= ROWS
        else None,
        retry_all=address("/dead-letters/retry", filters),
    )


def one(request: Request) -> Response:
    """All of one but what its reader may not see."""
    access, visitor = access_of(request), visitor_of(request)
    with access.connection() as connection:
        workflow_id, letter = _known(connection, placed(request, "id"))
        is_trusted = visitor is not None and visitor.may_see_payloads
        is_shown = is_trusted and letters.may_see_states(connection)
        state = letters.state(connection, workflow_id) if is_shown else None
    names = request.app.state.settings.redact
    details = _details(access, workflow_id, letter)
    said = redacted(details, names)
    told = CODED if TEXTS in details else str(said.get("reason", "unknown"))
    return render(
        request,
        "dead_letter.html",
        id=short_id(workflow_id),
        letter=letter,
        why=WHY.get(letter.reason, letter.reason),
        told=told if is_trusted else told[:TOLD_CHARS_MAX],
        trace=str(said.get("traceback") or "") if is_trusted else "",
        is_shown=is_shown,
        state=None if state is None else _state(access, workflow_id, letter, state, names),
    )


def retry(request: Request) -> Response:
    """Take one up again: the one that was looked at, not one that came after it."""
    seq = given_number(request, "seq")
    with access_of(request).acting(actor_of(request)) as connection:
        workflow_id, letter = _known(connection, placed(request, "id"))
        side_statements.retry_dead_letter(connection, workflow_id, seq=letter.seq if seq is None else seq)
    short = short_id(workflow_id)
    return redirected(request, f"/workflows/{short}", said=f"{short} goes on in step '{letter.step}'")


def end(request: Request) -> Response:
    """End one for good, as failed: the one that was looked at, not one that came after it."""
    if given(request, "sure") != "yes":
        raise Refused(400, "say that this is meant: tick the box")
    with access_of(request).acting(actor_of(request)) as connection:
        workflow_id, letter = _known(connection, placed(request, "id"))
        if given_number(request, "seq") != letter.seq:
            raise InvalidState("it has gone on and is stuck in another step by now; look at its dead letter again")
        letters.purge(connection, workflow_id)
    short = short_id(workflow_id)
    return redirected(request, f"/workflows/{short}", said=f"{short} has ended as failed")


def preview(request: Request) -> Response:
    """How many match and which, before they are all taken up again."""
    which = _asked(request)
    with access_of(request).connection() as connection:
        count, newest = letters.total(connection, which, most=COUNTED_MAX + 1)
        found = letters.listed(connection, which, limit=PREVIEWED)[:PREVIEWED]
    return render(
        request,
        "dead_letters_retry.html",
        found=found,
        count=count,
        counted_max=COUNTED_MAX,
        newest=None if newest is None else newest.isoformat(),
        filters=_values(which),
        why=WHY,
        back=address("/dead-letters", _values(which)),
    )


def retry_all(request: Request) -> Response:
    """Take all up again that matched the preview, as far as one request goes."""
    which = Filter(
        workflow=given(request, "workflow"), step=given(request, "step"), reason=given(request, "reason", among=REASONS)
    )
    newest = given_moment(request, "newest")
    access = access_of(request)
    done, until = 0, time.monotonic() + AT_ONCE_S
    while True:
        with access.acting(actor_of(request)) as connection:
            some = letters.retry_some(connection, which, newest=newest)
        done += some
        if not some or time.monotonic() > until:
            break
    told = f"{done:,} {'workflow goes' if done == 1 else 'workflows go'} on"
    if some:
        return redirected(
            request, address("/dead-letters/retry", _values(which)), said=f"{told}; the rest is still here"
        )
    return redirected(request, address("/dead-letters", _values(which)), said=told)


def _asked(request: Request) -> Filter:
    return Filter(
        workflow=asked(request, "workflow"), step=asked(request, "step"), reason=asked(request, "reason", among=REASONS)
    )


def _values(which: Filter) -> dict[str, str | None]:
    return {"workflow": which.workflow, "step": which.step, "reason": which.reason}


def _known(connection: Connection, prefix: str) -> tuple[str, WholeLetter]:
    """No more than 12 digits are looked at: who may look is told no more of an id than that."""
    return known(connection, checked_prefix(prefix)[:SHORT_ID_DIGITS])


def _details(access: Access, workflow_id: str, letter: WholeLetter) -> dict[str, Any]:
    """What its step said, as the app's codec reads it where there is one."""
    if access.app is None:
        return letter.details
    said: dict[str, Any] = access.app.payloads.unveiled(letter.details, Where(letter.workflow, "failure", workflow_id))
    return said


def _state(access: Access, workflow_id: str, letter: WholeLetter, state: str, names: tuple[str, ...]) -> Payload | str:
    """The state as it may be shown, or why it cannot be read: what can be done to the letter is offered all the same."""
    try:
        value = msgspec.json.decode(state)
        if access.app is not None:
            value = access.app.payloads.value(value, state_of(letter.workflow, workflow_id, letter.seq, letter.attempt))
    except CodecError as error:
        return str(error)
    return f"the state {CODED}" if is_coded(value) else payload(redacted(value, names))


routes = [
    Route("/dead-letters", list_),
    Route("/dead-letters/retry", preview),
    Route("/dead-letters/retry", retry_all, methods=["POST"]),
    Route("/dead-letters/{id}", one),
    Route("/dead-letters/{id}/retry", retry, methods=["POST"]),
    Route("/dead-letters/{id}/end", end, methods=["POST"]),
]
