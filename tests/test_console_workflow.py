"""The page of one workflow, and its actions, over a real database: what is shown, to whom, and what is done."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import psycopg
import pytest
from console import OPERATOR_TOKEN, VIEWER_TOKEN, csrf_in, logged_in, served
from console_shop import ESCAPED, SCRIPT, SECRET, Shop
from psycopg.conninfo import make_conninfo

from durable_cluster import App, Handle, set_progress
from durable_cluster.codec import Where
from durable_cluster.context import short_id

WHOLE_ID = re.compile("(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@pytest.fixture
def shop(dsn: str) -> Iterator[Shop]:
    shop = Shop(dsn)
    yield shop
    shop.app.close()


@pytest.fixture
def url(dsn: str, shop: Shop) -> Iterator[str]:
    with served(dsn, operator_token=OPERATOR_TOKEN, viewer_token=VIEWER_TOKEN) as url:
        yield url


@pytest.fixture
def operator(url: str) -> Iterator[httpx.Client]:
    with logged_in(url, name="ada") as client:
        yield client


@pytest.fixture
def viewer(url: str) -> Iterator[httpx.Client]:
    with logged_in(url, VIEWER_TOKEN) as client:
        yield client


def address(of: Handle, *more: str) -> str:
    return "/".join(("/workflows", short_id(of.id), *more))


def page(client: httpx.Client, path: str, status: int = 200) -> str:
    """The page, which has no id whole and nothing of a user's unescaped."""
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    assert not WHOLE_ID.search(answer.text)
    assert SCRIPT not in answer.text
    assert " style=" not in answer.text
    return answer.text


def acted(client: httpx.Client, of: Handle, action: str, status: int = 303, **fields: str) -> httpx.Response:
    path = address(of, action)
    answer = client.post(path, data={"csrf": csrf_in(client.get(path)), **fields})
    assert answer.status_code == status, answer.text
    return answer


def landed(client: httpx.Client, answer: httpx.Response) -> str:
    return page(client, answer.headers["location"])


def test_a_waiting_workflow_says_where_it_stands_and_all_that_is_known_of_it(
    shop: Shop, operator: httpx.Client
) -> None:
    handle = shop.begun(
        shop.asks, {"note": SCRIPT, "password": SECRET}, attributes={"customer": SCRIPT, "total": 12.5}, key=SCRIPT
    )
    text = page(operator, address(handle))
    assert "waits for a signal" in text
    assert "(approved)" in text
    assert "step 2 ‘told’" in text
    assert text.count(ESCAPED) >= 4  # attribute, key, input, progress
    assert SECRET not in text
    assert "•••" in text
    assert f"<title>asks {short_id(handle.id)} · durable-cluster</title>" in text


@pytest.mark.parametrize("action", ["signal", "pause", "cancel", "fork"])
def test_a_running_workflow_offers_its_actions_to_an_operator_alone(
    shop: Shop, operator: httpx.Client, viewer: httpx.Client, action: str
) -> None:
    path = address(shop.begun(shop.asks, 1))
    assert f'href="{path}/{action}"' in page(operator, path)
    seen = page(viewer, path)
    assert f"{path}/{action}" not in seen
    page(viewer, f"{path}/{action}", 403)


def test_a_viewer_sees_no_payload_and_can_do_nothing(shop: Shop, operator: httpx.Client, viewer: httpx.Client) -> None:
    handle = shop.begun(shop.asks, "a payload")
    stuck = shop.begun(shop.sour, "a payload")
    assert "a payload" in page(operator, address(handle))
    seen = page(viewer, address(handle))
    assert "a payload" not in seen
    assert "not shown to a viewer" in seen
    assert "sour" in page(viewer, address(stuck))
    assert "Traceback" not in page(viewer, address(stuck))
    token = csrf_in(viewer.get("/"))
    assert viewer.post(address(handle, "cancel"), data={"csrf": token, "reason": "x"}).status_code == 403
    assert handle.status() == "running"


def test_nothing_is_done_without_the_token_of_the_form(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.asks, 1)
    operator.get(address(handle, "cancel"))
    for fields in ({}, {"csrf": "wrong"}, {"csrf": ""}):
        assert operator.post(address(handle, "cancel"), data={"reason": "x", **fields}).status_code == 403
    shop.app.run(until_idle=True)
    assert handle.status() == "running"


def test_a_signal_is_sent_and_resumes(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.asks, 1)
    said = landed(operator, acted(operator, handle, "signal", name="approved", payload='{"limit": 500}'))
    assert "signal &#39;approved&#39; is sent" in said
    shop.app.run(until_idle=True)
    assert handle.result(timeout=5) == {"limit": 500}
    text = page(operator, address(handle))
    assert "completed" in text
    assert "&#34;limit&#34;: 500" in text


def test_a_signal_that_cannot_be_is_told_beside_the_form_as_it_was_filled_in(
    shop: Shop, operator: httpx.Client
) -> None:
    handle = shop.begun(shop.asks, 1)
    for fields, told, status in (
        ({"name": "approved", "payload": "{not json"}, "that is not JSON", 422),
        ({"name": SCRIPT}, "signal name", 400),
        ({"name": "", "payload": "1"}, "signal name", 400),
        ({"name": "approved", "payload": "[" * 5_000}, "that is not JSON", 422),
        ({"name": "approved", "key": "k" * 300}, "key", 400),
    ):
        answer = acted(operator, handle, "signal", status, **fields)
        assert told in answer.text, answer.text
        assert 'role="alert"' in answer.text
        assert SCRIPT not in answer.text
    assert "{not json" in acted(operator, handle, "signal", 422, name="approved", payload="{not json").text


def test_a_cancel_is_asked_for_first_and_reaches_the_workflow_with_its_reason(
    shop: Shop, operator: httpx.Client
) -> None:
    handle = shop.begun(shop.asks, 1)
    asked = page(operator, address(handle, "cancel"))
    assert "cannot be taken back" in asked
    assert handle.status() == "running"
    assert "is asked to end" in landed(operator, acted(operator, handle, "cancel", reason=f"no more {SCRIPT}"))
    shop.app.run(until_idle=True)
    assert handle.status() == "cancelled"
    assert f"no more {ESCAPED}" in page(operator, address(handle))


def test_a_pause_holds_and_a_resume_lets_go_on(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.asks, 1)
    landed(operator, acted(operator, handle, "pause"))
    handle.signal("approved", "yes")
    shop.app.run(until_idle=True)
    text = page(operator, address(handle))
    assert "this workflow" in text
    assert f"{address(handle)}/resume" in text
    assert f'{address(handle)}/pause"' not in text
    landed(operator, acted(operator, handle, "resume"))
    shop.app.run(until_idle=True)
    assert handle.result(timeout=5) == "yes"


def test_a_stuck_workflow_says_why_and_is_retried_with_an_edited_state(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.sour, {"lemon": 1})
    text = page(operator, address(handle))
    assert f"sour {ESCAPED}" in text
    assert "Traceback" in text
    assert f"/dead-letters/{short_id(handle.id)}" in text
    shop.is_mended = True
    assert "goes on" in landed(operator, acted(operator, handle, "retry", state='{"sugar": 1}'))
    shop.app.run(until_idle=True)
    assert handle.result(timeout=5) == "sweet"
    assert "is not stuck" in acted(operator, handle, "retry", 409).text


def test_a_failed_workflow_is_replayed_as_a_new_one(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.fails, 7)
    assert f"gave up {ESCAPED}" in page(operator, address(handle))
    text = landed(operator, acted(operator, handle, "replay"))
    assert f"replayed from {short_id(handle.id)}" in text
    assert "made of" in text


def test_a_linear_workflow_shows_what_is_recorded_and_is_forked_there(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.linear, 21)
    text = page(operator, address(handle))
    assert "1 double" in text
    assert "Fork here" in text
    found = re.search(r'href="(/workflows/[0-9a-f]{12}/fork\?at=[^"]*)"', text)
    assert found
    assert 'value="1 double"' in page(operator, found[1])
    forked = landed(operator, acted(operator, handle, "fork", at="1 double", input="4"))
    assert f"forked from {short_id(handle.id)}" in forked
    refused = acted(operator, handle, "fork", 422, at=f"99 {SCRIPT}").text
    assert f"99 {ESCAPED}" in refused
    assert "1 double" in refused


def test_a_fork_begins_at_an_await_of_any_name(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.selects, 300)
    handle.signal("signal-of-a-rather-long-name-0007")
    shop.app.run(until_idle=True)
    text = page(operator, address(handle))
    path = re.search(r'class="mono">(2 wait_for[^<]+)<', text)
    assert path and len(path[1]) > 10_000
    link = next(
        link for link in re.findall(r'href="(/workflows/[0-9a-f]{12}/fork\?at=[^"]*)"', text) if link.endswith("at=2")
    )
    assert 'name="at" type="text" value="2"' in page(operator, link)
    for at in ("2", path[1]):
        assert "forked from" in landed(operator, acted(operator, handle, "fork", at=at))
    acted(operator, handle, "fork", 400, at="9" * 20_000)


def test_the_children_are_a_tree_and_children_know_their_parent(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.tree, 3)
    text = page(operator, address(handle))
    assert len(re.findall(r'class="deep d1"', text)) == 3
    assert len(re.findall(r'class="deep d2"', text)) == 6
    assert "3 of the last 3 have ended" in text
    child = re.search(r'class="deep d2"><a class="id" href="(/workflows/[0-9a-f]{12})"', text)
    assert child
    assert "child of" in page(operator, child[1])
    assert len(re.findall(r'class="id"', page(operator, f"/workflows?parent={short_id(handle.id)}"))) == 3


def test_a_large_family_and_a_large_payload_are_bounded(shop: Shop, operator: httpx.Client) -> None:
    handle = shop.begun(shop.twig, 60)
    assert len(re.findall(r'class="deep', page(operator, address(handle)))) == 20
    big = shop.begun(shop.echo, "x" * 200_000)
    text = page(operator, address(big))
    assert len(text) < 150_000
    assert "of 200,0" in text
    assert '<details class="payload"><summary>Output' in text


def test_an_id_that_is_unknown_ambiguous_or_none_is_told(
    shop: Shop, operator: httpx.Client, conn: psycopg.Connection
) -> None:
    handle = shop.begun(shop.echo, 1)
    page(operator, "/workflows/ffffffffffff", 404)
    page(operator, "/workflows/xyz", 400)
    page(operator, f"/workflows/{SCRIPT}", 404)
    page(operator, "/workflows/%00", 400)
    page(operator, f"/workflows/{short_id(handle.id)}/explode", 404)
    assert operator.get(f"/workflows/{handle.id}").headers["location"] == address(handle)
    assert operator.get(f"/workflows/{handle.id[:8].upper()}").headers["location"] == address(handle)


def test_digits_that_mean_several_say_how_many_and_what_to_give_instead(
    shop: Shop, operator: httpx.Client, conn: psycopg.Connection
) -> None:
    def insert(rest: str) -> str:
        workflow_id = f"0a{rest}{'0' * (26 - len(rest))}{handle.id[28:]}"  # of the same day
        conn.execute(
            "insert into durable.started (id, day, workflow, version, input, at)"
            " select %s::uuid, s.day, s.workflow, s.version, s.input, s.at from durable.started s where s.id = %s::uuid",
            (workflow_id, handle.id),
        )
        return short_id(workflow_id)

    handle = shop.begun(shop.echo, 1)
    conn.execute("delete from durable.started where durable.hex(id) like '0a%%'")
    one, two = insert("1"), insert("2")
    told = f"2 workflows begin with 0a ({one}, {two}): give more digits of the one that is meant"
    assert told in page(operator, "/workflows/0a", 409)
    listed = page(operator, "/workflows?id=0a")
    assert told in listed
    assert f'href="/workflows/{two}"' in listed
    third = insert("3")
    assert f"3 or more workflows begin with 0a ({one}, {two}, {third}, …)" in page(operator, "/workflows/0a", 409)
    insert("1" + "0" * 9 + "1")
    told = page(operator, f"/workflows/{one}", 409)
    assert f"2 workflows have the same first 12 digits, {one}: only a whole id tells them apart" in told


def test_the_timeline_is_drawn_where_steps_are_recorded(
    shop: Shop, operator: httpx.Client, conn: psycopg.Connection
) -> None:
    handle = shop.begun(shop.linear, 1)
    handle.signal("approved", 1)
    shop.app.run(until_idle=True)
    text = page(operator, address(handle))
    bars = re.findall(r'<rect class="(\w+)" x="([0-9.]+)%" y="\d+" width="([0-9.]+)%"', text)
    assert len([kind for kind, _, _ in bars if kind != "track"]) >= 3, text
    assert all(float(x) >= 0 and float(x) + float(width) <= 100.001 for kind, x, width in bars if kind != "track")
    plain = shop.begun(shop.echo, 1)
    assert "are not recorded" in page(operator, address(plain))


def cut_short(conn: psycopg.Connection, function: str) -> None:
    """From now on the function is ended as the server ends what takes too long."""
    (definition,) = conn.execute("select pg_get_functiondef(%s::regprocedure)", (function,)).fetchone() or ("",)
    head = definition.partition("\nAS ")[0].replace("LANGUAGE sql", "LANGUAGE plpgsql")
    conn.execute(f"{head} as $$ begin raise exception 'too long' using errcode = 'query_canceled'; end $$".encode())


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("durable.family(uuid, int, int)", 'class="deep'),
        ("durable.timeline_of(uuid)", "<rect"),
        ("durable.state_of(uuid)", "an output"),
        ("durable.locate(uuid)", "waits for a signal"),
        ("durable.input_of(uuid)", "the input"),
        ("durable.progress_of(uuid)", "&#34;asked&#34;"),
        ("durable.group_of(uuid)", "have ended"),
        ("durable.history(uuid, int)", "1 double"),
    ],
)
def test_a_look_that_takes_too_long_costs_its_part_of_the_page_alone(
    shop: Shop, operator: httpx.Client, conn: psycopg.Connection, function: str, missing: str
) -> None:
    kinds = ((shop.linear, 21), (shop.tree, 1), (shop.asks, "the input"), (shop.echo, "an output"))
    paths = [address(shop.begun(kind, value)) for kind, value in kinds]
    before = "".join(page(operator, path) for path in paths)
    cut_short(conn, function)
    after = "".join(page(operator, path) for path in paths)
    assert after.count(missing) < before.count(missing)


class Watchful:
    """A codec that notes whether the console has a transaction open while it reads."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.seen: list[int] = []

    def encode(self, payload: bytes, where: Where, /) -> bytes:
        return payload[::-1]

    def decode(self, coded: bytes, where: Where, /) -> bytes:
        with psycopg.connect(self._dsn) as connection:
            row = connection.execute(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and application_name = 'durable-cluster console' and state <> 'idle'"
            ).fetchone()
        self.seen += row or ()
        return coded[::-1]


def test_a_codec_reads_when_no_connection_is_lent_any_more(dsn: str) -> None:
    codec = Watchful(dsn)
    app = App("coded", dsn=dsn, codec=codec)

    @app.workflow
    async def told(what: str) -> str:
        set_progress("on its way")
        return f"{what}, said"

    handle = told.start("a word")
    app.run(until_idle=True)
    codec.seen.clear()
    with served(dsn, app=app) as url, httpx.Client(base_url=url, timeout=20.0) as client:
        shown = page(client, address(handle))
        assert all(text in shown for text in ("a word", "a word, said", "on its way"))
        assert client.get(f"/api/workflows/{short_id(handle.id)}").json()["output"] == "a word, said"
    app.close()
    assert codec.seen == [0] * len(codec.seen)
    assert len(codec.seen) >= 5


@pytest.mark.parametrize("granted", ["durable_operator", "durable_viewer"])
def test_a_console_whose_database_role_may_see_little_shows_what_it_may(
    shop: Shop, dsn: str, conn: psycopg.Connection, granted: str
) -> None:
    waiting, stuck = shop.begun(shop.asks, "a payload", attributes={"customer": "ada"}), shop.begun(shop.sour, 1)
    role = f"console_{granted}_{conn.info.dbname}"
    conn.execute(f"create role {role} login in role {granted}")
    try:
        with served(make_conninfo(dsn, user=role)) as url, httpx.Client(base_url=url, timeout=20.0) as client:
            overview = page(client, "/")
            assert short_id(stuck.id) in overview
            assert "could not be looked at" not in overview
            assert short_id(waiting.id) in page(client, "/workflows?attribute=customer%3Dada")
            if granted == "durable_viewer":
                assert "database role may not" in page(client, address(waiting), 403)
                return
            text = page(client, address(waiting))
            assert "a payload" not in text
            assert "not for the console&#39;s database role" in text
            assert "waits for a signal" in text
            assert "Traceback" in page(client, address(stuck))
            landed(client, acted(client, waiting, "cancel", reason="enough"))
    finally:
        conn.execute(f"drop owned by {role}; drop role {role}")
