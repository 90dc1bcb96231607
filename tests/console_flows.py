"""Workflows that stand at every place a page tells of: waiting, joining, sleeping, stuck, held by a limit, scheduled."""

from __future__ import annotations

from typing import Any

from durable_cluster import App, Context, Continuation, Limit, Retry

HOSTILE = "</pre><script>alert('in')</script>"


class Flows:
    """An app of a database; ``mended``: bottles that are no poison any more."""

    def __init__(self, dsn: str) -> None:
        self.mended: set[str] = set()
        self.app = App("console-flows", dsn=dsn)
        self.order = self.app.machine("order", state=dict[str, Any])
        self.nap = self.app.machine("nap", state=str)
        self.family = self.app.machine("family", state=int)
        self.poison = self.app.machine("poison", state=str)
        self.crawl = self.app.machine("crawl", state=str)
        self.quick = self.app.machine("quick", state=int)
        self._declare()

    def _declare(self) -> None:
        @self.order.step(start=True)
        def ask(ctx: Context, new: dict[str, Any]) -> Continuation:
            return ctx.wait_for("approved", "rejected", then=decided, state=new, timeout="3d")

        @self.order.step()
        def decided(ctx: Context, new: dict[str, Any]) -> Continuation:
            return ctx.done({"order": new, "said": ctx.signal.payload})

        @self.nap.step(start=True)
        def lie(ctx: Context, text: str) -> Continuation:
            return ctx.sleep("30d", then=rise, state=text)

        @self.nap.step()
        def rise(ctx: Context, text: str) -> Continuation:
            return ctx.done(text)

        @self.family.step(start=True)
        def spawn(ctx: Context, count: int) -> Continuation:
            return ctx.gather([self.nap.child("child") for _ in range(count)], then=joined, state=count)

        @self.family.step()
        def joined(ctx: Context, count: int) -> Continuation:
            return ctx.done(count)

        @self.poison.step(start=True, retry=Retry(attempts=1))
        def drink(ctx: Context, bottle: str) -> Continuation:
            if bottle in self.mended:
                return ctx.done("it was water")
            raise ValueError(f"{HOSTILE} {bottle}")

        @self.crawl.step(start=True, limit=Limit("crawls", concurrency=0))
        def fetch(ctx: Context, site: str) -> Continuation:
            return ctx.done(site)

        @self.quick.step(start=True)
        def count(ctx: Context, number: int) -> Continuation:
            return ctx.done(number)

    def fill(self) -> None:
        """Start a few of each."""
        self.order.start_many([{"id": n, "note": HOSTILE, "password": "not for onlookers"} for n in range(4)])
        self.nap.start_many(["well"] * 3)
        self.family.start(3)
        self.poison.start_many([f"bottle {n}" for n in range(3)])
        self.crawl.start_many(["here"] * 2)
        self.quick.start_many(list(range(60)))
        self.app.schedules.create("nightly", "0 3 * * *", self.nap, "dream", zone="Europe/Berlin")
        self.run()

    def run(self) -> None:
        """What waits in the log."""
        self.app.run(until_idle=True)
