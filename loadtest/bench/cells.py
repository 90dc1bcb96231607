"""The raw figures of a run: one value a cell, one look a point; as CSV they are what every table and chart is made of."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. ``condition``: what was special, such as "held snapshot"; empty if nothing was. ``round``: from 1, where the
    same is measured several times. ``note``: why there is no value.
    """

    system: str
    workload: str
    condition: str = ""
    metric: str
    value: float | None
    unit: str
    round: int = 1
    note: str = ""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One look at something that moves, ``at_s`` seconds after its measurement began."""

    system: str
    workload: str
    condition: str = ""
    metric: str
    at_s: float
    value: float
    round: int = 1


Row = TypeVar("Row", Cell, Point)


class Results(msgspec.Struct, kw_only=True):
    """Everything a run has found so far."""

    cells: list[Cell] = []
    points: list[Point] = []

    def value(self, system: str, workload: str, metric: str, condition: str = "") -> float | None:
        """A figure: the median if it was measured in several rounds; None if there is none."""
        found = sorted(
            cell.value
            for cell in self.cells
            if (cell.system, cell.workload, cell.metric, cell.condition) == (system, workload, metric, condition)
            and cell.value is not None
        )
        return found[len(found) // 2] if found else None

    def note(self, system: str, workload: str, condition: str = "") -> str:
        """Why a figure is missing."""
        return next(
            (
                cell.note
                for cell in self.cells
                if (cell.system, cell.workload, cell.condition) == (system, workload, condition) and cell.note
            ),
            "",
        )

    def series(self, system: str, workload: str, metric: str, condition: str = "") -> list[tuple[float, float]]:
        """The looks at one thing in its first round, in order."""
        return [
            (point.at_s, point.value)
            for point in self.points
            if (point.system, point.workload, point.metric, point.condition) == (system, workload, metric, condition)
            and point.round == 1
        ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One row a line under a head of the field names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if not rows:
            return
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0].__struct_fields__)
        writer.writerows(_told(msgspec.structs.astuple(row)) for row in rows)


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """What ``write_csv`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            msgspec.convert(
                {name: value or (None if name == "value" else "") for name, value in row.items()}, kind, strict=False
            )
            for row in csv.DictReader(file)
        ]


def _told(values: Iterable[object]) -> list[object]:
    return [f"{value:.6g}" if isinstance(value, float) else value for value in values]
