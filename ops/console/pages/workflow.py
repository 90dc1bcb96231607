"""The page of one workflow, and what an operator can do to it: each action has a page that asks first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import psycopg
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from durable_cluster import coordination, replay_statements, side_statements
from durable_cluster.context import SHORT_ID_DIGITS, short_id
from durable_cluster.errors import DurableError, UnknownWorkflow
from durable_cluster.ops import looks
from durable_cluster.ops.console import actions
from durable_cluster.ops.console.access import Access, Connection, access_of
from durable_cluster.ops.console.asked import given, placed
from durable_cluster.ops.console.dossier import Teller
from durable_cluster.ops.console.reading import read
from durable_cluster.ops.console.refusals import Refusal, Refused, refusal_of
from durable_cluster.ops.console.security import Visitor, form_of, visitor_of
from durable_cluster.ops.console.shapes import POINT_CHARS_MAX
from durable_cluster.ops.console.views import redirected, render
from durable_cluster.ops.looks import Known
from durable_cluster.ops.show import checked_prefix, whole_id
from durable_cluster.replays import KEPT

OPEN = ("running", "stuck")
ENDED = ("completed", "failed", "cancelled")
REASON_CHARS_MAX = 200


class Asking(msgspec.Struct, frozen=True):
    """What an action works with. ``id``: whole."""

    request: Request
    access: Access
    connection: Connection
    id: str
    known: Known
    actor: str


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """What can be done to a workflow. ``when``: in which statuses; ``does``: does it, and says what came of it and where."""

    title: str
    submit: str
    when: tuple[str, ...]
    is_hard: bool = False
    does: Callable[[Asking], tuple[str, str]]


def one(request: Request) -> Response:
    """All that is known of one workflow."""
    digits = _digits(request)
    visitor, access = _visitor(request), access_of(request)
    is_trusted = visitor.may_see_payloads
    with access.connection() as connection:
        workflow_id = whole_id(connection, digits)
        short = short_id(workflow_id)
        if placed(request, "id") != short:
            return RedirectResponse(f"/workflows/{short}", status_code=303)
        found = read(connection, workflow_id, with_values=is_trusted)
    dossier = Teller(access.app, is_trusted=is_trusted, names=request.app.state.settings.redact).dossier(found)
    offered = [name for name in ACTIONS if visitor.may_act and _is_offered(name, dossier.known)]
    return render(request, "workflow.html", one=dossier, offered=offered, actions=ACTIONS)


def ask(request: Request) -> Response:
    """The page that asks before something is done."""
    action = _action(request)
    if not _visitor(request).may_act:
        raise Refused(403, "a viewer may look and not act; that takes an operator's token")
    with access_of(request).connection() as connection:
        workflow_id = whole_id(connection, _digits(request))
        known = looks.known(connection, workflow_id)
    if known is None:
        raise UnknownWorkflow(f"there is no workflow {short_id(workflow_id)}…")
    values = {"at": request.query_params.get("at", ""), "reason": "cancelled", "cascade": "yes"}
    return _asking(request, action, short_id(workflow_id), known, values)


def act(request: Request) -> Response:
    """Do it; what is refused is told beside the form, as it was filled in."""
    action, access = _action(request), access_of(request)
    short, known = "", None
    try:
        with access.acting(_visitor(request).actor) as connection:
            workflow_id = whole_id(connection, _digits(request))
            short, known = short_id(workflow_id), looks.known(connection, workflow_id)
            if known is None:
                raise UnknownWorkflow(f"there is no workflow {short}…")
            asking = Asking(request, access, connection, workflow_id, known, _visitor(request).actor)
            said, where = action.does(asking)
    except (Refused, DurableError, psycopg.Error) as error:
        if known is None:
            raise
        values = {name: str(value) for name, value in form_of(request).items()}
        return _asking(request, action, short, known, values, problem=refusal_of(error))
    return redirected(request, f"/workflows/{where}", said=said)


def _asking(
    request: Request,
    action: Action,
    short: str,
    known: Known,
    values: Mapping[str, str],
    *,
    problem: Refusal | None = None,
) -> Response:
    return render(
        request,
        "workflow_action.html",
        status_code=200 if problem is None else problem.status,
        name=request.path_params["action"],
        action=action,
        id=short,
        known=known,
        values=values,
        problem=problem,
        is_possible=known.status in action.when,
    )


def _is_offered(name: str, known: Known) -> bool:
    if known.status not in ACTIONS[name].when:
        return False
    return {"pause": known.paused != "workflow", "resume": known.paused == "workflow"}.get(name, True)


def _digits(request: Request) -> str:
    """No more than 12 are looked at, as everywhere here."""
    return checked_prefix(placed(request, "id"))[:SHORT_ID_DIGITS]


def _action(request: Request) -> Action:
    action = ACTIONS.get(request.path_params["action"])
    if action is None:
        raise Refused(404, "there is nothing here")
    return action


def _visitor(request: Request) -> Visitor:
    visitor = visitor_of(request)
    assert visitor is not None  # the gate lets nobody else in
    return visitor


def _retry(of: Asking) -> tuple[str, str]:
    actions.retry(of.access, of.connection, of.id, _json(of.request, "state"))
    return f"{short_id(of.id)} goes on where it was stuck", short_id(of.id)


def _replay(of: Asking) -> tuple[str, str]:
    workflow_id, is_new = replay_statements.replay(of.connection, of.id, actor=None)
    old, new = short_id(of.id), short_id(workflow_id)
    return (f"this is a new workflow, replayed from {old}" if is_new else f"{old} starts over"), new


def _fork(of: Asking) -> tuple[str, str]:
    at = given(of.request, "at", most=POINT_CHARS_MAX)
    workflow_id = actions.fork(of.access, of.connection, of.id, at, _json(of.request, "input"))
    return f"this is a new workflow, forked from {short_id(of.id)}", short_id(workflow_id)


def _cancel(of: Asking) -> tuple[str, str]:
    reason = given(of.request, "reason") or "cancelled"
    if len(reason) > REASON_CHARS_MAX:
        raise Refused(400, f"a reason has at most {REASON_CHARS_MAX} characters")
    cascade = given(of.request, "cascade") is not None
    lived = side_statements.cancel(of.connection, of.id, reason=reason, actor=of.actor, cascade=cascade)
    return f"{short_id(of.id)} {'is asked to end' if lived else 'had ended already'}", short_id(of.id)


def _signal(of: Asking) -> tuple[str, str]:
    name = given(of.request, "name") or ""
    payload = _json(of.request, "payload")
    actions.signal(
        of.access,
        of.connection,
        of.id,
        name,
        None if payload is KEPT else payload,
        key=given(of.request, "key"),
        token=given(of.request, "token"),
        actor=of.actor,
    )
    return f"signal '{name}' is sent to {short_id(of.id)}", short_id(of.id)


def _pause(of: Asking) -> tuple[str, str]:
    is_new = coordination.pause(of.connection, "workflow", of.id, actor=of.actor)
    return f"{short_id(of.id)} {'is paused' if is_new else 'was paused already'}", short_id(of.id)


def _resume(of: Asking) -> tuple[str, str]:
    freed = coordination.resume(of.connection, "workflow", of.id, actor=of.actor)
    return f"{short_id(of.id)} {'was not paused' if freed is None else 'goes on'}", short_id(of.id)


def _json(request: Request, name: str) -> Any:
    """A value that was typed in as JSON; ``KEPT`` where nothing was. Raises Refused."""
    text = str(form_of(request).get(name, "")).strip()
    if not text:
        return KEPT
    try:
        return msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Refused(422, f'{name}: that is not JSON ({error}); a text stands in quotes: "so"') from error


ACTIONS: Mapping[str, Action] = {
    "retry": Action(title="Retry", submit="Retry it", when=("stuck",), does=_retry),
    "signal": Action(title="Signal", submit="Send the signal", when=OPEN, does=_signal),
    "pause": Action(title="Pause", submit="Pause it", when=OPEN, does=_pause),
    "resume": Action(title="Resume", submit="Let it go on", when=OPEN, does=_resume),
    "replay": Action(title="Replay", submit="Start it over", when=("stuck", *ENDED), does=_replay),
    "fork": Action(title="Fork", submit="Start a new one", when=(*OPEN, *ENDED), does=_fork),
    "cancel": Action(title="Cancel", submit="Cancel it", when=OPEN, is_hard=True, does=_cancel),
}

routes = [
    Route("/workflows/{id}", one),
    Route("/workflows/{id}/{action}", ask),
    Route("/workflows/{id}/{action}", act, methods=["POST"]),
]
