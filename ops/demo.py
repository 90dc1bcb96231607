"""``demo``: the Northwind orders through a running cluster, watched live, their books reconciled at the end."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, TextIO

import msgspec
import psycopg

from durable_cluster.database import connect
from durable_cluster.errors import ConfigurationError
from durable_cluster.examples.orders import northwind
from durable_cluster.examples.orders.flows import order as order_machine
from durable_cluster.ops.reconcile import Reconciliation, block, reconcile
from durable_cluster.ops.terminal import Progress, Terminal, bar, elapsed

TIMES_MAX = 10_000
LOAD_BATCH = 1_000
LOOK_S = 0.5
LINE_S = 5.0
RATE_WINDOW_S = 3.0
# So much of the time may go into counting ended orders: it reads whole tables, and the cluster wants the processors.
COUNTING_SHARE_MAX = 0.1
# The demo's orders by their keys, loosely: a regular expression a row would make the count three times as dear.
IS_OF_DEMO = "s.workflow = 'order' and s.key like 'order-%-%'"

Connection = psycopg.Connection[Any]


class ShardOrders(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's orders that live on one shard; ``ended``: completed or failed."""

    shard: int
    total: int
    ended: int


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How far the demo is. ``steps_per_s``: of the whole cluster, lately."""

    elapsed_s: float
    steps_per_s: float
    shards: tuple[ShardOrders, ...]
    has_open_restocks: bool

    @property
    def total(self) -> int:
        return sum(shard.total for shard in self.shards)

    @property
    def ended(self) -> int:
        return sum(shard.ended for shard in self.shards)

    @property
    def is_done(self) -> bool:
        """Whether every order has ended, and every restock that one of them had to start."""
        return self.ended >= self.total and not self.has_open_restocks


def run_demo(
    terminal: Terminal,
    dsn: str,
    *,
    times: int,
    on_standing: Callable[[Standing], None] = lambda _: None,
    before_books: Callable[[], None] = lambda: None,
) -> Reconciliation:
    """Load the orders ``times`` times, watch the cluster on ``dsn`` finish them, answer with the reconciliation.

    ``on_standing`` hears twice a second how far it is, and may raise to end the demo. ``before_books`` is called when all is
    done: a cluster that is stopped there leaves the books still. Orders that the database knows are not started again.
    Raises ConfigurationError for a wrong ``times``.
    """
    checked_times(times)
    with connect(dsn, name="durable-cluster demo") as connection:
        northwind.prepare(connection)
        load(connection, times)
        display = Display(sys.stderr)

        def show(standing: Standing) -> None:
            display.show(standing)
            on_standing(standing)

        last = watch(connection, on_standing=show)
        display.finish(last)
        before_books()
        books = reconcile(connection, times)
    terminal.answer(books, block(books))
    return books


def checked_times(times: int) -> int:
    """``times`` if the demo can do that. Raises ConfigurationError."""
    if not 1 <= times <= TIMES_MAX:
        raise ConfigurationError(f"--times {times} is out of range; choose 1 to {TIMES_MAX:,}")
    return times


def load(connection: Connection, times: int) -> None:
    """Start every order ``times`` times, 1,000 a transaction, with a bar. Keys make it idempotent."""
    originals = len(northwind.orders())
    with Progress("orders loaded:", originals * times, is_live=sys.stderr.isatty()) as progress:
        rest = northwind.copies(times)
        while batch := list(islice(rest, LOAD_BATCH)):
            order_machine.start_many(batch, keys=[key_of(order.ref) for order in batch], tx=connection)
            progress.advance(len(batch))


def key_of(order_ref: str) -> str:
    """The key an order of the demo is started with."""
    return f"order-{order_ref}"


def watch(connection: Connection, *, on_standing: Callable[[Standing], None]) -> Standing:
    """Look twice a second until the demo's orders have ended; the last standing. Counts them as often as is cheap."""
    began_at = time.monotonic()
    meter = StepMeter(connection)
    totals = _orders_by_shard(connection)
    count_at = 0.0
    while True:
        now = time.monotonic()
        if now >= count_at:
            ended = _ended_by_shard(connection)
            has_open_restocks = _has_open_restocks(connection)
            took_s = time.monotonic() - now
            count_at = now + took_s / COUNTING_SHARE_MAX
        standing = Standing(
            elapsed_s=now - began_at,
            steps_per_s=meter.steps_per_s(),
            shards=tuple(ShardOrders(shard=s, total=n, ended=ended.get(s, 0)) for s, n in totals.items()),
            has_open_restocks=has_open_restocks,
        )
        on_standing(standing)
        if standing.is_done:
            return standing
        time.sleep(LOOK_S)


class StepMeter:
    """Steps a second, from the log: what is appended is a successor, and whatever has ended had none.

    Reads one number an entry of the retained log, so it costs what a commit costs, not what a step costs.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        rows = connection.execute(
            "select q.queue_data_pfx from durable.shard s join pgque.queue q using (queue_id)"
        ).fetchall()
        self._query = (
            " union all ".join(
                f"select tableoid::int, sum(ev_extra1::bigint)::bigint from {log} group by 1" for (log,) in rows
            )
            + " union all select 0, count(*) from durable.finished"
        )
        self._by_table: dict[int, int] = {}
        self._truncated = 0
        self._seen: deque[tuple[float, int]] = deque()

    def steps_per_s(self) -> float:
        """Of the last seconds; zero when asked for the first time."""
        now = time.monotonic()
        self._seen.append((now, self._steps()))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_WINDOW_S:
            self._seen.popleft()
        (then, before), (_, after) = self._seen[0], self._seen[-1]
        return max(0, after - before) / (now - then) if now > then else 0.0

    def _steps(self) -> int:
        """Steps so far, from some beginning. Rotation empties a table; what it held still counts."""
        by_table: dict[int, int] = dict(self._connection.execute(self._query.encode()).fetchall())
        self._truncated += sum(was for table, was in self._by_table.items() if by_table.get(table, 0) < was)
        self._by_table = by_table
        return self._truncated + sum(by_table.values())


class Display:
    """A standing on a terminal, redrawn in place; elsewhere a line every few seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_live = out.isatty()
        self._lines_drawn = 0
        self._line_at = 0.0

    def show(self, at: Standing) -> None:
        """Draw, if it is time to."""
        if self._is_live:
            self._redraw(at)
        elif at.elapsed_s >= self._line_at:
            self._line_at = at.elapsed_s + LINE_S
            self._print(_summary(at))

    def finish(self, at: Standing) -> None:
        """The last word, which stays."""
        rate = at.total / max(0.001, at.elapsed_s)
        self._print(f"all {at.total:,} orders have ended after {elapsed(at.elapsed_s)}: {rate:,.0f} orders/s\n")

    def _redraw(self, at: Standing) -> None:
        lines = [_summary(at)]
        lines += [
            f"  shard {of.shard:<2} {bar(of.ended / max(1, of.total))} {of.ended:>9,} of {of.total:,}"
            for of in at.shards
        ]
        up = f"\x1b[{self._lines_drawn}F" if self._lines_drawn else ""
        self._lines_drawn = len(lines)
        self._print(up + "\n".join(f"{line}\x1b[K" for line in lines))

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def _summary(at: Standing) -> str:
    share = at.ended / max(1, at.total)
    return f"{at.elapsed_s:6.1f} s  {at.ended:,} of {at.total:,} orders ({share:.0%})  {at.steps_per_s:,.0f} steps/s"


def _orders_by_shard(connection: Connection) -> dict[int, int]:
    rows = connection.execute(
        "select l.shard, count(*) from durable.started s join durable.slot l on l.slot = durable.slot_of(s.id)"
        f" where {IS_OF_DEMO} group by 1 order by 1".encode()
    )
    return dict(rows.fetchall())


def _ended_by_shard(connection: Connection) -> dict[int, int]:
    rows = connection.execute(
        "select l.shard, count(*) from durable.finished f join durable.started s on s.id = f.id and s.day = f.day"
        " join durable.slot l on l.slot = durable.slot_of(s.id)"
        f" where {IS_OF_DEMO} group by 1".encode()
    )
    return dict(rows.fetchall())


def _has_open_restocks(connection: Connection) -> bool:
    row = connection.execute("select exists (select from orders.stock s where s.is_on_order)").fetchone()
    return bool(row and row[0])
