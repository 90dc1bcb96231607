"""``durable-cluster bench``: measure ours, the peers and the baselines side by side, and write the report."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import msgspec

from durable_cluster.errors import ConfigurationError, DurableError
from durable_cluster.loadtest import hotpath, stage
from durable_cluster.loadtest.bench import meters, plan, report
from durable_cluster.loadtest.bench.cells import Cell, Results
from durable_cluster.loadtest.bench.environment import environment
from durable_cluster.loadtest.bench.plan import FULL, OURS, PEERS, QUICK, VARIANTS, Scale
from durable_cluster.loadtest.bench.report import Named, Run
from durable_cluster.loadtest.bench.verdicts import Verdict
from durable_cluster.ops.terminal import Terminal, elapsed

ALL = tuple(dict.fromkeys((OURS, *PEERS, *VARIANTS)))
SHARD_LAYOUTS = ("ours_1_shard", "ours_2_shards", "ours_8_shards")
CALLED = {
    OURS: "durable-cluster",
    "ours_dedup": "C: with a dedup row a step",
    "ours_status": "D: with a status row",
    "ours_waiting": "a wait on every step",
    "ours_joining": "a join on every step",
    "ours_linear": "an ordinary function, quick steps",
    "ours_linear_async": "an ordinary function, async steps",
    "ours_1_shard": "one shard, one process",
    "ours_2_shards": "two shards, two processes",
    "ours_8_shards": "eight shards, eight processes",
    "skip_locked": "SKIP LOCKED, grouped commits",
    "status_row_set": "A: status row, 1,000 a commit",
    "status_row_pipelined": "A: status row, pipelined",
}


def bench(terminal: Terminal, options: argparse.Namespace) -> int:
    """The exit code: 0, also where a goal is missed; 1 if a gate is."""
    _check(options)
    logging.basicConfig(level="ERROR")
    if options.render is not None:
        runs = report.joined(run for folder in options.render for run in report.read(folder))
        folder = options.render[0]
    else:
        runs = [_run(terminal, options, bin_dir) for bin_dir in options.pg_bin or [None]]
        folder = options.out
    page = report.write(folder, runs)
    terminal.answer(runs, [*(line(one) for one in runs[0].verdicts), "", f"the report: {page}"])
    return 1 if any(one.is_kept is False for run in runs for one in run.verdicts) else 0


def _run(terminal: Terminal, options: argparse.Namespace, bin_dir: Path | None) -> Run:
    scale = _scale(options)
    names = options.systems or list(ALL)
    results = Results()
    with stage.some_server(options.dsn, bin_dir=bin_dir) as server:
        durable = _hotpath(terminal, server, scale, is_asynchronous=False)
        asynchronous = _hotpath(terminal, server, scale, is_asynchronous=True)
        jobs = plan.jobs(scale, systems=names, workloads=options.workloads or plan.WORKLOADS)
        begun = time.monotonic()
        for number, job in enumerate(jobs, 1):
            terminal.note(f"{number} of {len(jobs)}, {elapsed(time.monotonic() - begun)}: {job.title}")
            _measure(terminal, job, server, results)
        with meters.session(server) as connection:
            where = environment(connection, [plan.system(name) for name in names])
    measured = [*names, *(SHARD_LAYOUTS if scale.has_matrix and OURS in names else ())]
    return Run(
        environment=where,
        durable=durable,
        asynchronous=asynchronous,
        systems=[_named(name) for name in measured],
        results=results,
        command=shlex.join(["durable-cluster", *sys.argv[1:]]),
    )


def _measure(terminal: Terminal, job: plan.Job, server: str, results: Results) -> None:
    """Run one job. What goes wrong with one system is noted, and the others are measured all the same."""
    try:
        job.run(server, results)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        terminal.note(f"{job.title} failed: {reason}")
        if not isinstance(error, DurableError):
            terminal.note(traceback.format_exc())
        results.cells.append(
            Cell(
                system=job.system,
                workload=job.workload,
                condition=job.condition,
                metric="failed",
                value=None,
                unit="",
                note=f"failed: {reason}",
            )
        )


def _hotpath(terminal: Terminal, server: str, scale: Scale, *, is_asynchronous: bool) -> hotpath.Report:
    terminal.note(f"hot path, {'asynchronous' if is_asynchronous else 'durable'}, {scale.hotpath_s:g} s")
    return hotpath.measured(server, seconds=scale.hotpath_s, is_asynchronous=is_asynchronous)


def _scale(options: argparse.Namespace) -> Scale:
    changes: dict[str, float] = {"soak_s": options.soak}
    if options.seconds is not None:
        factor = options.seconds / FULL.seconds
        changes |= {"seconds": options.seconds, "held_s": FULL.held_s * factor, "hotpath_s": FULL.hotpath_s * factor}
        changes["bucket_s"] = max(1.0, FULL.bucket_s * factor)
    return msgspec.structs.replace(QUICK if options.quick else FULL, **changes)


def _named(name: str) -> Named:
    kind = plan.system(name)
    called = CALLED.get(name, f"{name} {kind.version()}")
    return Named(name=name, called=called, configuration=kind.configuration, lacks=dict(kind.lacks))


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for what cannot be meant."""
    _demand_known("system", options.systems, plan.MODULES)
    _demand_known("workload", options.workloads, plan.WORKLOADS)
    if options.dsn and options.pg_bin:
        raise ConfigurationError("--dsn names a server and --pg-bin starts one; give one of them")


def line(one: Verdict) -> str:
    sign = {True: "✓", False: "✗", None: " "}[one.is_kept if one.is_kept is not None else one.is_reached]
    value = "-" if one.value is None else f"{one.value:,.4g}"
    return f"{sign} {one.what:<62} {value:>10} {one.unit:<12} {one.told.strip('*')}"


def _demand_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in set(given) - set(known):
        raise ConfigurationError(f"no {what} {name!r}; there are {', '.join(known)}")
