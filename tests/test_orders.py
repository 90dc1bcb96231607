"""The order-fulfilment example on its real input: totals to the last digit, nothing twice, stock never negative."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from types import ModuleType
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.errors import CheckViolation, UniqueViolation

from durable_cluster import App, InputError, WorkflowFailed
from durable_cluster.examples.orders import flows, linear, northwind
from durable_cluster.examples.orders.carrier import Booking, Carrier, CarrierError, Ledger, Shipping, ledger_of
from durable_cluster.examples.orders.carrier_stub import CarrierStub, Manners, carrier_process
from durable_cluster.examples.orders.shop import Line, Order, Shortage
from durable_cluster.ops import demo, demo_watch
from durable_cluster.ops.lasting import Lasting
from durable_cluster.ops.reconcile import Letters, Reconciliation, block, reconcile

KNOWN = northwind.Figures(
    orders=830, lines=2_155, units=51_317, gross=Decimal("1354458.59"), net=Decimal("1265793.0395")
)


FLOWS = {"machine": flows, "function": linear}
both = pytest.mark.parametrize("app", FLOWS.values(), ids=FLOWS, indirect=True)

POLITE = Manners(quick_s_max=0, slow_share=0, error_share=0, hang_share=0)


class Wharf(threading.Thread):
    """A carrier of this process, in a thread of its own."""

    def __init__(self, manners: Manners) -> None:
        super().__init__(daemon=True)
        self.stub = CarrierStub(manners, random.Random(1))
        self.address = ""
        self._is_open = threading.Event()
        self._loop = asyncio.new_event_loop()

    def run(self) -> None:
        server = self._loop.run_until_complete(self.stub.listen())
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._is_open.set()
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.close()

    def open(self) -> Wharf:
        self.start()
        assert self._is_open.wait(10)
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join(10)


@pytest.fixture
def wharf() -> Iterator[Callable[[Manners], Wharf]]:
    """Opens carriers and closes them after the test."""
    opened: list[Wharf] = []

    def open_one(manners: Manners) -> Wharf:
        opened.append(Wharf(manners).open())
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def carrier(app: App, conn: psycopg.Connection, wharf: Callable[[Manners], Wharf]) -> CarrierStub:
    """The shop's carrier, which always answers at once."""
    one = wharf(POLITE)
    northwind.name_carrier(conn, one.address)
    return one.stub


def compared(conn: psycopg.Connection, times: int, carrier: CarrierStub, **more: object) -> Reconciliation:
    return reconcile(conn, times, ledger=carrier.ledger(), settle_s=0, **more)  # type: ignore[arg-type]


@pytest.fixture
def app(
    request: pytest.FixtureRequest, dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> Iterator[App]:
    """The example's own app (the machine's, if the test does not say), on a fresh database with the shop's tables."""
    flow: ModuleType = getattr(request, "param", flows)
    monkeypatch.setenv("DURABLE_DSN", dsn)
    flow.app.client.use(dsn)  # whatever database another test of this process has used it with
    northwind.prepare(conn)
    yield flow.app
    flow.app.close()


def shipped(handle: Any) -> dict[str, Any]:
    """The output of an order, which the function's handle gives as a Shipment."""
    return msgspec.to_builtins(handle.result(timeout=5))  # type: ignore[no-any-return]


def an_order(*lines: Line, ref: str = "1-001") -> Order:
    return Order(ref, "VINET", 3, "France", list(lines))


def units(product_id: int, quantity: int) -> Line:
    return Line(product_id, Decimal("9.99"), quantity)


def on_hand(conn: psycopg.Connection, product_id: int) -> int:
    row = conn.execute("select on_hand from orders.stock where product_id = %s", (product_id,)).fetchone()
    assert row is not None
    return row[0]


def test_the_files_hold_the_known_figures() -> None:
    assert northwind.figures(northwind.orders()) == KNOWN
    assert northwind.figures(northwind.orders(), times=100).net == Decimal("126579303.95")


@both
def test_all_orders_go_through_and_their_books_are_exact(
    app: App, conn: psycopg.Connection, carrier: CarrierStub
) -> None:
    demo.load(conn, 1, app=app)
    app.run(until_idle=True)
    books = compared(conn, 1, carrier)
    assert books.is_exact, "\n".join(block(books))
    assert books.found == books.expected == KNOWN
    assert books.net_total == "1,265,793.04"
    assert books.restocks > 0
    steps_max = 7 if app is flows.app else 10  # a function wakes in one, and looks at the stock in the next
    assert 830 * 5 + books.restocks * 2 <= books.steps < 830 * steps_max, "an order on back-order sleeps"
    assert books.rows_changed_per_step is not None
    assert books.rows_changed_per_step < 0.4, "a step that outlasts its page costs a row"
    assert (books.parcels.booked, books.parcels.calls) == (830, 830)

    demo.load(conn, 1, app=app)
    assert app.run(until_idle=True) == 0, "a second load is no load"
    assert compared(conn, 1, carrier).found == KNOWN

    demo.load(conn, 2, app=app)
    app.run(until_idle=True)
    assert compared(conn, 2, carrier).is_exact
    assert compared(conn, 1, carrier).is_exact, "of a database that holds more copies, the first ones are compared"
    assert not compared(conn, 3, carrier).is_exact


def test_the_books_say_what_does_not_balance(app: App, conn: psycopg.Connection, carrier: CarrierStub) -> None:
    demo.load(conn, 1)
    app.run(until_idle=True)
    conn.execute("delete from orders.ledger where order_ref = '10248-001' and line = 2")
    conn.execute("update orders.ledger set net = net + 0.0001 where order_ref = '10249-001' and line = 1")
    ledger = carrier.ledger()
    first, second, *rest = ledger.bookings
    twice = Booking("another key", first.order_ref, first.tracking)
    wrong = Booking(second.key, second.order_ref, "lost in the post")
    ledger = msgspec.structs.replace(ledger, bookings=[first, twice, wrong, *rest])
    books = reconcile(conn, 1, ledger=ledger, poisoned=1, letters=Letters(found=1), settle_s=0)
    assert not books.is_exact
    assert (books.orders_off, books.lines_lost, books.units_unaccounted) == (2, 1, 10)
    assert (books.parcels.booked, books.parcels.twice, books.parcels.off) == (831, 1, 1)
    wrong_lines = [line.split("  ")[0] for line in block(books) if line.startswith("✗")]
    assert {"✗ ledger lines", "✗ parcels booked", "✗ parcels booked twice", "✗ dead letters retried"} <= set(
        wrong_lines
    )


def test_watching_ends_when_every_order_has(app: App, conn: psycopg.Connection, dsn: str, carrier: CarrierStub) -> None:
    demo.load(conn, 1)
    seen: list[demo_watch.Standing] = []

    def work(standing: demo_watch.Standing) -> None:
        seen.append(standing)
        app.run(until_idle=True)

    with Lasting(dsn, name="watch") as database:
        last = demo_watch.watch(database, time.monotonic(), on_standing=work)
    assert (seen[0].ended, seen[0].total) == (0, 830)
    assert last.is_settled
    assert (last.ended, last.stuck) == (830, 0)
    assert last.steps_per_s > 0
    assert [shard.shard for shard in last.shards] == [0, 1]


@both
def test_poisoned_orders_become_dead_letters_and_go_through_once_they_are_mended(
    app: App, conn: psycopg.Connection, dsn: str, carrier: CarrierStub
) -> None:
    poisoned = northwind.poisoned(1)
    assert sorted(poisoned.values()) == ["crashes", "crashes", "raises", "raises", "raises"]
    assert poisoned == northwind.poisoned(1)
    raising = {
        ref: poison for ref, poison in poisoned.items() if poison == "raises"
    }  # the others would end this process
    demo.load(conn, 1, poisoned=raising, app=app)
    app.run(until_idle=True)
    with Lasting(dsn, name="watch") as database:
        stuck = demo_watch.watch(database, time.monotonic(), on_standing=lambda _: None)
        assert (stuck.ended, stuck.stuck, stuck.is_settled) == (827, 3, True)
        found = demo.retry_letters(database, app)
    assert found == Letters(found=3, by_attempts=3, by_crashes=0, retried=3)
    assert not compared(conn, 1, carrier, poisoned=3, letters=found).is_exact
    app.run(until_idle=True)
    books = compared(conn, 1, carrier, poisoned=3, letters=found)
    assert books.is_exact, "\n".join(block(books))


@both
def test_a_parcel_is_booked_once_however_the_carrier_behaves(
    app: App, conn: psycopg.Connection, wharf: Callable[[Manners], Wharf]
) -> None:
    rude = wharf(Manners(quick_s_max=0, slow_share=0.05, slow_s_max=0.2, error_share=0.5, hang_share=0.01))
    northwind.name_carrier(conn, rude.address)
    handles = app.named("order").start_many([an_order(units(1, 1), ref=f"{n}-001") for n in range(60)])
    app.run(until_idle=True)
    tracked = {output["order_ref"]: output["tracking"] for output in map(shipped, handles)}
    ledger = ledger_of(rude.address)
    assert {booking.order_ref: booking.tracking for booking in ledger.bookings} == tracked
    assert len(ledger.bookings) == len(tracked) == 60
    assert ledger.errors > 0
    assert ledger.repeats > 0, "a booking whose answer was lost is asked for again"


def test_without_a_carrier_the_shop_ships_by_itself(app: App) -> None:
    handle = flows.order.start(an_order(units(1, 1)))
    app.run(until_idle=True)
    assert handle.result(timeout=5)["tracking"].startswith("FR-3-")


def test_a_carrier_that_hangs_up_is_an_error_and_its_connection_is_not_used_again(
    wharf: Callable[[Manners], Wharf],
) -> None:
    def book(address: str, key: str) -> str:
        return asyncio.run(Carrier().book(address, Shipping("1-001", 3, "France", 1), key=key))

    polite = wharf(POLITE)
    assert book(polite.address, "one") == book(polite.address, "one") == "FR-3-0000001"
    assert book(polite.address, "two") == "FR-3-0000002"
    with pytest.raises(CarrierError, match="503"):
        book(wharf(Manners(error_share=1)).address, "one")
    hanging = wharf(Manners(error_share=0, hang_share=1))

    async def hang_then_book() -> str:
        carrier = Carrier()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await carrier.book(hanging.address, Shipping("1-001", 3, "France", 1), key="one")
        return await carrier.book(polite.address, Shipping("1-001", 3, "France", 1), key="one")

    assert asyncio.run(hang_then_book()) == "FR-3-0000001"
    assert [booking.key for booking in hanging.stub.ledger().bookings] == ["one"], "it was booked all the same"


def test_the_carrier_of_the_demo_runs_in_a_process_of_its_own() -> None:
    with carrier_process() as address:
        assert ledger_of(address) == Ledger(bookings=[], calls=0, repeats=0, slow=0, errors=0, hangs=0)
    with pytest.raises(OSError, match="refused"):
        ledger_of(address)


@both
def test_an_order_waits_for_its_restock_and_takes_all_its_lines_at_once(app: App, conn: psycopg.Connection) -> None:
    conn.execute("update orders.stock set on_hand = 5, opening = 5 where product_id in (1, 2)")
    handle = app.named("order").start(an_order(units(1, 3), units(2, 8)))
    app.run(until_idle=True)
    assert shipped(handle)["order_ref"] == "1-001"
    assert on_hand(conn, 1) == 2, "the product that was there was taken once, and not ordered"
    delivered, deliveries, served = conn.execute(
        "select delivered, deliveries, served from orders.stock where product_id = 2"
    ).fetchone() or (0, 0, 0)
    assert (deliveries, served) == (1, 8)
    assert on_hand(conn, 2) == 5 + delivered - 8
    assert shipped(app.named("restock").get(key="restock-2-0"))["units"] == delivered


def test_many_orders_that_are_short_of_one_product_start_one_restock(app: App, conn: psycopg.Connection) -> None:
    conn.execute("update orders.stock set on_hand = 0, opening = 0 where product_id = 7")
    handles = flows.order.start_many([an_order(units(7, 10), ref=f"{n}-001") for n in range(200)])
    app.run(until_idle=True)
    assert {handle.status() for handle in handles} == {"completed"}
    (restocks,) = conn.execute("select count(*) from durable.started where workflow = 'restock'").fetchone() or (0,)
    assert 1 <= restocks <= 3
    assert on_hand(conn, 7) >= 0


def test_stock_cannot_go_below_zero_nor_a_line_be_charged_twice(app: App, conn: psycopg.Connection) -> None:
    with pytest.raises(CheckViolation):
        conn.execute("update orders.stock set on_hand = on_hand - 1000")
    charge = "insert into orders.ledger values ('1-001', 1, 7, 1, 9.99, 9.99)"
    conn.execute(charge)
    with pytest.raises(UniqueViolation):
        conn.execute(charge)


@both
def test_a_delivery_that_is_in_the_stock_already_is_not_stored_again(app: App, conn: psycopg.Connection) -> None:
    first, again = (app.named("restock").start(Shortage(product_id=4, delivery=0)) for _ in range(2))
    app.run(until_idle=True)
    assert {first.status(), again.status()} == {"completed", "failed"}
    assert conn.execute("select deliveries from orders.stock where product_id = 4").fetchone() == (1,)


@both
def test_an_order_that_makes_no_sense_fails_alone_and_takes_nothing(app: App, conn: psycopg.Connection) -> None:
    bad = {
        "order 1-001 has no lines": an_order(),
        "order 1-001 names product 7 2 times": an_order(units(7, 1), units(7, 2)),
        "a discount that is not between 0 and 1": an_order(Line(7, Decimal("9.99"), 1, Decimal("1.5"))),
        "there is no product 4711": an_order(units(7, 1), units(4711, 1)),
    }
    before = on_hand(conn, 7)
    handles = app.named("order").start_many([*bad.values(), an_order(units(1, 1), ref="2-001")])
    app.run(until_idle=True)
    for reason, handle in zip(bad, handles[:-1], strict=True):
        with pytest.raises(WorkflowFailed, match=reason):
            handle.result(timeout=5)
    assert handles[-1].status() == "completed"
    assert on_hand(conn, 7) == before


def test_a_quantity_below_one_is_refused_where_the_order_is_started(app: App) -> None:
    wrong = msgspec.structs.replace(units(7, 1), quantity=0)
    with pytest.raises(InputError, match=r"lines\[0\]\.quantity"):
        flows.order.start(an_order(wrong))


def test_preparing_again_changes_nothing(app: App, conn: psycopg.Connection) -> None:
    conn.execute("update orders.stock set on_hand = 1 where product_id = 1")
    northwind.prepare(conn)
    assert on_hand(conn, 1) == 1
