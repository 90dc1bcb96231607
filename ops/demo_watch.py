"""Watching the demo: how far its orders are, counted as often as is cheap, and shown."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

import msgspec
import psycopg

from durable_cluster.ops import letters
from durable_cluster.ops.lasting import Lasting
from durable_cluster.ops.terminal import bar, elapsed

LOOK_S = 0.5
LINE_S = 5.0
RATE_WINDOW_S = 3.0
# So much of the time may go into counting ended orders: it reads whole tables, and the cluster wants the processors.
COUNTING_SHARE_MAX = 0.1
COUNT_S_MAX = 5.0
# The demo's orders by their keys, loosely: a regular expression a row would make the count three times as dear.
IS_OF_DEMO = "s.workflow = 'order' and s.key like 'order-%-%'"

Connection = psycopg.Connection[Any]


class ShardOrders(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's orders that live on one shard; ``ended``: completed or failed."""

    shard: int
    total: int
    ended: int


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted last. ``stuck``: orders with a dead letter."""

    shards: tuple[ShardOrders, ...]
    stuck: int
    has_open_restocks: bool


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How far the demo is. ``steps_per_s``: of the whole cluster, lately."""

    elapsed_s: float
    steps_per_s: float
    count: Count

    @property
    def shards(self) -> tuple[ShardOrders, ...]:
        return self.count.shards

    @property
    def total(self) -> int:
        return sum(shard.total for shard in self.shards)

    @property
    def ended(self) -> int:
        return sum(shard.ended for shard in self.shards)

    @property
    def stuck(self) -> int:
        return self.count.stuck

    @property
    def is_settled(self) -> bool:
        """Whether nothing goes on by itself: every order has ended or is stuck, and every restock has ended."""
        return self.ended + self.stuck >= self.total and not self.count.has_open_restocks


def watch(database: Lasting, began_at: float, *, on_standing: Callable[[Standing], None]) -> Standing:
    """Look twice a second until the demo's orders have ended or are stuck; the last standing. ``began_at``: monotonic."""
    meter = StepMeter(database)
    totals = database.ask(_orders_by_shard)
    count_at = 0.0
    while True:
        now = time.monotonic()
        if now >= count_at:
            count = database.ask(lambda connection: counted(connection, totals))
            took_s = time.monotonic() - now
            count_at = now + min(took_s / COUNTING_SHARE_MAX, took_s + COUNT_S_MAX)
        standing = Standing(elapsed_s=now - began_at, steps_per_s=meter.steps_per_s(), count=count)
        on_standing(standing)
        if standing.is_settled:
            return standing
        time.sleep(LOOK_S)


def counted(connection: Connection, totals: dict[int, int]) -> Count:
    """Count now. ``totals``: the demo's orders by shard. Stuck ones first: a retried one must not be counted as neither."""
    stuck, _ = letters.total(connection, letters.Filter(workflow="order"))
    ended = _ended_by_shard(connection)
    return Count(
        shards=tuple(ShardOrders(shard=s, total=n, ended=ended.get(s, 0)) for s, n in totals.items()),
        stuck=stuck,
        has_open_restocks=_has_open_restocks(connection),
    )


class StepMeter:
    """Steps a second, from the log: what is appended is a successor, and whatever has ended had none.

    Reads one number an entry of the retained log, so it costs what a commit costs, not what a step costs.
    """

    def __init__(self, database: Lasting) -> None:
        self._database = database
        rows = database.ask(_logs)
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
        by_table: dict[int, int] = self._database.ask(
            lambda connection: dict(connection.execute(self._query.encode()).fetchall())
        )
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

    def say(self, text: str) -> None:
        """A line that stays, above what comes next."""
        self._lines_drawn = 0
        self._print(text)

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
    stuck = f"  {at.stuck:,} in dead letters" if at.stuck else ""
    return f"{at.elapsed_s:6.1f} s  {at.ended:,} of {at.total:,} orders ({share:.0%})  {at.steps_per_s:,.0f} steps/s{stuck}"


def _logs(connection: Connection) -> list[tuple[str]]:
    return connection.execute(
        "select q.queue_data_pfx from durable.shard s join pgque.queue q using (queue_id)"
    ).fetchall()


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
