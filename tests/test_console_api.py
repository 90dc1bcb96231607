"""The REST API against a real server and a real database: what it does, what it refuses, what it never tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import psycopg
import pytest
from console import OPERATOR_TOKEN, VIEWER_TOKEN, program, served
from psycopg.conninfo import make_conninfo

from durable_cluster import App, Context, Continuation, Retry, replay_statements, sleep, wait_for
from durable_cluster.ops.console import api
from durable_cluster.ops.console.access import Access

HOSTILE = [
    "'; drop table durable.started; --",
    "%",
    "_",
    "\\",
    "<script>alert(1)</script>",
    "{{7*7}}",
    "\u202e",
    "😀",
    "a" * 255,
]


class Order(msgspec.Struct):
    """What a typed workflow takes."""

    article: str
    count: int


@pytest.fixture
def shop(dsn: str) -> Iterator[App]:
    """A program's workflows; the console knows them from what is declared only."""
    app = App("shop", dsn=dsn)
    echo = app.machine("echo")

    @echo.step(start=True)
    def say(ctx: Context, what: Any) -> Continuation:
        return ctx.done(what)

    poisoned = app.machine("poisoned")

    @poisoned.step(start=True, retry=Retry(attempts=1))
    def swallow(ctx: Context, what: Any) -> Continuation:
        if what != "cured":
            raise ValueError(f"cannot swallow {what}")
        return ctx.done(what)

    @app.workflow
    async def approval(what: Any) -> Any:
        await sleep(0)
        return await wait_for("approved", timeout="1d")

    replay_statements.declare_types(app.client.connection(), app.declared_types(app.settings))
    yield app
    app.close()


@pytest.fixture
def url(dsn: str, shop: App) -> Iterator[str]:
    """A console over the same database."""
    with served(dsn, operator_token=OPERATOR_TOKEN, viewer_token=VIEWER_TOKEN) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """An operator's program."""
    with program(url) as client:
        yield client


@pytest.fixture
def viewer(url: str) -> Iterator[httpx.Client]:
    """A program that may only look."""
    with program(url, VIEWER_TOKEN) as client:
        yield client


def started(client: httpx.Client, workflow: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/api/workflows", json={"workflow": workflow, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def at(of: dict[str, Any], what: str = "") -> str:
    return f"/api/workflows/{of['id']}{what}"


def problem(answer: httpx.Response, status: int) -> str:
    """What it says; it has to be of the one shape that all refusals have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert said["status"] == status
    assert said["title"]
    return str(said["detail"])


# What it does.


def test_a_workflow_is_started_run_and_read(client: httpx.Client, shop: App) -> None:
    answer = client.post("/api/workflows", json={"workflow": "echo", "input": {"n": [1, None, "ü"]}})
    assert answer.status_code == 201
    one = answer.json()
    assert one["whole_id"].startswith(one["id"])
    assert len(one["whole_id"]) == 32
    assert answer.headers["location"] == at(one)
    shop.run(until_idle=True)
    found = client.get(answer.headers["location"]).json()
    assert (found["status"], found["output"], found["workflow"]) == ("completed", {"n": [1, None, "ü"]}, "echo")
    assert shop.get(one["whole_id"]).result(timeout=1) == {"n": [1, None, "ü"]}


def test_the_same_key_gives_the_same_workflow(client: httpx.Client) -> None:
    one = started(client, "echo", key="order-1")
    again = client.post("/api/workflows", json={"workflow": "echo", "key": "order-1", "input": 2})
    assert again.status_code == 200
    assert again.json() == {**one, "is_new": False}


def test_whoever_waits_is_answered_when_it_ends(client: httpx.Client, shop: App) -> None:
    one = started(client, "echo", input="soon")
    runner = threading.Timer(0.3, lambda: shop.run(until_idle=True))
    runner.start()
    began = time.monotonic()
    found = client.get(at(one), params={"wait_s": 20}).json()
    runner.join()
    assert (found["status"], found["output"]) == ("completed", "soon")
    assert time.monotonic() - began < 15


def test_whoever_waits_is_answered_after_that_time_at_the_latest(client: httpx.Client) -> None:
    began = time.monotonic()
    assert client.get(at(started(client, "echo")), params={"wait_s": 0.2}).json()["status"] == "running"
    assert 0.2 <= time.monotonic() - began < 10


def test_those_who_wait_take_no_threads(url: str, client: httpx.Client) -> None:
    one = started(client, "echo")
    crowd = httpx.Client(base_url=url, headers=client.headers, timeout=40, limits=httpx.Limits(max_connections=None))
    waiting = [threading.Thread(target=crowd.get, args=(at(one),), kwargs={"params": {"wait_s": 2}}) for _ in range(50)]
    for thread in waiting:
        thread.start()
    began = time.monotonic()
    assert client.get("/api/workflows").status_code == 200
    assert time.monotonic() - began < 2, "a look had to wait for those who wait"
    for thread in waiting:
        thread.join()
    crowd.close()


def test_a_crowd_beyond_the_limit_is_answered_at_once(dsn: str, shop: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "WAITERS_MAX", 0)
    with served(dsn) as url, program(url, None) as client:
        began = time.monotonic()
        assert client.get(at(started(client, "echo")), params={"wait_s": 20}).json()["status"] == "running"
        assert time.monotonic() - began < 10


def test_a_signal_is_delivered_with_who_sent_it(client: httpx.Client, shop: App) -> None:
    one = started(client, "approval")
    shop.run(until_idle=True)
    (place,) = client.get(at(one)).json()["places"]
    assert place["place"] == "waiting"
    assert client.post(at(one, "/signal"), json={"name": "approved", "payload": {"by": "ada"}}).json() == {
        "has_changed": True
    }
    shop.run(until_idle=True)
    assert client.get(at(one)).json()["output"] == {"by": "ada"}


def test_what_is_on_its_way_to_a_workflow_is_not_where_it_stands(client: httpx.Client, shop: App) -> None:
    one = started(client, "approval")
    shop.run(until_idle=True)
    client.post(at(one, "/signal"), json={"name": "other"})
    client.post(at(one, "/cancel"))
    assert [place["place"] for place in client.get(at(one)).json()["places"]] == ["waiting"]


def test_a_cancel_ends_it_once(client: httpx.Client, shop: App) -> None:
    one = started(client, "approval")
    shop.run(until_idle=True)
    assert client.post(at(one, "/cancel"), json={"reason": "the customer left"}).json() == {"has_changed": True}
    shop.run(until_idle=True)
    found = client.get(at(one)).json()
    assert (found["status"], found["failure"]["reason"]) == ("cancelled", "the customer left")
    assert client.post(at(one, "/cancel")).json() == {"has_changed": False}


def test_a_stuck_one_is_found_retried_with_another_state_and_goes_on(client: httpx.Client, shop: App) -> None:
    one = started(client, "poisoned", input="poison")
    shop.run(until_idle=True)
    (letter,) = client.get("/api/dead-letters", params={"workflow": "poisoned"}).json()["dead_letters"]
    assert (letter["id"], letter["step"], letter["reason"]) == (one["id"], "swallow", "attempts")
    assert client.get(at(one), params={"wait_s": 20}).json()["status"] == "stuck"
    assert client.post(at(one, "/retry"), json={"state": "cured"}).json() == {"has_changed": True}
    shop.run(until_idle=True)
    assert client.get(at(one)).json()["output"] == "cured"
    assert "not stuck" in problem(client.post(at(one, "/retry")), 409)


def test_an_ended_one_is_replayed_and_forked_into_new_ones(client: httpx.Client, shop: App) -> None:
    one = started(client, "echo", input=1)
    shop.run(until_idle=True)
    replayed = client.post(at(one, "/replay"))
    forked = client.post(at(one, "/fork"), json={"input": 2})
    assert (replayed.status_code, forked.status_code) == (201, 201)
    shop.run(until_idle=True)
    assert [client.get(at(of.json())).json()["output"] for of in (replayed, forked)] == [1, 2]
    found = client.get("/api/workflows", params={"origin": one["id"]}).json()["workflows"]
    assert {of["id"] for of in found} == {replayed.json()["id"], forked.json()["id"]}


def test_a_replay_of_a_stuck_one_tells_its_whole_id_only_to_who_knows_it(client: httpx.Client, shop: App) -> None:
    one = started(client, "poisoned", input="poison")
    shop.run(until_idle=True)
    answer = client.post(at(one, "/replay"))
    assert (answer.status_code, answer.json()) == (200, {"id": one["id"], "is_new": False, "whole_id": None})


def test_one_that_goes_on_by_itself_is_not_replayed(client: httpx.Client) -> None:
    assert "cancel it first" in problem(client.post(at(started(client, "echo"), "/replay")), 409)


def test_a_history_has_the_points_of_a_fork(client: httpx.Client, viewer: httpx.Client, shop: App) -> None:
    one = started(client, "approval")
    shop.run(until_idle=True)
    client.post(at(one, "/signal"), json={"name": "approved", "payload": "yes"})
    client.post(at(one, "/cancel"))
    shop.run(until_idle=True)
    history = client.get(at(one, "/history")).json()
    assert history["has_values"]
    assert [of["path"] for of in history["awaits"]][:1] == ["1 sleep"]
    unseen = viewer.get(at(one, "/history")).json()
    assert not unseen["has_values"]
    assert {of["value"] for of in unseen["awaits"]} == {None}


def test_a_pause_holds_until_the_resume(client: httpx.Client, shop: App) -> None:
    one = started(client, "echo", input="late")
    assert client.post(at(one, "/pause")).json() == {"has_changed": True}
    assert client.post(at(one, "/pause")).json() == {"has_changed": False}
    shop.run(until_idle=True)
    assert client.get(at(one)).json()["status"] == "running"
    assert client.post(at(one, "/resume")).json() == {"has_changed": True}
    shop.run(until_idle=True)
    assert client.get(at(one)).json()["output"] == "late"


def test_lists_are_paged_without_losing_or_repeating_any(client: httpx.Client) -> None:
    ids = {started(client, "echo", attributes={"lot": n % 2})["id"] for n in range(23)}
    seen: list[str] = []
    after: dict[str, str] = {}
    for _ in range(10):
        page = client.get("/api/workflows", params={"limit": 5, **after}).json()
        seen += [one["id"] for one in page["workflows"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert len(seen) == len(ids)
    assert set(seen) == ids
    odd = client.get("/api/workflows", params={"attribute": "lot=1", "status": "running"}).json()["workflows"]
    assert {one["attributes"]["lot"] for one in odd} == {1}
    assert len(odd) == 11


def test_dead_letters_are_paged_too(client: httpx.Client, shop: App) -> None:
    for n in range(7):
        started(client, "poisoned", input=n)
        shop.run(until_idle=True)
    seen: list[str] = []
    after: dict[str, str] = {}
    for _ in range(7):
        page = client.get("/api/dead-letters", params={"limit": 2, **after}).json()
        seen += [one["id"] for one in page["dead_letters"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert (len(seen), len(set(seen))) == (7, 7)


def test_who_acted_is_on_record(client: httpx.Client, conn: psycopg.Connection) -> None:
    conn.execute("select durable.set_audit(true)")
    started(client, "echo", actor="ada")
    client.post(at(started(client, "echo"), "/cancel"), json={"actor": "grace"})
    rows = conn.execute("select what, actor from durable.audit_list() order by at, what").fetchall()
    assert {("start", "ada"), ("start", "api"), ("cancel", "grace")} <= set(rows)


# What it refuses.


def test_unknown_ids_all_read_the_same(client: httpx.Client) -> None:
    one = started(client, "echo")
    whole = one["whole_id"]
    other = whole[:12] + "".join("0" if digit != "0" else "1" for digit in whole[12:])
    unknown = {"id": "0" * 12}
    said = problem(client.get(at(unknown)), 404).replace(unknown["id"], "ID")
    for answer in (
        client.get(at(one), headers={"workflow-id": other}),
        client.get(at(one), headers={"workflow-id": "f" * 32}),
        client.get(at(unknown), headers={"workflow-id": whole}),
        client.get(at(unknown), headers={"workflow-id": "0" * 32}),
        client.post(at(unknown, "/signal"), json={"name": "x"}),
        client.post(at(unknown, "/retry")),
        client.post(at(unknown, "/fork")),
    ):
        told = problem(answer, 404).replace(one["id"], "ID").replace(unknown["id"], "ID")
        assert told == said


def test_what_begins_alike_is_told_apart_by_a_whole_id(client: httpx.Client, conn: psycopg.Connection) -> None:
    one = started(client, "echo")
    twin = one["id"] + f"{int(one['whole_id'][12:], 16) ^ (1 << 60):020x}"
    conn.execute(
        "insert into durable.started (id, day, workflow, version, input, at)"
        " select %s::uuid, s.day, s.workflow, s.version, s.input, s.at from durable.started s where s.id = %s::uuid",
        (twin, one["whole_id"]),
    )
    assert "2 workflows have the same first 12 digits" in problem(client.get(at(one)), 409)
    assert client.get(at(one), headers={"workflow-id": one["whole_id"]}).status_code == 200


@pytest.mark.parametrize(
    "text", ["0" * 11, "0" * 13, "0" * 32, "G" * 12, "0" * 5000, "..%2f..%2fetc", "%00", "%ff", "🦆" * 4]
)
def test_an_id_of_another_shape_is_refused_and_not_repeated(client: httpx.Client, text: str) -> None:
    answer = client.get(f"/api/workflows/{text}")
    assert answer.status_code in (400, 404, 422)
    assert text not in answer.text


def test_a_whole_id_in_an_address_is_refused(client: httpx.Client) -> None:
    assert "capability" in problem(client.get(f"/api/workflows/{started(client, 'echo')['whole_id']}"), 422)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 422, "workflow"),
        (b"{", 400, "JSON"),
        (b"\xff", 400, "JSON"),
        (b'{"workflow": "echo", "input": "\\ud800"}', 400, "JSON"),
        (b"[" * 100_000, 422, "object"),
        (b'{"workflow": "echo", "input": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", 400, "JSON"),
        (b"[]", 422, "object"),
        (b"{}", 422, "workflow"),
        (b'{"workflow": 3}', 422, "$.workflow"),
        (b'{"workflow": "Echo!"}', 422, "$.workflow"),
        (b'{"workflow": "echo", "inptu": 1}', 422, "inptu"),
        (b'{"workflow": "echo", "key": ""}', 422, "$.key"),
        (b'{"workflow": "echo", "key": "a\\u0000b"}', 422, "$.key"),
        (b'{"workflow": "echo", "attributes": {"a": [1]}}', 422, "attribute 'a'"),
        (b'{"workflow": "echo", "attributes": {"a b": 1}}', 422, "$.attributes"),
        (b'{"workflow": "echo", "input": 1e999}', 422, "range"),
        (b'{"workflow": "echo", "input": "' + b"a" * (300 << 10) + b'"}', 422, "limit"),
        (b'{"workflow": "unheard-of"}', 409, "unheard-of"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_its_path(
    client: httpx.Client, body: bytes, status: int, says: str
) -> None:
    answer = client.post("/api/workflows", content=body, headers={"content-type": "application/json"})
    assert says in problem(answer, status)
    assert client.get("/api/workflows").json()["workflows"] == []


def test_a_body_of_another_format_or_size_is_refused(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
        problem(client.post("/api/workflows", content=b'{"workflow": "echo"}', headers={"content-type": kind}), 415)
    problem(client.post("/api/workflows", content=b" " * (5 << 20), headers={"content-type": "application/json"}), 413)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("limit=ten", "limit"),
        ("limit=1&limit=2", "2 times"),
        ("status=asleep", "status"),
        ("sort=id", "sort"),
        ("after=nonsense", "after"),
        ("after=0-", "after"),
        ("started_from=yesterday", "started_from"),
        ("started_from=2030-01-01T00:00:00", "started_from"),
        ("parent=xyz", "parent"),
        ("attribute=novalue", "attribute"),
        ("workflow=%00", "workflow"),
        ("key=%00", "key"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(client: httpx.Client, query: str, says: str) -> None:
    assert says in problem(client.get(f"/api/workflows?{query}"), 422)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(client: httpx.Client, shop: App, text: str) -> None:
    one = started(client, "echo", key=text, attributes={"a": text}, input={text: text})
    started(client, "echo", key="another", attributes={"a": "else"})
    for params in ({"key": text}, {"attribute": f"a={text}"}):
        found = client.get("/api/workflows", params=params).json()["workflows"]
        assert [of["id"] for of in found] == [one["id"]]
    shop.run(until_idle=True)
    assert client.get(at(one)).json()["output"] == {text: text}


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", ""), ("PUT", "/0123456789ab"), ("GET", "/0123456789ab/cancel"), ("POST", "/0123456789ab/history")],
)
def test_another_method_is_told_which_there_are(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, f"/api/workflows{path}")
    problem(answer, 405)
    assert method not in answer.headers["allow"]
    assert {"GET", "POST"} & set(answer.headers["allow"].split(", "))


@pytest.mark.parametrize(
    "path", ["/api/", "/api/nothing", "/api/workflows/", "/api/workflows/0123456789ab/", "/api//workflows"]
)
def test_an_address_that_is_none_is_told_so(client: httpx.Client, path: str) -> None:
    problem(client.get(path), 404)


# What it never tells.


def test_whole_ids_are_told_to_who_starts_and_to_nobody_else(
    client: httpx.Client, viewer: httpx.Client, shop: App
) -> None:
    one = started(client, "poisoned", input="x")
    two = started(client, "echo")
    shop.run(until_idle=True)
    ids = (one["whole_id"], two["whole_id"])
    for who in (client, viewer):
        for path in (
            "/api/workflows",
            "/api/dead-letters",
            at(one),
            at(two),
            at({"id": "0" * 12}),
            at(one, "/history"),
        ):
            assert not [of for of in ids if of in who.get(path).text], path


def test_a_viewer_sees_no_values_but_of_what_it_holds_the_id_of(
    client: httpx.Client, viewer: httpx.Client, shop: App
) -> None:
    one = started(client, "echo", input="confidential")
    stuck = started(client, "poisoned", input="confidential")
    shop.run(until_idle=True)
    for of in (one, stuck):
        assert "confidential" not in viewer.get(at(of)).text
        held = viewer.get(at(of), headers={"workflow-id": of["whole_id"]})
        assert held.json()["has_values"]
        assert "confidential" in held.text


# The database's roles.


def test_it_does_what_its_database_role_may(dsn: str, shop: App, conn: psycopg.Connection) -> None:
    for role in ("durable_viewer", "durable_operator", "durable_client"):
        conn.execute(
            f"do $$ begin create role console_{role} login; exception when duplicate_object then null; end $$".encode()
        )
        conn.execute(f"grant {role} to console_{role}".encode())
    handle = shop.named("echo").start("confidential")
    one = {"id": handle.id[:12]}
    whole = {"workflow-id": handle.id}
    with served(make_conninfo(dsn, user="console_durable_viewer")) as url, program(url, None) as client:
        assert client.get("/api/workflows").json()["workflows"][0]["id"] == one["id"]
        for answer in (
            client.get(at(one)),
            client.post("/api/workflows", json={"workflow": "echo"}),
            client.post(at(one, "/cancel")),
        ):
            assert "role" in problem(answer, 403)
    with served(make_conninfo(dsn, user="console_durable_operator")) as url, program(url, None) as client:
        assert client.post(at(one, "/pause")).json() == {"has_changed": True}
        assert client.post(at(one, "/resume")).json() == {"has_changed": True}
        problem(client.get(at(one)), 403)
    with served(make_conninfo(dsn, user="console_durable_client")) as url, program(url, None) as client:
        assert started(client, "echo")["is_new"]
        problem(client.get(at(one)), 403)
        found = client.get(at(one), headers=whole).json()
        assert (found["status"], found["places"]) == ("running", [])
        problem(client.get("/api/workflows"), 403)


def test_a_look_cannot_change_anything_and_does_not_last(dsn: str) -> None:
    access = Access(dsn)
    access.open()
    try:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), access.connection() as connection:
            connection.execute("create table t ()")
        with pytest.raises(psycopg.errors.QueryCanceled), access.connection() as connection:
            connection.execute("set local statement_timeout = '20ms'")
            connection.execute("select pg_sleep(5)")
        with access.acting("ada") as connection:
            shown = connection.execute("select current_setting('durable.actor'), current_setting('statement_timeout')")
            assert shown.fetchone() == ("ada", "3s")
        with access.connection() as connection:
            assert connection.execute("select current_setting('durable.actor', true)").fetchone() in ((None,), ("",))
    finally:
        access.close()


def test_without_its_database_it_says_so(dsn: str) -> None:
    with served(make_conninfo(dsn, port="1"), operator_token=OPERATOR_TOKEN) as url, program(url) as client:
        said = problem(client.get("/api/workflows"), 503)
        assert "database" in said


def test_sessions_that_were_cut_are_opened_again(client: httpx.Client, conn: psycopg.Connection) -> None:
    assert client.get("/api/workflows").status_code == 200
    conn.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'durable-cluster console'"
    )
    assert client.get("/api/workflows").status_code == 200


# An App of the console's own.


def test_with_an_app_inputs_have_to_fit(dsn: str) -> None:
    app = App("typed", dsn=dsn)
    order = app.machine("order", state=Order)

    @order.step(start=True)
    def take(ctx: Context, order: Order) -> Continuation:
        return ctx.done(order.count)

    with served(dsn, app=app) as url, program(url, None) as client:
        wrong = client.post("/api/workflows", json={"workflow": "order", "input": {"article": "tea", "count": "two"}})
        assert "count" in problem(wrong, 422)
        one = started(client, "order", input={"article": "tea", "count": 2})
        app.run(until_idle=True)
        assert client.get(at(one)).json()["output"] == 2
    app.close()
