"""What the shop does with an order and its stock, in SQL and over HTTP: the words and the deeds that every flow shares.

``flows`` puts them in order as a state machine, ``linear`` as a function. Nothing here knows of workflows: a transactional step
gives its connection, a step that calls somebody gives its idempotency key, and a ``TerminalError`` says: do not try again.
"""

from __future__ import annotations

import os
from collections import Counter
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
import psycopg
from msgspec import Meta
from psycopg.errors import RaiseException

from durable_cluster import TerminalError
from durable_cluster.examples.orders.carrier import Carrier, Shipping

UNITS_PER_BOX = 40
# A back-ordered order sleeps so long, then twice as long, … until it finds enough: a restock takes its time.
BACKORDER_S_MIN = 0.1
BACKORDER_S_MAX = 2.0
BACKORDER_DOUBLINGS_MAX = 8
CARRIER_TIMEOUT = "4s"

Connection = psycopg.Connection[Any]
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
    """The input of an order.

    ``waits``: how often the machine found too little. ``poison``: a defect that no step can handle; it has to be edited away.
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

    @property
    def key(self) -> str:
        """The restock is started with it: one for each delivery."""
        return f"restock-{self.product_id}-{self.delivery}"


class Delivery(msgspec.Struct, frozen=True):
    """The output of a restock."""

    product_id: int
    units: int
    steps: int


carrier = Carrier()


def check(new: Order) -> None:
    """Whether the order makes sense; types and quantities were checked when it was started. Raises TerminalError.

    A poisoned order never gets past it, and holds up no other: when a process dies of one, the steps it shared a page with are run
    one by one, until it is known whose fault it was.
    """
    if new.poison == "crashes":
        os._exit(1)
    if new.poison == "raises":
        raise ValueError(f"order {new.ref} cannot be read")
    if not new.lines:
        raise TerminalError(f"order {new.ref} has no lines")
    product_id, times = Counter(line.product_id for line in new.lines).most_common(1)[0]
    if times > 1:
        raise TerminalError(f"order {new.ref} names product {product_id} {times} times; give it one line")
    if any(line.unit_price < 0 or not 0 <= line.discount <= 1 for line in new.lines):
        raise TerminalError(f"order {new.ref} has a negative price, or a discount that is not between 0 and 1")


def take(tx: Connection, order: Order, *, is_backordered: bool) -> list[Shortage] | None:
    """Take all lines from the stock: then None; or nothing: then what has to be ordered now. Raises TerminalError."""
    products = [line.product_id for line in order.lines]
    quantities = [line.quantity for line in order.lines]
    try:
        row = tx.execute(
            "select is_reserved, to_restock, deliveries from orders.reserve(%s, %s::int[], %s::int[], %s)",
            (order.ref, products, quantities, is_backordered),
        ).fetchone()
    except RaiseException as refused:  # there is no such product, and trying again would not make one
        raise TerminalError(refused.diag.message_primary or "refused") from refused
    assert row is not None
    is_reserved, to_restock, deliveries = row
    return None if is_reserved else list(map(Shortage, to_restock, deliveries))


def backorder_s(waits: int) -> float:
    """How long to sleep before the stock is worth another look, after so many."""
    return min(BACKORDER_S_MAX, BACKORDER_S_MIN * 2.0 ** min(waits, BACKORDER_DOUBLINGS_MAX))


def book(tx: Connection, order: Order) -> Paid:
    """One ledger line for each order line. ``numeric`` and Decimal hold every digit; totals are rounded once, at the end."""
    lines = order.lines
    row = tx.execute(
        "with booked as (insert into orders.ledger (order_ref, line, product_id, quantity, gross, net)"
        "  select %s, l.* from unnest(%s::int[], %s::int[], %s::int[], %s::numeric[], %s::numeric[]) l)"
        " select c.address from orders.carrier c",
        (
            order.ref,
            list(range(1, len(lines) + 1)),
            [line.product_id for line in lines],
            [line.quantity for line in lines],
            [line.gross for line in lines],
            [line.net for line in lines],
        ),
    ).fetchone()
    boxes = -(-sum(line.quantity for line in lines) // UNITS_PER_BOX)
    return Paid(Shipping(order.ref, order.shipper_id, order.country, boxes), None if row is None else row[0])


async def hand_over(paid: Paid, *, key: str) -> Parcel:
    """Book the parcel with the carrier: the same key books one, however often it is asked for."""
    of = paid.shipping
    if paid.carrier is None:
        tracking = f"{of.country[:2].upper()}-{of.shipper_id}-{key[:12]}"  # the shop's own van
    else:
        tracking = await carrier.book(paid.carrier, of, key=key)
    return Parcel(of.order_ref, of.boxes, tracking)


async def ask_supplier(shortage: Shortage, *, key: str) -> None:
    """Stands for a supplier's API: asked twice with one key, he sends one delivery."""


def store(tx: Connection, shortage: Shortage) -> int:
    """Put a delivery into the stock; its units. Raises TerminalError for one that is there already."""
    row = tx.execute("select orders.receive(%s, %s)", (shortage.product_id, shortage.delivery)).fetchone()
    assert row is not None
    units: int | None = row[0]
    if units is None:
        raise TerminalError(f"delivery {shortage.delivery} of product {shortage.product_id} is in the stock already")
    return units
