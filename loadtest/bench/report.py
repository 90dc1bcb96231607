"""A run as a page of Markdown: the verdicts, the pictures, the tables, and how all of it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from durable_cluster.loadtest.bench import charts
from durable_cluster.loadtest.bench.cells import Results, write_csv
from durable_cluster.loadtest.bench.environment import Environment
from durable_cluster.loadtest.bench.plan import OURS, PAUSE_MS, PAYLOADS, PEERS, VARIANTS
from durable_cluster.loadtest.bench.reasons import REASONS
from durable_cluster.loadtest.bench.scene import HELD
from durable_cluster.loadtest.bench.verdicts import Verdict, verdicts
from durable_cluster.loadtest.hotpath import Report

PAGE = "README.md"
RUN = "run.json"
# Of the table of peers: the workload, the metric, what it is called, and whether more is better.
COMPARED = (
    ("W1", "steps/s", "W1 steps/s", True),
    ("W2", "ten steps p50", "W2 lone ten steps, p50, ms", False),
    ("W3", "WAL", "W3 WAL, B a step", False),
    ("W3", "changed rows", "W3 rows updated or deleted a step", False),
    ("W3", "CPU", "W3 CPU, µs a step", False),
    ("W4", "the last late by", "W4 the last of the sleepers late by, s", False),
    ("W5", "joined after", "W5 fan-out with join, s", False),
    ("W6", "longest gap", "W6 kill -9: longest gap, s", False),
    ("W7", "Postgres", "W7 idle: Postgres, % of a core", False),
    ("W7", "workers", "W7 idle: workers, % of a core", False),
    ("W7", "transaction ids", "W7 idle: transaction ids a second", False),
    ("W8", "single", "W8 starts/s, one by one", True),
    ("W8", "batch", "W8 starts/s, in batches", True),
)
COSTS = ("steps/s", "CPU", "CPU of Postgres", "WAL", "growth", "changed rows", "dead rows", "transaction ids", "memory")


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A system as the page speaks of it."""

    name: str
    called: str
    configuration: str
    lacks: dict[str, str]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured on one server. ``also``: commands that added to it, each with its commit."""

    environment: Environment
    durable: Report
    asynchronous: Report | None
    systems: list[Named]
    results: Results
    command: str
    also: list[tuple[str, str]] = []

    @property
    def verdicts(self) -> list[Verdict]:
        """Of the criteria."""
        return verdicts(self.durable, self.asynchronous, self.results)

    def called(self, names: Iterable[str]) -> dict[str, str]:
        """The systems of those names that were measured, in that order, with what the page calls them."""
        known = {one.name: one.called for one in self.systems}
        return {name: known[name] for name in names if name in known}


def write(folder: Path, runs: Sequence[Run]) -> Path:
    """Write the page of the first run, and of what the others found differently, with charts and raw figures; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        version = run.environment.postgres_version.partition(".")[0]
        write_csv(folder / f"figures-postgres-{version}.csv", run.results.cells)
        write_csv(folder / f"series-postgres-{version}.csv", run.results.points)
    (folder / RUN).write_bytes(msgspec.json.format(msgspec.json.encode(list(runs)), indent=1))
    main = runs[0]
    drawn = charts.draw(folder, main.results, main.called((OURS, *PEERS, "status_row_set", "status_row_pipelined")))
    page = folder / PAGE
    page.write_text("\n".join(_page(runs, set(drawn))) + "\n", "utf-8")
    return page


def read(folder: Path) -> list[Run]:
    """What ``write`` wrote there, to write the page anew."""
    return msgspec.json.decode((folder / RUN).read_bytes(), type=list[Run])


def joined(runs: Iterable[Run]) -> list[Run]:
    """One run a server's version: the first, with what it has not measured from those after it. So a long run is made in parts."""
    found: dict[str, Run] = {}
    for run in runs:
        version = run.environment.postgres_version
        found[version] = _extended(found[version], run) if version in found else run
    return list(found.values())


def _extended(run: Run, by: Run) -> Run:
    known = {(cell.system, cell.workload, cell.condition) for cell in run.results.cells}
    return msgspec.structs.replace(
        run,
        results=Results(
            cells=run.results.cells
            + [one for one in by.results.cells if (one.system, one.workload, one.condition) not in known],
            points=run.results.points
            + [one for one in by.results.points if (one.system, one.workload, one.condition) not in known],
        ),
        systems=run.systems + [one for one in by.systems if one.name not in run.called([one.name])],
        also=[*run.also, (by.command, by.environment.commit or "unknown"), *by.also],
    )


def _page(runs: Sequence[Run], drawn: set[str]) -> Iterable[str]:
    main = runs[0]
    where = main.environment
    yield f"# The hot path, measured: {where.at}"
    yield ""
    yield (
        f"durable-cluster {where.versions['durable-cluster']} (commit {(where.commit or 'unknown')[:12]}) on {where.postgres},"
        f" {where.cores} × {where.processor}, {where.memory_gib:g} GiB, {where.disk}. One machine runs the server, the workers and"
        " the harness."
    )
    also = "".join(f", and `{command}` (commit {commit[:12]})" for command, commit in main.also)
    yield f"Made by `{main.command}`{also}; every figure stands in the CSV files beside this page."
    yield from _section("Verdicts", _verdicts(main))
    if "held-snapshot" in drawn:
        yield from _section("Beside a held snapshot", _held(main, drawn))
    yield from _section("Side by side", _side_by_side(main, drawn))
    yield from _section("Workloads A to D: what a row per step costs", _variants(main))
    yield from _section("Shards", _shards(main))
    if len(runs) > 1:
        yield from _section("On other servers", _servers(runs))
    yield from _section("What was measured, and how", _method(main))


def _section(title: str, lines: Iterable[str]) -> Iterable[str]:
    found = list(lines)
    if found:
        yield from ("", f"## {title}", "", *found)


def _verdicts(run: Run) -> Iterable[str]:
    found = run.verdicts
    yield from _table(
        ["criterion", "measured", "gate", "goal", "verdict"],
        [
            [
                f"{one.what}, {one.unit}",
                _figure(one.value),
                _bound(one, one.gate),
                _bound(one, one.goal),
                one.told,
            ]
            for one in found
        ],
    )
    durable = run.durable
    yield ""
    yield (
        f"P, the yardstick, is what one session stores a second by INSERT … SELECT of the same lines, one a row, into a table"
        f" like the log's, measured between the rounds: {durable.p_rows_per_s:,.0f} rows/s here; by COPY"
        f" {durable.copy_rows_per_s:,.0f}; into a bare heap without an index {durable.heap_rows_per_s:,.0f}."
        f" Ours: {durable.steps_per_s:,.0f} steps/s over {durable.seconds:.0f} s with {durable.rotations} rotations, a line of"
        f" {durable.payload_bytes:.0f} B. A bare loop that decodes such a line, runs the handler and encodes the next takes"
        f" {durable.floor_us_per_step:.2f} µs."
    )
    missed = [one for one in found if one.is_reached is False and one.what in REASONS]
    if missed:
        yield from ("", "Where a goal is missed, what stops it, and what was tried:", "")
        yield from (f"- **{one.what}**: {REASONS[one.what]}" for one in missed)


def _held(run: Run, drawn: set[str]) -> Iterable[str]:
    yield "A REPEATABLE READ transaction looks once and stays open, as a long report or a forgotten session does; vacuum can"
    yield "remove nothing that died since."
    for stem in ("held-snapshot", "held-snapshot-lone", "dead-rows"):
        if stem in drawn:
            yield from ("", f"![{stem}]({stem}.svg)")
    rows = []
    for name, called in run.called((OURS, *PEERS, "status_row_set", "status_row_pipelined")).items():
        value = run.results.value
        rows.append(
            [
                called,
                *(
                    _figure(value(name, "W1", metric, HELD))
                    for metric in ("steps/s before", "steps/s at the end", "drift", "dead rows")
                ),
                *(_figure(value(name, "W2", metric, HELD)) for metric in ("step before p50", "step at the end p50")),
            ]
        )
    yield ""
    yield from _table(
        ["", "steps/s before", "at the end", "lost, %", "dead rows a step", "lone step before, ms", "at the end"], rows
    )


def _side_by_side(run: Run, drawn: set[str]) -> Iterable[str]:
    names = run.called((OURS, *PEERS))
    lacks = {one.name: one.lacks for one in run.systems}
    rows = []
    for workload, metric, title, is_more_better in COMPARED:
        source = "W1" if workload == "W3" else workload
        ours = run.results.value(OURS, source, metric)
        row = [title]
        for name in names:
            value = run.results.value(name, source, metric)
            missing = lacks[name].get(workload) or run.results.note(name, source) or "–"
            row.append(
                missing if value is None else _figure(value) + _ratio(name, ours, value, is_more_better=is_more_better)
            )
        rows.append(row)
    yield "In brackets: how many times better ours is (below 1: worse)."
    yield ""
    yield from _table(["", *names.values()], rows)
    for stem in ("throughput", "recovery"):
        if stem in drawn:
            yield from ("", f"![{stem}]({stem}.svg)")


def _ratio(name: str, ours: float | None, value: float, *, is_more_better: bool) -> str:
    if name == OURS or not ours or not value:
        return ""
    return f" ({_figure(ours / value if is_more_better else value / ours)}×)"


def _variants(run: Run) -> Iterable[str]:
    names = run.called(VARIANTS)
    conditions = ["", HELD, *PAYLOADS, f"{PAUSE_MS} ms of I/O", "soak"]
    rows = [
        [called, condition or "plain", *(_figure(run.results.value(name, "W1", metric, condition)) for metric in COSTS)]
        for condition in conditions
        for name, called in names.items()
        if run.results.value(name, "W1", "steps/s", condition) is not None
    ]
    if rows:
        yield "A is a status row per workflow, updated at every step; B is the product; C adds to B a row per step under a unique"
        yield "key; D adds to B a status row. CPU in µs, WAL and growth in bytes, rows: all a step; memory in MiB."
        yield ""
        yield from _table(["", "condition", *COSTS], rows)


def _shards(run: Run) -> Iterable[str]:
    rows = [
        [called, *(_figure(run.results.value(name, "W1", metric)) for metric in ("steps/s", "CPU"))]
        for name, called in run.called(("ours_1_shard", "ours_2_shards", OURS, "ours_8_shards")).items()
    ]
    if len(rows) > 1:
        yield from _table(["", "steps/s", "CPU, µs a step"], rows)


def _servers(runs: Sequence[Run]) -> Iterable[str]:
    heads = [run.environment.postgres for run in runs]
    by_run = [{one.what: one for one in run.verdicts} for run in runs]
    yield from _table(
        ["criterion", *heads],
        [
            [
                f"{one.what}, {one.unit}",
                *(f"{_figure(found[one.what].value)} ({found[one.what].told})" for found in by_run),
            ]
            for one in by_run[0].values()
        ],
    )


def _method(run: Run) -> Iterable[str]:
    where = run.environment
    yield "Every workload has a fresh database, and its own workers on it. A step counts itself in mapped memory, and a flow's last"
    yield "step stamps the time, the same in every system; so no figure depends on what a system records. Costs are read from the"
    yield "kernel (processor time of workers, backends and the server's own processes) and from the server's statistics."
    yield ""
    for one in run.systems:
        yield f"- **{one.called}**: {one.configuration}"
    yield ""
    yield from _table(["", ""], [["Python", where.python], ["system", where.system], ["disk", where.disk]])
    yield ""
    yield "Server settings: " + ", ".join(f"`{name} = {value}`" for name, value in where.settings.items()) + "."
    yield ""
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in where.versions.items()) + "."


def _bound(one: Verdict, limit: float | None) -> str:
    return "" if limit is None else f"{'≥' if one.is_least else '≤'} {limit:,g}"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.2g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
