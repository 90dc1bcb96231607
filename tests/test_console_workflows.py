"""The list of workflows in the console: what can be asked for, paging, and what bad input gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from console import OPERATOR_TOKEN, logged_in, served
from console_shop import ESCAPED, SCRIPT, Shop

from durable_cluster.context import short_id
from durable_cluster.ops.console.pages import workflows

WHOLE_ID = re.compile("(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@pytest.fixture
def shop(dsn: str) -> Iterator[Shop]:
    shop = Shop(dsn)
    yield shop
    shop.app.close()


@pytest.fixture
def client(dsn: str, shop: Shop) -> Iterator[httpx.Client]:
    with served(dsn, operator_token=OPERATOR_TOKEN) as url, logged_in(url) as client:
        yield client


def page(client: httpx.Client, query: str, status: int = 200) -> str:
    answer = client.get(f"/workflows{query}")
    assert answer.status_code == status, answer.text
    assert not WHOLE_ID.search(answer.text)
    assert SCRIPT not in answer.text
    return answer.text


def ids(text: str) -> list[str]:
    return re.findall(r'<a class="id" href="/workflows/([0-9a-f]{12})"', text)


def older(text: str) -> str | None:
    found = re.search(r'href="/workflows(\?[^"]*)" rel="next"', text)
    return None if found is None else found[1].replace("&amp;", "&")


def test_the_list_is_found_by_everything_that_the_form_asks(shop: Shop, client: httpx.Client) -> None:
    ada = shop.begun(shop.echo, 1, attributes={"customer": "ada", "n": 7, "vip": True}, key="order-1")
    bob = shop.begun(shop.asks, 1, attributes={"customer": SCRIPT})
    stuck = shop.begun(shop.sour, 1)
    tree = shop.begun(shop.tree, 1)
    for query, wanted in (
        ("?workflow=echo", [ada]),
        ("?status=running", [bob]),
        ("?status=stuck", [stuck]),
        ("?attribute=customer%3Dada&attribute=n%3D7", [ada]),
        ("?attribute=vip%3Dtrue", [ada]),
        (f"?attribute={quote('customer=' + SCRIPT)}", [bob]),
        ("?key=order-1", [ada]),
        ("?workflow=tree&from=2020-01-01T00:00", [tree]),
        ("?workflow=tree&to=2020-01-01T00:00", []),
        ("?workflow=+echo+&status=&key=", [ada]),
    ):
        assert ids(page(client, query)) == [short_id(one.id) for one in wanted], query
    assert len(ids(page(client, f"?parent={short_id(tree.id)}"))) == 1
    assert ESCAPED in page(client, "?status=running")
    # What an attribute's chip leads to is the list of those that have it.
    chip = re.search(r'class="chip" href="/workflows(\?attribute=[^"]*)"', page(client, "?workflow=asks"))
    assert chip
    assert ids(page(client, chip[1])) == [short_id(bob.id)]


def test_paging_shows_each_once_and_keeps_what_is_asked_for(
    shop: Shop, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflows, "ROWS", 10)
    wanted = [short_id(one.id) for one in shop.echo.start_many(list(range(37)), attributes={"batch": 1})]
    shop.begun(shop.asks, 1)
    seen, query = [], "?workflow=echo&attribute=batch%3D1"
    pages = []
    while not pages or (query := older(pages[-1]) or ""):
        pages.append(page(client, query))
        assert len(pages) < 6
        seen += ids(pages[-1])
    assert len(pages) == 4
    assert sorted(seen) == sorted(wanted)
    assert "To the newest" in pages[-1]


def test_the_beginning_of_an_id_leads_to_its_page_and_is_cut_to_what_a_list_shows(
    shop: Shop, client: httpx.Client
) -> None:
    handle = shop.begun(shop.echo, 1)
    short = short_id(handle.id)
    for typed in (short, handle.id, handle.id[:9].upper(), f" {short}… "):
        answer = client.get("/workflows", params={"id": typed})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/workflows/{short}"), typed
    # Of a wrong rest nothing is told: whoever may look cannot try out digits.
    wrong = short + ("0" * 20 if handle.id[12:] != "0" * 20 else "1" * 20)
    assert client.get("/workflows", params={"id": wrong}).headers["location"] == f"/workflows/{short}"
    other = shop.begun(shop.echo, 2)
    common = next((n for n in range(12) if handle.id[n] != other.id[n]), 0)
    if common:
        text = page(client, f"?id={handle.id[:common]}")
        assert "workflows begin with" in text
        assert sorted(ids(text)) == sorted([short, short_id(other.id)])
    assert "no workflow begins with ffffffffffff" in page(client, "?id=ffffffffffff", 404)
    assert "no beginning of an id" in page(client, f"?id={quote(SCRIPT)}", 400)


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("?status=gone", 400, "choose running, stuck"),
        ("?attribute=customer", 400, "no attribute"),
        ("?attribute=a%20b%3D1", 400, "a name is of"),
        (f"?attribute={quote(SCRIPT)}", 400, "no attribute"),
        ("?from=yesterday", 400, "is no time"),
        ("?to=9999-12-31T23:59:59-23:59", 400, "is no time"),
        ("?parent=xyz", 422, "up to 32 hex digits"),
        ("?after=x", 422, "no cursor of a list"),
        ("?after=ffffffffffffff-ffffffffffff", 200, "No more workflows"),
        ("?workflow=%00", 400, "without zeros"),
        (f"?workflow={'a' * 300}", 400, "up to 255 characters"),
        ("?" + "&".join(["attribute=a%3D1"] * 9), 400, "at most 8"),
        ("?key=%27%3B+drop+table+durable.started%3B--", 200, "No workflow matches"),
        (f"?workflow={quote(SCRIPT)}", 200, "No workflow matches"),
        ("?workflow=%25", 200, "No workflow matches"),
        ("?workflow=%F0%9F%98%80", 200, "No workflow matches"),
        ("?workflow=%ff", 200, "No workflow matches"),
        ("?nobody=asked", 200, "No workflows yet"),
    ],
)
def test_bad_input_gets_a_clear_message_and_never_an_error_of_ours(
    client: httpx.Client, query: str, status: int, said: str
) -> None:
    assert said in page(client, query, status)


def test_what_was_typed_stays_in_the_form(client: httpx.Client) -> None:
    text = page(client, f"?workflow=order&from=soon&key={quote(SCRIPT)}", 400)
    assert 'value="order"' in text
    assert 'value="soon"' in text
    assert f'value="{ESCAPED}"' in text
    assert 'role="alert"' in text


@pytest.mark.parametrize("name", ["id", "parent", "origin"])
def test_of_a_whole_id_that_was_pasted_only_the_first_digits_are_shown_again(client: httpx.Client, name: str) -> None:
    whole = "01234567-89ab-cdef-0123-456789abcdef"
    text = page(client, f"?{name}={whole}", 404 if name == "id" else 200)
    assert 'value="0123456789ab"' in text
    assert whole[:14] not in text
    assert re.search(f'name="{name}"[^>]* maxlength="12"', text)
