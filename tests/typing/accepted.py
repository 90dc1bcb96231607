"""What pyright, strict, has to accept, with the types that ``assert_type`` names. It is read, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_type

import msgspec
import psycopg

from durable_cluster import (
    App,
    ChildHandle,
    Context,
    Retry,
    Signal,
    Workflow,
    WorkflowHandle,
    at_least,
    compensation,
    first,
    gather,
    loop,
    scope,
    select,
    side_effect,
    sleep,
    wait_for,
)

app = App("typed")


class Order(msgspec.Struct):
    number: int


@dataclass
class Receipt:
    cents: int


# Steps: plain and async, with and without options, with and without the context, which callers leave out.


@app.step
def price(order: Order) -> int:
    return order.number


@app.step
async def charge(ctx: Context, order: Order, cents: int, *, note: str = "") -> Receipt:
    return Receipt(cents + ctx.attempt + len(note) + order.number)


@app.step(retry=Retry(attempts=8), timeout="30s")
async def fetch(url: str) -> dict[str, int]:
    return {url: 1}


@app.step(transactional=True)
def store(ctx: Context, receipt: Receipt) -> None:
    ctx.tx.execute("select %s", (receipt.cents,))


@app.step(blocking=True)
def nothing() -> None:
    pass


@app.step
def stamped(ctx: Context) -> str:
    return ctx.idempotency_key


# A first parameter that takes anything is an argument, not the context.


@app.step
def shown(value: Any) -> str:
    return str(value)


@app.step(blocking=True)
def measured(value: object, unit: str) -> int:
    return len(f"{value} {unit}")


@app.step
async def kept(value: Any, *, days: int = 1) -> int:
    return days


@app.workflow
async def other(number: int) -> str:
    return str(number)


@app.workflow(name="more")
async def without_input() -> int:
    await nothing()
    return 1


@app.workflow
def plain(number: int) -> int:
    return number + 1


@app.workflow(version=2)
async def fulfil(order: Order) -> Receipt:
    cents = await price(order)
    assert_type(cents, int)
    receipt = await charge(order, cents, note="thanks")
    assert_type(receipt, Receipt)
    assert_type(await charge(order=order, cents=1), Receipt)
    assert_type(await charge.opts(timeout="60s", retry=Retry(attempts=2))(order, cents), Receipt)
    assert_type(await fetch("a"), dict[str, int])
    assert_type(await stamped(), str)
    assert_type(await shown(order), str)
    assert_type(await measured(order, "m"), int)
    assert_type(await kept(order, days=2), int)
    await store(receipt)
    await waits()
    await at_once(order)
    return receipt


async def waits() -> None:
    await sleep("7d")
    assert_type(await wait_for("approved", bool), bool)
    assert_type(await wait_for("approved", bool, timeout="3d"), bool | None)
    assert_type(await wait_for("order", Order, require_token=True), Order)
    assert_type(await wait_for("anything", timeout=3), Any)
    assert_type(await select("left", "right"), Signal | None)
    assert_type(side_effect(lambda: 1), int)


async def at_once(order: Order) -> None:
    child = other.spawn(1)
    assert_type(child, ChildHandle[str])
    assert_type(await child, str)
    assert_type(await other.spawn(2, after="1h"), str)
    assert_type(await without_input.spawn(), int)
    assert_type(plain.spawn(1).result(), int)
    assert_type(await gather(price(order), price(order)), list[int])
    assert_type(await gather(*(other.spawn(n) for n in range(3))), list[str])
    assert_type(await first(price(order), price(order)), int)
    assert_type(await at_least(2, *(fetch(url) for url in "abc")), list[dict[str, int]])
    assert_type(await asyncio.gather(price(order), fetch("a")), tuple[int, dict[str, int]])
    assert_type(await scope(helped, order), int)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(charge(order, 1))
    assert_type(task.result(), Receipt)
    async with compensation() as undo:
        undo(store, Receipt(1))
        undo(charge, order, 1, note="undone")
    async for turn in loop(Order(0)):
        assert_type(turn.state, Order)
        turn.state = Order(await price(turn.state))


async def helped(order: Order) -> int:
    return await price(order)


# Outside of workflows.

assert_type(fulfil, Workflow[Order, Receipt])
assert_type(without_input, Workflow[None, int])


def outside() -> None:
    handle = fulfil.start(Order(1), key="order-1")
    assert_type(handle, WorkflowHandle[Receipt])
    assert_type(handle.result(timeout=1), Receipt)
    assert_type(fulfil.get(key="order-1").result(), Receipt)
    assert_type([one.result() for one in fulfil.start_many([Order(1), Order(2)], keys=["a", "b"])], list[Receipt])
    assert_type(without_input.start().result(), int)
    assert_type(without_input.start(key="once").result(), int)
    assert_type(plain.start(1).result(), int)


async def outside_async() -> None:
    handle = fulfil.start(Order(1), priority=2)
    assert_type(await handle, Receipt)
    assert_type(await handle.wait(timeout=1), Receipt)
    with psycopg.connect() as tx:
        assert_type(fulfil.start(Order(1), tx=tx), WorkflowHandle[Receipt])
    async with await psycopg.AsyncConnection[tuple[Any, ...]].connect() as joined:
        assert_type(await fulfil.start_async(Order(1), key="a", tx=joined), WorkflowHandle[Receipt])
        assert_type(await without_input.start_async(tx=joined), WorkflowHandle[int])
        assert_type(await fulfil.start_many_async([Order(1)], tx=joined), Sequence[WorkflowHandle[Receipt]])
        assert_type(await handle.cancel_async("gone", tx=joined), bool)
    assert_type(await (await fulfil.get_async(key="a")), Receipt)
    assert_type(await handle.status_async(), str)
