"""The order-fulfilment example on its real input: totals to the last digit, nothing twice, stock never negative."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import msgspec
import psycopg
import pytest
from psycopg.errors import CheckViolation, UniqueViolation

from durable_cluster import App, InputError, WorkflowFailed
from durable_cluster.examples.orders import flows, northwind
from durable_cluster.examples.orders.flows import Line, Order, Shortage
from durable_cluster.ops import demo
from durable_cluster.ops.reconcile import block, reconcile

KNOWN = northwind.Figures(
    orders=830, lines=2_155, units=51_317, gross=Decimal("1354458.59"), net=Decimal("1265793.0395")
)


@pytest.fixture
def app(dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """The example's own app, on a fresh database with the shop's tables."""
    monkeypatch.setenv("DURABLE_DSN", dsn)
    flows.app.client.use(dsn)  # whatever database another test of this process has used it with
    northwind.prepare(conn)
    yield flows.app
    flows.app.close()


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


def test_all_orders_go_through_and_their_books_are_exact(app: App, conn: psycopg.Connection) -> None:
    demo.load(conn, 1)
    app.run(until_idle=True)
    books = reconcile(conn, 1, settle_s=0)
    assert books.is_exact, "\n".join(block(books))
    assert books.found == books.expected == KNOWN
    assert books.net_total == "1,265,793.04"
    assert books.restocks > 0
    assert books.steps >= 830 * 5 + books.restocks * 2
    assert books.rows_changed_per_step < 0.1

    demo.load(conn, 1)
    assert app.run(until_idle=True) == 0, "a second load is no load"
    assert reconcile(conn, 1, settle_s=0).found == KNOWN

    demo.load(conn, 2)
    app.run(until_idle=True)
    assert reconcile(conn, 2, settle_s=0).is_exact
    assert reconcile(conn, 1, settle_s=0).is_exact, "of a database that holds more copies, the first ones are compared"
    assert not reconcile(conn, 3, settle_s=0).is_exact


def test_the_books_say_what_does_not_balance(app: App, conn: psycopg.Connection) -> None:
    demo.load(conn, 1)
    app.run(until_idle=True)
    conn.execute("delete from orders.ledger where order_ref = '10248-001' and line = 2")
    conn.execute("update orders.ledger set net = net + 0.0001 where order_ref = '10249-001' and line = 1")
    books = reconcile(conn, 1, settle_s=0)
    assert not books.is_exact
    assert (books.orders_off, books.lines_lost, books.units_unaccounted) == (2, 1, 10)
    assert [line for line in block(books) if line.startswith("✗ ledger lines")]


def test_watching_ends_when_every_order_has(app: App, conn: psycopg.Connection) -> None:
    demo.load(conn, 1)
    seen: list[demo.Standing] = []

    def work(standing: demo.Standing) -> None:
        seen.append(standing)
        app.run(until_idle=True)

    last = demo.watch(conn, on_standing=work)
    assert (seen[0].ended, seen[0].total) == (0, 830)
    assert last.is_done
    assert last.ended == 830
    assert last.steps_per_s > 0
    assert [shard.shard for shard in last.shards] == [0, 1]


def test_an_order_waits_for_its_restock_and_takes_all_its_lines_at_once(app: App, conn: psycopg.Connection) -> None:
    conn.execute("update orders.stock set on_hand = 5, opening = 5 where product_id in (1, 2)")
    handle = flows.order.start(an_order(units(1, 3), units(2, 8)))
    app.run(until_idle=True)
    assert handle.result(timeout=5)["order_ref"] == "1-001"
    assert on_hand(conn, 1) == 2, "the product that was there was taken once, and not ordered"
    delivered, deliveries, served = conn.execute(
        "select delivered, deliveries, served from orders.stock where product_id = 2"
    ).fetchone() or (0, 0, 0)
    assert (deliveries, served) == (1, 8)
    assert on_hand(conn, 2) == 5 + delivered - 8
    assert flows.restock.get(key="restock-2-0").result(timeout=5)["units"] == delivered


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


def test_a_delivery_that_is_in_the_stock_already_is_not_stored_again(app: App, conn: psycopg.Connection) -> None:
    first = flows.restock.start(Shortage(product_id=4, delivery=0))
    again = flows.restock.start(Shortage(product_id=4, delivery=0))
    app.run(until_idle=True)
    assert {first.status(), again.status()} == {"completed", "failed"}
    assert conn.execute("select deliveries from orders.stock where product_id = 4").fetchone() == (1,)


def test_an_order_that_makes_no_sense_fails_alone_and_takes_nothing(app: App, conn: psycopg.Connection) -> None:
    bad = {
        "order 1-001 has no lines": an_order(),
        "order 1-001 names product 7 2 times": an_order(units(7, 1), units(7, 2)),
        "a discount that is not between 0 and 1": an_order(Line(7, Decimal("9.99"), 1, Decimal("1.5"))),
        "there is no product 4711": an_order(units(7, 1), units(4711, 1)),
    }
    before = on_hand(conn, 7)
    handles = flows.order.start_many([*bad.values(), an_order(units(1, 1), ref="2-001")])
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
