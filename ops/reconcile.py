"""The demo's books: what the orders come to by the files alone, beside what the database holds."""

from __future__ import annotations

import re
import time
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec
import psycopg

from durable_cluster.examples.orders import northwind
from durable_cluster.examples.orders.carrier import Ledger
from durable_cluster.examples.orders.northwind import Figures
from durable_cluster.examples.orders.shop import Order
from durable_cluster.ops.chaos import Havoc

CENT = Decimal("0.01")
SETTLE_S = 1.5
SETTLE_S_MAX = 15.0
# Which copy of a Northwind order this is (10248-007: 7); null for anybody else's order.
COPY_OF_REF = "substring(l.order_ref from '^[0-9]+-([0-9]{3,9})$')::int"
COPY_OF_KEY = "substring(s.key from '^order-[0-9]+-([0-9]{3,9})$')::int"

COPY_IN_REF = re.compile(r"^[0-9]+-([0-9]{3,9})$", re.ASCII)

Connection = psycopg.Connection[Any]


class Letters(msgspec.Struct, frozen=True, kw_only=True):
    """Dead letters of orders: how many there were, for which reason, and how many were retried."""

    found: int = 0
    by_attempts: int = 0
    by_crashes: int = 0
    retried: int = 0

    def told(self) -> str:
        """For people."""
        others = self.found - self.by_attempts - self.by_crashes
        reasons = [f"{self.by_attempts} raised each time", f"{self.by_crashes} ended their process each time"]
        reasons += [f"{others} for other reasons"] * bool(others)
        return f"{self.found} orders were dead letters ({', '.join(reasons)})"


class Parcels(msgspec.Struct, frozen=True, kw_only=True):
    """The carrier's ledger beside the orders' outputs.

    ``twice``: orders with more than one booking; ``off``: finished orders whose tracking number is not that of their booking.
    ``calls``, ``repeats`` (with a key that had booked), ``slow``, ``errors`` and ``hangs``: how the carrier behaved.
    """

    booked: int
    twice: int
    off: int
    calls: int
    repeats: int
    slow: int
    errors: int
    hangs: int


class Reconciliation(msgspec.Struct, frozen=True, kw_only=True):
    """Expected and found.

    ``steps``: of all orders and restocks, vain tries too. ``rows_changed``: rows updated and deleted in each table of ours that
    has any, since the database was made; unknown (None) when the server was killed meanwhile, for its counters went with it.
    ``letters_expected``: dead letters that there had to be. ``havoc``: what was done to the cluster, if anything.
    """

    times: int
    is_exact: bool
    expected: Figures
    found: Figures
    net_total: str
    orders_off: int
    lines_charged_twice: int
    lines_lost: int
    stock_min: int
    units_backordered: int
    units_unaccounted: int
    workflows_failed: int
    restocks: int
    steps: int
    rows_changed: dict[str, int] | None
    rows_changed_per_step: float | None
    parcels: Parcels
    letters_expected: int
    letters: Letters
    havoc: Havoc | None


class _Ends(msgspec.Struct, frozen=True, kw_only=True):
    """How the workflows ended."""

    orders: int
    restocks: int
    failed: int
    steps: int


class _Stock(msgspec.Struct, frozen=True, kw_only=True):
    """What the stock says. ``unaccounted``: units taken from it that no ledger line names."""

    lowest: int
    backordered: int
    unaccounted: int


class _Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger beside the files, order by order."""

    found: Figures
    off: int
    twice: int
    lost: int


def reconcile(
    connection: Connection,
    times: int,
    *,
    ledger: Ledger,
    poisoned: int = 0,
    letters: Letters | None = None,
    havoc: Havoc | None = None,
    settle_s: float = SETTLE_S,
) -> Reconciliation:
    """Compare ledger, stock, parcels and workflows with ``times`` copies of every order in the files. Reads whole tables.

    ``ledger``: the carrier's; ``poisoned``: how many orders had to be dead letters; ``letters``: those that were; ``havoc``: what
    was done to the cluster. Of a database that holds more copies the first ``times`` are compared; stock, restocks and steps are
    everybody's. Waits until the counts of changed rows stand still for ``settle_s``, because a backend reports them up to a second
    late.
    """
    orders = northwind.orders()
    expected = northwind.figures(orders, times=times)
    ends = _ends(connection, times)
    charged = _ledger(connection, orders, times=times, finished=ends.orders)
    stock = _stock(connection)
    parcels = _parcels(connection, ledger, times=times)
    letters = letters or Letters()
    is_known = havoc is None or not havoc.server_kills
    changed = settled_row_changes(connection, settle_s=settle_s) if is_known else None
    wrong = [
        *(charged.off, charged.twice, charged.lost, ends.failed, stock.backordered, stock.unaccounted),
        *(parcels.booked != expected.orders, parcels.twice, parcels.off),
        *(letters.found != poisoned, letters.retried != poisoned, stock.lowest < 0),
    ]
    return Reconciliation(
        times=times,
        is_exact=charged.found == expected and not any(wrong),
        expected=expected,
        found=charged.found,
        net_total=money(charged.found.net),
        orders_off=charged.off,
        lines_charged_twice=charged.twice,
        lines_lost=charged.lost,
        stock_min=stock.lowest,
        units_backordered=stock.backordered,
        units_unaccounted=stock.unaccounted,
        workflows_failed=ends.failed,
        restocks=ends.restocks,
        steps=ends.steps,
        rows_changed=changed,
        rows_changed_per_step=None if changed is None else round(sum(changed.values()) / max(1, ends.steps), 6),
        parcels=parcels,
        letters_expected=poisoned,
        letters=letters,
        havoc=havoc,
    )


def block(books: Reconciliation) -> list[str]:
    """The reconciliation as aligned lines for people. Money is rounded here, once."""
    expected, found, parcels, letters = books.expected, books.found, books.parcels, books.letters
    rows: list[tuple[str, object, object]] = [
        ("orders finished", expected.orders, found.orders),
        ("ledger lines", expected.lines, found.lines),
        ("units sold", expected.units, found.units),
        ("gross total", expected.gross, found.gross),
        ("net total", expected.net, found.net),
        ("orders whose books differ", 0, books.orders_off),
        ("lines charged twice", 0, books.lines_charged_twice),
        ("lines lost", 0, books.lines_lost),
        ("stock below zero", 0, min(0, books.stock_min)),
        ("units still on back-order", 0, books.units_backordered),
        ("units taken, not charged", 0, books.units_unaccounted),
        ("parcels booked", expected.orders, parcels.booked),
        ("parcels booked twice", 0, parcels.twice),
        ("tracking numbers that differ", 0, parcels.off),
        ("dead letters found", books.letters_expected, letters.found),
        ("dead letters retried", books.letters_expected, letters.retried),
        ("workflows failed", 0, books.workflows_failed),
    ]
    lines = [f"  {'':29}  {'expected':>16}  {'found':>16}"]
    for what, should, does in rows:
        lines.append(f"{'✓' if should == does else '✗'} {what:29}  {_shown(should):>16}  {_shown(does):>16}")
    lines += [
        "",
        f"  {books.steps:,} steps; {books.restocks:,} restocks; the lowest stock is {books.stock_min:,} units",
        f"  the carrier was called {parcels.calls:,} times: {parcels.slow:,} slow answers, {parcels.errors:,} errors,"
        f" {parcels.hangs:,} never answered; {parcels.repeats:,} calls were for parcels it had booked",
        f"  {_changes(books)}",
        "",
        "✓ every figure is exact" if books.is_exact else "✗ the books do not balance",
    ]
    return lines


def _changes(books: Reconciliation) -> str:
    if books.rows_changed is None:
        return "rows updated or deleted are not known: Postgres counts anew after a crash"
    changed = ", ".join(
        f"{table} {rows:,}" for table, rows in sorted(books.rows_changed.items(), key=lambda of: -of[1])
    )
    return f"{books.rows_changed_per_step:.4f} rows updated or deleted per step ({changed or 'none'})"


def money(amount: Decimal) -> str:
    """To the cent, half up, with its thousands apart."""
    return f"{amount.quantize(CENT, ROUND_HALF_UP):,}"


def settled_row_changes(connection: Connection, *, settle_s: float) -> dict[str, int]:
    """Rows updated and deleted so far in each of our tables that has any, once two readings agree (or 15 s are over)."""
    stop_at = time.monotonic() + SETTLE_S_MAX
    before: dict[str, int] | None = None
    while True:
        connection.execute("select pg_stat_clear_snapshot()")
        now = dict(
            connection.execute(
                "select relation, updated + deleted from durable.row_changes() where updated + deleted > 0"
            ).fetchall()
        )
        if now == before or time.monotonic() > stop_at:
            return now
        before = now
        time.sleep(settle_s)


def _ends(connection: Connection, times: int) -> _Ends:
    """A workflow's last step knows its number and says it in its output; a failure does too."""
    orders, restocks, failed, steps = _row(
        connection,
        "with ended as ("
        "  select s.workflow, f.status = 'completed' as is_completed,"
        f"   case s.workflow when 'order' then {COPY_OF_KEY} <= %s else true end as is_demo,"
        "    coalesce(f.output::json ->> 'steps', f.output::json ->> 'seq')::int as steps"
        "  from durable.finished f join durable.started s on s.id = f.id and s.day = f.day"
        "  where s.workflow in ('order', 'restock'))"
        " select count(*) filter (where workflow = 'order' and is_completed and is_demo),"
        "  count(*) filter (where workflow = 'restock' and is_completed),"
        "  count(*) filter (where not is_completed and is_demo), coalesce(sum(steps), 0) from ended",
        times,
    )
    return _Ends(orders=orders, restocks=restocks, failed=failed, steps=steps)


def _stock(connection: Connection) -> _Stock:
    lowest, backordered, unaccounted = _row(
        connection,
        "select min(s.on_hand), (select coalesce(sum(b.quantity), 0) from orders.backorder b) - sum(s.served),"
        " sum(s.opening + s.delivered - s.on_hand) - (select coalesce(sum(l.quantity), 0) from orders.ledger l)"
        " from orders.stock s",
    )
    return _Stock(lowest=lowest, backordered=backordered, unaccounted=unaccounted)


def _parcels(connection: Connection, ledger: Ledger, *, times: int) -> Parcels:
    bookings = [booking for booking in ledger.bookings if _is_copy(booking.order_ref, times)]
    booked = {booking.order_ref: booking.tracking for booking in bookings}
    shipped = connection.execute(
        "select f.output::json ->> 'order_ref', f.output::json ->> 'tracking'"
        " from durable.finished f join durable.started s on s.id = f.id and s.day = f.day"
        f" where s.workflow = 'order' and f.status = 'completed' and {COPY_OF_KEY} <= %s".encode(),
        (times,),
    ).fetchall()
    return Parcels(
        booked=len(bookings),
        twice=sum(times > 1 for times in Counter(booking.order_ref for booking in bookings).values()),
        off=sum(booked.get(ref) != tracking for ref, tracking in shipped),
        calls=ledger.calls,
        repeats=ledger.repeats,
        slow=ledger.slow,
        errors=ledger.errors,
        hangs=ledger.hangs,
    )


def _is_copy(order_ref: str, times: int) -> bool:
    found = COPY_IN_REF.match(order_ref)
    return found is not None and int(found[1]) <= times


def _ledger(connection: Connection, orders: list[Order], *, times: int, finished: int) -> _Ledger:
    due = {order.ref: northwind.figures([order], times=times) for order in orders}
    rows = connection.execute(
        "select split_part(l.order_ref, '-', 1), count(distinct l.order_ref), count(*), sum(l.quantity), sum(l.gross), sum(l.net)"
        f" from orders.ledger l where {COPY_OF_REF} <= %s group by 1".encode(),
        (times,),
    )
    booked = {
        ref: Figures(orders=copies, lines=lines, units=units, gross=gross, net=net)
        for ref, copies, lines, units, gross, net in rows
    }
    (twice,) = _row(
        connection,
        f"select count(*) - count(distinct (l.order_ref, l.line)) from orders.ledger l where {COPY_OF_REF} <= %s",
        times,
    )
    return _Ledger(
        found=msgspec.structs.replace(northwind.total(booked.values()), orders=finished),
        off=sum(booked.get(ref) != of for ref, of in due.items()) + len(booked.keys() - due.keys()),
        twice=twice,
        lost=sum(max(0, of.lines - (booked[ref].lines if ref in booked else 0)) for ref, of in due.items()),
    )


def _shown(value: object) -> str:
    if isinstance(value, Decimal):
        return money(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _row(connection: Connection, query: str, *parameters: object) -> Any:
    row = connection.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row
