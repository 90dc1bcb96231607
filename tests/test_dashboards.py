"""The dashboards as files: what Grafana imports is what the code describes, and each panel says what is normal."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from durable_cluster.ops.dashboards.__main__ import BOARDS
from durable_cluster.ops.dashboards.panels import json_of

ROOT = Path(__file__).parent.parent
FILES = {path.name: path for path in (ROOT / "ops" / "dashboards").glob("*.json")}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, path in FILES.items()
    for panel in json.loads(path.read_text("utf-8"))["panels"]
    if panel["type"] != "row"
]


def board(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(FILES[name].read_text("utf-8"))
    return made


def test_there_are_four() -> None:
    assert set(FILES) == set(BOARDS) == {"cluster.json", "shard.json", "workflow.json", "reliability.json"}


@pytest.mark.parametrize("name", BOARDS)
def test_the_files_are_what_the_code_describes(name: str) -> None:
    assert FILES[name].read_text("utf-8") == json_of(BOARDS[name]), "run python -m durable_cluster.ops.dashboards"


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_names_a_data_source_of_anybodys(name: str) -> None:
    """Grafana asks for it when the file is imported: the variable is the only one that is meant."""

    def sources(of: object) -> list[object]:
        if isinstance(of, dict):
            found = [of["datasource"]] if "datasource" in of else []
            return found + [one for value in of.values() for one in sources(value)]
        return [one for value in of for one in sources(value)] if isinstance(of, list) else []

    found = sources(board(name))
    assert len(found) > 10
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in found)
    assert board(name)["templating"]["list"][0] == {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "refresh": 1,
    }


@pytest.mark.parametrize("name", BOARDS)
def test_no_panel_lies_upon_another_or_beside_the_board(name: str) -> None:
    panels = board(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("name", BOARDS)
def test_what_is_wrong_stands_on_the_first_screen(name: str) -> None:
    row, *panels = board(name)["panels"]
    assert row["title"] in ("What is wrong", "Over the time shown")
    first = [panel for panel in panels if panel["gridPos"]["y"] == 1]
    assert len(first) >= 4
    assert {panel["type"] for panel in first} == {"stat"}
    assert sum(panel["gridPos"]["w"] for panel in first) == 24


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_says_what_is_normal_in_which_unit(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    _, _, runbook = panel["description"].partition("\n\nRunbook: ")
    assert not runbook or (ROOT / "ops" / "runbooks" / f"{runbook}.md").exists()


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_asks_for_the_cluster_that_was_chosen(panel: dict[str, Any]) -> None:
    assert [target["expr"] for target in panel["targets"] if "$job" not in target["expr"]] == []


@pytest.mark.parametrize(("name", "label"), [("shard.json", "shard"), ("workflow.json", "workflow")])
def test_each_panel_of_a_shard_or_type_asks_for_those_that_were_chosen(name: str, label: str) -> None:
    exprs = [target["expr"] for panel in board(name)["panels"] for target in panel.get("targets", [])]
    assert [expr for expr in exprs if f'{label}=~"${label}"' not in expr] == []
