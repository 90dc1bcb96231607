"""One page, one set of successors: whoever lost a window commits nothing, however the race goes."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import psycopg
import pytest

from durable_cluster import App, BatchLost, Context, Continuation, Settings, statements
from durable_cluster.beside import Beside
from durable_cluster.consumer import Consumer
from durable_cluster.envelope import Page, decode_page
from durable_cluster.handoff import Window
from durable_cluster.page import PageRunner

SHARD = 0
LIMITS = {"lines_max": 1000, "bytes_max": 1 << 20}


class Count(msgspec.Struct):
    n: int


def walking(dsn: str, *, ends_at: int = 3, before: Callable[[Context], None] | None = None, **settings: int) -> App:
    """A machine that walks from n = 0 to its end; ``before`` is called by each plain step first."""
    app = App("walking", dsn=dsn, settings=Settings(takeover_probe_s=0, **settings))
    machine = app.machine("walk", state=Count)

    @machine.step(start=True)
    def walk(ctx: Context, at: Count) -> Continuation:
        if before is not None:
            before(ctx)
        return ctx.done(at.n) if at.n >= ends_at else ctx.goto(walk, Count(at.n + 1))

    return app


def in_shard(conn: psycopg.Connection, app: App, count: int) -> list[str]:
    """Start workflows until ``count`` of them live in SHARD; the ids of those."""
    machine = next(iter(app.machines.values()))
    query = "select s.shard from durable.slot s where s.slot = durable.slot_of(%s)"
    found: list[str] = []
    while len(found) < count:
        handle = machine.start(Count(0))
        if conn.execute(query, (handle.id,)).fetchone() == (SHARD,):
            found.append(handle.id)
    return found


class Reader:
    """One incarnation of a consumer on its own connection, one call at a time."""

    def __init__(self, dsn: str, app: App, owner: int) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.owner = owner
        self.beside = Beside(app.settings)
        self.runner = PageRunner(self.connection, app.machines, app.settings, self.beside)
        statements.join_shard(self.connection, SHARD, self.member)

    @property
    def member(self) -> str:
        return f"m{self.owner}"

    def claim(self, dead_s: float | None = None) -> Page | None:
        row = self.connection.execute(
            "select durable.claim(%s::int, %s, %s::bigint, 1000, 1048576, make_interval(secs => %s::float8))",
            (SHARD, self.member, self.owner, dead_s),
        ).fetchone()
        return decode_page(row[0]) if row and row[0] else None

    def take_over(self) -> Page:
        page = self.claim(dead_s=3600)
        assert page is not None
        return page

    def next_page(self, page: Page) -> Page:
        return decode_page(statements.page(self.connection, batch=page.header.batch, owner=self.owner, **LIMITS))

    def commit(self, page: Page) -> None:
        self.runner.run(Window(shard=SHARD, owner=self.owner), page)


@pytest.fixture
def reader(dsn: str) -> Iterator[Callable[..., Reader]]:
    made: list[Reader] = []

    def make(app: App, owner: int) -> Reader:
        made.append(Reader(dsn, app, owner))
        return made[-1]

    yield make
    for one in made:
        one.beside.close()
        one.connection.close()


def seqs_logged(conn: psycopg.Connection) -> Counter[int]:
    """How many step events of each step number stand in the log of SHARD."""
    return Counter(seq for (seq,) in conn.execute("select seq from durable.log(%s)", (SHARD,)))


def steps_logged(conn: psycopg.Connection) -> Counter[tuple[str, int]]:
    """How often each step event (truncated id, step number) stands in the log."""
    rows = conn.execute("select l.id, l.seq from durable.shard s, durable.log(s.shard) l").fetchall()
    return Counter(rows)


def is_waiting_for_a_lock(conn: psycopg.Connection, pid: int) -> bool:
    query = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
    return bool((conn.execute(query, (pid,)).fetchone() or [False])[0])


def test_a_process_stopped_between_its_handlers_and_its_commit_hands_nothing_on(
    dsn: str, conn: psycopg.Connection
) -> None:
    began, may_end = threading.Event(), threading.Event()

    def stop_here(_: Context) -> None:
        if threading.current_thread().name == "zombie":
            began.set()
            assert may_end.wait(20)

    app = walking(dsn, before=stop_here)
    in_shard(conn, app, 5)
    zombie, heir = (Consumer(dsn, SHARD, app.machines, app.settings) for _ in range(2))
    zombies_owner = zombie.owner
    thread = threading.Thread(target=zombie.work, args=(lambda: True, lambda: None), name="zombie")
    thread.start()
    assert began.wait(20)
    statements.abandon(conn, zombies_owner)
    assert heir.work(lambda: True, lambda: None)
    after_the_heir = steps_logged(conn)
    may_end.set()
    thread.join(20)
    assert steps_logged(conn) == after_the_heir
    assert set(after_the_heir.values()) == {1}
    assert zombie.owner != zombies_owner, "it comes back as somebody else"
    app.run(until_idle=True)
    assert set(steps_logged(conn).values()) == {1}
    zombie.close(), heir.close()


def test_a_window_taken_over_after_silence_is_lost_to_its_silent_owner(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 3)
    first, second = reader(app, 1), reader(app, 2)
    page = first.claim()
    assert page is not None
    assert second.claim(dead_s=3600) is None, "it is not silent yet"
    conn.execute("update durable.win set active = durable.now() - interval '2 hours'")
    taken = second.take_over()
    assert taken.lines == page.lines
    with pytest.raises(BatchLost):
        first.commit(page)
    second.commit(taken)
    with pytest.raises(BatchLost):
        first.commit(page)
    with pytest.raises(BatchLost):
        first.next_page(page)
    assert seqs_logged(conn) == {1: 3, 2: 3}


def test_a_takeover_passes_over_a_window_whose_commit_is_in_flight(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 3)
    first, second = reader(app, 1), reader(app, 2)
    page = first.claim()
    assert page is not None
    conn.execute("update durable.win set active = '-infinity'")
    second.connection.execute("set statement_timeout = '5s'")
    with first.connection.transaction():
        first.commit(page)
        assert second.claim(dead_s=3600) is None, "skipped, and not waited for"
    assert second.claim(dead_s=3600) is not None, "the successors are there once it has committed"
    assert seqs_logged(conn) == {1: 3, 2: 3}


def test_a_commit_waits_for_a_takeover_in_flight_and_then_gives_way(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader], eventually: Callable[..., None]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 3)
    first, second = reader(app, 1), reader(app, 2)
    page = first.claim()
    assert page is not None
    conn.execute("update durable.win set active = '-infinity'")
    with ThreadPoolExecutor() as pool:
        with second.connection.transaction():
            taken = second.take_over()
            late = pool.submit(first.commit, page)
            eventually(lambda: late.done() or is_waiting_for_a_lock(conn, first.connection.info.backend_pid))
            assert not late.done()
        with pytest.raises(BatchLost):
            late.result(20)
    second.commit(taken)
    assert seqs_logged(conn) == {1: 3, 2: 3}


def test_two_replays_of_one_page_by_the_same_owner_give_one_set_of_successors(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader], eventually: Callable[..., None]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 3)
    first, replay = reader(app, 1), reader(app, 1)
    page = first.claim()
    again = replay.claim()
    assert page is not None and again is not None
    assert again.lines == page.lines
    with ThreadPoolExecutor() as pool:
        with first.connection.transaction():
            first.commit(page)
            late = pool.submit(replay.commit, again)
            eventually(lambda: late.done() or is_waiting_for_a_lock(conn, replay.connection.info.backend_pid))
            assert not late.done()
        with pytest.raises(BatchLost):
            late.result(20)
    assert seqs_logged(conn) == {1: 3, 2: 3}


def test_a_part_of_a_page_that_is_committed_cannot_be_committed_again_by_its_own_owner(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader]
) -> None:
    app = walking(dsn, page_window_ms=0)
    in_shard(conn, app, 4)
    one, replay = reader(app, 1), reader(app, 1)
    page = one.claim()
    assert page is not None
    one.commit(page)
    with pytest.raises(BatchLost):
        replay.commit(page)
    logged = seqs_logged(conn)
    assert logged[1] == 4
    assert 1 <= logged[2] < 4, "the page was cut"
    while page is not None and not (page := one.next_page(page)).header.last:
        one.commit(page)


@pytest.mark.parametrize(
    ("batch", "owner", "cursor"),
    [(0, 1, None), (0, 0, "(0,0,1)"), (0, 0, "(999999999,0,0)"), (10**9, 0, None)],
    ids=["another owner", "a cursor further on", "a cursor of another time", "a batch that never was"],
)
def test_the_fence_refuses_whatever_differs_from_the_window(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader], batch: int, owner: int, cursor: str | None
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 1)
    page = reader(app, 1).claim()
    assert page is not None
    with pytest.raises(BatchLost), conn.transaction():
        statements.fence(conn, batch=page.header.batch + batch, owner=1 + owner, done=cursor or page.cursor(0))
    with conn.transaction():
        statements.fence(conn, batch=page.header.batch, owner=1, done=page.cursor(0))


def test_a_commit_without_its_fence_in_the_same_transaction_is_refused(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 1)
    page = reader(app, 1).claim()
    assert page is not None
    empty = {"shard": SHARD, "steps": "", "counts": [], "outcomes": [], "is_last": True, "is_fenced": True}
    whose = {"batch": page.header.batch, "owner": 1, "done": page.cursor(0)}
    statements.fence(conn, **whose)  # autocommit: its transaction is over
    with pytest.raises(BatchLost):
        statements.commit_page(conn, next_cursor=page.cursor(1), **whose, **empty)
    assert conn.execute("select count(*) from durable.win").fetchone() == (1,)


def test_an_abandoned_owner_that_lives_after_all_may_commit_while_nobody_has_taken_over(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader]
) -> None:
    app = walking(dsn, page_window_ms=0)
    in_shard(conn, app, 3)
    first, second = reader(app, 1), reader(app, 2)
    page = first.claim()
    assert page is not None
    assert statements.abandon(conn, 1) == [SHARD]
    first.commit(page)
    seconds = second.claim(dead_s=3600)
    assert seconds is None or seconds.header.batch != page.header.batch, "its commit was a sign of life"


def test_a_page_lost_in_the_engine_alone_hands_nothing_on(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 3)
    first = reader(app, 1)
    page = first.claim()
    assert page is not None
    conn.execute("select pgque.finish_batch(%s)", (page.header.batch,))
    with pytest.raises(BatchLost):
        first.commit(page)
    assert seqs_logged(conn) == {1: 3}


def test_two_claims_at_once_wait_for_each_other_and_share_no_event(
    dsn: str, conn: psycopg.Connection, reader: Callable[..., Reader], eventually: Callable[..., None]
) -> None:
    app = walking(dsn)
    in_shard(conn, app, 3)
    first, second = reader(app, 1), reader(app, 2)
    with ThreadPoolExecutor() as pool:
        with first.connection.transaction():
            mine = first.claim()
            late = pool.submit(second.claim)
            eventually(lambda: late.done() or is_waiting_for_a_lock(conn, second.connection.info.backend_pid))
            assert not late.done()
            in_shard(conn, app, 2)
        theirs = late.result(20)
    assert mine is not None and theirs is not None
    assert (len(mine.lines), len(theirs.lines)) == (3, 2)
    assert mine.header.batch != theirs.header.batch


@pytest.mark.parametrize("seed", range(8))
def test_every_step_is_handed_on_exactly_once_in_all_cuts_of_pages_and_groups(
    dsn: str, conn: psycopg.Connection, seed: int
) -> None:
    """Entries of 1 to n lines, pages of few lines or bytes, cut after one, groups of 1 to 3, takeovers in between.

    A step runs once, unless it outlasted its page and its process was given up before it was handed on.
    """
    print(f"seed {seed}")
    dice = random.Random(seed)
    conn.execute("create table effect (id text, seq int)")
    runs: Counter[tuple[str, int]] = Counter()
    runs_awaited: Counter[tuple[str, int]] = Counter()
    app = App("cuts", dsn=dsn, settings=cut_settings(dice))
    machine = app.machine("cuts", state=Count)

    @machine.step(start=True)
    def plain(ctx: Context, at: Count) -> Continuation:
        return onward(ctx, at)

    @machine.step()
    async def awaited(ctx: Context, at: Count) -> Continuation:
        runs_awaited[ctx.short_id, ctx.seq] += 1
        return onward(ctx, at)

    @machine.step(transactional=True)
    def transactional(ctx: Context, at: Count) -> Continuation:
        ctx.tx.execute("insert into effect values (%s, %s)", (ctx.short_id, ctx.seq))
        return onward(ctx, at)

    def onward(ctx: Context, at: Count) -> Continuation:
        runs[ctx.short_id, ctx.seq] += 1
        kind = (plain, awaited, transactional)[(int(ctx.short_id, 16) + ctx.seq) % 3]
        return ctx.done(at.n) if at.n == 0 else ctx.goto(kind, Count(at.n - 1))

    handles = []
    for _ in range(6):
        lengths = [dice.randrange(5) for _ in range(dice.choice([1, 1, 2, 5, 11]))]
        handles += zip(machine.start_many([Count(n) for n in lengths]), lengths, strict=True)
    consumers = [Consumer(dsn, n % 2, app.machines, app.settings) for n in range(3)]
    for consumer in consumers:
        consumer.shards = [0, 1]
    in_vain = 0  # claims in a row that found nothing: a workflow that is lost would be waited for in vain
    while in_vain < 30:
        consumer = dice.choice(consumers)
        pages = iter(range(dice.choice([1, 1, 3, 100])))
        has_work = consumer.work(lambda pages=pages: next(pages, None) is None, lambda: None)
        in_vain = 0 if has_work or consumer.wait(0) else in_vain + 1
        assert sum(runs.values()) < 10_000, "steps come again and again"
        if not consumer.expects_work(0) or dice.random() < 0.2:
            statements.abandon(conn, consumer.owner)
        if dice.random() < 0.2:
            consumer.reincarnate()
    expected = Counter((handle.id[:12], seq) for handle, steps in handles for seq in range(1, steps + 2))
    assert runs.keys() == expected.keys()
    assert {step for step, times in runs.items() if times > 1} <= runs_awaited.keys()
    assert steps_logged(conn) == expected
    ended = Counter(short for (short,) in conn.execute("select durable.short(id) from durable.finished"))
    assert ended == Counter(handle.id[:12] for handle, _ in handles)
    effects = Counter(conn.execute("select id, seq from effect").fetchall())
    assert set(effects.values()) <= {1}
    assert effects.keys() <= expected.keys()
    for consumer in consumers:
        consumer.close()


def cut_settings(dice: random.Random) -> Settings:
    return Settings(
        page_lines_max=dice.choice([1, 2, 3, 7, 1000]),
        page_bytes_max=dice.choice([1, 200, 500, 1 << 20]),
        page_window_ms=dice.choice([0, 0, 1, 50]),
        transactional_steps_max=dice.randint(1, 3),
        dead_interval_s=3600,
        takeover_probe_s=0,
    )
