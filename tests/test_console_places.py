"""The console's pages beside workflows: they show what there is, do what they offer, and bear whatever is asked of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import psycopg
import pytest
from console import OPERATOR_TOKEN, VIEWER_TOKEN, browser, csrf_in, logged_in, served
from console_flows import HOSTILE, Flows
from psycopg.conninfo import make_conninfo

from durable_cluster import App, Context, Continuation, InputError, Retry
from durable_cluster.codec import Where
from durable_cluster.metrics import Families, put_step_cpu
from durable_cluster.ops import costs, letters, processes, waiting
from durable_cluster.ops.console.pages.cost import costs_of, wal_between
from durable_cluster.ops.costs import Kept, Log, Logged, Reading
from durable_cluster.ops.letters import Filter
from durable_cluster.settings import MEANINGS, Settings
from durable_cluster.shards import metrics_page
from durable_cluster.shards.metrics_page import Address

WHOLE_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
FORM = re.compile(r'<form[^>]*method="post"[^>]*action="([^"]+)"')
PAGES = ("/waiting", "/due", "/dead-letters", "/dead-letters/retry", "/schedules", "/limits", "/pauses")
PAGES = (*PAGES, "/processes", "/cost", "/settings")
HOSTILE_TEXTS = (
    "'; drop table durable.started; --",
    "%' or 1=1",
    "\\",
    "\x00",
    "ü" * 5_000,
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "<script>alert(1)</script>",
    "-1",
    "9" * 40,
    "0-0",
    "ffffffffffffffff-ffffffffffffffff",
    "660d5a85f91d5-2c813d128038",
    "2030-01-01T00:00:00",
    "0001-01-01T00:00:00+23:59",
)
FILTERS = (
    *(("/waiting", name) for name in ("place", "workflow", "signal", "after")),
    *(("/due", name) for name in ("workflow", "after")),
    *(("/dead-letters", name) for name in ("workflow", "step", "reason", "before")),
    *(("/schedules", name) for name in ("workflow", "after")),
)


class Turned:
    """A codec that a console without it cannot read."""

    def encode(self, payload: bytes, where: Where, /) -> bytes:
        return payload[::-1]

    def decode(self, coded: bytes, where: Where, /) -> bytes:
        return coded[::-1]


@pytest.fixture
def flows(dsn: str) -> Iterator[Flows]:
    """A few of each, in the fresh database."""
    made = Flows(dsn)
    made.fill()
    yield made
    made.app.close()


@pytest.fixture
def console(dsn: str) -> Iterator[httpx.Client]:
    """An operator's browser at a console that wants no token."""
    with served(dsn) as url, browser(url) as client:
        yield client


def post(console: httpx.Client, page: str, action: str, **fields: str) -> httpx.Response:
    """Send a form that stands on a page; where it leads."""
    answer = console.post(action, data={"csrf": csrf_in(console.get(page)), **fields})
    assert answer.status_code == 303, answer.text
    return console.get(answer.headers["location"])


@pytest.mark.parametrize("path", PAGES)
def test_every_page_shows_an_empty_database(console: httpx.Client, path: str) -> None:
    assert console.get(path).status_code == 200


def test_every_page_shows_a_full_one_and_no_whole_id_and_nothing_of_it_as_markup(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    for path in (*PAGES, f"/dead-letters/{letter.id}", "/schedules/nightly", "/pauses"):
        page = console.get(path)
        assert page.status_code == 200, path
        assert not WHOLE_ID.search(page.text), path
        assert HOSTILE not in page.text, path
    assert "&lt;script&gt;" in console.get("/dead-letters").text


@pytest.mark.parametrize(("path", "name"), FILTERS)
def test_a_hostile_filter_finds_nothing_or_is_refused(console: httpx.Client, path: str, name: str) -> None:
    for text in HOSTILE_TEXTS:
        page = console.get(path, params={name: text})
        assert page.status_code in (200, 400, 422), (name, text)
        assert "<script>alert" not in page.text


@pytest.mark.parametrize("path", ["/dead-letters/{}", "/schedules/{}"])
@pytest.mark.parametrize("part", ["%00", "zz", "%2e%2e", "0" * 33, "0" * 12, "%C3%BC", "%ff", "nightly%0a"])
def test_a_hostile_path_is_refused(console: httpx.Client, path: str, part: str) -> None:
    assert console.get(path.format(part)).status_code in (400, 404)


def test_a_viewer_sees_every_page_without_a_form_and_without_states(
    flows: Flows, dsn: str, conn: psycopg.Connection
) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    paths = (*PAGES, f"/dead-letters/{letter.id}", "/schedules/nightly")
    with served(dsn, operator_token=OPERATOR_TOKEN, viewer_token=VIEWER_TOKEN) as url:
        with logged_in(url, VIEWER_TOKEN) as viewer:
            for path in paths:
                page = viewer.get(path)
                assert page.status_code == 200, path
                assert FORM.findall(page.text) == ["/logout"], path
            shown = viewer.get(f"/dead-letters/{letter.id}").text
            assert "&#34;bottle" not in shown
            assert "Traceback" not in shown
            csrf = csrf_in(viewer.get("/limits"))
            for action in (f"/dead-letters/{letter.id}/retry", "/pauses/pause", "/schedules/nightly/pause"):
                assert viewer.post(action, data={"csrf": csrf}).status_code == 403, action
        with logged_in(url, OPERATOR_TOKEN) as operator:
            assert len(FORM.findall(operator.get("/schedules/nightly").text)) > 3
            shown = operator.get(f"/dead-letters/{letter.id}").text
            assert "&#34;bottle" in shown
            assert "Traceback" in shown


@pytest.mark.parametrize(
    ("role", "refused"),
    [
        # Who may only list is shown no single dead letter: that is an operator's.
        ("durable_viewer", {"/dead-letters/{}"}),
        ("durable_operator", set()),
    ],
)
def test_every_page_works_for_a_role_of_the_database_that_may_only_look(
    flows: Flows, dsn: str, conn: psycopg.Connection, role: str, refused: set[str]
) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    with served(make_conninfo(dsn, options=f"-c role={role}")) as url, browser(url) as client:
        for path in (*PAGES, "/schedules/nightly", "/dead-letters/{}"):
            page = client.get(path.format(letter.id))
            assert page.status_code == (403 if path in refused else 200), (path, page.text)


def test_a_whole_id_in_what_a_step_said_or_in_a_key_is_in_no_list(flows: Flows, console: httpx.Client) -> None:
    whole = flows.nap.start("well", key="nap of 0123456789abcdef0123456789abcdef").id
    flows.poison.start(f"no answer from {whole} or {UUID(whole)}")
    flows.run()
    for path in ("/", "/dead-letters", "/workflows", f"/workflows/{whole[:12]}"):
        page = console.get(path).text
        assert not WHOLE_ID.search(page), path
        assert str(UUID(whole)) not in page, path


# What stands still.


def test_what_stands_still_comes_the_longest_first_and_page_by_page_whole(
    flows: Flows, conn: psycopg.Connection
) -> None:
    whole = waiting.waiting(conn, limit=1_000)
    assert len(whole) == 4 + 3 + 1 + 3
    assert [one.since for one in whole] == sorted(one.since for one in whole)
    found: list[str] = []
    after = None
    while page := waiting.waiting(conn, limit=2, after=after):
        found += [one.id for one in page]
        after = page[-1].cursor
    assert found == [one.id for one in whole]


def test_what_stands_still_is_found_by_place_type_and_signal(flows: Flows, conn: psycopg.Connection) -> None:
    orders = waiting.waiting(conn, place="waiting", limit=100)
    assert {(one.workflow, one.step, *(one.signals or ())) for one in orders} == {
        ("order", "decided", "approved", "rejected")
    }
    assert waiting.waiting(conn, signal="rejected", limit=100) == orders
    assert waiting.waiting(conn, signal="nobody", limit=100) == []
    (parent,) = waiting.waiting(conn, place="joining", limit=100)
    assert (parent.workflow, parent.children, parent.ended, parent.due) == ("family", 3, 0, None)
    assert len(waiting.waiting(conn, workflow="nap", limit=100)) == 6
    counted = {(one.workflow, one.place): one.workflows for one in waiting.types(conn)}
    assert counted == {("nap", "sleeping"): 6, ("order", "waiting"): 4, ("family", "joining"): 1}


def test_of_many_that_stand_still_some_are_counted_by_type_and_all_are_estimated(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into durable.wait (id, seq, line, due, since, names)"
        " select i, 2, durable.line(i, 2, 'crowd', 'go_on', 1, '{}'), 'infinity', now() - interval '1 year', '{approved}'"
        " from (select gen_random_uuid() i from generate_series(1, 12000)) q"
    )
    conn.execute("analyze durable.wait")
    assert sum(one.workflows for one in waiting.types(conn)) == waiting.COUNTED_MAX
    page = console.get("/waiting").text
    assert "of the first 10,000 that were found" in page
    assert re.search(r"Waiting for a signal</a></span><span class=\"value\">12,004<", page)


def test_what_is_due_next_comes_by_its_time_without_waits_that_are_over(flows: Flows, conn: psycopg.Connection) -> None:
    whole, following = waiting.due_next(conn, limit=100)
    assert following is None
    assert [one.what for one in whole] == ["timeout"] * 4 + ["sleep"] * 6
    assert [one.due for one in whole] == sorted(one.due for one in whole)
    conn.execute("select durable.signal(w.id, 'approved', '1') from durable.wait w where w.names <> '{}' limit 1")
    flows.run()
    assert [one.what for one in waiting.due_next(conn, limit=100)[0]] == ["timeout"] * 3 + ["sleep"] * 6
    page, following = waiting.due_next(conn, limit=5)
    rest, last = waiting.due_next(conn, limit=100, after=following)
    assert [one.id for one in page + rest] == [one.id for one in waiting.due_next(conn, limit=100)[0]]
    assert last is None


def test_a_look_at_what_is_due_that_finds_too_little_says_where_to_go_on(
    flows: Flows, conn: psycopg.Connection
) -> None:
    """Timers whose waits are over are passed over, but not without an end."""
    conn.execute(
        "insert into durable.timer_0 (due, workflow_id, seq) select now() + interval '1 hour', gen_random_uuid(), 1"
        " from generate_series(1, 6000)"
    )
    found, following = waiting.due_next(conn, limit=5)
    assert (found, following is not None) == ([], True)
    found, _ = waiting.due_next(conn, limit=5, after=following)
    assert len(found) == 5


@pytest.mark.parametrize("cursor", ["x", "0", "0-", "-0", "0" * 17 + "-0", "'--"])
def test_a_cursor_that_is_none_is_refused(conn: psycopg.Connection, cursor: str) -> None:
    with pytest.raises(InputError):
        waiting.due_next(conn, limit=5, after=cursor)
    with pytest.raises(InputError):
        waiting.waiting(conn, limit=5, after=cursor)


# Dead letters.


def test_one_dead_letter_is_taken_up_again(flows: Flows, console: httpx.Client, conn: psycopg.Connection) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    path = f"/dead-letters/{letter.id}"
    flows.mended = {"bottle 0", "bottle 1", "bottle 2"}
    page = post(console, path, f"{path}/retry", seq=str(letter.seq))
    assert f"{letter.id} goes on in step" in page.text
    flows.run()
    assert letters.total(conn, Filter())[0] == 2
    assert console.get(path).status_code == 404


def test_a_dead_letter_is_not_taken_up_in_place_of_the_one_that_was_looked_at(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    path = f"/dead-letters/{letter.id}"
    csrf = csrf_in(console.get(path))
    answer = console.post(f"{path}/retry", data={"csrf": csrf, "seq": str(letter.seq + 1)})
    assert answer.status_code == 404
    assert letters.total(conn, Filter())[0] == 3


def test_no_more_dead_letters_are_counted_than_somebody_reads(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    fill = (
        "insert into durable.dead_letter (id, seq, workflow, step, attempt, reason, details, line, at)"
        " select gen_random_uuid(), 1, 'lost', 'find', 1, 'attempts', '{}', '{}', now() from generate_series(1, %s)"
    )
    conn.execute(fill, (10_000,))
    assert "10,000 dead letters like that" in console.get("/dead-letters?workflow=lost").text
    conn.execute(fill, (1,))
    assert "over 10,000 dead letters like that" in console.get("/dead-letters?workflow=lost").text
    assert "3 dead letters like that" in console.get("/dead-letters?workflow=poison").text
    page = console.get("/dead-letters/retry?workflow=lost").text
    assert "<b>over 10,000</b>" in page
    assert "Take over 10,000 workflows up again" in page
    assert letters.total(conn, Filter())[0] == 10_004


def test_a_workflow_is_ended_only_by_whoever_says_that_it_is_meant(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    path = f"/dead-letters/{letter.id}"
    csrf = csrf_in(console.get(path))
    assert console.post(f"{path}/end", data={"csrf": csrf}).status_code == 400
    other = {"csrf": csrf, "sure": "yes", "seq": str(letter.seq + 1)}  # another one than was looked at
    assert console.post(f"{path}/end", data=other).status_code == 409
    assert letters.total(conn, Filter())[0] == 3
    assert "has ended as failed" in post(console, path, f"{path}/end", sure="yes", seq=str(letter.seq)).text
    assert letters.total(conn, Filter())[0] == 2


def test_all_that_match_are_taken_up_again_after_a_look_at_how_many_and_none_that_came_later(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    path = "/dead-letters/retry?workflow=poison&step=drink"
    page = console.get(path)
    assert "Take 3 workflows up again" in page.text
    newest = re.search(r'name="newest" value="([^"]+)"', page.text)
    assert newest is not None
    flows.poison.start("bottle 9")
    flows.run()
    flows.mended = {f"bottle {n}" for n in range(10)}
    told = post(console, path, "/dead-letters/retry", workflow="poison", step="drink", newest=newest[1])
    assert "3 workflows go on" in told.text
    flows.run()
    assert [one.message for one in letters.listed(conn, Filter(), limit=9)] == [f"ValueError: {HOSTILE} bottle 9"]


def test_of_what_a_dead_letter_says_a_viewer_is_shown_the_beginning_alone(
    flows: Flows, dsn: str, conn: psycopg.Connection
) -> None:
    flows.poison.start(f"bottle of {'long ' * 100}")
    flows.run()
    path = f"/dead-letters/{letters.listed(conn, Filter(), limit=1)[0].id}"
    with served(dsn, operator_token=OPERATOR_TOKEN, viewer_token=VIEWER_TOKEN) as url:
        with logged_in(url, VIEWER_TOKEN) as viewer:
            assert viewer.get(path).text.count("long ") < 40
        with logged_in(url, OPERATOR_TOKEN) as operator:
            assert operator.get(path).text.count("long ") > 100


@pytest.mark.parametrize("app", [None, App("without-a-codec")])
def test_a_dead_letter_whose_state_cannot_be_read_is_retried_and_ended_all_the_same(
    dsn: str, conn: psycopg.Connection, app: App | None
) -> None:
    coded = App("coded", dsn=dsn, codec=Turned())
    poison = coded.machine("coded-poison", state=str)

    @poison.step(start=True, retry=Retry(attempts=1))
    def drink(ctx: Context, bottle: str) -> Continuation:
        raise ValueError(bottle)

    poison.start("bottle")
    coded.run(until_idle=True)
    letter = letters.listed(conn, Filter(), limit=1)[0]
    with served(dsn, app=app) as url, browser(url) as client:
        page = client.get(f"/dead-letters/{letter.id}")
    coded.close()
    assert page.status_code == 200
    assert "is coded" in page.text.partition("<h2>State</h2>")[2]
    assert "$coded" not in page.text
    assert FORM.findall(page.text) == [f"/dead-letters/{letter.id}/{action}" for action in ("retry", "end")]


def test_no_more_of_an_id_is_compared_than_everybody_sees(
    flows: Flows, console: httpx.Client, conn: psycopg.Connection
) -> None:
    letter = letters.listed(conn, Filter(), limit=1)[0]
    for rest in ("0" * 20, "f" * 20):
        assert console.get(f"/dead-letters/{letter.id}{rest}").status_code == 200


# Schedules.


def test_a_schedule_is_paused_with_a_reason_and_resumed(flows: Flows, console: httpx.Client) -> None:
    path = "/schedules/nightly"
    page = post(console, path, f"{path}/pause", reason="the report is wrong")
    assert "is paused" in page.text
    assert "the report is wrong" in page.text
    assert "Nothing while it is paused" in page.text
    assert "goes on" in post(console, path, f"{path}/resume").text
    assert flows.app.schedules.get("nightly").paused_at is None


def test_a_schedule_is_run_now_and_filled_in_and_its_runs_are_seen(flows: Flows, console: httpx.Client) -> None:
    path, now = "/schedules/nightly", datetime.now(UTC)
    assert "schedule &#39;nightly&#39; started" in post(console, path, f"{path}/trigger").text
    begin, end = (moment.strftime("%Y-%m-%dT%H:%M") for moment in (now - timedelta(days=3), now))
    assert "started 3 workflows" in post(console, path, f"{path}/backfill", begin=begin, end=end).text
    page = console.get(path).text
    assert page.count("nothing was started") == 7
    flows.run()


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("backfill", {"begin": "", "end": ""}),
        ("backfill", {"begin": "yesterday", "end": "2030-01-01T00:00"}),
        ("backfill", {"begin": "0001-01-01T00:00", "end": "9999-12-31T23:59"}),
        ("backfill", {"begin": "0001-01-01T00:00", "end": "0001-01-02T00:00"}),
        ("backfill", {"begin": "9999-12-30T00:00", "end": "9999-12-31T23:59"}),
        ("backfill", {"begin": "2020-01-01T00:00", "end": "2026-01-01T00:00"}),
        ("trigger", {"overlap": "perhaps"}),
        ("pause", {"reason": "\x00"}),
        ("pause", {"reason": "r" * 5_000}),
    ],
)
def test_what_cannot_be_done_to_a_schedule_is_refused(
    flows: Flows, console: httpx.Client, action: str, fields: dict[str, str]
) -> None:
    csrf = csrf_in(console.get("/schedules/nightly"))
    answer = console.post(f"/schedules/nightly/{action}", data={"csrf": csrf, **fields})
    assert answer.status_code in (400, 422), answer.text


# Limits and pauses.


def test_a_limit_is_set_and_reset_while_steps_wait_for_it(flows: Flows, console: httpx.Client) -> None:
    assert re.search(r'data-label="waiting"[^>]*>2<', console.get("/limits").text)
    page = post(console, "/limits", "/limits/crawls/set", concurrency="2", rate="")
    assert "limit &#39;crawls&#39; is set" in page.text
    flows.run()
    assert not flows.app.list("crawl", status="running")
    assert "counts again as the code declares it" in post(console, "/limits", "/limits/crawls/reset").text


@pytest.mark.parametrize(
    "fields",
    [{}, {"concurrency": "-1"}, {"concurrency": "a"}, {"concurrency": "9" * 12}, {"rate": "lots"}, {"rate": "0/1s"}],
)
def test_a_limit_that_cannot_be_is_refused(flows: Flows, console: httpx.Client, fields: dict[str, str]) -> None:
    csrf = csrf_in(console.get("/limits"))
    assert console.post("/limits/crawls/set", data={"csrf": csrf, **fields}).status_code in (400, 422)


def test_a_type_and_a_shard_are_paused_and_resumed_and_a_workflow_is_resumed_by_its_digits(
    flows: Flows, console: httpx.Client
) -> None:
    assert "is paused" in post(console, "/pauses", "/pauses/pause", scope="type", name="quick").text
    assert "is paused" in post(console, "/pauses", "/pauses/pause", scope="shard", name="1").text
    handle = flows.order.start({"id": 9})
    handle.pause()
    page = console.get("/pauses").text
    assert all(f'name="name" value="{name}"' in page for name in ("quick", "1", handle.id[:12]))
    for scope, name in (("type", "quick"), ("shard", "1"), ("workflow", handle.id[:12])):
        assert "goes on" in post(console, "/pauses", "/pauses/resume", scope=scope, name=name).text
    assert "Nothing is paused" in console.get("/pauses").text


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, (400,)),
        ({"scope": "all", "name": "x"}, (400,)),
        ({"scope": "shard", "name": "99"}, (422,)),
        ({"scope": "type", "name": "no such name!"}, (422,)),
        ({"scope": "workflow", "name": "0" * 12}, (404,)),
        ({"scope": "workflow", "name": "zz"}, (400,)),
    ],
)
def test_what_cannot_be_paused_is_refused(
    console: httpx.Client, fields: dict[str, str], status: tuple[int, ...]
) -> None:
    csrf = csrf_in(console.get("/pauses"))
    assert console.post("/pauses/pause", data={"csrf": csrf, **fields}).status_code in status


# Processes, settings, costs.


def test_an_owner_without_a_session_is_told_to_be_gone(conn: psycopg.Connection, console: httpx.Client) -> None:
    assert "No process of a cluster is connected" in console.get("/processes").text
    with psycopg.connect(
        conn.info.dsn, autocommit=True, application_name=f"durable-cluster shard 1 c{255:016x}"
    ) as one:
        for owner in (255, 254):
            conn.execute(
                "insert into durable.win (batch, shard, owner, s0, s1, active)"
                " values (%s, 0, %s, pg_current_snapshot(), pg_current_snapshot(), now() - interval '20 seconds')",
                (owner, owner),
            )
        found = {found.role: found for found in processes.processes(one)}
        assert (found["consumer"].home, found["consumer"].shards, found["consumer"].windows) == (1, [0], 1)
        assert (found["gone"].windows, found["gone"].pid) == (1, None)
        assert (found["gone"].seconds or 0) > 19
        assert "gone, without a session" in console.get("/processes").text


def test_what_is_not_told_of_sessions_is_said_where_the_installer_may_not_see_it(
    dsn: str, conn: psycopg.Connection
) -> None:
    """Whoever looks may not see other roles' sessions either: that is not asked."""
    said = "States and addresses of other roles&#39; sessions are not shown"
    role = f"installer_{conn.info.dbname}"
    with served(make_conninfo(dsn, options="-c role=durable_operator")) as url, browser(url) as client:
        assert said not in client.get("/processes").text
        conn.execute(f"create role {role}; grant usage on schema durable to {role}")
        try:
            conn.execute(f"grant select on all tables in schema durable to {role}")
            conn.execute(f"grant execute on all functions in schema durable to {role}")
            conn.execute(f"alter function durable.processes() owner to {role}")
            page = client.get("/processes").text
            assert said in page
            assert f"grant pg_read_all_stats to {role}" in page
        finally:
            conn.execute(
                f"alter function durable.processes() owner to current_user; drop owned by {role}; drop role {role}"
            )


def test_every_setting_has_a_meaning_and_stands_on_the_page(console: httpx.Client) -> None:
    assert set(MEANINGS) == set(Settings.__struct_fields__)
    page = console.get("/settings").text
    assert all(f"<code>{name}</code>" in page for name in MEANINGS)


def test_the_settings_of_the_server_are_not_the_consoles_own_limits(dsn: str) -> None:
    with served(make_conninfo(dsn, options="-c statement_timeout=7s")) as url, browser(url) as client:
        page = client.get("/settings").text
    assert "<dt>statement_timeout</dt><dd>7000 ms</dd>" in page
    assert "<dt>idle_in_transaction_session_timeout</dt><dd>0 ms</dd>" in page
    assert re.search(r"<dt>shared_buffers</dt><dd>\d+[kMG]B</dd>", page)


def test_a_log_that_is_small_is_sampled_whole(flows: Flows, conn: psycopg.Connection) -> None:
    log = costs.log_of([part for shard in range(2) for part in costs.log_sample(conn, shard)])
    told = {one.workflow: one.lines for one in log.types}
    assert (told["quick"], told["order"], told["poison"]) == (60, 4, 3)
    (lines, size) = conn.execute(
        "select count(*), sum(octet_length(l))"
        " from (select ev_data from pgque.event_1 union all select ev_data from pgque.event_2) e,"
        " string_to_table(e.ev_data, E'\\n') l"
    ).fetchone() or (0, 0)
    assert (log.lines, log.bytes) == (lines, size)
    kept = {one.workflow: one for one in costs.kept_sample(conn)}
    assert (kept["quick"].workflows, kept["quick"].living) == (60, 0)
    assert (kept["order"].workflows, kept["order"].living) == (4, 4)


def test_what_is_recorded_for_timelines_is_an_entry_without_step_events(conn: psycopg.Connection) -> None:
    """The WAL of a step is what was written, over how many entries there are by how many step events one has."""
    line = '{"w":"' + "0" * 32 + '","n":1,"f":"quick","s":"s","v":1,"d":0}'
    for shard in range(2):
        conn.execute("select durable.append(%s, %s, 3)", (shard, "\n".join([line] * 3)))
        conn.execute("select durable.record_steps(%s, '{}', 3)", (shard,))
    log = costs.log_of([part for shard in range(2) for part in costs.log_sample(conn, shard)])
    assert (log.lines, log.entries, [one.workflow for one in log.types]) == (6, 4, ["quick"])
    assert costs.reading(conn).entries == 4


def test_a_large_log_is_estimated_from_a_part_of_it(conn: psycopg.Connection) -> None:
    line = '{{"w":"{}","n":1,"f":"{}","s":"s","v":1,"d":0}}'
    conn.execute(
        "insert into pgque.event_1_0 (ev_id, ev_type, ev_data, ev_extra1)"
        " select n, 'steps', case when n %% 4 = 0 then %s else %s end, '1' from generate_series(1, 40000) n",
        (line.format("0" * 32, "rare"), line.format("0" * 32, "common")),
    )
    log = costs.log_of(costs.log_sample(conn, 0))
    told = {one.workflow: one for one in log.types}
    assert 0.5 < log.lines / 40_000 < 2
    assert 0.15 < told["rare"].lines / log.lines < 0.35
    assert sum(one.sampled for one in log.types) < 10_000


def log(**types: tuple[float, float]) -> Log:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    return Log(
        types=[Logged(workflow=name, lines=lines, bytes=size, sampled=1) for name, (lines, size) in types.items()],
        entries=10,
        lines=sum(lines for lines, _ in types.values()),
        bytes=sum(size for _, size in types.values()),
        since=at,
        until=at + timedelta(seconds=100),
    )


def reading(seconds: float, wal_bytes: int, entries: int) -> Reading:
    return Reading(
        at=datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds), wal_bytes=wal_bytes, entries=entries
    )


def test_wal_is_divided_by_steps_and_among_types_by_their_bytes() -> None:
    of = log(large=(10, 3_000), small=(30, 1_000))
    wal = wal_between(reading(0, 0, 0), reading(10, 80_000, 100), of)
    assert wal is not None
    assert (wal.steps, wal.per_step) == (400, 200)  # an entry holds four steps
    large, small = costs_of(of, [], wal, {"large": 1.0, "small": 3.0})
    assert (large.share, large.steps_per_s, large.step_bytes, large.wal_bytes) == (0.75, 0.1, 300, 600)
    assert small.wal_bytes == pytest.approx(200 / 3)
    assert (large.cpu_share, small.cpu_share) == (0.25, 0.75)
    assert (large.steps * (large.wal_bytes or 0) + small.steps * (small.wal_bytes or 0)) / 40 == pytest.approx(200)


@pytest.mark.parametrize(
    ("first", "now"),
    [(None, reading(10, 1, 1)), (reading(0, 0, 0), reading(1, 9, 9)), (reading(0, 9, 0), reading(10, 1, 0))],
)
def test_nothing_is_said_of_wal_where_nothing_can_be(first: Reading | None, now: Reading) -> None:
    assert wal_between(first, now, log(one=(1, 1))) is None


def test_what_is_kept_and_not_in_the_log_any_more_has_a_row_too() -> None:
    kept = Kept(workflow="old", workflows=5, living=1, input_bytes=10, output_bytes=20, sampled=5)
    (one,) = costs_of(log(), [kept], None, {})
    assert (one.workflow, one.steps, one.step_bytes, one.kept_bytes, one.wal_bytes, one.cpu_share) == (
        "old",
        0,
        None,
        30,
        None,
        None,
    )


def test_the_processor_time_of_types_is_what_the_metrics_of_clusters_say(flows: Flows, dsn: str) -> None:
    families = Families()
    put_step_cpu(families, [{"order": 3.0, "nap": 0.5}, {"nap": 0.5}])
    with ExitStack() as stack:
        pages = [
            stack.enter_context(metrics_page.served(Address("127.0.0.1", 0), families=lambda: families, unread=list))
            for _ in range(2)
        ]
        urls = (*(f"http://{page.address}/metrics" for page in pages), "http://127.0.0.1:1/metrics")
        client = stack.enter_context(browser(stack.enter_context(served(dsn, metrics=urls))))
        text = client.get("/cost").text
    shares = dict(re.findall(r'workflow=(\w+)">.*?"share of CPU" class="num">([^<]+)<', text, re.DOTALL))
    assert (shares["order"], shares["nap"], shares["quick"]) == ("75 %", "25 %", "0 %")
    assert "8.0 s went into steps" in text


def test_without_metrics_the_page_says_where_the_processor_time_is_told(console: httpx.Client) -> None:
    assert "name it with --metrics-from" in console.get("/cost").text


def test_figures_are_taken_once_for_all_who_look(
    flows: Flows, console: httpx.Client, eventually: Callable[..., None]
) -> None:
    first = console.get("/cost").text
    flows.quick.start_many(list(range(50)))
    flows.run()
    assert console.get("/cost").text == first
