"""``demo``: the Northwind orders through a running cluster, watched live, their books reconciled at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import msgspec
import psycopg

from durable_cluster.app import App
from durable_cluster.errors import ConfigurationError
from durable_cluster.examples.orders import flows, northwind
from durable_cluster.examples.orders.carrier import ledger_of
from durable_cluster.examples.orders.shop import Poison
from durable_cluster.ops import letters
from durable_cluster.ops.chaos import Havoc
from durable_cluster.ops.demo_watch import Display, Standing, watch
from durable_cluster.ops.lasting import Lasting
from durable_cluster.ops.reconcile import Letters, Reconciliation, block, reconcile
from durable_cluster.ops.terminal import Progress, Terminal

TIMES_MAX = 10_000
LOAD_BATCH = 1_000
# Many more than are expected; what is beyond stays a dead letter, and the books say so.
LETTERS_MAX = 1_000

Connection = psycopg.Connection[Any]


def run_demo(
    terminal: Terminal,
    dsn: str,
    *,
    times: int,
    carrier: str,
    app: App = flows.app,
    on_standing: Callable[[Standing], None] = lambda _: None,
    before_books: Callable[[], Havoc | None] = lambda: None,
) -> Reconciliation:
    """Load the orders ``times`` times, watch the cluster on ``dsn`` finish them, answer with the reconciliation.

    ``carrier``: the address of whoever books the parcels; ``app``: the flow, which the cluster runs. A handful of orders are
    poisoned: they end as dead letters, and are mended and retried when all others have ended. ``on_standing`` hears twice a second
    how far it is, and may raise to end the demo. ``before_books`` is called when all is done and says what was done to the cluster:
    one that is stopped there leaves the books still. Orders that the database knows are not started again. Raises
    ConfigurationError for a wrong ``times``.
    """
    checked_times(times)
    poisoned = northwind.poisoned(times)
    app.client.use(dsn)
    with Lasting(dsn, name="durable-cluster demo") as database:
        database.ask(northwind.prepare)
        database.ask(lambda connection: northwind.name_carrier(connection, carrier))
        database.ask(lambda connection: load(connection, times, poisoned=poisoned, app=app))
        display = Display(sys.stderr)
        began_at = time.monotonic()

        def show(standing: Standing) -> None:
            display.show(standing)
            on_standing(standing)

        last = watch(database, began_at, on_standing=show)
        found = retry_letters(database, app)
        if found.found:
            display.say(f"{found.told()}; mended and retried {found.retried}")
            last = watch(database, began_at, on_standing=show)
        display.finish(last)
        app.client.close()
        havoc = before_books()
        books = database.ask(
            lambda connection: reconcile(
                connection,
                times,
                ledger=ledger_of(carrier),
                poisoned=len(poisoned),
                letters=found,
                havoc=havoc,
            )
        )
    terminal.answer(books, block(books))
    return books


def checked_times(times: int) -> int:
    """``times`` if the demo can do that. Raises ConfigurationError."""
    if not 1 <= times <= TIMES_MAX:
        raise ConfigurationError(f"--times {times} is out of range; choose 1 to {TIMES_MAX:,}")
    return times


def load(
    connection: Connection, times: int, *, poisoned: Mapping[str, Poison] | None = None, app: App = flows.app
) -> None:
    """Start every order ``times`` times, 1,000 a transaction, with a bar. Keys make it idempotent.

    ``poisoned``: what is wrong with some, by ref.
    """
    originals = len(northwind.orders())
    defects = poisoned or {}
    with Progress("orders loaded:", originals * times, is_live=sys.stderr.isatty()) as progress:
        rest = (msgspec.structs.replace(one, poison=defects.get(one.ref)) for one in northwind.copies(times))
        while batch := list(islice(rest, LOAD_BATCH)):
            app.named("order").start_many(batch, keys=[key_of(order.ref) for order in batch], tx=connection)
            progress.advance(len(batch))


def key_of(order_ref: str) -> str:
    """The key an order of the demo is started with."""
    return f"order-{order_ref}"


def retry_letters(database: Lasting, app: App = flows.app) -> Letters:
    """Take up again what is stuck, as an operator would: read the state, mend it, retry. What there was, by reason."""
    stuck = database.ask(
        lambda connection: letters.listed(connection, letters.Filter(workflow="order"), limit=LETTERS_MAX)
    )
    reasons = [letter.reason for letter in stuck]
    retried = 0
    for letter in stuck:
        for workflow_id in database.ask(partial(letters.by_prefix, digits=letter.id)):
            state = database.ask(partial(letters.state, workflow_id=workflow_id))
            handle = app.get(workflow_id)
            if letter.step == "validate" and state is not None:
                handle.retry(mended(msgspec.json.decode(state)))
            else:
                handle.retry()
            retried += 1
    return Letters(
        found=len(stuck),
        by_attempts=reasons.count("attempts"),
        by_crashes=reasons.count("crashes"),
        retried=retried,
    )


def mended(state: Any) -> Any:
    """The state without what is wrong with the order, wherever it says that: a function's has it as input and as argument."""
    if isinstance(state, dict):
        return {name: mended(value) for name, value in state.items() if name != "poison"}
    return [mended(value) for value in state] if isinstance(state, list) else state
