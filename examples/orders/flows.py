"""Order fulfilment: a machine that takes an order from its check to its parcel, and one that refills the stock.

    order:    validate → reserve ⟲ → charge → pack → ship
    restock:  send_order → receive

What can happen twice, and what cannot: **at-least-once step execution, exactly-once transactional handoff, idempotent external
effects.** A step whose process dies runs again, so code outside the database may act twice: ``ship`` and ``send_order`` pass
``ctx.idempotency_key`` to whoever must act once. What a transactional step writes through ``ctx.tx`` commits together with the
handoff to the next step or not at all: ``reserve``, ``charge`` and ``receive`` take, charge and store once and need no key.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Annotated

import msgspec
from msgspec import Meta

from durable_cluster import App, Context, Continuation

UNITS_PER_BOX = 40

Quantity = Annotated[int, Meta(gt=0)]


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
    """The input, and the state of most steps. ``is_backordered``: ``reserve`` found too little before."""

    ref: str
    customer_id: str
    shipper_id: int
    country: str
    lines: list[Line]
    is_backordered: bool = False


class Parcel(msgspec.Struct, frozen=True):
    """What is left of an order once it is paid and packed."""

    order_ref: str
    shipper_id: int
    country: str
    boxes: int


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


@order.step(start=True)
def validate(ctx: Context, new: Order) -> Continuation:
    """A plain step: microseconds of work that touch nothing. Types and quantities were checked when the order was started."""
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

    An order that finds too little goes on back-order and comes here again until there is enough. The first to find a product
    short starts its restock, in this same transaction: the stock is marked as on order if and only if somebody is sent.
    """
    products = [line.product_id for line in new.lines]
    quantities = [line.quantity for line in new.lines]
    row = ctx.tx.execute(
        "select is_reserved, to_restock, deliveries from orders.reserve(%s, %s::int[], %s::int[], %s)",
        (new.ref, products, quantities, new.is_backordered),
    ).fetchone()
    assert row is not None
    is_reserved, to_restock, deliveries = row
    if is_reserved:
        return ctx.goto(charge, new)
    for shortage in map(Shortage, to_restock, deliveries):
        restock.start(shortage, key=f"restock-{shortage.product_id}-{shortage.delivery}", tx=ctx.tx)
    return ctx.goto(reserve, msgspec.structs.replace(new, is_backordered=True))


@order.step(transactional=True)
def charge(ctx: Context, reserved: Order) -> Continuation:
    """One ledger line for each order line. ``numeric`` and Decimal hold every digit; totals are rounded once, at the end."""
    lines = reserved.lines
    ctx.tx.execute(
        "insert into orders.ledger (order_ref, line, product_id, quantity, gross, net)"
        " select %s, l.* from unnest(%s::int[], %s::int[], %s::int[], %s::numeric[], %s::numeric[]) l",
        (
            reserved.ref,
            list(range(1, len(lines) + 1)),
            [line.product_id for line in lines],
            [line.quantity for line in lines],
            [line.gross for line in lines],
            [line.net for line in lines],
        ),
    )
    return ctx.goto(pack, reserved)


@order.step()
def pack(ctx: Context, paid: Order) -> Continuation:
    """From here on a parcel is all that counts: each step may hand on a state of its own type."""
    units = sum(line.quantity for line in paid.lines)
    boxes = -(-units // UNITS_PER_BOX)
    return ctx.goto(ship, Parcel(paid.ref, paid.shipper_id, paid.country, boxes))


@order.step()
async def ship(ctx: Context, parcel: Parcel) -> Continuation:
    """An effect outside the database: it may be asked for twice, so it carries a key by which the carrier acts once."""
    tracking = await book_carrier(parcel, key=ctx.idempotency_key)
    return ctx.done(Shipment(parcel.order_ref, tracking, parcel.boxes, steps=ctx.seq))


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


async def book_carrier(parcel: Parcel, *, key: str) -> str:
    """Stands for a carrier's API: the same key gets the same parcel's tracking number."""
    return f"{parcel.country[:2].upper()}-{parcel.shipper_id}-{key[:12]}"


async def ask_supplier(shortage: Shortage, *, key: str) -> None:
    """Stands for a supplier's API."""
