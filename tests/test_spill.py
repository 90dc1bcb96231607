"""What linear workflows have on record and do not carry: written with its step event or not at all, read again, and collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import psycopg
import pytest

from durable_cluster import (
    App,
    BatchLost,
    Context,
    InputError,
    Retry,
    Settings,
    TerminalError,
    Where,
    WorkflowStuck,
    continue_as_new,
    gather,
    loop,
    memo,
    patched,
    scope,
    side_effect,
    side_statements,
    sleep,
    statements,
    wait_for,
)
from durable_cluster.chunks import Chunks
from durable_cluster.envelope import decode_line
from durable_cluster.memo import Spilled
from durable_cluster.shards import maintenance, upkeep
from durable_cluster.testing import histories

Connection = psycopg.Connection[Any]
LIMIT = Settings().payload_bytes_max
ONCE = Retry(attempts=1)

HOW = {
    "resumed": Settings(run_ahead_ms=0),
    "entered anew": Settings(functions_max=0, run_ahead_ms=0),
    "run ahead": Settings(),
}


@pytest.fixture(params=HOW)
def app(request: pytest.FixtureRequest, dsn: str) -> Iterator[App]:
    """Its functions are kept between two steps, or never; or run ahead where they can."""
    app = App("spill", dsn=dsn, settings=HOW[request.param])
    yield app
    app.close()


@pytest.fixture
def forgetful(dsn: str) -> Iterator[App]:
    """Each step event enters the function anew."""
    app = App("spill", dsn=dsn, settings=HOW["entered anew"])
    yield app
    app.close()


def ran(app: App, handle: Any) -> Any:
    app.run(until_idle=True)
    return handle.result(timeout=1)


def one(conn: Connection, query: str, *arguments: object) -> Any:
    row = conn.execute(query.encode(), arguments or None).fetchone()
    assert row is not None
    return row[0]


def rows(conn: Connection) -> int:
    return int(one(conn, "select count(*) from durable.spill"))


def written(conn: Connection) -> int:
    """Bytes of all step events, and of all chunks."""
    logs = conn.execute("select ev_data from pgque.event_1 union all select ev_data from pgque.event_2").fetchall()
    return sum(len(text) for (text,) in logs) + int(
        one(conn, "select coalesce(sum(octet_length(body)), 0) from durable.spill")
    )


def states(conn: Connection) -> list[bytes]:
    """Of all step events that the logs hold."""
    logs = conn.execute("select ev_data from pgque.event_1 union all select ev_data from pgque.event_2").fetchall()
    return [bytes(decode_line(line).state) for (text,) in logs for line in text.split("\n")]


def rotated(conn: Connection) -> None:
    """All three tables, whether it is worth it or not."""
    for _ in range(3):
        assert upkeep.rotate_spill(conn) >= 0


def test_many_small_results_are_written_once_and_no_event_carries_more_than_a_few_of_them(
    app: App, conn: Connection
) -> None:
    @app.step
    def fetch(n: int) -> str:
        return f"{n:0100d}"

    @app.workflow
    async def many(count: int) -> int:
        return sum([int(await fetch(n)) for n in range(count)])

    count = 300
    assert ran(app, many.start(count)) == sum(range(count))
    assert max(map(len, states(conn))) < 8_192 + 500
    assert written(conn) < count * 6_000


def test_large_results_go_from_step_to_step_and_no_event_carries_what_is_recorded(app: App, conn: Connection) -> None:
    @app.step
    async def fetch(n: int) -> str:
        return str(n) * 100_000

    @app.step
    def joined(first_one: str, second: str) -> str:
        return first_one[:1] + second[:1]

    @app.workflow
    async def large(text: str) -> list[str]:
        pages = [await fetch(n) for n in range(4)]
        both = await joined(pages[1], pages[3])
        await sleep("1ms")
        more = await gather(*(fetch(n) for n in range(20)))
        await sleep("1ms")
        return [text[:1], both, *(page[:1] for page in more), *(page[-1:] for page in pages)]

    found = ran(app, large.start("x" * 200_000))
    assert found == ["x", "13", *(str(n)[:1] for n in range(20)), *"0123"]
    waiting = [state for state in states(conn) if state[:1] == b"{" and b'"4.1 fetch"' not in state]
    large = [state for state in waiting if len(state) > 3_000]
    assert [b" joined" in state for state in large] == [True] * len(large), "the step whose arguments they are"
    assert len(waiting) > 5


def test_a_result_and_an_argument_may_be_as_large_as_a_payload_and_no_larger(app: App) -> None:
    @app.step
    def made(size: int) -> str:
        return "x" * (size - 2)

    @app.step(retry=ONCE)
    def told(text: str) -> int:
        return len(text)

    @app.workflow
    async def edge(size: int) -> int:
        small = [await made(100) for _ in range(30)]
        return await told(await made(size)) + len(small)

    @app.workflow
    async def asked(size: int) -> int:
        return await told("x" * (size - 2))

    assert ran(app, edge.start(LIMIT)) == LIMIT + 28
    assert ran(app, asked.start(LIMIT)) == LIMIT - 2
    for workflow in (edge, asked):
        handle = workflow.start(LIMIT + 1 + 4 * (workflow is asked))
        app.run(until_idle=True)
        with pytest.raises(WorkflowStuck, match=r"the limit is 262,144; store them, and (return|pass) a reference"):
            handle.result(timeout=1)


def test_a_memo_may_have_so_many_bytes_and_no_more_and_the_error_says_what_to_do(dsn: str) -> None:
    def app_of(bytes_max: int) -> App:
        app = App("spill", dsn=dsn, settings=Settings(memo_bytes_max=bytes_max, run_ahead_ms=0))

        @app.step(retry=ONCE)
        def fetch(n: int) -> str:
            return "x" * (3_000 - len(f'["{n} fetch",""]') - 1)

        @app.workflow
        async def long(count: int) -> int:
            found = len([await fetch(n + 1) for n in range(count)])
            await sleep("1ms")
            return found

        return app

    app = app_of(29_999)
    handle = app.named("long").start(10)
    app.run(until_idle=True)
    with pytest.raises(WorkflowStuck) as stuck:
        handle.result(timeout=1)
    for said in (
        "workflow 'long'",
        "30,000 bytes",
        "by 'fetch' at await 10",
        "29,999 (memo_bytes_max)",
        "loop()",
        "scope()",
    ):
        assert said in stuck.value.reason
    app.close()
    app = app_of(30_000)
    handle.retry()
    assert ran(app, handle) == 10
    app.close()


def test_what_a_turn_of_a_loop_recorded_is_garbage_when_the_next_begins(app: App, conn: Connection) -> None:
    sizes: list[int] = []

    @app.step
    async def fetch(ctx: Context, n: int) -> str:
        sizes.append(len(bytes(ctx.envelope.state)))
        return "x" * (3_000 + n)

    @app.workflow
    async def agent(turns: int) -> list[int]:
        before = [len(await fetch(n)) for n in range(3)]
        async for turn in loop("-" * 2_500):
            sum([len(await fetch(n)) for n in range(3)])
            assert len(await scope(twice)) == 6_000
            turn.state = turn.state[:2_500] + str(turn.number)
            if turn.number == turns:
                break
        return [*before, len(turn.state), len(await fetch(0))]

    async def twice() -> str:
        return "".join([await fetch(0), await fetch(0)])

    turns = 12
    handle = agent.start(turns)
    assert ran(app, handle) == [3_000, 3_001, 3_002, 2_502, 3_000]
    assert max(sizes) < 9_000
    counting = one(
        conn,
        "select sum(length(body)) from durable.chunks_of(%s, (select ref from durable.spill order by at desc limit 1))",
        handle.id,
    )
    assert counting < 60_000, "of some 250,000"


def test_a_loop_or_a_new_run_that_records_nothing_large_any_more_leaves_nothing_behind(
    app: App, conn: Connection
) -> None:
    @app.step
    async def fetch(n: int) -> str:
        return str(n) * 5_000

    @app.workflow
    async def looping(_: int) -> str:
        async for turn in loop(0):
            if turn.number == 0:
                turn.state = sum([len(await fetch(n)) for n in range(3)])
            else:
                await wait_for("go")
                return str(turn.state)
        return ""

    @app.workflow
    async def anew(run: int) -> str:
        if run == 1:
            await wait_for("go")
            return "15000"
        return continue_as_new(sum([len(await fetch(n)) for n in range(3)]) // 15_000)

    handles = [looping.start(0), anew.start(0)]
    app.run(until_idle=True)
    rotated(conn)
    assert one(conn, "select count(*) from durable.spill where body is not null") == 0
    for handle in handles:
        handle.signal("go")
        assert ran(app, handle) == "15000"


def test_continued_as_new_nothing_of_the_run_before_is_read(app: App, conn: Connection) -> None:
    @app.step
    async def fetch(run: int, n: int) -> str:
        return f"{run}{n}" * 1_500

    @app.workflow
    async def again(run: int) -> list[str]:
        pages = [await fetch(run, n) for n in range(3 - run)]
        await sleep("1ms")
        if run < 2:
            continue_as_new(run + 1)
        return [page[:2] for page in pages]

    assert ran(app, again.start(0)) == ["20"]


def test_a_dead_letter_keeps_what_it_refers_to_through_a_retry_with_its_state_or_an_edited_one(
    app: App, conn: Connection
) -> None:
    is_broken = [True]

    @app.step
    async def fetch(n: int) -> str:
        return str(n) * 5_000

    @app.step(retry=ONCE)
    def judge(text: str, limit: int) -> str:
        if is_broken[0] and limit < 5:
            raise ValueError("too strict")
        return text

    @app.workflow
    async def case(text: str) -> list[str]:
        pages = [await fetch(n) for n in range(3)]
        verdict = await judge("guilty", 1)
        return [text[:3], verdict, *(page[0] for page in pages)]

    handle, edited = case.start("why" * 1_000), case.start("why" * 1_000)
    app.run(until_idle=True)
    rotated(conn)
    shown = msgspec.json.decode(one(conn, "select durable.dead_letter_state(%s)", edited.id))
    assert shown["a"][1] == ["guilty", 1], "what is to be mended stands in the letter"
    shown["a"][1] = ["free", 9]
    edited.retry(state=shown)
    assert ran(app, edited) == ["why", "free", "0", "1", "2"]
    rotated(conn)
    is_broken[0] = False
    handle.retry()
    assert ran(app, handle) == ["why", "guilty", "0", "1", "2"]


def test_a_state_whose_chunks_are_gone_is_a_dead_letter_that_says_so(forgetful: App, conn: Connection) -> None:
    @forgetful.step
    async def fetch(n: int) -> str:
        return str(n) * 5_000

    @forgetful.workflow
    async def waiting(_: int) -> str:
        page = await fetch(1)
        await wait_for("go")
        return page[:1]

    handle = waiting.start(0)
    forgetful.run(until_idle=True)
    conn.execute("truncate durable.spill_0")
    handle.signal("go")
    forgetful.run(until_idle=True)
    with pytest.raises(WorkflowStuck, match="of 1 chunks 0 were found"):
        handle.result(timeout=1)


def test_a_cancelled_workflow_cleans_up_with_what_it_has_on_record_also_from_within_a_gather(app: App) -> None:
    undone: list[str] = []

    @app.step
    async def fetch(n: int) -> str:
        return str(n) * 5_000

    @app.step
    async def undo(text: str) -> None:
        undone.append(text[:1])

    @app.workflow
    async def flow(text: str) -> None:
        pages = [await fetch(n) for n in range(3)]
        try:
            await wait_for("never")
        finally:
            await gather(*(undo(page) for page in [text, *pages]))

    handle = flow.start("i" * 3_000)
    app.run(until_idle=True)
    handle.cancel("enough")
    app.run(until_idle=True)
    assert sorted(undone) == ["0", "1", "2", "i"]
    assert handle.status() == "cancelled"


def test_what_was_recorded_without_a_step_is_read_again_too(app: App) -> None:
    drawn: list[str] = []

    def draw() -> str:
        drawn.append("x")
        return str(len(drawn)) * 1_000

    @app.step
    async def same(text: str) -> str:
        return text

    @app.workflow
    async def flow(_: int) -> list[str]:
        found = []
        for n in range(20):
            found.append(side_effect(draw))
            await same(str(n))
            assert patched("always")
        await sleep("1ms")
        return [one[0] for one in found]

    expected = [str(n)[0] for n in range(1, 21)]
    assert ran(app, flow.start(0)) == expected
    assert len(drawn) == 20


def test_a_failure_that_is_caught_is_recorded_with_what_else_the_workflow_says(app: App, conn: Connection) -> None:
    @app.step(retry=ONCE)
    async def fetch(n: int) -> str:
        if n == 2:
            raise ValueError("y" * 4_000)
        return "x" * 4_000

    @app.workflow
    async def flow(_: int) -> list[str]:
        found = []
        for n in range(5):
            try:
                found.append((await fetch(n))[0])
            except ValueError as error:
                found.append(str(error)[0])
        return found

    assert ran(app, flow.start(0)) == ["x", "x", "y", "x", "x"]


def test_all_that_is_recorded_can_be_read_from_a_state(app: App, conn: Connection) -> None:
    @app.step
    def fetch(n: int) -> str:
        return str(n) * 500

    @app.workflow
    async def flow(text: str) -> None:
        for n in range(30):
            await fetch(n % 10)
        await wait_for("go")

    handle = flow.start("x" * 4_000)
    app.run(until_idle=True)
    line = decode_line(one(conn, "select line from durable.wait where id = %s", handle.id))
    carried = memo.carried_decoder.decode(line.state)
    assert carried.chain is not None
    assert carried.chain.chunks >= 1
    entries = Chunks(app, "flow", handle.id).all_entries(carried)
    assert [(entry.key, msgspec.json.decode(entry.value)[:1]) for entry, _ in entries] == [
        (f"{n + 1} fetch", str(n % 10)) for n in range(30)
    ]


# In one transaction with the step event.


def spilled(number: int, *, ref: int = 0, text: str = "", of: str = "ab" * 16) -> Spilled:
    return Spilled(of, number, ref, text)


def test_a_page_that_is_lost_leaves_no_chunk(conn: Connection, app: App) -> None:
    @app.step
    async def fetch() -> str:
        return "x" * 5_000

    @app.workflow
    async def flow() -> str:
        return await fetch()

    flow.start()
    shard = int(
        one(conn, "select s.shard from durable.started w join durable.slot s on s.slot = durable.slot_of(w.id)")
    )
    statements.join_shard(conn, shard, "m")
    text = statements.claim(conn, shard, member="m", owner=1, lines_max=10, bytes_max=1 << 20)
    assert text is not None
    batch = msgspec.json.decode(text.partition("\n")[0])["batch"]
    what: dict[str, Any] = {
        "shard": shard,
        "batch": batch,
        "done": "(0,0,0)",
        "next_cursor": "(0,0,1)",
        "is_last": False,
    }
    nothing: dict[str, Any] = {"steps": "", "counts": [], "outcomes": [], "is_fenced": False}
    rows_of = [spilled(0, ref=7, text="{}")]
    with pytest.raises(BatchLost):
        statements.commit_page(conn, owner=2, **what, **nothing, spilled=rows_of)
    assert rows(conn) == 0
    statements.commit_page(conn, owner=1, **what, **nothing, spilled=rows_of)
    assert rows(conn) == 1


def test_a_page_without_anything_to_spill_is_still_one_statement_and_one_with_is_too(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App("spill", dsn=dsn, settings=Settings(run_ahead_ms=0))

    @app.step
    def fetch(size: int) -> str:
        return "x" * size

    @app.workflow
    async def flow(size: int) -> int:
        return len([await fetch(size) for _ in range(3)])

    called: list[int] = []
    commit = statements.commit_page

    def commit_page(tx: Any, **what: Any) -> None:
        called.append(len(what["spilled"]))
        assert not what["is_fenced"]
        commit(tx, **what)

    monkeypatch.setattr(statements, "commit_page", commit_page)
    for size, chunks in ((10, [0, 0, 0, 0]), (3_000, [0, 1, 1, 0])):
        called.clear()
        assert ran(app, flow.start(size)) == 3
        assert called == chunks
    app.close()


def test_a_line_without_a_workflows_id_does_not_stop_its_page(conn: Connection) -> None:
    with conn.transaction():
        statements.hand_on(
            conn,
            shard=0,
            steps="",
            counts=[],
            outcomes=[],
            spilled=[spilled(0, text="{}", of="not an id " + "x" * 22), spilled(0, ref=1, text='{"b":0}')],
        )
    assert rows(conn) == 1


# Rotation.


@pytest.fixture
def living(forgetful: App) -> Iterator[Any]:
    """Starts a workflow that has three chunks, and waits."""

    @forgetful.step
    async def fetch(n: int) -> str:
        return str(n) * 5_000

    @forgetful.workflow
    async def flow(_: int) -> str:
        pages = [await fetch(n) for n in range(3)]
        await wait_for("go")
        pages += [await fetch(n) for n in range(3, 5)]
        return "".join(page[0] for page in pages)

    def start() -> Any:
        handle = flow.start(0)
        forgetful.run(until_idle=True)
        return handle

    yield start


def test_a_rotation_keeps_what_lives_and_lets_go_of_what_has_ended(
    forgetful: App, conn: Connection, living: Callable[[], Any]
) -> None:
    ends, lives = living(), living()
    assert rows(conn) == 6
    ends.signal("go")
    assert ran(forgetful, ends) == "01234"
    for _ in range(100):
        assert upkeep.rotate_spill(conn) >= 0
    assert conn.execute("select distinct durable.hex(id), count(*) over () from durable.spill").fetchall() == [
        (lives.id, 3)
    ]
    lives.signal("go")
    assert ran(forgetful, lives) == "01234"
    rotated(conn)
    assert rows(conn) == 0


def test_a_rotation_keeps_the_newest_of_what_was_written_anew(
    forgetful: App, conn: Connection, living: Callable[[], Any]
) -> None:
    handle = living()
    for number, ref in ((1, 21), (2, 22), (1, 31)):
        text = '{"b":1}'
        statements.hand_on(
            conn, shard=0, steps="", counts=[], outcomes=[], spilled=[spilled(number, ref=ref, text=text, of=handle.id)]
        )
        upkeep.rotate_spill(conn)
    rotated(conn)
    kept = conn.execute("select number, ref from durable.spill order by number").fetchall()
    assert [number for number, _ in kept] == [0, 1]
    assert kept[1] == (1, 31)


def test_a_rotation_passes_by_a_table_with_a_chunk_in_flight_and_does_not_lose_it(
    dsn: str, conn: Connection, living: Callable[[], Any]
) -> None:
    handle = living()
    row = [spilled(3, ref=99, text='{"b":1}', of=handle.id)]
    with psycopg.connect(dsn) as page:
        statements.hand_on(page, shard=0, steps="", counts=[], outcomes=[], spilled=row)
        assert upkeep.rotate_spill(conn) == 0
        assert upkeep.rotate_spill(conn) == -1, "the page still writes to the oldest table"
        page.commit()
    rotated(conn)
    assert rows(conn) == 4
    assert one(conn, "select count(*) from durable.spill where ref = 99") == 1


def test_a_page_that_spills_while_a_rotation_is_on_its_way_waits_for_nobody(
    dsn: str, conn: Connection, living: Callable[[], Any]
) -> None:
    living()
    conn.execute("set lock_timeout = '10ms'")
    with psycopg.connect(dsn) as rotation:
        other = living()
        assert one(rotation, "select durable.rotate_spill()") >= 0
        row = [spilled(3, ref=99, text='{"b":1}', of=other.id)]
        statements.hand_on(conn, shard=0, steps="", counts=[], outcomes=[], spilled=row)
        rotation.commit()
    rotated(conn)
    assert rows(conn) == 3 + 4


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read", "serializable"])
def test_a_reentry_that_meets_a_rotation_reads_all_of_it(
    dsn: str,
    forgetful: App,
    conn: Connection,
    living: Callable[[], Any],
    eventually: Callable[..., None],
    isolation: str,
) -> None:
    """The reader's snapshot is older than the carrying, and its lock younger than the truncate."""
    handle = living()
    carried = memo.carried_decoder.decode(decode_line(one(conn, "select line from durable.wait")).state)
    upkeep.rotate_spill(conn)  # what is read stands in the oldest table now
    with (
        psycopg.connect(dsn) as rotation,
        psycopg.connect(dsn, autocommit=True) as reader,
        ThreadPoolExecutor(1) as pool,
    ):
        reader.execute("select set_config('default_transaction_isolation', %s, false)", (isolation.replace("_", " "),))
        assert one(rotation, "select durable.rotate_spill()") == 3

        class OfReader(Chunks):
            def read(self, ref: int) -> list[tuple[int, str]]:
                return side_statements.chunks_of(reader, self.workflow_id, ref)

        reading = pool.submit(OfReader(forgetful, "flow", handle.id).all_entries, carried)
        waits = "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
        eventually(lambda: one(conn, waits, reader.info.backend_pid))
        rotation.commit()
        assert [msgspec.json.decode(entry.value)[0] for entry, _ in reading.result(timeout=10)] == ["0", "1", "2"]


def test_a_reader_that_holds_on_makes_a_rotation_give_up_and_nothing_is_carried_twice(
    dsn: str, conn: Connection, living: Callable[[], Any]
) -> None:
    living()
    upkeep.rotate_spill(conn)
    with psycopg.connect(dsn) as reader:
        assert one(reader, "select count(*) from durable.spill") == 3
        assert upkeep.rotate_spill(conn) == -1
    assert rows(conn) == 3
    assert upkeep.rotate_spill(conn) == 3
    assert rows(conn) == 3


def test_two_rotations_at_once_are_one(dsn: str, conn: Connection, living: Callable[[], Any]) -> None:
    living()
    with psycopg.connect(dsn) as rotation:
        assert one(rotation, "select durable.rotate_spill()") == 0
        assert upkeep.rotate_spill(conn) == -1


def test_maintenance_rotates_when_half_of_the_bytes_are_garbage_and_not_before(dsn: str, conn: Connection) -> None:
    app = App("spill", dsn=dsn)

    @app.step
    async def fetch(n: int) -> list[int]:
        return [(n * 7919 + k * 104729) % 1_000_003 for k in range(15_000)]

    @app.workflow
    async def flow(count: int) -> int:
        found = [len(await fetch(n)) for n in range(count)]
        await wait_for("go")
        return sum(found)

    def needed() -> bool:
        return bool(one(conn, "select durable.needs_spill_rotation()"))

    assert not needed()
    handles = [flow.start(100) for _ in range(6)]
    app.run(until_idle=True)
    assert one(conn, "select durable.spill_bytes()") > 16 << 20
    assert not needed(), "all of it lives"
    for handle in handles[:4]:
        handle.signal("go")
    app.run(until_idle=True)
    assert needed()
    maintenance.run_once(conn)
    assert needed(), "the garbage stands in the table that was current"
    assert one(conn, "select chunks_carried from durable.maintain()") == 200
    assert not needed()
    assert rows(conn) == 200
    for handle in handles[4:]:
        handle.signal("go")
        assert ran(app, handle) == 1_500_000
    app.close()


class Backwards:
    """A codec that anybody can read who knows it."""

    def encode(self, payload: bytes, where: Where) -> bytes:
        return payload[::-1]

    def decode(self, coded: bytes, where: Where) -> bytes:
        return coded[::-1]


def test_chunks_go_through_the_codec_and_a_process_without_it_leaves_them_to_one_that_has_it(
    dsn: str, conn: Connection, eventually: Callable[..., None]
) -> None:
    def app_of(codec: Any) -> App:
        app = App("spill", dsn=dsn, codec=codec, settings=HOW["entered anew"])

        @app.step
        async def fetch(n: int) -> str:
            return f"secret {n} " * 500

        @app.workflow
        async def flow(text: str) -> str:
            pages = [await fetch(n) for n in range(3)]
            await wait_for("go")
            return text[:6] + "".join(page[7] for page in pages)

        return app

    app = app_of(Backwards())
    handle = app.named("flow").start("secret" * 500)
    app.run(until_idle=True)
    bodies = [body for (body,) in conn.execute("select body from durable.spill").fetchall()]
    assert len(bodies) == 4, "the input, and a page each"
    assert not any("secret" in body for body in bodies)
    assert all(body.startswith('{"$codec":"') for body in bodies)
    handle.signal("go")
    without = app_of(None)
    without.run(until_idle=True, timeout=0.5)
    assert handle.status() == "running"
    without.close()
    eventually(lambda: app.run(until_idle=True, timeout=1) >= 0 and handle.status() == "completed")
    assert handle.result(timeout=1) == "secret012"
    app.close()


def test_a_history_holds_all_that_is_recorded(forgetful: App, living: Callable[[], Any]) -> None:
    living()
    (history,) = histories.record(forgetful)
    carried = memo.carried_decoder.decode(history.state)
    assert carried.chain is None
    assert len(memo.decoded_entries(carried.entries)) == 3
    histories.check_replay(forgetful, history)


def test_a_large_memo_can_be_listed_and_forked_wherever_the_workflow_stands(app: App, conn: Connection) -> None:
    fetched: list[int] = []

    @app.step
    async def fetch(n: int) -> str:
        fetched.append(n)
        return str(n) * 3_000

    @app.workflow
    async def flow(text: str) -> str:
        drawn = side_effect(lambda: "s" * 3_000)
        pages = [await fetch(n) for n in range(2)]
        async for turn in loop(0):
            turn.state += len(await fetch(5 + turn.number))
            if turn.number == 2:
                break
        pages += [await fetch(n) for n in range(2, 4)]
        await wait_for("go")
        return text[:1] + drawn[:1] + "".join(page[0] for page in pages)

    handle = flow.start("i" * 3_000)
    app.run(until_idle=True)
    rotated(conn)
    paths = conn.execute("select path, status from durable.paths(%s)", (handle.id,)).fetchall()
    assert [path for path, _ in paths] == ["2 fetch", "3 fetch", "4~2.1 fetch", "4~2.2 fetch", "4~2.3 fetch", "now"]
    assert fetched == [0, 1, 5, 6, 7, 2, 3]
    forks = [handle.fork(at="4~2.3 fetch"), handle.fork(at="3"), handle.fork(at="now")]
    fetched.clear()
    app.run(until_idle=True)
    assert sorted(fetched) == sorted([3, 1, 5, 6, 7, 2, 3])
    for one_of in (handle, *forks):
        one_of.signal("go")
        assert ran(app, one_of) == "is0123"


def test_a_replay_begins_without_what_was_recorded(app: App, conn: Connection) -> None:
    is_broken = [True]

    @app.step
    async def fetch(n: int) -> str:
        return str(n) * 3_000

    @app.step(retry=ONCE)
    def judge() -> None:
        if is_broken[0]:
            raise ValueError("not yet")

    @app.workflow
    async def flow(_: int) -> str:
        pages = [await fetch(n) for n in range(3)]
        await judge()
        return "".join(page[0] for page in pages)

    handle = flow.start(0)
    app.run(until_idle=True)
    is_broken[0] = False
    handle.replay()
    rotated(conn)
    assert one(conn, "select count(*) from durable.spill where body is not null") == 0
    assert ran(app, handle) == "012"


@pytest.mark.parametrize(("size", "is_kept"), [(3_000, True), (200_000, False)])
def test_what_ends_is_kept_whole_or_not_at_all(app: App, conn: Connection, size: int, is_kept: bool) -> None:
    @app.step
    async def fetch(n: int) -> str:
        return str(n) * size

    @app.step(retry=ONCE)
    def judge(how: str) -> None:
        raise TerminalError("no") if how == "failed" else ValueError("no")

    @app.workflow
    async def flow(how: str) -> None:
        for n in range(3):
            await fetch(n)
        if how == "line":
            raise TerminalError("no")
        await judge(how)

    ends = [flow.start(how) for how in ("line", "failed", "purged")]
    app.run(until_idle=True)
    conn.execute("select durable.purge_dead_letter(%s)", (ends[2].id,))
    rotated(conn)
    for handle in ends:
        memo_kept = one(conn, "select memo from durable.finished where id = %s", handle.id)
        assert (memo_kept is not None) == is_kept
        if is_kept:
            carried = memo.carried_decoder.decode(memo_kept)
            assert carried.chain is None
            keys = [entry.key for entry, _ in memo.decoded_entries(carried.entries)]
            assert keys[:3] == ["1 fetch", "2 fetch", "3 fetch"]


def test_a_parent_has_more_children_than_its_state_has_room_for(dsn: str, conn: Connection) -> None:
    """When each was spawned is on record: some 20 bytes a child, which a state carried once, and was full of."""
    app = App("wide", dsn=dsn, settings=Settings(payload_bytes_max=12 << 10, functions_max=0))

    @app.workflow
    async def child(n: int) -> int:
        return n

    @app.workflow
    async def parent(n: int) -> int:
        return sum(await gather(*(child.spawn(k) for k in range(n))))

    handle = parent.start(1_500)
    app.run(until_idle=True)
    assert handle.result(timeout=1) == sum(range(1_500))
    assert one(conn, "select max(octet_length(s::text)) from durable.spill s") > 2 * (12 << 10)
    app.close()


def test_states_that_were_written_before_there_were_chunks_are_read_as_ever(forgetful: App) -> None:
    carried = memo.carried_decoder.decode(b'{"i":1,"m":[["1 fetch",2]],"a":["2 fetch",[3]],"r":{"4 now":5},"k":6}')
    assert (bytes(carried.input), carried.chain, carried.spawned) == (b"1", None, 6)
    entries = Chunks(forgetful, "flow", "ab" * 16).all_entries(carried)
    assert [entry.key for entry, _ in entries] == ["1 fetch"]


def test_an_edited_state_without_input_and_without_chunks_is_refused(forgetful: App) -> None:
    @forgetful.step
    async def fetch(n: int) -> int:
        return n

    @forgetful.workflow
    async def flow(n: int) -> int:
        return await fetch(n)

    where = Where("flow", "state", "ab" * 16)
    with pytest.raises(InputError):
        forgetful.encoded_state("flow", "fetch", {"m": [], "a": ["1 fetch", [1]]}, where)
    assert forgetful.encoded_state("flow", "fetch", {"c": [1, 1, 10], "m": [], "a": ["1 fetch", [1]]}, where)
