"""A child that should be there, and all that it and those before it in its place have told."""

from __future__ import annotations

import msgspec

from durable_cluster.meters import Report, Totals, summed
from durable_cluster.shards.process import Child


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of one place have counted. Replaced whole, so that another thread sees none of them twice or not at all.

    ``gone`` and what begins so: of those that have ended; ``totals``, ``now``: of the one that runs.
    """

    gone: Totals = {}
    gone_cpu_s: float = 0.0
    gone_step_cpu_s: dict[str, float] = {}
    gone_spans: int = 0
    totals: Totals = {}
    now: Report = Report()

    @property
    def cpu_s(self) -> float:
        """Processor time of all of them."""
        return self.gone_cpu_s + self.now.cpu_s

    @property
    def step_cpu_s(self) -> dict[str, float]:
        """What of it was seen to go into steps, by type of workflow."""
        gone, now = self.gone_step_cpu_s, self.now.step_cpu_s
        return {name: gone.get(name, 0.0) + now.get(name, 0.0) for name in {**gone, **now}}

    @property
    def spans_dropped(self) -> int:
        """Spans that all of them have lost."""
        return self.gone_spans + self.now.spans_dropped

    def heard(self, report: Report) -> Told:
        """With a word of the one that runs."""
        totals = self.totals if report.totals is None else report.totals
        return msgspec.structs.replace(self, totals=totals, now=report)

    def ended(self) -> Told:
        """The one that ran has ended; what it had told stays."""
        return Told(
            gone=summed([self.gone, self.totals]),
            gone_cpu_s=self.cpu_s,
            gone_step_cpu_s=self.step_cpu_s,
            gone_spans=self.spans_dropped,
        )


class Place:
    """A child that should be there: a consumer of a shard, or maintenance."""

    def __init__(self, name: str, shard: int | None) -> None:
        self.name = name
        self.shard = shard
        self.child: Child | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.told = Told()
        self.is_ready = False
        self.is_holding = False
        self.owners: list[int] = []
        self.start_at = 0.0
        self.heard_at = 0.0
        self.deaths: list[float] = []
        self.adopted: list[int] = []
        self.released: set[int] = set()
        self.is_hanging = False
        self.is_stood_in_for = False

    @property
    def is_up(self) -> bool:
        """Whether its child runs and has said so."""
        return self.child is not None and self.is_ready

    @property
    def role(self) -> str:
        """What its child is there for."""
        return "maintenance" if self.shard is None else "consumer"

    @property
    def reads(self) -> list[int]:
        """The shards that its child reads: none while it is not up, or somebody has stopped it."""
        shard, adopted = self.shard, self.adopted
        return [shard, *adopted] if shard is not None and self.is_up and not self.is_stood_in_for else []
