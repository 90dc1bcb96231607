"""Order fulfilment: a machine that takes an order from its check to its parcel, and one that refills the stock.

    order:    validate → reserve ⟲ sleep → charge → pack → ship
    restock:  send_order → receive

What can happen twice, and what cannot: **at-least-once step execution, exactly-once transactional handoff, idempotent external
effects.** A step whose process dies runs again, so code outside the database may act twice: ``pack`` and ``send_order`` pass
``ctx.idempotency_key`` to whoever must act once. What a transactional step writes through ``ctx.tx`` commits together with the
handoff to the next step or not at all: ``reserve``, ``charge`` and ``receive`` take, charge and store once and need no key.

A step that raises is tried again, as its ``retry`` says; one that never succeeds, or takes its process with it time and again,
becomes a dead letter: its order waits there for somebody who mends the order or the code, and retries it.
"""

from __future__ import annotations

import os
from collections import Counter
from decimal import Decimal
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from psycopg.errors import RaiseException

from durable_cluster import App, Context, Continuation, Retry, TerminalError
from durable_cluster.examples.orders.carrier import Carrier, Shipping

UNITS_PER_BOX = 40
# A back-ordered order sleeps so long, then twice as long, … until it finds enough: a restock takes its time.
BACKORDER_S_MIN = 0.1
BACKORDER_S_MAX = 2.0
BACKORDER_DOUBLINGS_MAX = 8
CARRIER_TIMEOUT = "4s"

Quantity = Annotated[int, Meta(gt=0)]
Poison = Literal["raises", "crashes"]
"""What an order does to the step that reads it: it makes it raise, or it takes the whole process with it."""


class Line(msgspec.Struct, frozen=True):
    """So many units of a product. Money is Decimal, in JSON a string: a float would lose cents."""

    product_id: int
    unit_price: Decimal
    quantity: Quantity
    discount: Decimal = Decimal(0)

    @property
    def gross(self) -> Decimal:
        return self.unit_price * self.quantity

    @property
    def net(self) -> Decimal:
        return self.gross * (1 - self.discount)


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """The input, and the state of most steps.

    ``waits``: how often ``reserve`` found too little. ``poison``: a defect that no step can handle; it has to be edited away.
    """

    ref: str
    customer_id: str
    shipper_id: int
    country: str
    lines: list[Line]
    waits: int = 0
    poison: Poison | None = None


class Paid(msgspec.Struct, frozen=True):
    """What is left of an order once it is paid. ``carrier``: the address of the carrier's API, if there is one."""

    shipping: Shipping
    carrier: str | None


class Parcel(msgspec.Struct, frozen=True):
    """Packed, and booked with the carrier."""

    order_ref: str
    boxes: int
    tracking: str


class Shipment(msgspec.Struct, frozen=True):
    """The output of an order. ``steps``: how many it took."""

    order_ref: str
    tracking: str
    boxes: int
    steps: int


class Shortage(msgspec.Struct, frozen=True):
    """The input of a restock: a product, and which of its deliveries (counted from 0) this will be."""

    product_id: int
    delivery: int


class Delivery(msgspec.Struct, frozen=True):
    """The output of a restock."""

    product_id: int
    units: int
    steps: int


app = App("orders")
order = app.machine("order")
restock = app.machine("restock")
carrier = Carrier()


@order.step(start=True, retry=Retry(attempts=3, backoff="200ms"))
def validate(ctx: Context, new: Order) -> Continuation:
    """A plain step: microseconds of work that touch nothing. Types and quantities were checked when the order was started.

    A poisoned order never gets past it, and holds up no other: when a process dies of one, the steps it shared a page with are run
    one by one, until it is known whose fault it was.
    """
    if new.poison == "crashes":
        os._exit(1)
    if new.poison == "raises":
        raise ValueError(f"order {new.ref} cannot be read")
    if not new.lines:
        return ctx.fail(f"order {new.ref} has no lines")
    product_id, times = Counter(line.product_id for line in new.lines).most_common(1)[0]
    if times > 1:
        return ctx.fail(f"order {new.ref} names product {product_id} {times} times; give it one line")
    if any(line.unit_price < 0 or not 0 <= line.discount <= 1 for line in new.lines):
        return ctx.fail(f"order {new.ref} has a negative price, or a discount that is not between 0 and 1")
    return ctx.goto(reserve, new)


@order.step(transactional=True)
def reserve(ctx: Context, new: Order) -> Continuation:
    """Take all lines from the stock, or none.

    An order that finds too little goes on back-order and sleeps, which costs nothing, until it is worth looking again. The first
    to find a product short starts its restock, in this same transaction: the stock is marked as on order if and only if somebody
    is sent.
    """
    products = [line.product_id for line in new.lines]
    quantities = [line.quantity for line in new.lines]
    try:
        row = ctx.tx.execute(
            "select is_reserved, to_restock, deliveries from orders.reserve(%s, %s::int[], %s::int[], %s)",
            (new.ref, products, quantities, new.waits > 0),
        ).fetchone()
    except RaiseException as refused:  # there is no such product, and trying again would not make one
        raise TerminalError(refused.diag.message_primary or "refused") from refused
    assert row is not None
    is_reserved, to_restock, deliveries = row
    if is_reserved:
        return ctx.goto(charge, new)
    for shortage in map(Shortage, to_restock, deliveries):
        restock.start(shortage, key=f"restock-{shortage.product_id}-{shortage.delivery}", tx=ctx.tx)
    pause_s = min(BACKORDER_S_MAX, BACKORDER_S_MIN * 2 ** min(new.waits, BACKORDER_DOUBLINGS_MAX))
    return ctx.sleep(pause_s, then=reserve, state=msgspec.structs.replace(new, waits=new.waits + 1))


@order.step(transactional=True)
def charge(ctx: Context, reserved: Order) -> Continuation:
    """One ledger line for each order line. ``numeric`` and Decimal hold every digit; totals are rounded once, at the end."""
    lines = reserved.lines
    row = ctx.tx.execute(
        "with booked as (insert into orders.ledger (order_ref, line, product_id, quantity, gross, net)"
        "  select %s, l.* from unnest(%s::int[], %s::int[], %s::int[], %s::numeric[], %s::numeric[]) l)"
        " select c.address from orders.carrier c",
        (
            reserved.ref,
            list(range(1, len(lines) + 1)),
            [line.product_id for line in lines],
            [line.quantity for line in lines],
            [line.gross for line in lines],
            [line.net for line in lines],
        ),
    ).fetchone()
    boxes = -(-sum(line.quantity for line in lines) // UNITS_PER_BOX)
    shipping = Shipping(reserved.ref, reserved.shipper_id, reserved.country, boxes)
    return ctx.goto(pack, Paid(shipping, None if row is None else row[0]))


@order.step(retry=Retry(attempts=12, backoff="100ms", max_backoff="2s"), timeout=CARRIER_TIMEOUT)
async def pack(ctx: Context, paid: Paid) -> Continuation:
    """An effect outside the database, slow and often in vain: the same key books one parcel, however often it is asked for.

    While it waits it holds nothing up: it runs beside the pages, and one that takes long leaves its page.
    """
    of = paid.shipping
    if paid.carrier is None:
        tracking = f"{of.country[:2].upper()}-{of.shipper_id}-{ctx.idempotency_key[:12]}"  # the shop's own van
    else:
        tracking = await carrier.book(paid.carrier, of, key=ctx.idempotency_key)
    return ctx.goto(ship, Parcel(of.order_ref, of.boxes, tracking))


@order.step()
def ship(ctx: Context, parcel: Parcel) -> Continuation:
    """A step may hand on a state of its own type; the last one gives the workflow's output."""
    return ctx.done(Shipment(parcel.order_ref, parcel.tracking, parcel.boxes, steps=ctx.seq))


@restock.step(start=True)
async def send_order(ctx: Context, shortage: Shortage) -> Continuation:
    """Ask the supplier; asked twice with one key, he sends one delivery."""
    await ask_supplier(shortage, key=ctx.idempotency_key)
    return ctx.goto(receive, shortage)


@restock.step(transactional=True)
def receive(ctx: Context, shortage: Shortage) -> Continuation:
    """The goods are in the stock, and this restock is over, at one instant."""
    row = ctx.tx.execute("select orders.receive(%s, %s)", (shortage.product_id, shortage.delivery)).fetchone()
    assert row is not None
    if row[0] is None:
        return ctx.fail(f"delivery {shortage.delivery} of product {shortage.product_id} is in the stock already")
    return ctx.done(Delivery(shortage.product_id, row[0], steps=ctx.seq))


async def ask_supplier(shortage: Shortage, *, key: str) -> None:
    """Stands for a supplier's API."""
