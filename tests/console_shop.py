"""A shop whose workflows have been everywhere: what tests of the console look at. What a user controls is hostile."""

from __future__ import annotations

from typing import Any

from durable_cluster import App, Context, Continuation, Handle, Retry, gather, select, wait_for

SCRIPT = "<script>alert(1)</script>"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"
SECRET = "hunter2-in-plain"


class Shop:
    """An app of a database, and the handles of what it started."""

    def __init__(self, dsn: str) -> None:
        self.app = App("shop", dsn=dsn)
        self.is_mended = False
        self.echo = self.app.machine("echo")
        self.asks = self.app.machine("asks")
        self.sour = self.app.machine("sour")
        self.fails = self.app.machine("fails")
        self.leaf = self.app.machine("leaf")
        self.twig = self.app.machine("twig")
        self.tree = self.app.machine("tree")
        self._declare()

    def _declare(self) -> None:
        @self.echo.step(start=True)
        def say(ctx: Context, what: Any) -> Continuation:
            return ctx.done(what)

        @self.asks.step(start=True)
        def ask(ctx: Context, what: Any) -> Continuation:
            ctx.set_progress({"asked": SCRIPT})
            return ctx.wait_for("approved", then=told, state=what, timeout="1d")

        @self.asks.step()
        def told(ctx: Context, what: Any) -> Continuation:
            return ctx.done(ctx.signal.payload)

        @self.sour.step(start=True, retry=Retry(attempts=1))
        def taste(ctx: Context, what: Any) -> Continuation:
            if self.is_mended:
                return ctx.done("sweet")
            raise ValueError(f"sour {SCRIPT}")

        @self.fails.step(start=True)
        def give_up(ctx: Context, what: Any) -> Continuation:
            return ctx.fail(f"gave up {SCRIPT}")

        @self.leaf.step(start=True)
        def grow(ctx: Context, what: Any) -> Continuation:
            return ctx.done(what)

        @self.twig.step(start=True)
        def sprout(ctx: Context, count: int) -> Continuation:
            return ctx.gather([self.leaf.child(n) for n in range(count)], then=grown, state=count)

        @self.twig.step()
        def grown(ctx: Context, count: int) -> Continuation:
            return ctx.done(count)

        @self.tree.step(start=True)
        def branch(ctx: Context, count: int) -> Continuation:
            return ctx.gather([self.twig.child(2) for _ in range(count)], then=whole, state=count)

        @self.tree.step()
        def whole(ctx: Context, count: int) -> Continuation:
            return ctx.done(count)

        @self.app.step()
        async def double(n: int) -> int:
            return n * 2

        @self.app.workflow(name="linear", history=True)
        async def linear(n: int) -> Any:
            first = await double(n)
            both = await gather(double(first), double(n))
            answer = await wait_for("approved", timeout="1d")
            return {"both": both, "answer": None if answer is None else answer.payload}

        @self.app.workflow(name="selects")
        async def selects(count: int) -> Any:
            await double(count)
            await select(*(f"signal-of-a-rather-long-name-{n:04}" for n in range(count)))
            return await wait_for("approved")

        self.linear, self.selects = linear, selects

    def begun(self, machine: Any, value: Any, **options: Any) -> Handle:
        """One that has gone as far as it can."""
        handle: Handle = machine.start(value, **options)
        self.app.run(until_idle=True)
        return handle
