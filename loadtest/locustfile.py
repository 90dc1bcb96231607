"""Starts orders and awaits their results, with Locust: against a cluster that is running.

    durable-cluster start --shards 8
    locust -f loadtest/locustfile.py --headless -u 50 -r 50 -t 30s

The database is DURABLE_DSN's, or the local one of this directory. ``start`` is the call with its commit; ``end to end`` begins
with it and lasts until ``result()`` has returned, which polls. Each user is a connection. Psycopg waits the way of gevent, for
Locust has patched the standard library before it is imported here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TypeVar
from uuid import uuid4

import msgspec
from locust import User, events

from durable_cluster.examples.orders import northwind
from durable_cluster.examples.orders.flows import app, order

T = TypeVar("T")
RESULT_TIMEOUT_S = 60.0

some_order = itertools.cycle(northwind.orders()).__next__
events.test_start.add_listener(lambda **_: northwind.prepare(app.client.connection()))  # type: ignore[no-untyped-call, unused-ignore]


class Customer(User):  # type: ignore[misc, unused-ignore]  # Locust is an extra, and need not be there when types are checked
    """Places an order, waits for its shipment, places the next."""

    def buy(self) -> None:
        """One order, from its start to its result."""
        placed = msgspec.structs.replace(some_order(), ref=uuid4().hex)
        begin = time.perf_counter()
        handle = self.timed("start", begin, lambda: order.start(placed))
        self.timed("end to end", begin, lambda: handle.result(timeout=RESULT_TIMEOUT_S))

    tasks = [buy]  # noqa: RUF012  (Locust's way)

    def timed(self, name: str, begin: float, act: Callable[[], T]) -> T:
        """What ``act`` returns. Locust hears how long it was since ``begin``, and of the error, which goes on."""
        raised: Exception | None = None
        try:
            return act()
        except Exception as error:
            raised = error
            raise
        finally:
            passed_ms = (time.perf_counter() - begin) * 1000
            self.environment.events.request.fire(
                request_type="order",
                name=name,
                response_time=passed_ms,
                response_length=0,
                exception=raised,
                context={},
            )
