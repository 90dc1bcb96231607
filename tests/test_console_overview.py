"""The overview and its live parts: what it tells, how often it asks, who follows."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator

import httpx
import msgspec
import psycopg
import pytest
from console import OPERATOR_TOKEN, logged_in, served
from console_shop import ESCAPED, SCRIPT, Shop

from durable_cluster.context import short_id
from durable_cluster.ops import looks
from durable_cluster.ops.console import live, shared
from durable_cluster.ops.console.access import Access
from durable_cluster.ops.console.live import Live
from durable_cluster.ops.console.pages.overview import PARTS
from durable_cluster.ops.console.pulse import Pulse
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.shared import Shared

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


@pytest.fixture
def pulse(dsn: str) -> Iterator[Pulse]:
    access = Access(dsn)
    access.open()
    yield Pulse(access)
    access.close()


def stale(pulse: Pulse) -> Pulse:
    """As if its last reading were a while ago."""
    pulse._shared._known = None
    return pulse


def test_the_overview_tells_what_stands_what_is_wrong_and_what_ended_badly(shop: Shop, client: httpx.Client) -> None:
    stuck, failed = shop.begun(shop.sour, 1), shop.begun(shop.fails, 1)
    shop.begun(shop.asks, 1)
    waiting = shop.asks.start(2)  # nobody has come by yet
    shop.app.named("asks").pause(actor=SCRIPT)
    text = client.get("/").text
    assert not WHOLE_ID.search(text)
    assert SCRIPT not in text
    for told in (
        f"sour {ESCAPED}",
        f"gave up {ESCAPED}",
        f"by {ESCAPED}",
        f'href="/workflows/{short_id(stuck.id)}"',
        f'href="/workflows/{short_id(failed.id)}"',
        f'href="/workflows/{short_id(waiting.id)}"',
        "no cluster is connected, and work waits",
        "durable-cluster start",
        '<div class="tile wrong"><span class="name"><a href="/dead-letters">Stuck</a></span><span class="value">1</span>',
        "nobody",
    ):
        assert told in text, told


def test_an_empty_database_has_an_overview_that_says_what_to_do(client: httpx.Client) -> None:
    text = client.get("/").text
    assert "Nothing ended badly" in text
    assert "No workflows yet" in text


def test_rates_are_of_what_happened_between_two_readings(shop: Shop, pulse: Pulse) -> None:
    first = pulse.overview()
    assert (first.steps.now, first.starts.now) == (None, None)
    shop.echo.start_many(list(range(500)))
    second = stale(pulse).overview()
    assert second.steps.now is not None
    seconds = (second.at - first.at).total_seconds()
    assert round(second.steps.now * seconds) == 500
    assert second.lag_events == 500
    shop.app.run(until_idle=True)
    assert stale(pulse).overview().lag_events == 0
    assert second.steps.spark.highest == second.steps.now


def test_step_events_are_counted_once_whoever_commits_late(dsn: str, shop: Shop, conn: psycopg.Connection) -> None:
    with psycopg.connect(dsn) as late:
        shop.echo.start("late", tx=late)
        shop.echo.start("early")
        snapshot = looks.beat(conn, since=None).snapshot
        shop.echo.start_many(list(range(5)))
        between = looks.beat(conn, since=snapshot)
        assert between.appended == 5
        late.commit()
    assert looks.beat(conn, since=between.snapshot).appended == 1
    assert looks.beat(conn, since=snapshot).appended == 6
    conn.execute("select durable.record_steps(0, '{}', 7)")  # records of a timeline are in the log, too
    assert looks.beat(conn, since=snapshot).appended == 6


def test_whoever_looks_at_once_shares_a_reading(pulse: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[object] = []
    beat = looks.beat
    monkeypatch.setattr(looks, "beat", lambda *a, **k: (readings.append(a), beat(*a, **k))[1])
    threads = [threading.Thread(target=pulse.overview) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(readings) == 1


def test_a_reading_that_failed_is_the_answer_to_whoever_comes_right_after() -> None:
    readings: list[float] = []

    def away() -> int:
        readings.append(time.monotonic())
        raise psycopg.OperationalError("away")

    kept = Shared(away, fresh_s=1.0)
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError):
            kept.newest()
    assert len(readings) == 1


def test_nobody_waits_long_for_the_reading_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PATIENCE_S", 0.01)
    began, goes_on = threading.Event(), threading.Event()

    def slow() -> int:
        began.set()
        assert goes_on.wait(20)
        return 1

    kept = Shared(slow, fresh_s=-1.0)
    reader = threading.Thread(target=kept.newest)
    reader.start()
    assert began.wait(20)
    with pytest.raises(Refused):  # nothing was read before
        kept.newest()
    goes_on.set()
    reader.join()
    goes_on.clear()
    began.clear()
    reader = threading.Thread(target=kept.newest)
    reader.start()
    assert began.wait(20)
    assert kept.newest() == 1
    monkeypatch.setattr(shared, "STALE_S", -1.0)
    with pytest.raises(Refused):
        kept.newest()
    goes_on.set()
    reader.join()


def test_the_live_parts_are_those_of_the_page_and_follow_what_changes(shop: Shop, client: httpx.Client) -> None:
    def events() -> Iterator[dict[str, str]]:
        with client.stream("GET", "/live") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield msgspec.json.decode(line.removeprefix("data: "))

    seen = events()
    first = next(seen)
    assert set(first) == set(PARTS)
    text = client.get("/").text
    assert all(f'id="{name}"' in text for name in PARTS)
    assert "No workflows yet" in first["newest"]
    handle = shop.begun(shop.sour, 1)
    deadline = time.monotonic() + 20
    while short_id(handle.id) not in (parts := next(seen))["ended"]:
        assert time.monotonic() < deadline
    assert f"sour {ESCAPED}" in parts["ended"]
    assert SCRIPT not in "".join(parts.values())
    assert not WHOLE_ID.search("".join(parts.values()))
    seen.close()


def test_nothing_is_read_while_nobody_follows_and_once_for_all_who_do() -> None:
    drawn = 0

    def draw() -> dict[str, str]:
        nonlocal drawn
        drawn += 1
        return {"part": f"<p>{drawn}</p>"}

    async def followed() -> None:
        board = Live(draw, every_s=0.01)
        await asyncio.sleep(0.05)
        assert drawn == 0
        streams = [board.follow() for _ in range(5)]
        for stream in streams:
            assert (await anext(stream)).startswith(b":")
        received = await asyncio.gather(*(anext(stream) for stream in streams))
        assert len(set(received)) == 1
        # One that does not read gets the newest in the end, and keeps nobody waiting.
        for _ in range(5):
            await anext(streams[0])
        assert msgspec.json.decode((await anext(streams[1])).partition(b"data: ")[2])["part"] != "<p>1</p>"
        for stream in streams:
            await stream.aclose()
        assert board._task is not None
        await asyncio.wait_for(board._task, 5)
        before = drawn
        await asyncio.sleep(0.05)
        assert drawn == before

    asyncio.run(followed())


def test_followers_are_limited_and_a_reading_that_fails_is_told_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FOLLOWERS_MAX", 2)

    def draw() -> dict[str, str]:
        raise psycopg.OperationalError("the server is gone, and its password is pass")

    async def followed() -> None:
        board = Live(draw, every_s=0.01)
        streams = [board.follow() for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Refused, match="follow this already"):
            board.follow()
        told = await anext(streams[0])
        assert told.startswith(b"event: wrong")
        assert b"the database is away" in told
        assert b"pass" not in told
        await streams[0].aclose()
        await anext(board.follow())  # there is room again
        await streams[1].aclose()

    asyncio.run(followed())


def test_a_stream_ends_so_that_whoever_follows_passes_the_gate_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "STREAM_S_MAX", 0.05)

    async def followed() -> int:
        board = Live(lambda: {"part": "x"}, every_s=0.01)
        return len([event async for event in board.follow()])

    assert 2 <= asyncio.run(followed()) < 100


def test_a_database_that_lacks_the_schema_gets_a_page_that_says_so(empty_dsn: str) -> None:
    with served(empty_dsn) as url, httpx.Client(base_url=url) as client:
        answer = client.get("/")
        assert answer.status_code == 503
        assert "durable-cluster init" in answer.text


def test_the_theme_is_what_the_cookie_says_and_nothing_else(client: httpx.Client) -> None:
    assert "data-theme" not in client.get("/").text.partition("</head>")[0]
    for cookie, shown in (("dark", 'data-theme="dark"'), ("light", 'data-theme="light"'), ('"><script>', None)):
        head = client.get("/", headers={"cookie": f"durable_theme={cookie}; {_cookies(client)}"}).text
        head = head.partition("</head>")[0]
        assert (shown in head) if shown else ("data-theme" not in head)


def _cookies(client: httpx.Client) -> str:
    return "; ".join(f"{name}={value}" for name, value in client.cookies.items())
