"""The pictures of a report, each as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from durable_cluster.loadtest.bench.cells import Results
from durable_cluster.loadtest.bench.plan import OURS
from durable_cluster.loadtest.bench.scene import HELD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS_COLOR = "#c2410c"
OTHERS = ("#1d4ed8", "#15803d", "#7c3aed", "#b45309", "#0891b2", "#be185d", "#4b5563", "#65a30d")
SIZE = (8.0, 4.2)
DPI = 150
STYLE: Any = {
    "svg.hashsalt": "durable-cluster",  # the same figures make the same file
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
}


def draw(folder: Path, results: Results, names: dict[str, str]) -> list[str]:
    """Draw what there are figures for; the stems of the files. ``names``: how each system is called, in the order of drawing."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context(STYLE):
        for stem, chart in (
            ("held-snapshot", _held),
            ("held-snapshot-lone", _held_lone),
            ("dead-rows", _dead_rows),
            ("throughput", _throughput),
            ("recovery", _recovery),
        ):
            figure = chart(results, names)
            if figure is not None:
                _save(figure, folder / stem)
                drawn.append(stem)
    return drawn


def _held(results: Results, names: dict[str, str]) -> Figure | None:
    """Throughput over time, in percent of what it was before the snapshot."""
    series = {name: results.series(name, "W1", "steps/s", HELD) for name in names}
    free = {name: results.value(name, "W1", "steps/s before", HELD) for name in names}
    relative = {
        name: [(at_s, 100 * value / before) for at_s, value in points]
        for name, points in series.items()
        if points and (before := free[name])
    }
    return _lines(
        relative,
        names,
        title="Throughput while somebody holds a snapshot open",
        y="% of the throughput before",
        held_from_s=_held_from(results, "W1", "steps/s"),
    )


def _held_lone(results: Results, names: dict[str, str]) -> Figure | None:
    series = {name: results.series(name, "W2", "step p50, ms", HELD) for name in names}
    figure = _lines(
        {name: points for name, points in series.items() if points},
        names,
        title="A lone workflow's step while somebody holds a snapshot open",
        y="p50 of a step, ms",
        held_from_s=_held_from(results, "W2", "step p50, ms"),
    )
    if figure is not None:
        figure.axes[0].set_yscale("log")
    return figure


def _dead_rows(results: Results, names: dict[str, str]) -> Figure | None:
    series = {name: results.series(name, "W1", "dead rows", HELD) for name in names}
    return _lines(
        {name: points for name, points in series.items() if points},
        names,
        title="Dead rows that the held snapshot keeps from vacuum",
        y="dead rows",
        held_from_s=_held_from(results, "W1", "steps/s"),
    )


def _throughput(results: Results, names: dict[str, str]) -> Figure | None:
    found = {name: results.value(name, "W1", "steps/s") for name in names}
    return _bars(
        {name: value for name, value in found.items() if value},
        names,
        title="Steps a second: workflows of ten trivial steps (log scale)",
        x="steps/s",
    )


def _recovery(results: Results, names: dict[str, str]) -> Figure | None:
    found = {name: results.value(name, "W6", "longest gap") for name in names}
    return _bars(
        {name: value for name, value in found.items() if value},
        names,
        title="Longest standstill of a workflow after SIGKILL of its worker (log scale)",
        x="seconds",
    )


def _held_from(results: Results, workload: str, metric: str) -> float | None:
    """When the snapshot was taken: a quarter into the whole, as the plan has it."""
    series = results.series(OURS, workload, metric, HELD)
    return series[-1][0] / 4 if series else None


def _lines(
    series: dict[str, list[tuple[float, float]]],
    names: dict[str, str],
    *,
    title: str,
    y: str,
    held_from_s: float | None,
) -> Figure | None:
    if not series:
        return None
    figure, axes = _figure(title)
    for color, (name, points) in zip(_colors(list(series)), series.items(), strict=True):
        axes.plot(
            *zip(*_spaced(points), strict=True),
            label=names[name],
            color=color,
            linewidth=2.6 if name == OURS else 1.5,
            zorder=3 if name == OURS else 2,
        )
    if held_from_s is not None:
        axes.axvspan(
            held_from_s, max(points[-1][0] for points in series.values()), color="#9ca3af", alpha=0.15, linewidth=0
        )
        axes.text(held_from_s, axes.get_ylim()[1], " snapshot held", va="top", fontsize=9, color="#4b5563")
    axes.set_xlabel("seconds")
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _spaced(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without looks that came at once because the harness was late: a rate over an instant says nothing."""
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(points)]
    enough = 0.5 * median(gaps) if gaps else 0.0
    return points[:1] + [point for gap, point in zip(gaps, points[1:], strict=True) if gap >= enough]


def _bars(found: dict[str, float], names: dict[str, str], *, title: str, x: str) -> Figure | None:
    if not found:
        return None
    figure, axes = _figure(title)
    ordered = sorted(found, key=lambda name: found[name])
    colors = [OURS_COLOR if name == OURS else "#9ca3af" for name in ordered]
    axes.barh([names[name] for name in ordered], [found[name] for name in ordered], color=colors)
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.grid(visible=False, axis="y")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 4)
    for row, name in enumerate(ordered):
        value = found[name]
        axes.text(value * 1.1, row, f"{value:,.0f}" if value >= 100 else f"{value:.2g}", va="center", fontsize=9)
    return figure


def _colors(names: Sequence[str]) -> list[str]:
    others = iter(OTHERS * 2)
    return [OURS_COLOR if name == OURS else next(others) for name in names]


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure, axes


def _save(figure: Figure, stem: Path) -> None:
    from matplotlib import pyplot

    undated: dict[str, Any] = {"Date": None}
    figure.savefig(stem.with_suffix(".svg"), metadata=undated)
    figure.savefig(stem.with_suffix(".png"), dpi=DPI)
    pyplot.close(figure)
