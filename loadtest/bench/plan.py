"""What a run measures, in which order, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from types import MappingProxyType

import msgspec

from durable_cluster.loadtest.bench import episodes
from durable_cluster.loadtest.bench.cells import Results
from durable_cluster.loadtest.bench.scene import HELD
from durable_cluster.loadtest.bench.throughput import throughput
from durable_cluster.loadtest.bench.work import TEN_STEPS, Flow
from durable_cluster.loadtest.peers.base import System

OURS = "ours"
PEERS = ("dbos", "absurd", "procrastinate", "pgqueuer", "skip_locked")
WITH_A_ROW_MORE = ("ours_dedup", "ours_status")
COORDINATING = ("ours_waiting", "ours_joining")
LINEAR = ("ours_linear", "ours_linear_async")
CHAINS_BESIDE_A_SNAPSHOT = (OURS, "skip_locked", "dbos", "absurd")
VARIANTS = ("status_row_set", "status_row_pipelined", OURS, *WITH_A_ROW_MORE)
WORKLOADS = ("W1", "W2", "W4", "W5", "W6", "W7", "W8")
MODULES = MappingProxyType(
    {
        "ours": "ours:Ours",
        "ours_dedup": "ours:OursWithDedup",
        "ours_status": "ours:OursWithStatus",
        "ours_waiting": "ours:OursWaiting",
        "ours_joining": "ours:OursJoining",
        "ours_linear": "ours:OursLinear",
        "ours_linear_async": "ours:OursLinearAsync",
        "ours_1_shard": "ours:OursOnOneShard",
        "ours_2_shards": "ours:OursOnTwoShards",
        "ours_8_shards": "ours:OursOnEightShards",
        "skip_locked": "skip_locked:SkipLocked",
        "status_row_set": "status_row:StatusRowSet",
        "status_row_pipelined": "status_row:StatusRowPipelined",
        "dbos": "dbos:Dbos",
        "absurd": "absurd:Absurd",
        "procrastinate": "procrastinate:Procrastinate",
        "pgqueuer": "pgqueuer:PgQueuer",
    }
)
PAYLOADS = MappingProxyType({"150 B": 150, "2 KiB": 2 << 10, "16 KiB": 16 << 10})
LINE_BYTES = 100  # of a line whose flow carries no ballast
PAUSE_MS = 20


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each. Times in seconds; ``rounds``: of W1, interleaved over the systems."""

    seconds: float
    held_s: float
    bucket_s: float
    rounds: int
    hotpath_s: float
    sleepers: int
    ahead_s: float
    width: int
    fan_outs: int
    kills: int
    patience_s: float
    starts_s: float
    has_matrix: bool
    soak_s: float = 0.0


QUICK = Scale(
    seconds=2.5,
    held_s=7.5,
    bucket_s=0.5,
    rounds=1,
    hotpath_s=8.0,
    sleepers=1_000,
    ahead_s=3.0,
    width=200,
    fan_outs=1,
    kills=1,
    patience_s=8.0,
    starts_s=1.0,
    has_matrix=False,
)
FULL = Scale(
    seconds=20.0,
    held_s=60.0,
    bucket_s=5.0,
    rounds=3,
    hotpath_s=60.0,
    sleepers=10_000,
    ahead_s=5.0,
    width=1_000,
    fan_outs=5,
    kills=5,
    patience_s=60.0,
    starts_s=5.0,
    has_matrix=True,
)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. ``run`` adds what it finds to the results."""

    system: str
    workload: str
    condition: str
    run: Callable[[str, Results], None]

    @property
    def title(self) -> str:
        """For people."""
        return " ".join(part for part in (self.workload, self.system, self.condition and f"({self.condition})") if part)


def system(name: str) -> type[System]:
    """The class behind a name; imports the peer."""
    module, _, class_ = MODULES[name].partition(":")
    found: type[System] = getattr(import_module(f"durable_cluster.loadtest.peers.{module}"), class_)
    return found


def jobs(scale: Scale, *, systems: Sequence[str], workloads: Sequence[str]) -> list[Job]:
    """Everything to measure, of those systems and workloads; what a system lacks is left out."""
    found = [
        job
        for job in (*_loads(scale, systems), *_episodes(scale, systems), *_matrix(scale, systems))
        if job.workload in workloads and job.workload not in system(job.system).lacks
    ]
    return found + ([_soak(scale)] if scale.soak_s else [])


def _loads(scale: Scale, systems: Sequence[str]) -> Iterable[Job]:
    """W1 by turns, with a wait or a join a step, then beside a held snapshot."""
    for round_ in range(1, scale.rounds + 1):
        for name in systems:
            yield _load(name, scale, "", seconds=scale.seconds, round_=round_)
    if OURS in systems:
        for name in (*COORDINATING, *LINEAR):
            yield _load(name, scale, "", seconds=scale.seconds)
    for name in systems:
        if scale.has_matrix or name not in WITH_A_ROW_MORE:
            yield _load(name, scale, HELD, seconds=scale.held_s / 3, held_s=scale.held_s)


def _episodes(scale: Scale, systems: Sequence[str]) -> Iterable[Job]:
    for name in (name for name in systems if name in (OURS, *PEERS)):

        def job(
            workload: str, run: Callable[..., None], condition: str = "", *, name: str = name, **options: float
        ) -> Job:
            return Job(
                system=name,
                workload=workload,
                condition=condition,
                run=lambda server, results: run(system(name), server, results, **options),
            )

        if name == OURS:
            for linear in LINEAR:
                yield job("W2", episodes.lone, name=linear, seconds=scale.seconds)
        yield job("W8", episodes.starts, seconds=scale.starts_s)
        yield job("W2", episodes.lone, seconds=scale.seconds)
        if name in (CHAINS_BESIDE_A_SNAPSHOT if scale.has_matrix else (OURS, "skip_locked")):
            yield job(
                "W2", episodes.chain, HELD, seconds=scale.held_s / 3, held_s=scale.held_s, bucket_s=scale.bucket_s
            )
        yield job("W4", episodes.sleepers, count=scale.sleepers, ahead_s=scale.ahead_s)
        yield job("W5", episodes.fan_out, width=scale.width, rounds=scale.fan_outs)
        yield job("W6", episodes.recovery, kills=scale.kills, patience_s=scale.patience_s)
        yield job("W7", episodes.idle, seconds=max(5.0 if name == OURS else 3.0, scale.seconds))


def _matrix(scale: Scale, systems: Sequence[str]) -> Iterable[Job]:
    """A to D under every condition of their own."""
    if not scale.has_matrix:
        return
    for name in (name for name in VARIANTS if name in systems):
        for told, size in PAYLOADS.items():
            yield _load(name, scale, told, seconds=scale.seconds, like=Flow(0, ballast="x" * (size - LINE_BYTES)))
        yield _load(name, scale, f"{PAUSE_MS} ms of I/O", seconds=scale.seconds, like=Flow(0, pause_ms=PAUSE_MS))
    if OURS in systems:
        for name in ("ours_1_shard", "ours_2_shards", "ours_8_shards"):
            yield _load(name, scale, "", seconds=scale.seconds)


def _load(
    name: str,
    scale: Scale,
    condition: str,
    *,
    seconds: float,
    held_s: float = 0.0,
    like: Flow = TEN_STEPS,
    round_: int = 1,
) -> Job:
    return Job(
        system=name,
        workload="W1",
        condition=condition,
        run=lambda server, results: throughput(
            system(name),
            server,
            results,
            seconds=seconds,
            held_s=held_s,
            bucket_s=scale.bucket_s,
            condition=condition,
            like=like,
            round_=round_,
        ),
    )


def _soak(scale: Scale) -> Job:
    run = partial(
        throughput, system(OURS), seconds=scale.soak_s, bucket_s=max(5.0, scale.soak_s / 120), condition="soak"
    )
    return Job(system=OURS, workload="W1", condition="soak", run=run)
