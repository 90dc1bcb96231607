"""Order fulfilment: a machine that takes an order from its check to its parcel, and one that refills the stock.

    order:    validate → reserve ⟲ sleep → charge → pack → ship
    restock:  send_order → receive

What can happen twice, and what cannot: **at-least-once step execution, exactly-once transactional handoff, idempotent external
effects.** A step whose process dies runs again, so code outside the database may act twice: ``pack`` and ``send_order`` pass
``ctx.idempotency_key`` to whoever must act once. What a transactional step writes through ``ctx.tx`` commits together with the
handoff to the next step or not at all: ``reserve``, ``charge`` and ``receive`` take, charge and store once and need no key.

A step that raises is tried again, as its ``retry`` says; one that never succeeds, or takes its process with it time and again,
becomes a dead letter: its order waits there for somebody who mends the order or the code, and retries it.

``linear`` is the same as ordinary functions; ``shop`` holds what the steps do.
"""

from __future__ import annotations

import msgspec

from durable_cluster import App, Context, Continuation, Retry
from durable_cluster.examples.orders import shop
from durable_cluster.examples.orders.shop import Delivery, Order, Paid, Parcel, Shipment, Shortage

app = App("orders")
order = app.machine("order")
restock = app.machine("restock")


@order.step(start=True, retry=Retry(attempts=3, backoff="200ms"))
def validate(ctx: Context, new: Order) -> Continuation:
    """A plain step: microseconds of work that touch nothing."""
    shop.check(new)
    return ctx.goto(reserve, new)


@order.step(transactional=True)
def reserve(ctx: Context, new: Order) -> Continuation:
    """Take all lines from the stock, or none.

    An order that finds too little goes on back-order and sleeps, which costs nothing, until it is worth looking again. The first
    to find a product short starts its restock, in this same transaction: the stock is marked as on order if and only if somebody
    is sent.
    """
    short = shop.take(ctx.tx, new, is_backordered=new.waits > 0)
    if short is None:
        return ctx.goto(charge, new)
    for shortage in short:
        restock.start(shortage, key=shortage.key, tx=ctx.tx)
    waiting = msgspec.structs.replace(new, waits=new.waits + 1)
    return ctx.sleep(shop.backorder_s(new.waits), then=reserve, state=waiting)


@order.step(transactional=True)
def charge(ctx: Context, reserved: Order) -> Continuation:
    """One ledger line for each order line, and the next step: both or neither."""
    return ctx.goto(pack, shop.book(ctx.tx, reserved))


@order.step(retry=Retry(attempts=12, backoff="100ms", max_backoff="2s"), timeout=shop.CARRIER_TIMEOUT)
async def pack(ctx: Context, paid: Paid) -> Continuation:
    """An effect outside the database, slow and often in vain: the same key books one parcel, however often it is asked for.

    While it waits it holds nothing up: it runs beside the pages, and one that takes long leaves its page.
    """
    return ctx.goto(ship, await shop.hand_over(paid, key=ctx.idempotency_key))


@order.step()
def ship(ctx: Context, parcel: Parcel) -> Continuation:
    """A step may hand on a state of its own type; the last one gives the workflow's output."""
    return ctx.done(Shipment(parcel.order_ref, parcel.tracking, parcel.boxes, steps=ctx.seq))


@restock.step(start=True)
async def send_order(ctx: Context, shortage: Shortage) -> Continuation:
    """Ask the supplier; asked twice with one key, he sends one delivery."""
    await shop.ask_supplier(shortage, key=ctx.idempotency_key)
    return ctx.goto(receive, shortage)


@restock.step(transactional=True)
def receive(ctx: Context, shortage: Shortage) -> Continuation:
    """The goods are in the stock, and this restock is over, at one instant."""
    return ctx.done(Delivery(shortage.product_id, shop.store(ctx.tx, shortage), steps=ctx.seq))
