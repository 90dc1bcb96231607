"""Who may come in: tokens, sessions, forms of other sites, names that lead here; and what every answer carries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from console import OPERATOR_TOKEN, VIEWER_TOKEN, browser, csrf_in, logged_in, program, served
from itsdangerous import TimestampSigner

from durable_cluster.errors import ConfigurationError
from durable_cluster.ops.console import security
from durable_cluster.ops.console.security import local_path
from durable_cluster.ops.console.settings import ConsoleSettings

PAGES = ("/", "/nowhere", "/workflows", "/static/nowhere.css")


@pytest.fixture
def locked(dsn: str) -> Iterator[str]:
    """A console that wants a token."""
    with served(dsn, operator_token=OPERATOR_TOKEN, viewer_token=VIEWER_TOKEN) as url:
        yield url


@pytest.fixture
def unlocked(dsn: str) -> Iterator[str]:
    """A console on loopback that wants none."""
    with served(dsn) as url:
        yield url


# What a console has to be told.


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"host": "192.168.0.7"}, "needs a token"),
        ({"host": "::"}, "needs a token"),
        ({"host": "console.example.com"}, "needs a token"),
        ({"is_https": True}, "--https can be reached from elsewhere and needs a token"),
        ({"hosts": ("localhost", "console.example.com")}, "--allow-host console.example.com can be"),
        ({"operator_token": "short"}, "at least 16"),
        ({"viewer_token": "a" * 15}, "at least 16"),
        ({"operator_token": "a" * 16, "viewer_token": "a" * 16}, "the same"),
    ],
)
def test_a_console_that_would_be_open_to_others_does_not_start(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        ConsoleSettings(dsn="", **settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_nobody_needs_a_token_unless_one_is_set(host: str) -> None:
    assert not ConsoleSettings(dsn="", host=host).needs_login
    assert ConsoleSettings(dsn="", host=host, viewer_token="a" * 16).needs_login


def test_the_settings_do_not_tell_their_secrets() -> None:
    settings = ConsoleSettings(dsn="postgresql://u:dsn-password@h/d", operator_token=OPERATOR_TOKEN)
    for secret in ("dsn-password", OPERATOR_TOKEN, settings.secret):
        assert secret not in repr(settings)


# Browsers.


@pytest.mark.parametrize("path", ["/", "/workflows?status=stuck", "/nowhere"])
def test_without_a_session_every_page_leads_to_the_login_and_back(locked: str, path: str) -> None:
    with browser(locked) as client:
        answer = client.get(path)
        assert answer.status_code == 303
        page = client.get(answer.headers["location"])
        assert page.status_code == 200
        form = {"csrf": csrf_in(page), "token": OPERATOR_TOKEN, "next": _field(page, "next")}
        assert client.post("/login", data=form).headers["location"] == path


def test_a_session_is_a_cookie_that_scripts_and_other_sites_do_not_get(locked: str) -> None:
    with browser(locked) as client:
        form = {"csrf": csrf_in(client.get("/login")), "token": OPERATOR_TOKEN}
        cookie = client.post("/login", data=form).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie
    assert OPERATOR_TOKEN not in cookie


def test_behind_https_no_cookie_goes_without_it(dsn: str) -> None:
    with served(dsn, operator_token=OPERATOR_TOKEN, is_https=True) as url, browser(url) as client:
        assert "secure" in client.get("/login").headers["set-cookie"].lower()


@pytest.mark.parametrize(
    "token", ["", "wrong", OPERATOR_TOKEN + "x", OPERATOR_TOKEN[:-1], OPERATOR_TOKEN.upper(), "\x00", "ü" * 20]
)
def test_a_wrong_token_opens_nothing(locked: str, token: str) -> None:
    with browser(locked) as client:
        answer = client.post("/login", data={"csrf": csrf_in(client.get("/login")), "token": token})
        assert answer.status_code == 403
        assert client.get("/").status_code == 303


def test_after_ten_wrong_tokens_even_the_right_one_has_to_wait(locked: str) -> None:
    with browser(locked) as client:
        form = {"csrf": csrf_in(client.get("/login")), "token": "wrong"}
        statuses = [client.post("/login", data=form).status_code for _ in range(11)]
        assert statuses == [403] * 10 + [429]
        assert client.post("/login", data=form | {"token": OPERATOR_TOKEN}).status_code == 429
    with program(locked) as client:
        answer = client.get("/api/workflows")
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 60


def test_failures_wear_off_and_are_remembered_of_so_many_addresses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(security.time, "monotonic", lambda: now)
    doors = security.Doors(ConsoleSettings(dsn="", operator_token=OPERATOR_TOKEN))
    for _ in range(security.FAILURES_MAX):
        assert doors.role_of("wrong", "a") is None
    with pytest.raises(security.Refused):
        doors.role_of(OPERATOR_TOKEN, "a")
    assert doors.role_of(OPERATOR_TOKEN, "b") == "operator"
    now += security.FAILURES_S + 1
    assert doors.role_of(OPERATOR_TOKEN, "a") == "operator"
    for number in range(security.ADDRESSES_MAX + 50):
        doors.role_of("wrong", f"address {number}")
    assert len(doors._failures) == security.ADDRESSES_MAX


def test_a_session_that_was_forged_or_has_expired_is_none(dsn: str, locked: str) -> None:
    with logged_in(locked) as client:
        (name,) = client.cookies.keys()
        good = client.cookies[name]
        assert client.get("/login").headers["location"] == "/"
    body, stamp, mark = good.split(".")
    forged = TimestampSigner("some other secret").sign(body).decode()
    for cookie in (forged, f"{body}.{stamp}.{mark[:-2]}aa", f"{body}A.{stamp}.{mark}", "nonsense", ""):
        with httpx.Client(base_url=locked, cookies={name: cookie}) as client:
            assert client.get("/").status_code == 303, cookie


def test_a_session_ends_after_its_time(locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with logged_in(locked) as client:
        assert client.get("/login").headers["location"] == "/"
        later = security.time.time() + security.SESSION_S + 1
        monkeypatch.setattr(security.time, "time", lambda: later)
        assert client.get("/login").status_code == 200


def test_who_logs_out_is_out(locked: str) -> None:
    with logged_in(locked) as client:
        page = client.get("/nowhere")
        assert page.status_code == 404
        assert client.post("/logout", data={"csrf": csrf_in(page)}).status_code == 303
        assert client.get("/nowhere").status_code == 303


def test_a_login_begins_a_session_anew(locked: str) -> None:
    with browser(locked) as client:
        before = csrf_in(client.get("/login"))
        client.post("/login", data={"csrf": before, "token": OPERATOR_TOKEN})
        assert csrf_in(client.get("/nowhere")) != before


@pytest.mark.parametrize(
    "elsewhere", ["//evil.example", "https://evil.example/", "/\\evil.example", "evil", "/a\nb", "javascript:alert(1)"]
)
def test_a_login_leads_nowhere_else(locked: str, elsewhere: str) -> None:
    assert local_path(elsewhere) == "/"
    with browser(locked) as client:
        form = {"csrf": csrf_in(client.get("/login")), "token": OPERATOR_TOKEN, "next": elsewhere}
        assert client.post("/login", data=form).headers["location"] == "/"


def test_a_viewer_looks_and_does_not_act(locked: str) -> None:
    with logged_in(locked, VIEWER_TOKEN) as client:
        page = client.get("/nowhere")
        assert page.status_code == 404
        answer = client.post("/workflows", data={"csrf": csrf_in(page)})
        assert answer.status_code == 403
        assert "operator" in answer.text


# Forms.


@pytest.mark.parametrize("form", [{}, {"csrf": ""}, {"csrf": "x" * 32}])
def test_a_form_without_the_token_of_its_session_is_refused(locked: str, unlocked: str, form: dict[str, str]) -> None:
    with logged_in(locked) as client:
        client.get("/nowhere")
        assert client.post("/logout", data=form or {"a": "b"}).status_code == 403
    with browser(unlocked) as client:
        assert client.post("/anything", data=form or {"a": "b"}).status_code == 403


def test_the_token_of_another_session_is_none(locked: str) -> None:
    with logged_in(locked) as one, logged_in(locked) as other:
        assert one.post("/logout", data={"csrf": csrf_in(other.get("/nowhere"))}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://[bad"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none", "origin": "http://evil.example"},
    ],
)
def test_what_a_page_of_another_site_sends_is_refused(locked: str, unlocked: str, headers: dict[str, str]) -> None:
    with logged_in(locked) as client:
        answer = client.post("/logout", data={"csrf": csrf_in(client.get("/nowhere"))}, headers=headers)
        assert answer.status_code == 403
    with program(unlocked, None) as client:
        assert client.post("/api/workflows", json={"workflow": "x"}, headers=headers).status_code == 403


def test_what_a_page_of_this_console_sends_is_taken(locked: str) -> None:
    with logged_in(locked) as client:
        headers = {"origin": locked, "sec-fetch-site": "same-origin"}
        form = {"csrf": csrf_in(client.get("/nowhere"))}
        assert client.post("/logout", data=form, headers=headers).status_code == 303


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"csrf=1", "text/plain", 415),
        (b"csrf=1", "multipart/form-data; boundary=x", 415),
        (b"{}", "application/json", 415),
        (b"\xff\xfe", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"a=1" for _ in range(300)), "application/x-www-form-urlencoded", 400),
        (b"a" * (security.BODY_BYTES_MAX + 1), "application/x-www-form-urlencoded", 413),
    ],
)
def test_a_form_that_is_none_is_refused(unlocked: str, content: bytes, kind: str, status: int) -> None:
    with browser(unlocked) as client:
        assert client.post("/login", content=content, headers={"content-type": kind}).status_code == status


# Names and headers.


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8100", "127.0.0.1.evil.example", "localhost.evil", "", "[", "a@localhost:x"]
)
def test_a_name_that_was_made_to_lead_here_is_not_answered(unlocked: str, host: str) -> None:
    with program(unlocked, None) as client:
        for path in ("/", "/api/workflows", "/static/style.css", "/login"):
            assert client.get(path, headers={"host": host}).status_code == 400


@pytest.mark.parametrize(
    "host", ["localhost/static/", "localhost/login?", "a/api/openapi.json#", "a b", "[::1", "a@b", "", ":80"]
)
def test_a_host_that_is_none_opens_no_door(dsn: str, host: str) -> None:
    """Whoever puts an address together with it takes the page for one that is open to all."""
    with served(dsn, operator_token=OPERATOR_TOKEN, hosts=()) as url, program(url, None) as client:
        for path in ("/nowhere", "/api/workflows"):
            assert client.get(path, headers={"host": host}).status_code == 400
        assert client.get("/nowhere", headers={"host": "any.example"}).status_code == 303


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8100"])
def test_the_names_of_loopback_are_answered(unlocked: str, host: str) -> None:
    with program(unlocked, None) as client:
        assert client.get("/api/workflows", headers={"host": host}).status_code == 200


def test_a_name_can_be_allowed(dsn: str) -> None:
    allowed = {"operator_token": OPERATOR_TOKEN, "hosts": ("console.example.com",)}
    with served(dsn, **allowed) as url, program(url) as client:
        assert client.get("/api/workflows", headers={"host": "console.example.com"}).status_code == 200
        assert client.get("/api/workflows", headers={"host": "localhost"}).status_code == 400


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded"])
def test_a_proxy_brings_nobody_to_a_console_without_a_token(locked: str, unlocked: str, header: str) -> None:
    with program(unlocked, None) as client:
        for path in ("/", "/workflows", "/api/workflows"):
            assert client.get(path, headers={header: "for=192.0.2.7"}).status_code == 403
    with program(locked) as client:
        assert client.get("/api/workflows", headers={header: "192.0.2.7"}).status_code == 200


@pytest.mark.parametrize("path", [*PAGES, "/login", "/api/workflows", "/api/openapi.json", "/api/nowhere"])
def test_every_answer_says_what_a_browser_may_do_with_it(unlocked: str, path: str) -> None:
    with browser(unlocked) as client:
        headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    policy = dict(one.strip().split(" ", 1) for one in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]


def test_static_files_are_kept_by_browsers_until_they_change(unlocked: str) -> None:
    with browser(unlocked) as client:
        page = client.get("/nowhere").text
        addresses = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
        assert addresses
        for address in addresses:
            assert "immutable" in client.get(address).headers["cache-control"]
        assert client.get("/static/nowhere.css?v=1").headers["cache-control"] == "no-store"


def test_no_page_has_a_script_or_a_style_of_its_own(unlocked: str) -> None:
    with browser(unlocked) as client:
        for path in (*PAGES, "/login"):
            page = client.get(path).text
            assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", page)


def test_what_was_asked_for_is_not_repeated_as_markup(unlocked: str) -> None:
    with browser(unlocked) as client:
        for path in (
            "/<script>alert(1)</script>",
            "/login?next=%22%3E%3Cscript%3Ealert(1)%3C/script%3E",
            "/api/<script>",
        ):
            assert "<script>alert" not in client.get(path).text


def test_following_a_link_of_another_site_does_not_end_a_session(locked: str) -> None:
    with logged_in(locked) as client:
        elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        arrival = httpx.get(f"{locked}/nowhere", headers=elsewhere)  # browsers send no strict cookie then
        assert arrival.status_code == 200
        assert 'http-equiv="refresh"' in arrival.text
        assert "set-cookie" not in arrival.headers
        assert client.get("/nowhere").status_code == 404


# Programs.


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {OPERATOR_TOKEN}",
        OPERATOR_TOKEN,
        f"Bearer {OPERATOR_TOKEN} x",
    ],
)
def test_a_program_without_a_valid_token_gets_nothing(locked: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    with httpx.Client(base_url=locked, headers=headers) as client:
        answer = client.get("/api/workflows")
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/api/nowhere").status_code == 401


def test_a_session_is_no_token(locked: str) -> None:
    with logged_in(locked) as client:
        assert client.get("/api/workflows").status_code == 401


def test_a_viewers_program_looks_and_does_not_act(locked: str) -> None:
    with program(locked, VIEWER_TOKEN) as client:
        assert client.get("/api/workflows").status_code == 200
        for path in ("", "/0123456789ab/cancel", "/0123456789ab/fork"):
            answer = client.post(f"/api/workflows{path}", json={"workflow": "x"})
            assert answer.status_code == 403
            assert msgspec.json.decode(answer.content)["status"] == 403


def test_the_document_of_the_api_is_for_everybody(locked: str) -> None:
    with program(locked, None) as client:
        assert client.get("/api/openapi.json").status_code == 200


def _field(page: httpx.Response, name: str) -> str:
    found = re.search(f'name="{name}" value="([^"]*)"', page.text)
    assert found
    return found[1].replace("&amp;", "&")
