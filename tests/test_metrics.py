"""The metrics page of a live cluster: what it says is what was run, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families
from psycopg.conninfo import conninfo_to_dict

from durable_cluster import App, Settings, figures
from durable_cluster.errors import ConfigurationError
from durable_cluster.loading import load_app
from durable_cluster.metrics import METRICS
from durable_cluster.shards import metrics_page
from durable_cluster.shards.metrics_page import READERS_MAX, Address, address_of
from durable_cluster.shards.monitoring import monitored

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clusters run on Linux")

Eventually = Callable[..., None]
Labels = frozenset[tuple[str, str]]
HERE = Address("127.0.0.1", 0)
SHARDS = 2
DOCUMENT = (Path(__file__).parent.parent / "docs" / "telemetry.md").read_text("utf-8")
FLOWS = '''
"""What the metrics' tests run."""
import asyncio
import time

from durable_cluster import App, Context, Continuation, Retry

app = App("metrics-tests")
chain = app.machine("chain", state=int)
flaky = app.machine("flaky", state=int)
failing = app.machine("failing", state=str)
waiting = app.machine("waiting", state=str)
slow = app.machine("slow", state=float)
heavy = app.machine("heavy", state=float)


@chain.step(start=True)
def link(ctx: Context, left: int) -> Continuation:
    return ctx.goto(link, left - 1) if left else ctx.done()


@flaky.step(start=True, retry=Retry(attempts=2, backoff=0.001))
def fail_so_often(ctx: Context, times: int) -> Continuation:
    if ctx.attempt <= times:
        raise RuntimeError("again")
    return ctx.done()


@failing.step(start=True)
def fail(ctx: Context, reason: str) -> Continuation:
    return ctx.fail(reason)


@waiting.step(start=True)
def wait(ctx: Context, name: str) -> Continuation:
    return ctx.wait_for(name, then=wait, state=name)


@heavy.step(start=True)
def reckon(ctx: Context, seconds: float) -> Continuation:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return ctx.done()


@slow.step(start=True)
async def rest(ctx: Context, seconds: float) -> Continuation:
    await asyncio.sleep(seconds)
    return ctx.done()
'''


class Scrape:
    """One look at a page. ``values``: by name and labels; ``types``: by the names that the page documents."""

    def __init__(self, address: Address) -> None:
        self.text = get(address, "/metrics")
        self.values: dict[tuple[str, Labels], float] = {}
        self.types: dict[str, str] = {}
        for family in families(self.text):
            self.types[family.name + ("_total" if family.type == "counter" else "")] = family.type
            for sample in family.samples:
                self.values[sample.name, frozenset(sample.labels.items())] = sample.value

    def of(self, name: str, **labels: str) -> float:
        """The sum of all values with these labels."""
        wanted = set(labels.items())
        return sum(value for (known, has), value in self.values.items() if known == name and wanted <= has)

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Sums by these labels, where they are above zero."""
        found: dict[tuple[str, ...], float] = {}
        for (known, has), value in self.values.items():
            if known == name and value:
                key = tuple(dict(has)[label] for label in labels)
                found[key] = found.get(key, 0) + value
        return found


def get(address: Address, path: str, **headers: str) -> str:
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[None]:
    """A directory on ``sys.path``, which the children inherit, with the app's module."""
    (tmp_path / "flows_of_metrics.py").write_text(FLOWS)
    sys.path.insert(0, str(tmp_path))
    yield
    sys.path.remove(str(tmp_path))
    sys.modules.pop("flows_of_metrics", None)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is asked at each look."""
    monkeypatch.setattr(figures, "FRESH_S", 0.0)


@pytest.fixture  # after the databases, which go when the clusters have stopped
def watched(
    new_database: Callable[..., str], run_cluster: Callable[..., Any]
) -> Iterator[Callable[..., tuple[Any, Address]]]:
    """``watched(dsn)``: a cluster that is up, and where its page is."""
    with contextlib.ExitStack() as stack:

        def watch(dsn: str) -> tuple[Any, Address]:
            settings = Settings(drain_grace_s=1.0)  # a step goes on for a minute
            cluster = run_cluster(dsn, app="flows_of_metrics:app", settings=settings, shards=SHARDS)
            page = stack.enter_context(monitored(cluster.supervisor, HERE))
            assert page is not None
            return cluster.demand_up(), page.address

        yield watch


@contextlib.contextmanager
def client(dsn: str) -> Iterator[App]:
    app = load_app("flows_of_metrics:app")
    app.client.use(dsn)
    yield app
    app.close()


def documented() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Type, unit and labels of each metric in the table."""
    table = DOCUMENT.partition("| metric | type |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    return {
        name.strip("`"): (kind, unit, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, unit, labels, _ in rows
    }


def test_the_document_lists_every_metric_as_it_is() -> None:
    assert documented() == {metric.name: (metric.kind, metric.unit, metric.labels) for metric in METRICS.values()}


def test_the_page_says_what_was_run(
    watched: Callable[..., tuple[Any, Address]], dsn: str, eventually: Eventually
) -> None:
    _, address = watched(dsn)
    with client(dsn) as app:
        app.named("chain").start_many([4] * 25)
        app.named("flaky").start(1)
        app.named("flaky").start(9)
        app.named("failing").start("no")
        cancelled = app.named("waiting").start("never")
        app.named("waiting").start("never")
        slow = [app.named("slow").start(0.2), app.named("slow").start(60.0)]
        eventually(lambda: Scrape(address).of("durable_waits_open") == 2)
        cancelled.cancel()
        slow[0].result(timeout=10)
        eventually(lambda: Scrape(address).of("durable_workflows_ended_total") == 25 + 1 + 1 + 1 + 1)
    found = Scrape(address)
    assert found.by("durable_steps_total", "workflow") == {
        ("chain",): 125,
        ("flaky",): 1,
        ("failing",): 1,
        ("waiting",): 3,
        ("slow",): 1,
    }
    assert found.by("durable_workflows_ended_total", "workflow", "status") == {
        ("chain", "completed"): 25,
        ("flaky", "completed"): 1,
        ("failing", "failed"): 1,
        ("waiting", "cancelled"): 1,
        ("slow", "completed"): 1,
    }
    eventually(lambda: Scrape(address).of("durable_dead_letters_total") == 1)
    found = Scrape(address)
    assert found.by("durable_retries_total", "workflow") == {("flaky",): 2}
    assert found.of("durable_stuck_workflows") == 1
    assert found.of("durable_waits_open") == 1
    assert found.of("durable_detached_steps") == 1
    assert found.of("durable_database_up") == 1
    assert found.of("durable_lag_events") == 0
    assert found.by("durable_shard_consumers", "shard") == {("0",): 1, ("1",): 1}
    assert found.by("durable_processes", "role") == {("consumer",): 2, ("maintenance",): 1, ("supervisor",): 1}
    assert found.by("durable_processes", "role") == found.by("durable_processes_expected", "role")
    assert found.of("durable_pages_total") == found.of("durable_page_steps_count") > 0
    assert found.of("durable_page_steps_bucket", le="+Inf") == found.of("durable_page_steps_count")
    assert found.of("durable_page_steps_sum") > 125
    assert 0 < found.of("durable_commit_duration_seconds_sum") < 60
    memory = found.by("durable_process_memory_bytes", "role")
    assert all(memory[role,] > 10 << 20 for role in ("consumer", "maintenance", "supervisor"))
    assert found.of("durable_process_cpu_seconds_total", role="consumer") > 0
    assert found.of("durable_wal_bytes_total") > 0

    absent = {"durable_history_lag_seconds"}
    assert found.types == {name: kind for name, (kind, _, _) in documented().items() if name not in absent}
    labels = {name: {label for known, has in found.values for label, _ in has if known == name} for name in found.types}
    assert all(labels[name] <= set(documented()[name][2]) for name in found.types)
    assert not re.search("[0-9a-f]{32}", found.text), "no whole id"
    opened = get(address, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert opened.endswith("# EOF\n")
    assert {family.name for family in open_families(opened)} == {name.removesuffix("_total") for name in found.types}, (
        "as OpenMetrics too"
    )


def test_processor_time_goes_to_the_type_whose_steps_are_seen_to_take_it(
    watched: Callable[..., tuple[Any, Address]], dsn: str, eventually: Eventually
) -> None:
    cluster, address = watched(dsn)

    def seconds(name: str) -> float:
        return Scrape(address).of("durable_step_cpu_seconds_total", workflow=name)

    with client(dsn) as app:
        app.named("slow").start(3.0)  # which only waits
        app.named("heavy").start(2.0)
        eventually(lambda: seconds("heavy") > 0.8, what="processor time of the heavy one")
        assert seconds("slow") < seconds("heavy") / 4
        known = seconds("heavy")
        for pid in cluster.supervisor.pids.values():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: cluster.supervisor.restarts >= SHARDS)
        assert seconds("heavy") >= known


def test_what_a_killed_process_has_told_is_neither_lost_nor_told_twice(
    watched: Callable[..., tuple[Any, Address]], dsn: str, eventually: Eventually
) -> None:
    cluster, address = watched(dsn)

    def steps() -> float:
        return Scrape(address).of("durable_steps_total")

    with client(dsn) as app:
        app.named("chain").start_many([9] * 20)
        eventually(lambda: steps() == 200)
        for kill in range(2):
            cpu_s = Scrape(address).of("durable_process_cpu_seconds_total", role="consumer")
            os.kill(cluster.supervisor.pids["shard-0"], signal.SIGKILL)
            eventually(lambda kill=kill: cluster.supervisor.restarts == kill + 1)
            assert steps() == 200 + 100 * kill
            assert Scrape(address).of("durable_process_cpu_seconds_total", role="consumer") >= cpu_s
            app.named("chain").start_many([9] * 10)
            eventually(lambda kill=kill: steps() >= 300 + 100 * kill, seconds=30)
            eventually(lambda: Scrape(address).of("durable_processes", role="consumer") == SHARDS, seconds=30)
            assert steps() == 300 + 100 * kill
    assert Scrape(address).by("durable_process_restarts_total", "role", "shard") == {
        ("consumer", "0"): 2,
    }


def test_two_clusters_on_one_host_have_a_page_each(
    watched: Callable[..., tuple[Any, Address]],
    dsn: str,
    new_database: Callable[..., str],
    template: str,
    eventually: Eventually,
) -> None:
    other_dsn = new_database(template)
    (_, one), (_, other) = watched(dsn), watched(other_dsn)
    with client(dsn) as app:
        app.named("chain").start(4)
        eventually(lambda: Scrape(one).of("durable_steps_total") == 5)
    assert Scrape(other).of("durable_steps_total") == 0
    assert Scrape(other).by("durable_processes", "role") == {("consumer",): 2, ("maintenance",): 1, ("supervisor",): 1}
    with (
        pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{one.port}: Address already in use; choose another"),
        monitored(run_by_nobody(), one),
    ):
        pass


def run_by_nobody() -> Any:
    """A supervisor that is never asked."""

    class Nobody:
        class config:
            dsn = ""

    return Nobody()


def test_a_page_tells_within_a_second_that_the_database_is_away(
    watched: Callable[..., tuple[Any, Address]], server: str, dsn: str, eventually: Eventually
) -> None:
    _, address = watched(dsn)
    assert Scrape(address).of("durable_database_up") == 1
    name = conninfo_to_dict(dsn)["dbname"]
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"alter database {name} with allow_connections false")
        try:
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
            began = time.monotonic()
            found = Scrape(address)
            assert time.monotonic() - began < 1.0
            assert found.of("durable_database_up") == 0
            assert found.of("durable_wal_bytes_total") > 0, "the last good value"
            assert found.of("durable_processes", role="consumer") == SHARDS
        finally:
            admin.execute(f"alter database {name} with allow_connections true")
    eventually(lambda: Scrape(address).of("durable_database_up") == 1)


def test_health_and_readiness_need_no_database_and_name_what_is_missing(
    watched: Callable[..., tuple[Any, Address]], dsn: str
) -> None:
    cluster, address = watched(dsn)
    assert get(address, "/-/healthy") == "healthy\n"
    assert get(address, "/-/ready") == "ready\n"
    cluster.supervisor.stop()
    for path, code, said in (
        ("/-/ready", 503, "not ready: no process reads shard 0, 1\n"),
        ("/elsewhere", 404, "there are /metrics, /-/healthy and /-/ready\n"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(address, path)
        assert (refused.value.code, refused.value.read().decode()) == (code, said)
    assert get(address, "/-/healthy") == "healthy\n"


def test_readers_that_never_end_hold_up_neither_the_cluster_nor_later_ones(
    watched: Callable[..., tuple[Any, Address]], dsn: str, eventually: Eventually
) -> None:
    _, address = watched(dsn)
    stalled = [socket.create_connection((address.host, address.port)) for _ in range(2 * READERS_MAX)]
    for one in stalled:
        with contextlib.suppress(OSError):
            one.sendall(b"GET /metrics HTTP/1.1\r\n")
    with client(dsn) as app:
        app.named("chain").start(4).result(timeout=10)
    for one in stalled:
        one.close()

    def is_served() -> bool:
        with contextlib.suppress(OSError):
            return Scrape(address).of("durable_steps_total") == 5
        return False

    eventually(is_served)


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("9464", Address("127.0.0.1", 9464)),
        (":9464", Address("127.0.0.1", 9464)),
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
        ("[::1]:9464", Address("::1", 9464)),
    ],
)
def test_an_address_without_a_host_is_this_machine_alone(said: str, address: Address) -> None:
    assert address_of(said, source="--metrics ") == address


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigurationError, match=r"needs the extra 'metrics': pip install 'durable-cluster\[metrics\]'"),
        monitored(run_by_nobody(), HERE),
    ):
        pass


@pytest.mark.parametrize("said", ["", "host", "host:", "host:port", "1:65536", "-1", "host:٣"])
def test_what_is_no_address_is_refused_by_name(said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"DURABLE_METRICS=.*needs a port, such as"):
        address_of(said, source="DURABLE_METRICS=")
