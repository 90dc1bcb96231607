"""Order fulfilment as ordinary functions: the flow of ``flows``, with the same names, tables and guarantees.

Each ``await`` of a step is a checkpoint. Whoever takes an order up after a crash enters its function anew, is given what the awaits
before came to, and goes on where it stopped: nothing is taken, charged or booked a second time.
"""

from __future__ import annotations

from durable_cluster import App, Context, Retry, sleep
from durable_cluster.examples.orders import shop
from durable_cluster.examples.orders.shop import Delivery, Order, Paid, Parcel, Shipment, Shortage

app = App("orders")


@app.workflow
async def order(new: Order) -> Shipment:
    """From its check to its parcel."""
    await validate(new)
    waits = 0
    while not await reserve(new, is_backordered=waits > 0):
        await sleep(shop.backorder_s(waits))
        waits += 1
    paid = await charge(new)
    parcel = await pack(paid)
    return await ship(parcel)


@app.workflow
async def restock(shortage: Shortage) -> Delivery:
    """Refills the stock."""
    await send_order(shortage)
    return await receive(shortage)


@app.step(retry=Retry(attempts=3, backoff="200ms"))
def validate(new: Order) -> None:
    """Quick: it runs in the page that starts the order."""
    shop.check(new)


@app.step(transactional=True)
def reserve(ctx: Context, new: Order, *, is_backordered: bool) -> bool:
    """Take all lines from the stock, or none; and order what is short, in this same transaction, if nobody has."""
    short = shop.take(ctx.tx, new, is_backordered=is_backordered)
    for shortage in short or ():
        restock.start(shortage, key=shortage.key, tx=ctx.tx)
    return short is None


@app.step(transactional=True)
def charge(ctx: Context, reserved: Order) -> Paid:
    """One ledger line for each order line, and that it is charged: both are committed, or neither."""
    return shop.book(ctx.tx, reserved)


@app.step(retry=Retry(attempts=12, backoff="100ms", max_backoff="2s"), timeout=shop.CARRIER_TIMEOUT)
async def pack(ctx: Context, paid: Paid) -> Parcel:
    """An effect outside the database: the same key books one parcel, however often it is asked for."""
    return await shop.hand_over(paid, key=ctx.idempotency_key)


@app.step
def ship(ctx: Context, parcel: Parcel) -> Shipment:
    """What the order comes to."""
    return Shipment(parcel.order_ref, parcel.tracking, parcel.boxes, steps=ctx.seq)


@app.step
async def send_order(ctx: Context, shortage: Shortage) -> None:
    """Ask the supplier; asked twice with one key, he sends one delivery."""
    await shop.ask_supplier(shortage, key=ctx.idempotency_key)


@app.step(transactional=True)
def receive(ctx: Context, shortage: Shortage) -> Delivery:
    """The goods are in the stock, and that is on record, at one instant."""
    return Delivery(shortage.product_id, shop.store(ctx.tx, shortage), steps=ctx.seq)
