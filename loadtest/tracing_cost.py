"""What telemetry costs: the same load by turns without it, at its defaults, and with every workflow traced.

    python -m durable_cluster.loadtest.tracing_cost [--seconds 60] [--processes 2] [--dsn …]

Three clusters on one server, each with a database of its own; while one works the others are idle. A round is a backlog of
workflows of ten trivial steps, drained (see ``hotpath``); the rounds go round the three, so that what else the machine does meets
all alike. Spans, and metrics where they are sent by OTLP, go to an endpoint on loopback, a process that reads and forgets them.

Said is, for each of the three: the medians of its rounds' steps/s and of their CPU a step (consumers, supervisor, backends and
the server; not the endpoint), and of what each round differs by from the round without telemetry beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median

import msgspec

from durable_cluster.database import connect
from durable_cluster.errors import DurableError
from durable_cluster.loadtest import hotpath, stage, workloads

OFF, DEFAULT, ALL = "off", "default", "all"
ROUNDS_MIN = 3
ROUND_S = 2.0
WARM_UP_WORKFLOWS = 2_000
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "DURABLE_TRACE_SAMPLE", "OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER")


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run, and what it costs beside running without telemetry. CPU: None with a server on another machine."""

    telemetry: str
    steps_per_s: float
    cpu_us_per_step: float | None
    throughput_ratio: float
    more_cpu_us_per_step: float | None


class Forget(BaseHTTPRequestHandler):
    """Answers 200 to whatever is posted."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Read it, and forget it."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def endpoint() -> Iterator[str]:
    """The URL of an OTLP endpoint, in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--endpoint"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def be_endpoint() -> int:
    """Say on which port, and serve until ended."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Forget) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
    return 0


@contextmanager
def variables(said: Mapping[str, str]) -> Iterator[None]:
    """Of telemetry's variables these alone, for processes that are started meanwhile."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    os.environ.update(said)
    try:
        yield
    finally:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(before)


def measured(server: str | None, *, seconds: float, processes: int) -> list[Cost]:
    """Measure, in about so many seconds besides what starting takes."""
    with ExitStack() as stack:
        url = {"OTEL_EXPORTER_OTLP_ENDPOINT": stack.enter_context(endpoint())}
        admin = stack.enter_context(stage.some_server(server))
        ways = {OFF: {}, DEFAULT: url, ALL: {**url, "DURABLE_TRACE_SAMPLE": "1"}}
        running = {name: _running(stack, admin, way, processes) for name, way in ways.items()}
        rounds: dict[str, list[hotpath.Round]] = {name: [] for name in running}
        sizes = {name: _size(one.round(WARM_UP_WORKFLOWS)) for name, one in running.items()}
        order = list(running)
        for number in range(max(ROUNDS_MIN, round(seconds / ROUND_S / len(order)))):
            for name in (*order[number % 3 :], *order[: number % 3]):
                rounds[name].append(running[name].round(sizes[name]))
            hotpath.say(", ".join(f"{name} {rounds[name][-1].steps_per_s:,.0f} steps/s" for name in order))
    return [_cost(name, rounds[name], rounds[OFF]) for name in order]


def _running(stack: ExitStack, admin: str, way: Mapping[str, str], processes: int) -> hotpath.Hotpath:
    """A cluster that is told of telemetry what ``way`` says."""
    dsn = stack.enter_context(stage.database_on(admin))
    with variables(way):
        cluster = stack.enter_context(stage.running_cluster(dsn, processes=processes, shards=processes))
    connection = stack.enter_context(connect(dsn, name="durable-loadtest"))
    return hotpath.Hotpath(connection, cluster, processes=processes, shards=processes)


def _size(warm_up: hotpath.Round) -> int:
    """How many workflows a round of it takes."""
    return max(hotpath.WORKFLOWS_MIN, int(warm_up.steps_per_s * ROUND_S / workloads.STEPS))


def _cost(name: str, rounds: Sequence[hotpath.Round], off: Sequence[hotpath.Round]) -> Cost:
    pairs = list(zip(rounds, off, strict=True))
    cpu = [_cpu_us(one) for one in rounds]
    more = [None if (a := _cpu_us(one)) is None or (b := _cpu_us(beside)) is None else a - b for one, beside in pairs]
    return Cost(
        telemetry=name,
        steps_per_s=round(median(one.steps_per_s for one in rounds), 1),
        cpu_us_per_step=_median(cpu),
        throughput_ratio=round(median(one.steps_per_s / beside.steps_per_s for one, beside in pairs), 3),
        more_cpu_us_per_step=_median(more),
    )


def _cpu_us(one: hotpath.Round) -> float | None:
    return None if one.span.cpu_s is None else one.span.cpu_s / one.steps * 1e6


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 2) if len(known) == len(values) else None


def as_table(costs: Sequence[Cost]) -> str:
    """For people."""
    lines = ["telemetry   steps/s   CPU µs/step   throughput   more CPU µs/step"]
    for cost in costs:
        cpu, more = ("–" if one is None else f"{one:.2f}" for one in (cost.cpu_us_per_step, cost.more_cpu_us_per_step))
        lines.append(
            f"{cost.telemetry:9}   {cost.steps_per_s:7,.0f}   {cpu:>11}   {cost.throughput_ratio:10.1%}   {more:>16}"
        )
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with 2 when it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m durable_cluster.loadtest.tracing_cost", description="Measure what telemetry costs a step."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the rounds take together (60)")
    parser.add_argument("--processes", type=int, default=2, help="consumer processes of each cluster (2)")
    parser.add_argument("--dsn", help="a server where databases may be made (default: a local Postgres of its own)")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--endpoint", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.processes < 1 or not options.seconds > 0:
        parser.error("give it at least one process, and time")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 with the error in a line on standard error."""
    options = parsed(arguments)
    if options.endpoint:
        return be_endpoint()
    try:
        costs = measured(options.dsn, seconds=options.seconds, processes=options.processes)
    except DurableError as error:
        hotpath.say(f"tracing_cost: {error}")
        return 1
    print(msgspec.json.encode(costs).decode() if options.json else as_table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
