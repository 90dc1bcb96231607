"""In whose span a workflow was started: a link of its trace's root, from Python and from SQL."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from durable_cluster import App, Context, Continuation, InputError, Retry, telemetry
from durable_cluster.telemetry import Tracing
from durable_cluster.traceparents import ids_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"
BAD = [
    "",
    "00",
    GOOD[:-1],
    f"{GOOD}0",
    f"{GOOD}-more",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f" {GOOD}",
    f"{GOOD}\n",
    f'00-{TRACE}-{SPAN}-0"',
    "💥" * 14,
]
LATER = f"01-{TRACE}-{SPAN}-03-what comes later"


class Traced:
    def __init__(self, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self.exporter), role="test", sample=1.0)
        monkeypatch.setattr(telemetry, "configure", lambda _: self.tracing)
        self.app = App("traced", dsn=dsn)
        self.flow = flow = self.app.machine("flow", state=int)

        @flow.step(start=True, retry=Retry(attempts=2, backoff=0.001))
        def first(ctx: Context, n: int) -> Continuation:
            if n == 13 and ctx.attempt == 1:
                raise ValueError("unlucky")
            return ctx.goto(second, n)

        @flow.step()
        def second(ctx: Context, n: int) -> Continuation:
            return ctx.done(n)

    def links(self, *ids: str) -> list[list[tuple[str, str, int]]]:
        """Of the roots of their traces, after they have run."""
        self.app.run(until_idle=True)
        return [self.links_of(workflow_id) for workflow_id in ids]

    def links_of(self, workflow_id: str) -> list[tuple[str, str, int]]:
        trace_id = telemetry.trace_id_of(workflow_id)
        spans = [one for one in self.exporter.get_finished_spans() if one.context.trace_id == trace_id]
        (root,) = [one for one in spans if one.parent is None]
        assert not any(one.links for one in spans if one is not root)
        return [(f"{x.context.trace_id:032x}", f"{x.context.span_id:016x}", x.context.trace_flags) for x in root.links]


@pytest.fixture
def traced(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    made = Traced(dsn, monkeypatch)
    yield made
    made.app.close()


def test_a_given_traceparent_becomes_a_link_of_the_root(traced: Traced) -> None:
    one = traced.flow.start(1, traceparent=GOOD)
    delayed = traced.flow.start(2, traceparent=GOOD, after=0.01)
    retried = traced.flow.start(13, traceparent=GOOD)
    many = traced.flow.start_many([3, 4], traceparent=LATER)
    plain = traced.flow.start(5)
    links = traced.links(*(each.id for each in (one, delayed, retried, *many, plain)))
    assert links == [[(TRACE, SPAN, 1)]] * 3 + [[(TRACE, SPAN, 3)]] * 2 + [[]]


def test_only_the_first_step_carries_it(traced: Traced, conn: psycopg.Connection) -> None:
    handle = traced.flow.start(1, traceparent=GOOD)
    traced.links(handle.id)
    logs = [name for (name,) in conn.execute("select queue_data_pfx from pgque.queue where queue_name ~ '^durable_'")]
    lines = [
        line for log in logs for (data,) in conn.execute(f"select ev_data from {log}") for line in data.split("\n")
    ]
    assert len(lines) == 2, "a line each step"
    assert [line for line in lines if TRACE in line] == [line for line in lines if '"s":"first"' in line]


def test_the_current_span_is_linked_to_without_being_told(traced: Traced, dsn: str) -> None:
    tracer = TracerProvider().get_tracer("of the caller")
    with tracer.start_as_current_span("request") as span:
        here = span.get_span_context()
        one = traced.flow.start(1)
        (other,) = traced.flow.start_many([2])
        given = traced.flow.start(3, traceparent=GOOD)

        async def start_async() -> list[Any]:
            in_a_thread = await traced.flow.start_async(4)
            async with await psycopg.AsyncConnection.connect(dsn) as tx:
                return [in_a_thread, await traced.flow.start_async(5, tx=tx)]

        later = asyncio.run(start_async())
    expected = [(f"{here.trace_id:032x}", f"{here.span_id:016x}", here.trace_flags)]
    links = traced.links(*(each.id for each in (one, other, *later, given)))
    assert links == [expected] * 4 + [[(TRACE, SPAN, 1)]]


@pytest.mark.parametrize("bad", [*BAD, "\x00", f"01-{TRACE}-{SPAN}-01-\x00\ud800"])
def test_what_is_no_traceparent_is_ignored_by_python(traced: Traced, bad: str) -> None:
    handle = traced.flow.start(1, traceparent=bad)
    assert traced.links(handle.id) == [[(TRACE, SPAN, 1)] if bad.startswith("01-") else []]


@pytest.mark.parametrize("value", [b"00", 7, ("00",)])
def test_what_is_no_text_is_an_error_that_says_so(traced: Traced, value: Any) -> None:
    with pytest.raises(InputError, match=r"traceparent: \w+ is no text; pass what the header says"):
        traced.flow.start(1, traceparent=value)


def test_sql_takes_a_traceparent_and_ignores_what_is_none(traced: Traced, conn: psycopg.Connection) -> None:
    start = "select durable.hex(id) from durable.start('flow', 1, 'first', '1', i_traceparent => %s)"
    many = "select durable.hex(id) from durable.start_many('flow', 1, 'first', E'1\\n2', i_traceparent => %s)"
    good = [conn.execute(query.encode(), (each,)).fetchone()[0] for query in (start, many) for each in (GOOD, LATER)]
    bad = [conn.execute(query.encode(), (each,)).fetchone()[0] for query in (start, many) for each in (*BAD, None)]
    links = traced.links(*good, *bad)
    assert links == [[(TRACE, SPAN, flags)] for flags in (1, 3, 1, 3)] + [[]] * len(bad)


@pytest.mark.parametrize("text", [GOOD, LATER, *BAD])
def test_python_and_sql_agree_on_what_a_traceparent_is(conn: psycopg.Connection, text: str) -> None:
    row = conn.execute("select durable.checked_traceparent(%s)", (text,)).fetchone()
    assert row is not None
    assert (row[0] is None) == (ids_of(text) is None)


def test_a_client_without_opentelemetry_in_use_does_not_import_its_sdk() -> None:
    program = "import sys, durable_cluster; print(sorted(name for name in sys.modules if name == 'opentelemetry.sdk'))"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "[]"


def test_without_any_opentelemetry_there_is_no_current_span(monkeypatch: pytest.MonkeyPatch, traced: Traced) -> None:
    with trace.use_span(TracerProvider().get_tracer("of the caller").start_span("request")):
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        handle = traced.flow.start(1)
    monkeypatch.undo()
    monkeypatch.setattr(telemetry, "configure", lambda _: traced.tracing)
    assert traced.links(handle.id) == [[]]
