"""What pyright, strict, has to refuse: each marked line, by that rule, and no other. It is read, never run."""

from __future__ import annotations

import sqlite3

import msgspec

from durable_cluster import App, Context, compensation, gather, sleep, wait_for

app = App("refused")


class Order(msgspec.Struct):
    number: int


@app.step
def price(order: Order) -> int:
    return order.number


@app.step(timeout="1s")
async def charge(ctx: Context, order: Order, *, cents: int) -> str:
    return f"{ctx.attempt} {order.number} {cents}"


@app.step(retries=3)  # error: reportCallIssue, reportUntypedFunctionDecorator
def misspelt() -> None: ...


@app.workflow
async def other(number: int) -> str:
    return str(number)


@app.workflow
async def without_input() -> None: ...


@app.workflow
async def fulfil(order: Order) -> str:
    await price(1)  # error: reportArgumentType
    await price()  # error: reportCallIssue
    await price(order, 2)  # error: reportCallIssue
    await charge(order, 3)  # error: reportCallIssue
    await charge(order, cents="3")  # error: reportArgumentType
    await charge(order, cents=3, tip=1)  # error: reportCallIssue
    await charge.opts(timeout="1s")(order)  # error: reportCallIssue
    await price.opts(attempts=3)(order)  # error: reportCallIssue
    text: str = await price(order)  # error: reportAssignmentType
    cents = await price(order)
    cents.upper()  # error: reportAttributeAccessIssue, reportUnknownMemberType
    price(order)  # error: reportUnusedCoroutine
    sleep("1s")  # error: reportUnusedCoroutine
    granted: bool = await wait_for("approved", bool, timeout="1d")  # error: reportAssignmentType
    several: list[str] = await gather(price(order), price(order))  # error: reportAssignmentType
    number: int = await other.spawn(1)  # error: reportAssignmentType
    other.spawn("1")  # error: reportArgumentType
    async with compensation() as undo:
        undo(charge, order)  # error: reportCallIssue
        undo(price, 1)  # error: reportArgumentType
    return f"{text} {granted} {several} {number}"


@app.workflow  # error: reportArgumentType, reportCallIssue, reportUntypedFunctionDecorator
async def of_two(one: int, two: int) -> int:
    return one + two


def outside(ctx: Context) -> None:
    fulfil.start(1)  # error: reportArgumentType
    fulfil.start()  # error: reportCallIssue
    fulfil.start(Order(1), keys="a")  # error: reportCallIssue
    fulfil.start_many([1])  # error: reportArgumentType
    without_input.start(1)  # error: reportArgumentType, reportCallIssue
    fulfil.start(Order(1), tx=sqlite3.connect(""))  # error: reportArgumentType
    number: int = fulfil.start(Order(1)).result()  # error: reportAssignmentType
    other.get(key="a").result().real()  # error: reportAttributeAccessIssue, reportUnknownMemberType
    charge(ctx, Order(number), cents=1)  # error: reportCallIssue
