"""Users for Locust: they start workflows, signal them, and await what becomes of them, as four mixes named after real loads.

    durable-cluster start --app durable_cluster.loadtest.mixes:app
    locust -f loadtest/locustfile.py --headless -u 40 -r 20 -t 30s [OrderFlow Approvals AgentLoop FanOut]

docs/loadtest.md says what is measured. Each user holds a connection; psycopg waits the way of gevent, because Locust has patched
the standard library before anything is imported here.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
import psycopg
from locust import FastHttpUser, User, constant_throughput, events, stats, task
from locust.exception import RescheduleTask
from locust.runners import WorkerRunner

from durable_cluster import Handle
from durable_cluster.errors import DurableError
from durable_cluster.examples.orders import northwind
from durable_cluster.loadtest import load_options, mixes
from durable_cluster.loadtest.load_options import END_TO_END
from durable_cluster.machine import Machine

T = TypeVar("T")
ERRORS = (DurableError, psycopg.Error)
API_WAIT_S = 10
AFTER_ERROR_S = 0.5
"""A user whose call failed comes back after so long: a server that is away is not stormed."""

some_order = itertools.cycle(northwind.orders()).__next__
events.init_command_line_parser.add_listener(load_options.declare)


@events.init.add_listener
def meet_the_cluster(environment: Any, **_: object) -> None:
    """Once, where the users are counted: find the database, prepare it, and see that a cluster answers; or end, saying why."""
    if isinstance(environment.runner, WorkerRunner):
        return
    options = environment.parsed_options
    if options.api is None and not options.user_classes:
        environment.user_classes.remove(ApiCustomer)
    held = load_options.prepared(options, of_api=[kind is ApiCustomer for kind in environment.user_classes])
    environment.events.quit.add_listener(lambda **_: held.close())


@events.test_start.add_listener
def hear_of_the_database(environment: Any, **_: object) -> None:
    """A worker has it from its master, with all other options of ours."""
    if environment.parsed_options.dsn is not None:
        mixes.app.client.use(environment.parsed_options.dsn)


@events.quitting.add_listener
def let_the_end_be_written(environment: Any, **_: object) -> None:
    """Locust writes its CSV files once a second, and closes them here: those of the last second were missing."""
    if environment.parsed_options.csv_prefix:
        time.sleep(2 * stats.CSV_STATS_INTERVAL_SEC)


class Customer(User):
    """What all of them do: one thing again and again, as often as ``--rate`` allows."""

    abstract = True

    def on_start(self) -> None:
        self.options = self.environment.parsed_options

    def wait_time(self) -> float:
        """Until the next start: nothing, or what the rate leaves."""
        return float(constant_throughput(self.options.rate)(self)) if self.options.rate else 0.0

    def count(self, what: str, since: float, error: str | None = None) -> None:
        """Tell Locust how long it was since then."""
        self.environment.events.request.fire(
            request_type=what,
            name=type(self).__name__,
            response_time=(time.perf_counter() - since) * 1000,
            response_length=0,
            exception=error,
            context={},
        )


class Mix(Customer):
    """One with a connection of its own."""

    abstract = True

    def on_start(self) -> None:
        super().on_start()
        with contextlib.suppress(*ERRORS):  # the first start will say so
            mixes.app.client.connection()

    def on_stop(self) -> None:
        with contextlib.suppress(*ERRORS):
            mixes.app.client.connection().close()

    def begin(self, workflow: Machine, value: object) -> Handle:
        """Start one."""
        self.began = time.perf_counter()
        return self.timed("start", self.began, lambda: workflow.start(value))

    def end(self, handle: Handle) -> None:
        """Await it."""
        self.timed(END_TO_END, self.began, lambda: handle.result(timeout=self.options.timeout))

    def timed(self, what: str, since: float, act: Callable[[], T]) -> T:
        """What ``act`` returns. An error is counted, and ends this task."""
        try:
            done = act()
        except ERRORS as error:
            self.count(what, since, load_options.told(error))
            time.sleep(AFTER_ERROR_S)
            raise RescheduleTask from error
        self.count(what, since)
        return done


class OrderFlow(Mix):
    """A customer: places an order, and waits for its shipment."""

    weight = 4

    @task
    def buy(self) -> None:
        self.end(self.begin(mixes.order, msgspec.structs.replace(some_order(), ref=uuid4().hex)))


class Approvals(Mix):
    """Whoever asks for a purchase and, after ``--think``, the person who approves it."""

    weight = 3

    @task
    def approve(self) -> None:
        handle = self.begin(mixes.purchase, mixes.Purchase(uuid4().hex, 900))
        time.sleep(self.options.think)
        clicked = time.perf_counter()
        self.timed("signal", clicked, lambda: handle.signal("decided", True, actor="ada"))
        self.end(handle)
        self.count("signal to end", clicked)


class AgentLoop(Mix):
    """Somebody who asks an agent, and waits for its answer."""

    weight = 2

    @task
    def ask(self) -> None:
        self.end(self.begin(mixes.agent, mixes.Talk(self.options.turns, self.options.think)))


class FanOut(Mix):
    """A job that is spread over ``--width`` children, and joined."""

    weight = 1

    @task
    def spread(self) -> None:
        self.end(self.begin(mixes.batch, self.options.width))


class ApiCustomer(Customer, FastHttpUser):
    """As ``Approvals``, through the REST API that ``--api`` names."""

    weight = 3

    def __init__(self, environment: Any) -> None:
        self.host = environment.parsed_options.api
        super().__init__(environment)

    @task
    def approve(self) -> None:
        began = time.perf_counter()
        request = {"workflow": mixes.purchase.name, "input": mixes.Purchase(uuid4().hex, 900)}
        started = self.asked("POST", "/api/workflows", body=request)
        here = {"id": started["id"], "whole_id": started["whole_id"]}
        time.sleep(self.options.think)
        self.asked("POST", "/api/workflows/{id}/signal", body={"name": "decided", "payload": True}, **here)
        status = "running"
        while status == "running" and time.perf_counter() - began < self.options.timeout:
            status = self.asked("GET", f"/api/workflows/{{id}}?wait_s={API_WAIT_S}", **here)["status"]
        self.count(END_TO_END, began, None if status == "completed" else f"it is {status}")

    def asked(self, method: str, path: str, *, id: str = "", whole_id: str = "", body: object = None) -> Any:
        """What it answers. Another answer than one of success is counted as an error, and ends this task."""
        with self.client.request(
            method,
            path.format(id=id),
            name=path,
            headers={**load_options.api_headers(), **({"Workflow-Id": whole_id} if whole_id else {})},
            data=msgspec.json.encode(body).decode() if body else None,
            catch_response=True,
        ) as response:
            if 200 <= response.status_code < 300:
                return msgspec.json.decode(response.content)
            response.failure(f"it answered {response.status_code}" if response.status_code else "no answer")
        time.sleep(AFTER_ERROR_S)
        raise RescheduleTask
