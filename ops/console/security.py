"""Who may come in, and what for.

    operator   shows DURABLE_CONSOLE_TOKEN: sees and acts
    viewer     shows DURABLE_CONSOLE_VIEWER_TOKEN: sees, without payloads
    anybody    where no token is set, which only a console on loopback can be: an operator

Browsers log in and have a signed session cookie then; programs send ``Authorization: Bearer``. Whatever changes something is a
POST, comes from a page of this console, as browsers tell it and a token in its form proves, and from an operator.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import parse_qsl, urlsplit

import msgspec
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.settings import ConsoleSettings

OPERATOR, VIEWER = "operator", "viewer"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = ("/login", "/logout", "/static/", "/api/openapi.json")
API = "/api/"
FORWARDED = ("forwarded", "x-forwarded-for")
SESSION_S = 12 * 3600
BODY_BYTES_MAX = 4 << 20
BODY_S_MAX = 15.0
FIELDS_MAX = 200
FAILURES_MAX = 10
FAILURES_S = 60.0
ADDRESSES_MAX = 1_000
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
ARRIVAL = '<!doctype html><title>durable-cluster</title><meta http-equiv="refresh" content="0"><a href="">go on</a>'


class Visitor(msgspec.Struct, frozen=True):
    """Who asks. ``name``: what somebody called themselves at the login, for the audit; ``via``: 'console' or 'api'."""

    role: str
    name: str | None = None
    via: str = "console"

    @property
    def may_act(self) -> bool:
        """Whether more than looking is allowed."""
        return self.role == OPERATOR

    @property
    def may_see_payloads(self) -> bool:
        """Whether inputs, outputs and states are for them; the database's role has its own say in it."""
        return self.role == OPERATOR

    @property
    def actor(self) -> str:
        """On whose behalf something is done."""
        return f"{self.name} ({self.via})" if self.name else self.via


def visitor_of(request: Request) -> Visitor | None:
    """Who asks; None on the pages before a login."""
    found: Visitor | None = getattr(request.state, "visitor", None)
    return found


def form_of(request: Request) -> FormData:
    """The fields of a form that was posted."""
    found: FormData = request.state.form
    return found


def body_of(request: Request) -> bytes:
    """The body of a request that may have one."""
    found: bytes = getattr(request.state, "body", b"")
    return found


def csrf_token(request: Request) -> str:
    """What every form of this session has to bring."""
    known: str | None = request.session.get("csrf")
    if known is None:
        known = request.session["csrf"] = secrets.token_urlsafe(24)
    return known


class Doors:
    """The tokens of a console, and who failed to show one."""

    def __init__(self, settings: ConsoleSettings) -> None:
        tokens = {OPERATOR: settings.operator_token, VIEWER: settings.viewer_token}
        self._digests = {role: _digest(token) for role, token in tokens.items() if token is not None}
        self._failures: dict[str, deque[float]] = {}
        self.needs_login = settings.needs_login

    def role_of(self, token: str, address: str) -> str | None:
        """The role that a token stands for. Raises Refused for an address that failed too often, whatever it shows now."""
        now = time.monotonic()
        failures = self._failures.get(address, deque())
        while failures and now - failures[0] > FAILURES_S:
            failures.popleft()
        if len(failures) >= FAILURES_MAX:
            wait_s = int(FAILURES_S - (now - failures[0])) + 1
            raise Refused(429, f"{FAILURES_MAX} wrong tokens came from here; wait {wait_s} s", retry_after=str(wait_s))
        given = _digest(token)
        # All are compared: how long it takes tells nothing.
        roles = [role for role, digest in self._digests.items() if hmac.compare_digest(digest, given)]
        if roles:
            return roles[0]
        failures.append(now)
        self._failures.pop(address, None)
        self._failures[address] = failures  # the one that failed last stands last
        if len(self._failures) > ADDRESSES_MAX:
            del self._failures[next(iter(self._failures))]
        return None


Answer = Callable[[Request, Exception], Response]


class Gate:
    """What every request passes: the name it was sent to, where it comes from, who sends it. Sets ``state.visitor``."""

    def __init__(self, app: ASGIApp, *, settings: ConsoleSettings, doors: Doors, refused: Answer) -> None:
        self._app = app
        self._settings = settings
        self._doors = doors
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._demand_host(request)
            self._demand_direct(request)
            if self._is_arrival(request):
                await HTMLResponse(ARRIVAL)(scope, receive, send)
                return
            if request.method not in SAFE_METHODS:
                _demand_same_origin(request)
            request.state.visitor = self._visitor(request)
            if request.method not in SAFE_METHODS:
                receive = await self._with_body(request, receive)
        except Refused as error:
            await self._refused(request, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _demand_host(self, request: Request) -> None:
        """A page of elsewhere whose name was made to lead here (DNS rebinding) would speak to us as one of our own."""
        name = _hostname(request.headers.get("host", ""))
        if name is None or (self._settings.hosts and name not in self._settings.hosts):
            raise Refused(400, "this console is not reached by that name; allow a name with --allow-host")

    def _demand_direct(self, request: Request) -> None:
        """Where no token is set only this machine may come, and a proxy brings others."""
        if not self._doors.needs_login and any(name in request.headers for name in FORWARDED):
            raise Refused(
                403,
                "this came through a proxy, and whoever comes from elsewhere needs a token: set DURABLE_CONSOLE_TOKEN",
            )

    def _is_arrival(self, request: Request) -> bool:
        """Whether somebody followed a link of another site, with which browsers send no strict cookie: the page asks again."""
        return (
            request.method == "GET"
            and request.headers.get("sec-fetch-site") == "cross-site"
            and request.headers.get("sec-fetch-mode") == "navigate"
            and not path_of(request).startswith(API)
        )

    def _visitor(self, request: Request) -> Visitor | None:
        path = path_of(request)
        if any(path == known or (known.endswith("/") and path.startswith(known)) for known in OPEN_PATHS):
            return self._by_session(request)
        visitor = self._by_token(request) if path.startswith(API) else self._by_session(request)
        if visitor is None:
            raise Refused(401, "log in first")
        if request.method not in SAFE_METHODS and not visitor.may_act:
            raise Refused(403, "a viewer may look and not act; that takes an operator's token")
        return visitor

    def _by_session(self, request: Request) -> Visitor | None:
        if not self._doors.needs_login:
            return Visitor(OPERATOR)
        role = request.session.get("role")
        if role is None or request.session.get("until", 0) < time.time():
            return None
        return Visitor(role, request.session.get("name"))

    def _by_token(self, request: Request) -> Visitor:
        if not self._doors.needs_login:
            return Visitor(OPERATOR, via="api")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        role = self._doors.role_of(token.strip(), address_of(request)) if scheme.lower() == "bearer" else None
        if role is None:
            raise Refused(401, "send a valid token: Authorization: Bearer …", www_authenticate="Bearer")
        return Visitor(role, via="api")

    async def _with_body(self, request: Request, receive: Receive) -> Receive:
        """Read the body, which has a limit, and of a page's form the fields, which have to have the session's token."""
        body = await _body(receive)
        request.state.body = body
        if not path_of(request).startswith(API):
            request.state.form = _form(request, body)
            expected = request.session.get("csrf", "")
            given = str(request.state.form.get("csrf", ""))
            if not expected or not hmac.compare_digest(expected.encode(), given.encode()):
                raise Refused(403, "this form is not from this session; go back, reload the page and send it again")
        is_given = False

        async def replayed() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replayed


def begin_session(request: Request, role: str, name: str | None) -> None:
    """Somebody has logged in: nothing of the session before is kept."""
    request.session.clear()
    request.session.update(role=role, name=name, until=time.time() + SESSION_S)


def path_of(request: Request) -> str:
    """What is asked for. Not ``request.url``, which is put together with a Host header that may say anything."""
    path: str = request.scope["path"]
    return path


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else ""


def local_path(path: str) -> str:
    """``path`` if it is one of this console, else its first page: a login must not lead elsewhere."""
    is_local = path.startswith("/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path if is_local else "/"


def _demand_same_origin(request: Request) -> None:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    is_ours = site in (None, "same-origin", "none") and origin in (None, "")
    if origin:
        is_ours = site in (None, "same-origin") and _netloc(origin) == request.headers.get("host", "").lower()
    if not is_ours:
        raise Refused(403, "that was sent by a page of another site")


def _form(request: Request, body: bytes) -> FormData:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refused(415, "a form is sent as application/x-www-form-urlencoded")
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX, errors="strict")
    except ValueError as error:
        raise Refused(400, "the form cannot be read") from error
    return FormData([*fields])


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S_MAX):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the request broke off")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > BODY_BYTES_MAX:
                    raise Refused(413, f"a request has at most {BODY_BYTES_MAX:,} bytes")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise Refused(408, f"the request did not come within {BODY_S_MAX:.0f} s") from error


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _hostname(host: str) -> str | None:
    found = HOST.fullmatch(host.lower())
    return None if found is None else found[1] or found[2]


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
