"""Kills and stops consumers while they hold work, and then asks whether anything was lost, doubled, or blamed on an innocent.

    python -m durable_cluster.loadtest.chaos [--workflows 5000] [--kills 300] [--stops 100] [--seed N]

A consumer is stopped first (SIGSTOP). If the database then says that it holds a window or a detached step, it is killed (SIGKILL),
or left until others have taken all of it over and then woken (SIGCONT): a zombie that believes it still owns its work. The last
line says in figures how it went.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import time
from typing import Any

import msgspec
import psycopg

from durable_cluster import Settings
from durable_cluster.database import connect
from durable_cluster.errors import DurableError
from durable_cluster.loadtest import chaos_flows
from durable_cluster.loadtest.chaos_flows import POISONS, STEPS, Job, chain
from durable_cluster.loadtest.stage import RunningCluster, fresh_database, running_cluster
from durable_cluster.ops.chaos import is_stopped
from durable_cluster.ops.terminal import Progress

SHARDS = 8
BOOKED_AT = (1, 3, 5, 7, 9)
AT_ONCE = 60
OPEN_MIN = 24
ZOMBIES_MAX = 2
LOOK_S = 0.05
STRIKE_S = 0.5
POISONED_OF = 500
END_S_MAX = 180.0
SETTINGS = Settings(dead_interval_s=2.0, heartbeat_s=0.5, hang_grace_s=1.0, restarts_max=10_000, page_window_ms=30)
APPENDED = (
    "durable.timer_0",
    "durable.timer_1",
    "durable.timer_2",
    "durable.started",
    "durable.finished",
    "pgque.event",
)
HOLDS = (
    "select exists (select from durable.win w where w.owner = any(%(owners)s))"
    " or exists (select from durable.detached d where d.owner = any(%(owners)s))"
)

Connection = psycopg.Connection[Any]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it all. ``doubled``, ``missing``: lines of the ledger; ``strays``: dead letters that nobody planted."""

    workflows: int
    completed: int
    lost: int
    doubled: int
    missing: int
    planted: int
    dead_letters: int
    strays: int
    kills: int
    stops: int
    appended_rows_changed: int
    seconds: float
    seed: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing is wrong."""
        wrong = self.lost + self.doubled + self.missing + self.strays + self.appended_rows_changed
        return not wrong and self.dead_letters == self.planted and self.completed == self.workflows - self.planted


class Zombie(msgspec.Struct, frozen=True):
    """A stopped consumer and the owners under which it held work."""

    pid: int
    owners: list[int]


class Run:
    """One run: a cluster, a trickle of workflows, and somebody who strikes."""

    def __init__(self, options: argparse.Namespace, dsn: str, cluster: RunningCluster, connection: Connection) -> None:
        self._options = options
        self._dice = random.Random(options.seed)
        self._cluster = cluster
        self._connection = connection
        self._zombies: list[Zombie] = []
        self._started = 0
        self.kills = self.stops = 0
        self.poisoned = {
            number: self._dice.choice(POISONS) for number in range(options.workflows) if number % POISONED_OF == 7
        }

    def go(self) -> None:
        """Until every workflow has been started, every strike has been made, and everything has come to an end."""
        total = self._options.workflows
        began_at = strike_at = time.monotonic()
        end_at: float | None = None
        with Progress("workflows ended:", total, is_live=sys.stderr.isatty()) as progress:
            shown = 0
            while True:
                self._cluster.demand_running()
                ended, stuck = self._ended(), self._dead_letters()
                progress.advance(ended + stuck - shown)
                shown = ended + stuck
                strikes = self.kills + self.stops
                share = strikes / max(1, self._options.kills + self._options.stops)
                # As many as the strikes have earned, and always enough to be caught at; more than asked for, if need be.
                self._start(max(int(total * share) + AT_ONCE, shown + OPEN_MIN) if share < 1 else total)
                if shown >= total and shown == self._started and share >= 1 and not self._zombies:
                    return
                now = time.monotonic()
                end_at = now + END_S_MAX if end_at is None and share >= 1 and self._started >= total else end_at
                if end_at is not None and now > end_at:
                    return
                if now >= strike_at and share < 1:
                    strike_at = now + STRIKE_S
                    self._strike()
                self._wake_zombies()
                if now - began_at > self._options.timeout:
                    raise DurableError(f"not through after {self._options.timeout:.0f} s: {shown:,} of {total:,} ended")
                time.sleep(LOOK_S)

    def _start(self, target: int) -> None:
        numbers = range(self._started, min(target, self._started + AT_ONCE))
        if not numbers:
            return
        jobs = [Job(number, poison=self.poisoned.get(number, "")) for number in numbers]
        chain.start_many(jobs, keys=[f"chaos-{number}" for number in numbers], tx=self._connection)
        self._started = numbers[-1] + 1

    def _strike(self) -> None:
        """Hit one consumer that holds work; with luck it is there."""
        is_kill = self._dice.random() < self._options.kills / (self._options.kills + self._options.stops)
        if (self.kills >= self._options.kills) or (not is_kill and self.stops < self._options.stops):
            if len(self._zombies) >= ZOMBIES_MAX:
                return
            is_kill = False
        asleep = {zombie.pid for zombie in self._zombies}
        consumers = [(pid, owners) for pid, owners in self._cluster.supervisor.owners.items() if pid not in asleep]
        self._dice.shuffle(consumers)
        for pid, owners in consumers:
            try:
                os.kill(pid, signal.SIGSTOP)
                is_hit = is_stopped(pid) and self._holds(owners)
                if not is_hit:
                    os.kill(pid, signal.SIGCONT)
                    continue
                if is_kill:
                    os.kill(pid, signal.SIGKILL)
                    self.kills += 1
                else:
                    self._zombies.append(Zombie(pid, owners))
                    self.stops += 1
            except ProcessLookupError:
                continue
            return

    def _wake_zombies(self) -> None:
        for zombie in list(self._zombies):
            if not self._holds(zombie.owners):
                self._zombies.remove(zombie)
                try:
                    os.kill(zombie.pid, signal.SIGCONT)
                except ProcessLookupError:
                    continue

    def _holds(self, owners: list[int]) -> bool:
        row = self._connection.execute(HOLDS.encode(), {"owners": owners}).fetchone()
        return bool(row and row[0])

    def _ended(self) -> int:
        return _count(self._connection, "select count(*) from durable.finished")

    def _dead_letters(self) -> int:
        return _count(self._connection, "select count(*) from durable.dead_letter")

    def verdict(self, seconds: float) -> Verdict:
        """Read the ledger and the lifecycle."""
        connection, total = self._connection, self._started
        completed = _count(connection, "select count(*) from durable.finished where status = 'completed'")
        dead = {
            key
            for (key,) in connection.execute(
                "select s.key from durable.dead_letter d join durable.started s on s.id = d.id"
            )
        }
        planted = {f"chaos-{number}" for number in self.poisoned}
        doubled = _count(connection, "select count(*) - count(distinct (number, position)) from chaos.ledger")
        healthy = [number for number in range(total) if number not in self.poisoned]
        booked = dict(
            connection.execute("select number, count(distinct position) from chaos.ledger group by 1").fetchall()
        )
        missing = sum(len(BOOKED_AT) - booked.get(number, 0) for number in healthy)
        changed = _count(
            connection,
            "select coalesce(sum(updated + deleted), 0) from durable.row_changes() where relation like any(%s)",
            [f"{name}%" for name in APPENDED],
        )
        return Verdict(
            workflows=total,
            completed=completed,
            lost=total - completed - len(dead),
            doubled=doubled,
            missing=missing,
            planted=len(planted),
            dead_letters=len(dead & planted),
            strays=len(dead - planted),
            kills=self.kills,
            stops=self.stops,
            appended_rows_changed=changed,
            seconds=round(seconds, 1),
            seed=self._options.seed,
        )


def main(words: list[str] | None = None) -> int:
    """Run it; 0 only if nothing is wrong."""
    options = _parser().parse_args(words)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(message)s")
    print(f"seed {options.seed}: {options.workflows:,} workflows x {STEPS} steps, {SHARDS} shards", flush=True)
    with fresh_database(options.dsn, is_asynchronous=False) as dsn:
        with connect(dsn, name="durable-loadtest chaos") as connection:
            connection.execute(
                "create schema chaos; create table chaos.ledger (number int not null, position int not null, seq int not null)"
            )
        chaos_flows.app.client.use(dsn)
        with (
            running_cluster(
                dsn,
                processes=SHARDS,
                shards=SHARDS,
                app="durable_cluster.loadtest.chaos_flows:app",
                settings=SETTINGS,
            ) as cluster,
            connect(dsn, name="durable-loadtest chaos") as connection,
        ):
            began_at = time.monotonic()
            run = Run(options, dsn, cluster, connection)
            run.go()
            verdict = run.verdict(time.monotonic() - began_at)
    print(told(verdict))
    return 0 if verdict.is_exact else 1


def told(verdict: Verdict) -> str:
    """The last line."""
    return (
        f"{'exact' if verdict.is_exact else 'NOT EXACT'}: {verdict.kills} SIGKILL, {verdict.stops} SIGSTOP zombies,"
        f" {verdict.workflows:,} workflows x {STEPS} steps: {verdict.completed:,} completed, {verdict.lost} lost,"
        f" {verdict.doubled} double and {verdict.missing} missing handoffs; {verdict.dead_letters} dead letters of"
        f" {verdict.planted} planted, {verdict.strays} others; {verdict.appended_rows_changed} rows changed in append-only tables;"
        f" {verdict.seconds:.0f} s, seed {verdict.seed}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos", description="Kill and stop consumers at work, and reconcile.")
    parser.add_argument("--dsn", help="a server to use; default: a local Postgres of its own")
    parser.add_argument("--workflows", type=int, default=5_000)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds (600)")
    parser.add_argument("--log-level", default="error")
    return parser


def _count(connection: Connection, query: str, *arguments: object) -> int:
    row = connection.execute(query.encode(), arguments or None).fetchone()
    return int(row[0]) if row else 0


if __name__ == "__main__":
    sys.exit(main())
