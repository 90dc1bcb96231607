"""The overview: one reading of it, rates from one reading to the next, and what the last minutes were like.

Readings are shared: however many look, the database is asked once a second at the most, and not at all while nobody looks.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime

import msgspec
import psycopg

from durable_cluster import figures, schema, search
from durable_cluster.errors import DurableError
from durable_cluster.figures import Aside, OfShard
from durable_cluster.ops import checks, letters, looks, lookups, processes
from durable_cluster.ops.checks import Finding
from durable_cluster.ops.console import charts
from durable_cluster.ops.console.access import Access, Connection
from durable_cluster.ops.console.charts import Spark
from durable_cluster.ops.console.refusals import Refused
from durable_cluster.ops.console.shared import Shared
from durable_cluster.ops.doctor import SCHEMA_CHECKS, SERVER_CHECKS, Check, unmade
from durable_cluster.ops.letters import Filter, Letter
from durable_cluster.ops.looks import Beat, Ended
from durable_cluster.ops.lookups import Pause
from durable_cluster.ops.processes import Process
from durable_cluster.search import Listed, Which

FRESH_S = 1.0
FOUND_S = 10.0
"""So long the findings of the checks count."""
GAP_S_MAX = 60.0
"""A longer time between two readings says nothing of now."""
KEPT = 90
"""Rates that a chart shows."""
LOOKS = 30
"""At a process: what its share is made of."""
ROWS, NEWEST = 6, 16


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """So much a second, now (None: nobody knows yet) and lately."""

    now: float | None
    spark: Spark


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer in the heat map. ``busy``: in which part of the last looks it had something in hand, 0 to 1."""

    process: Process
    busy: float

    @property
    def level(self) -> int:
        """0: had nothing, to 4: always had."""
        return 0 if not self.busy else min(4, 1 + int(self.busy * 4))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A shard in the heat map. ``left``: windows of processes that are gone."""

    shard: OfShard
    left: int
    is_paused: bool
    cells: list[Cell]


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """One reading; lists are the newest few. ``due_s``: until the next timer; None: there is none."""

    at: datetime
    steps: Rate
    starts: Rate
    ends: Rate
    aside: Aside
    due_s: float | None
    pauses: list[Pause]
    rows: list[Row]
    findings: list[Finding]
    ended: list[Ended]
    letters: list[Letter]
    newest: list[Listed]

    @property
    def lag_events(self) -> int:
        """Step events in the log that are not done."""
        return sum(row.shard.lag_events for row in self.rows)

    @property
    def lag_s(self) -> float:
        """Age of the oldest of them."""
        return max((row.shard.lag_s for row in self.rows), default=0.0)

    @property
    def slow_steps(self) -> int:
        """That run beside the pages."""
        return sum(cell.process.slow_steps for row in self.rows for cell in row.cells)

    @property
    def columns(self) -> int:
        """Consumers of the shard that has most."""
        return max((len(row.cells) for row in self.rows), default=0)

    @property
    def wrong(self) -> list[Finding]:
        """What needs somebody, the worst first."""
        return sorted((one for one in self.findings if one.verdict != "ok"), key=lambda one: one.verdict != "wrong")


class Pulse:
    """The readings of one console."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._shared = Shared(self._looked, fresh_s=FRESH_S)
        self._beat: Beat | None = None
        self._rates: dict[str, deque[float]] = {name: deque(maxlen=KEPT) for name in ("steps", "starts", "ends")}
        self._busy: dict[int, deque[bool]] = {}
        self._findings: list[Finding] = []
        self._found_at = float("-inf")

    def overview(self) -> Overview:
        """As it is now, or was less than a second ago. Raises DurableError, psycopg.Error, Refused."""
        return self._shared.newest()

    def _looked(self) -> Overview:
        with self._access.connection() as connection:
            return self._read(connection)

    def _read(self, connection: Connection) -> Overview:
        schema.demand_installed(connection)
        beat = looks.beat(connection, since=None if self._beat is None else self._beat.snapshot)
        steps, starts, ends = self._rated(beat)
        paused = lookups.pauses(connection)
        return Overview(
            at=beat.at,
            steps=steps,
            starts=starts,
            ends=ends,
            aside=figures.aside(connection),
            due_s=beat.due_s,
            pauses=paused,
            rows=self._rows(figures.shards(connection), processes.processes(connection), paused),
            findings=self._checked(connection),
            ended=looks.recent_ends(connection, limit=ROWS),
            letters=letters.listed(connection, Filter(), limit=ROWS)[:ROWS],
            newest=search.listed(connection, Which(), limit=NEWEST)[:NEWEST],
        )

    def _rated(self, beat: Beat) -> tuple[Rate, Rate, Rate]:
        """Steps, starts and ends a second since the last reading, and before."""
        last, self._beat = self._beat, beat
        gap_s = None if last is None else (beat.at - last.at).total_seconds()
        if last is None or gap_s is None or not 0 < gap_s <= GAP_S_MAX:
            for kept in self._rates.values():
                kept.clear()
            counts: tuple[int | None, ...] = (None, None, None)
        else:
            counts = (beat.appended, beat.started - last.started, beat.ended - last.ended)
        found = []
        for kept, count in zip(self._rates.values(), counts, strict=True):
            # Days that are dropped take what they counted with them.
            now = None if count is None or not gap_s else max(count, 0) / gap_s
            if now is not None:
                kept.append(now)
            found.append(Rate(now=now, spark=charts.spark(list(kept), slots=KEPT)))
        return found[0], found[1], found[2]

    def _rows(self, shards: Sequence[OfShard], found: Sequence[Process], paused: Sequence[Pause]) -> list[Row]:
        consumers = [one for one in found if one.role == "consumer" and one.pid is not None]
        self._busy = {one.pid: self._busy.get(one.pid, deque(maxlen=LOOKS)) for one in consumers if one.pid is not None}
        cells: dict[int | None, list[Cell]] = {}
        for one in consumers:
            assert one.pid is not None
            looked = self._busy[one.pid]
            looked.append(bool(one.windows or one.slow_steps))
            cells.setdefault(one.home, []).append(Cell(process=one, busy=sum(looked) / len(looked)))
        still = {one.name for one in paused if one.scope == "shard"}
        left = [number for one in found if one.role == "gone" for number in one.shards]
        return [
            Row(
                shard=shard,
                left=left.count(shard.shard),
                is_paused=str(shard.shard) in still,
                cells=cells.get(shard.shard, []),
            )
            for shard in shards
        ]

    def _checked(self, connection: Connection) -> list[Finding]:
        """What doctor finds, but for what a transaction, or the console's database role, cannot look at."""
        if time.monotonic() - self._found_at > FOUND_S:
            wanted = [check for check in (*SERVER_CHECKS, *SCHEMA_CHECKS) if check is not checks.session]
            made = [_alone(connection, check) for check in wanted]
            self._findings = [one for one in made if one is not None]
            self._found_at = time.monotonic()
        return self._findings


def warm(access: Access) -> None:
    """Read once for nobody: the first reading of a session takes many times as long as the next, and somebody would wait for it."""
    with contextlib.suppress(DurableError, psycopg.Error, Refused):
        Pulse(access).overview()


def _alone(connection: Connection, check: Check) -> Finding | None:
    """In a savepoint: a check that cannot be made leaves the others their transaction. None: it is not for this role."""
    try:
        with connection.transaction():
            return check(connection)
    except psycopg.errors.InsufficientPrivilege:
        return None
    except psycopg.Error as error:
        return unmade(check, error)
