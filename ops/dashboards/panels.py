"""What a dashboard is made of, and the JSON of it: Grafana's classic model, schema 42, which Grafana 9 and later import.

A board is rows of panels, laid out from left to right over 24 columns. Every query goes to the variable ``$datasource`` and
asks for one cluster, ``$job``: nothing names a data source of anybody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

SCHEMA_VERSION = 42
COLUMNS = 24
TAG = "durable-cluster"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
FIRING = 'ALERTS{alertname=~"Durable.*",alertstate="firing",job=~"$job|"}'

Json = dict[str, Any]


class Query(msgspec.Struct, frozen=True):
    """A PromQL expression, and what its series are called."""

    expr: str
    legend: str = ""


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One panel. ``about`` says what is normal and what to do; ``runbook`` names the alert whose page says more.

    ``kind``: timeseries, stat, table or heatmap. ``unit`` is Grafana's word for it. ``warns``, ``alarms``: from where on it is
    orange and red; with ``alarms`` under ``warns`` it is low values that are bad.
    """

    title: str
    about: str
    queries: tuple[Query, ...]
    unit: str
    kind: str = "timeseries"
    runbook: str = ""
    width: int = 8
    height: int = 7
    warns: float | None = None
    alarms: float | None = None
    is_stacked: bool = False
    decimals: int | None = None


class Row(msgspec.Struct, frozen=True):
    """Panels under a title."""

    title: str
    panels: tuple[Panel, ...]


class Choice(msgspec.Struct, frozen=True):
    """A variable whose values are those of a label; any number of them can be chosen."""

    label: str
    metric: str


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """A dashboard."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    choices: tuple[Choice, ...] = ()


def stat(
    *,
    title: str,
    about: str,
    expr: str,
    unit: str = "none",
    runbook: str = "",
    width: int,
    warns: float | None = None,
    alarms: float | None = None,
    decimals: int | None = None,
) -> Panel:
    """One number, green, orange or red."""
    return Panel(
        title=title,
        about=about,
        queries=(Query(expr),),
        unit=unit,
        kind="stat",
        runbook=runbook,
        width=width,
        height=4,
        warns=warns,
        alarms=alarms,
        decimals=decimals,
    )


def part_of(some: str, others: str) -> str:
    """Which part of both counters, type by type, is the first one's."""
    part, rest = (f"sum by (workflow) (rate({counter}[$__rate_interval]))" for counter in (some, others))
    return f"{part} / ({part} + ({rest} or 0 * {part}) > 0)"


def quantiles(metric: str, selector: str, *, by: str = "") -> tuple[Query, ...]:
    """The median and the slowest hundredth of a histogram in seconds."""
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(
            f"histogram_quantile({quantile}, sum by ({labels}) (rate({metric}_bucket{{{selector}}}[$__rate_interval])))",
            f"{legend}{word}",
        )
        for quantile, word in ((0.5, "median"), (0.99, "99 %"))
    )


def json_of(board: Board) -> str:
    """The file that Grafana imports."""
    made = {
        "uid": board.uid,
        "title": board.title,
        "description": board.about,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_annotation()]},
        "links": [_links()],
        "templating": {"list": list(_variables(board))},
        "panels": list(_panels(board.rows)),
    }
    return msgspec.json.format(msgspec.json.encode(made), indent=2).decode() + "\n"


def _annotation() -> Json:
    return {
        "name": "Alerts that fire",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": FIRING,
        "step": "60s",
        "titleFormat": "{{alertname}}",
        "textFormat": "shard {{shard}} {{workflow}}",
    }


def _links() -> Json:
    return {
        "type": "dashboards",
        "title": "",
        "tags": [TAG],
        "asDropdown": False,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "tooltip": "",
        "url": "",
    }


def _variables(board: Board) -> Iterator[Json]:
    yield {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1}
    yield _variable("job", "Cluster", "label_values(durable_build_info, job)")
    for choice in board.choices:
        query = f'label_values({choice.metric}{{job="$job"}}, {choice.label})'
        many = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
        yield _variable(choice.label, choice.label.capitalize(), query) | many


def _variable(name: str, label: str, query: str) -> Json:
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
    }


def _panels(rows: tuple[Row, ...]) -> Iterator[Json]:
    """Every row's line and its panels, each where it belongs."""
    number, top = 0, 0
    for row in rows:
        number += 1
        yield _line(row.title, number, top)
        left, top, tallest = 0, top + 1, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, top, tallest = 0, top + tallest, 0
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place} | _panel(panel)
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest


def _line(title: str, number: int, top: int) -> Json:
    place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
    return {"id": number, "gridPos": place, "type": "row", "title": title, "collapsed": False, "panels": []}


def _panel(panel: Panel) -> Json:
    about = f"{panel.about}\n\nRunbook: {panel.runbook}" if panel.runbook else panel.about
    made = {
        "type": panel.kind,
        "title": panel.title,
        "description": about,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": OPTIONS[panel.kind](panel),
        "targets": [_target(panel, number) for number in range(len(panel.queries))],
    }
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "alertstate", "job"), True)
        made["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return made


def _target(panel: Panel, number: int) -> Json:
    query = panel.queries[number]
    form = {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series")
    is_instant = panel.kind in ("stat", "table")
    return {
        "refId": chr(ord("A") + number),
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": form,
        "instant": is_instant,
        "range": not is_instant,
    }


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": list(_thresholds(panel))}}
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.kind == "stat":
        defaults["color"] = {"mode": "thresholds"}
    if panel.kind == "timeseries":
        defaults |= {"min": 0, "color": {"mode": "palette-classic"}, "custom": _drawn(panel)}
    return defaults


def _drawn(panel: Panel) -> Json:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.is_stacked else 8,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if panel.warns is None and panel.alarms is None else "dashed"},
    }


def _thresholds(panel: Panel) -> Iterator[Json]:
    """From the lowest colour up; Grafana wants the lowest without a value."""
    warns, alarms = panel.warns, panel.alarms
    if warns is not None and alarms is not None and alarms < warns:
        yield from ({"color": "red", "value": None}, {"color": "orange", "value": alarms})
        yield {"color": "green", "value": warns}
        return
    yield {"color": "green", "value": None}
    if warns is not None:
        yield {"color": "orange", "value": warns}
    if alarms is not None:
        yield {"color": "red", "value": alarms}


def _of_timeseries(panel: Panel) -> Json:
    legend = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _of_stat(panel: Panel) -> Json:
    return {
        "colorMode": "background",
        "graphMode": "none",
        "justifyMode": "center",
        "orientation": "auto",
        "textMode": "value",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }


def _of_table(panel: Panel) -> Json:
    return {"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": "severity", "desc": False}]}


def _of_heatmap(panel: Panel) -> Json:
    return {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {},
        "color": {
            "mode": "scheme",
            "scheme": "Oranges",
            "steps": 64,
            "fill": "dark-orange",
            "exponent": 0.5,
            "reverse": False,
        },
        "exemplars": {"color": "red"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": False},
        "yAxis": {"unit": panel.unit, "axisPlacement": "left", "reverse": False},
    }


OPTIONS = {"timeseries": _of_timeseries, "stat": _of_stat, "table": _of_table, "heatmap": _of_heatmap}
