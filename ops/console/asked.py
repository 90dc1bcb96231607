"""What an address or a form asks for: every value that comes from outside is read here, and what cannot be meant is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from urllib.parse import urlencode

from starlette.requests import Request

from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.security import form_of, visitor_of

TEXT_CHARS_MAX = 255
YEARS = range(1970, 9999)
"""A time in one of these can be reckoned with, some time before and after it too."""


def asked(request: Request, name: str, *, among: Collection[str] | None = None) -> str | None:
    """A value of the address; None for none, or an empty one. ``among``: what it can be. Raises Refused."""
    return _text(name, request.query_params.get(name, ""), among)


def given(
    request: Request, name: str, *, among: Collection[str] | None = None, most: int = TEXT_CHARS_MAX
) -> str | None:
    """The same of a form that was posted. ``most``: characters."""
    return _text(name, str(form_of(request).get(name, "")), among, most)


def placed(request: Request, name: str) -> str:
    """A part of the path. Raises Refused."""
    found = _text(name, str(request.path_params[name]), None)
    if found is None:
        raise Refused(404, "there is nothing here")
    return found


def given_number(request: Request, name: str, *, most: int = 2**31 - 1) -> int | None:
    """A whole number of a form that was posted; None for none. Raises Refused."""
    text = given(request, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > most:
        raise Refused(400, f"{name}: that is no whole number from 0 to {most:,}")
    return int(text)


def moment(name: str, text: str | None) -> datetime | None:
    """``text`` as a time, in UTC where it says no zone; None for none. Raises Refused."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        at = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
        if at.year not in YEARS:
            raise ValueError(at.year)
        return at
    except (ValueError, OverflowError) as error:
        raise Refused(400, f"{name}: that is no time; write it as 2030-01-31T09:00") from error


def given_moment(request: Request, name: str) -> datetime:
    """A time of a form that was posted. Raises Refused for none, too."""
    at = moment(name, given(request, name))
    if at is None:
        raise Refused(400, f"{name}: a time is asked for; write it as 2030-01-31T09:00")
    return at


def address(path: str, values: Mapping[str, str | None]) -> str:
    """``path`` with those of ``values`` that there are."""
    query = urlencode({name: value for name, value in values.items() if value})
    return f"{path}?{query}" if query else path


def actor_of(request: Request) -> str:
    """On whose behalf something is done, for the audit."""
    visitor = visitor_of(request)
    return "console" if visitor is None else visitor.actor


def _text(name: str, value: str, among: Collection[str] | None, most: int = TEXT_CHARS_MAX) -> str | None:
    text = value.strip()
    if "\x00" in text or len(text) > most:
        raise Refused(400, f"{name}: a text of up to {most:,} characters is asked for, without zeros")
    if text and among is not None and text not in among:
        raise Refused(400, f"{name}: choose {', '.join(among)}")
    return text or None
