"""An order on its way: charged, approved by somebody if it is dear, packed. Onlookers are told where it stands.

fulfil:  reserve → [approved] → charge → pack
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

import msgspec
import psycopg

from durable_cluster import App, TerminalError, set_progress, wait_for

DEAR_CENTS = 10_000
PREPARE_LOCK = 0x7765_6273  # "webs": one at a time makes the tables


class Order(msgspec.Struct, frozen=True):
    """The input."""

    ref: str
    article: str
    cents: int


class Decision(msgspec.Struct, frozen=True):
    """What comes with an approval."""

    approved: bool
    by: str


app = App("web")


@app.step
async def reserve(article: str) -> str:
    """Stands for a call of the warehouse."""
    await asyncio.sleep(0.05)
    return f"shelf {len(article)}"


@app.step
async def charge(ref: str, cents: int) -> str:
    """Stands for a call of the bank, which would get ``ctx.idempotency_key``."""
    await asyncio.sleep(0.05)
    return f"{ref}: {cents / 100:.2f} EUR"


@app.step
async def pack(article: str, shelf: str) -> str:
    """Stands for another."""
    await asyncio.sleep(0.05)
    return f"{article} from {shelf}"


@app.workflow
async def fulfil(order: Order) -> dict[str, str]:
    """What was charged and packed."""
    set_progress("reserving")
    shelf = await reserve(order.article)
    if order.cents >= DEAR_CENTS:
        set_progress("waiting for approval")
        decision = await wait_for("decided", Decision, timeout="3d")
        if decision is None or not decision.approved:
            raise TerminalError("nobody approved it" if decision is None else f"{decision.by} refused it")
    set_progress("charging")
    receipt = await charge(order.ref, order.cents)
    set_progress("packing")
    parcel = await pack(order.article, shelf)
    return {"receipt": receipt, "parcel": parcel}


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the tables, in one transaction; what is there stays as it is."""
    with connection.transaction():
        connection.execute("select pg_advisory_xact_lock(%s)", (PREPARE_LOCK,))
        connection.execute("select set_config('client_min_messages', 'warning', true)")
        connection.execute((files("durable_cluster.examples.web") / "tables.sql").read_bytes())
