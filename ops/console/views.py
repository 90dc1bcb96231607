"""Pages: templates of Jinja2, everything escaped, and what each of them is given."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from durable_cluster.ops.console.formats import FILTERS
from durable_cluster.ops.console.security import csrf_token, path_of, visitor_of

HERE = Path(__file__).parent
STATIC = HERE / "static"
SAID_CHARS_MAX = 500
THEME, THEMES = "durable_theme", ("light", "dark")
"""The cookie that console.js keeps, and what it may say."""


def render(request: Request, template: str, /, *, status_code: int = 200, **values: Any) -> HTMLResponse:
    """A page. Besides ``values`` templates have ``visitor`` (None before a login), ``path``, ``said`` (once, after a redirect),
    ``needs_login``, ``csrf_field()``, which every form needs, ``static(name)``, the address of a static file, ``theme`` (None:
    as the system has it) and ``database``, what it is called.
    """
    theme = request.cookies.get(THEME)
    text = drawn(
        template,
        theme=theme if theme in THEMES else None,
        database=request.app.state.access.name,
        visitor=visitor_of(request),
        path=path_of(request),
        said=request.session.pop("said", None) if "session" in request.scope else None,
        needs_login=request.app.state.settings.needs_login,
        csrf_field=lambda: _csrf_field(request),
        **values,
    )
    return HTMLResponse(text, status_code=status_code)


def drawn(template: str, /, **values: Any) -> str:
    """A part of a page that is the same for whoever looks."""
    return _environment().get_template(template).render(**values)


def compile_templates() -> None:
    """Before anybody looks: the first page would wait for it."""
    environment = _environment()
    for name in environment.list_templates(extensions=["html"]):
        environment.get_template(name)


def redirected(request: Request, path: str, *, said: str | None = None) -> Response:
    """After an action: see ``path`` (of this console, from the root on). ``said``: told there, once."""
    if said is not None:
        request.session["said"] = said[:SAID_CHARS_MAX]
    return RedirectResponse(path, status_code=303)


def _csrf_field(request: Request) -> Markup:
    return Markup('<input type="hidden" name="csrf" value="{}">').format(csrf_token(request))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    environment.globals["static"] = static
    return environment


@cache
def static(name: str) -> str:
    """The address of a static file; it changes with the file, so browsers may keep it."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{quote(name)}?v={digest}"
