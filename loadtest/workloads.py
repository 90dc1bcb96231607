"""What the load tests run: workflows whose steps do nothing, so that what is measured is the product.

Imported by every consumer process as ``durable_cluster.loadtest.workloads:app``.
"""

from __future__ import annotations

import msgspec

from durable_cluster import App, Context, Continuation

STEPS = 10

app = App("loadtest")


class Count(msgspec.Struct, frozen=True):
    """The state of both machines: the steps so far, how many there shall be, and a sum to carry along."""

    steps: int
    of: int
    total: int = 0


def next_count(at: Count) -> Count:
    """The state one step later."""
    return Count(at.steps + 1, at.of, at.total + at.steps)


ten_steps = app.machine("ten-steps", state=Count)
chain = app.machine("chain", state=Count)


@ten_steps.step(start=True)
def trivial(ctx: Context, at: Count) -> Continuation:
    """One of the steps of a short workflow; thousands of these run side by side."""
    return ctx.done(at.total) if at.steps == at.of else ctx.goto(trivial, next_count(at))


@chain.step(start=True)
def link(ctx: Context, at: Count) -> Continuation:
    """One of the steps of a long workflow that runs alone."""
    return ctx.done(at.total) if at.steps == at.of else ctx.goto(link, next_count(at))


def short_flows(count: int) -> list[Count]:
    """The inputs of ``count`` workflows of ten steps each."""
    return [Count(1, STEPS)] * count
