"""Traces and logs of a cluster whose processes are killed at work, received by a real OTLP endpoint and read to the last byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from receiver import Receiver, attributes_of, receiving

from durable_cluster import telemetry
from durable_cluster.ops import cli
from durable_cluster.telemetry import Tracing

FLOWS = """
import asyncio, logging, os, time
from durable_cluster import App, Context, Continuation, Retry, TerminalError, gather, sleep

app = App("chaos")
TWICE = Retry(attempts=2, backoff=0.01)
logger = logging.getLogger("shop")

def work(ctx: Context, n: int) -> None:
    logger.info("%s %d of %s", ctx.step, n, ctx.workflow_id)
    if n % 5 == 0 and ctx.attempt == 1 or n % 11 == 7 and ctx.step in ("fetch", "charge"):
        raise ValueError(f"{ctx.step} of {ctx.workflow_id} does not work")

parcel = app.machine("parcel", state=int)

@parcel.step(start=True, retry=TWICE)
def weigh(ctx: Context, n: int) -> Continuation:
    work(ctx, n)
    return ctx.goto(fetch, n)

@parcel.step(retry=TWICE)
async def fetch(ctx: Context, n: int) -> Continuation:
    await asyncio.sleep(0.02 * (n % 7))
    work(ctx, n)
    return ctx.goto(stamp, n)

@parcel.step(blocking=True)
def stamp(ctx: Context, n: int) -> Continuation:
    if n == 999:
        os._exit(17)
    time.sleep(0.01)
    work(ctx, n + 1 if n % 5 == 0 else n)
    return ctx.goto(book, n)

@parcel.step(transactional=True, retry=TWICE)
def book(ctx: Context, n: int) -> Continuation:
    work(ctx, n)
    return ctx.done(n)

@app.step(retry=TWICE)
def reserve(ctx: Context, n: int) -> None:
    work(ctx, n)

@app.step(retry=TWICE)
async def charge(ctx: Context, n: int) -> None:
    await asyncio.sleep(0.02 * (n % 7))
    work(ctx, n)

@app.step(blocking=True, retry=TWICE)
def pack(ctx: Context, n: int) -> None:
    work(ctx, n)

@app.step(transactional=True, retry=TWICE)
def ship(ctx: Context, n: int) -> None:
    work(ctx, n)

@app.workflow()
async def order(n: int) -> int:
    await reserve(n)
    await gather(charge(n), pack(n))
    await sleep(0.01)
    await ship(n)
    return n
"""
STEPS = {"parcel": ["weigh", "fetch", "stamp", "book"], "order": ["reserve", "charge", "pack", "ship"]}
SAMPLE = 0.4
EACH = 16
KILLS = 3
OPTIONS = ("dead_interval_s=2", "heartbeat_s=0.5", "max_crashes=1", "restarts_max=1000")


class Cluster:
    """The command, as somebody would start it; what it says goes to two files."""

    def __init__(self, dsn: str, home: Path, endpoint: str) -> None:
        (home / "flows.py").write_text(FLOWS)
        self.said, self.logged = home / "said.txt", home / "logged.txt"
        variables = {
            "PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]),
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "DURABLE_TRACE_SAMPLE": str(SAMPLE),
        }
        words = ["start", "--dsn", dsn, "--app", "flows:app", "--log-level", "info", "--log-format", "json"]
        words += [word for option in OPTIONS for word in ("--set", option)]
        with self.said.open("wb") as said, self.logged.open("wb") as logged:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "durable_cluster.ops", *words],
                cwd=home,
                env={**os.environ, **variables},
                stdout=said,
                stderr=logged,
            )

    @property
    def consumers(self) -> list[int]:
        """Its children, but for the one that cleans up after all."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


def start(conn: psycopg.Connection, first: int) -> list[str]:
    """As many of each kind; their ids."""
    ids: list[str] = []
    for workflow, step in (("parcel", "weigh"), ("order", "workflow.start")):
        inputs = "\n".join(str(n) for n in range(first, first + EACH))
        rows = conn.execute(
            "select durable.hex(id) from durable.start_many(%s, 1, %s, %s)", (workflow, step, inputs)
        ).fetchall()
        ids += [row[0] for row in rows]
    return ids


def ended(conn: psycopg.Connection) -> int:
    row = conn.execute("select (select count(*) from durable.finished) + (select count(*) from durable.dead_letter)")
    return int(row.fetchone()[0])  # type: ignore[index]


def test_a_chaotic_run_is_one_trace_a_workflow_without_orphans_and_no_whole_id_leaves(
    dsn: str,
    conn: psycopg.Connection,
    receiver: Receiver,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    eventually: Callable[..., None],
) -> None:
    cluster = Cluster(dsn, tmp_path, receiver.endpoint)
    try:
        eventually(lambda: b"up:" in cluster.said.read_bytes(), seconds=60, what="the cluster's start")
        under_fire = start(conn, 0)
        conn.execute("select durable.start('parcel', 1, 'weigh', '999')")
        for kill in range(KILLS):
            least = ended(conn) + 3
            eventually(lambda least=least: ended(conn) >= least, seconds=60, what="an end")
            os.kill(cluster.consumers[kill % 2], signal.SIGKILL)
        eventually(lambda: ended(conn) == 2 * EACH + 1, seconds=60, what="the end of all")
        in_peace = start(conn, 1000)
        eventually(lambda: ended(conn) == 4 * EACH + 1, seconds=60, what="the end of all others")
    finally:
        cluster.stop()
    restarted = cluster.logged.read_bytes().count(b"started again in")
    assert restarted > KILLS, "each that was killed, and who ran what ends its process"

    spans = receiver.spans
    rows = conn.execute("select durable.hex(id), workflow, input::int from durable.started").fetchall()
    workflows = {telemetry.trace_id_of(row[0]).to_bytes(16, "big"): row for row in rows}
    traces: dict[bytes, list[Span]] = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append(span)
    pages = {trace_id for trace_id, some in traces.items() if some[0].kind == Span.SPAN_KIND_CONSUMER}
    assert traces.keys() - pages <= workflows.keys(), "one trace a workflow"
    for trace_id in traces.keys() - pages:
        roots = {span.span_id for span in traces[trace_id] if not span.parent_span_id}
        assert len(roots) == 1, "one root, however many processes have told it"
        assert all(span.parent_span_id in roots for span in traces[trace_id] if span.parent_span_id), "no orphans"
        assert {span.name for span in traces[trace_id] if not span.parent_span_id} == {workflows[trace_id][1]}

    tracing = Tracing(SimpleSpanProcessor(InMemorySpanExporter()), role="test", sample=SAMPLE)
    sampled = {row[0] for row in rows if tracing.is_sampled(row[0])}
    linked = {link.trace_id for trace_id in pages for span in traces[trace_id] for link in span.links}
    assert {workflows[trace_id][0] for trace_id in linked} <= sampled, "all processes sample the same"
    assert len(sampled & set(under_fire)) > EACH / 8
    dead = dict(conn.execute("select durable.hex(id), step from durable.dead_letter").fetchall())
    for workflow_id in in_peace:
        trace_id = telemetry.trace_id_of(workflow_id).to_bytes(16, "big")
        _, workflow, n = workflows[trace_id]
        check_steps(
            traces.get(trace_id, []), workflow, n, is_sampled=workflow_id in sampled, dead=dead.get(workflow_id)
        )
    poisoned = next(trace_id for trace_id, row in workflows.items() if row[2] == 999)
    assert "the process died" in " ".join(span.status.message for span in traces[poisoned])

    for words in (["list", "--limit", "500"], ["status"], ["dead-letters", "list"], ["show", in_peace[0][:12]]):
        assert cli.main([*words, "--dsn", dsn]) == 0
        assert cli.main([*words, "--dsn", dsn, "--json"]) == 0
    commands = "".join(capsys.readouterr())
    sent = b"".join(receiver.bodies).decode("latin-1")
    ids = {row[0] for row in rows}
    forms = ids | {str(UUID(workflow_id)) for workflow_id in ids}
    for output in (sent, cluster.said.read_text(), cluster.logged.read_text(), commands):
        wrong = [line for line in output.lower().splitlines() if any(form in line for form in forms)]
        assert wrong == []
    check_logs(cluster.logged.read_text(), spans, sampled, set(in_peace))


def check_steps(spans: list[Span], workflow: str, n: int, *, is_sampled: bool, dead: str | None) -> None:
    """Of a workflow that nobody has disturbed: each attempt that has to be a span is one, with its error."""
    told = defaultdict(list)
    for span in spans:
        said = attributes_of(span)
        if said.get("durable.step.name") in STEPS[workflow]:
            told[said["durable.step.name"]].append((said["durable.step.attempt"], bool(span.status.message)))
    fails_once = [step for step in STEPS[workflow] if n % 5 == 0 and step != "stamp"]
    failed = {"workflow.gather": "charge"}.get(str(dead), dead)
    never = {"fetch": ["stamp", "book"], "charge": ["ship"]}.get(str(failed), [])
    for step in STEPS[workflow]:
        attempts = sorted(set(told[step]))  # a transaction runs again if another step of it has failed
        if step in never:
            assert attempts == []
        elif step == failed:
            assert attempts == [(1, True), (2, True)]
        elif step in fails_once:
            assert attempts == [(1, True), (2, False)]
        else:
            assert attempts == ([(1, False)] if is_sampled else [])


def check_logs(logged: str, spans: list[Span], sampled: set[str], in_peace: set[str]) -> None:
    """Every line is JSON, and what a step logs says of which step, and of which span if there is one."""
    lines = logged.splitlines()
    assert [line for line in lines if not line.startswith("{")] == ["the cluster has stopped"], "no record, but a word"
    records: list[dict[str, Any]] = [msgspec.json.decode(line) for line in lines if line.startswith("{")]
    assert all({"timestamp", "level", "event", "logger", "process"} <= record.keys() for record in records)
    known = {(span.trace_id.hex(), span.span_id.hex()) for span in spans}
    short = {workflow_id[:12]: workflow_id for workflow_id in in_peace}
    assert len(short) == len(in_peace)
    of_steps = [record for record in records if record["logger"] == "shop"]
    assert {(record["workflow"], record["step"]) for record in of_steps} == {
        (workflow, step) for workflow, steps in STEPS.items() for step in steps
    }
    assert {record["attempt"] for record in of_steps} >= {1, 2}
    for record in of_steps:
        assert record["event"].startswith(f"{record['step']} ")
        assert record["event"].endswith(f"{record['workflow_id']}…")
        workflow_id = short.get(record["workflow_id"])
        if workflow_id is not None:
            assert ("trace_id" in record) == (workflow_id in sampled or record["attempt"] > 1)
            if "trace_id" in record:
                assert record["trace_id"] == f"{telemetry.trace_id_of(workflow_id):032x}"
                assert (record["trace_id"], record["span_id"]) in known
