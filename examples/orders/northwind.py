"""The Northwind files as orders, what these add up to, and the shop's tables with the opening stock."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Iterator
from decimal import Decimal
from importlib.resources import files
from io import StringIO
from typing import Any

import msgspec
import psycopg

from durable_cluster.examples.orders.shop import Line, Order, Poison

PACKAGE = "durable_cluster.examples.orders"
PREPARE_LOCK = 0x6F72_6465_7273  # "orders": one at a time makes the tables
POISON_SEED = 830
POISONS: tuple[Poison, ...] = ("raises", "raises", "raises", "crashes", "crashes")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What some orders come to. ``gross`` and ``net`` are exact."""

    orders: int
    lines: int
    units: int
    gross: Decimal
    net: Decimal


def orders() -> list[Order]:
    """The 830 orders, by number; ``ref`` is the number."""
    lines: dict[str, list[Line]] = {}
    for row in _rows("order_details"):
        line = Line(
            product_id=int(row["product_id"]),
            unit_price=Decimal(row["unit_price"]),
            quantity=int(row["quantity"]),
            discount=Decimal(row["discount"]),
        )
        lines.setdefault(row["order_id"], []).append(line)
    return [
        Order(
            ref=row["order_id"],
            customer_id=row["customer_id"],
            shipper_id=int(row["ship_via"]),
            country=row["ship_country"],
            lines=lines[row["order_id"]],
        )
        for row in _rows("orders")
    ]


def copies(times: int) -> Iterator[Order]:
    """Every order ``times`` times, under refs like 10248-001."""
    originals = orders()
    for copy in range(1, times + 1):
        for original in originals:
            yield msgspec.structs.replace(original, ref=f"{original.ref}-{copy:03}")


def poisoned(times: int) -> dict[str, Poison]:
    """A handful among ``times`` copies of every order, by ref, and what is wrong with each; the same at every call."""
    originals = orders()
    chosen = random.Random(POISON_SEED).sample(range(len(originals) * times), len(POISONS))
    return {
        f"{originals[index % len(originals)].ref}-{index // len(originals) + 1:03}": poison
        for index, poison in zip(chosen, POISONS, strict=True)
    }


def figures(of: Iterable[Order], *, times: int = 1) -> Figures:
    """What ``times`` copies of these orders come to."""
    return total(
        Figures(
            orders=times,
            lines=len(order.lines) * times,
            units=sum(line.quantity for line in order.lines) * times,
            gross=sum((line.gross for line in order.lines), Decimal(0)) * times,
            net=sum((line.net for line in order.lines), Decimal(0)) * times,
        )
        for order in of
    )


def total(of: Iterable[Figures]) -> Figures:
    """The sum of figures."""
    several = list(of)
    return Figures(
        orders=sum(one.orders for one in several),
        lines=sum(one.lines for one in several),
        units=sum(one.units for one in several),
        gross=sum((one.gross for one in several), Decimal(0)),
        net=sum((one.net for one in several), Decimal(0)),
    )


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the shop's tables and its opening stock, in one transaction; what is there stays as it is."""
    products = list(_rows("products"))
    with connection.transaction():
        connection.execute("select pg_advisory_xact_lock(%s)", (PREPARE_LOCK,))
        connection.execute("select set_config('client_min_messages', 'warning', true)")
        connection.execute((files(PACKAGE) / "tables.sql").read_bytes())
        connection.execute(
            "insert into orders.stock (product_id, name, opening, on_hand)"
            " select i, n, u, u from unnest(%s::int[], %s::text[], %s::int[]) p(i, n, u) on conflict do nothing",
            (
                [int(row["product_id"]) for row in products],
                [row["product_name"] for row in products],
                [int(row["units_in_stock"]) for row in products],
            ),
        )


def name_carrier(connection: psycopg.Connection[Any], address: str) -> None:
    """From now on parcels are booked there."""
    connection.execute(
        "insert into orders.carrier (address) values (%s) on conflict (is_one) do update set address = excluded.address",
        (address,),
    )


def _rows(name: str) -> Iterator[dict[str, str]]:
    text = (files(PACKAGE) / "data" / f"{name}.csv").read_text("utf-8")
    return csv.DictReader(StringIO(text, newline=""))
