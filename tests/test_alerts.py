"""The alert rules: each fires when it should and not when it should not, and leads to a page that says what to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import operands

ROOT = Path(__file__).parent.parent
RULES = ROOT / "ops" / "prometheus"
RUNBOOKS = ROOT / "ops" / "runbooks"
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((RULES / "alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]
]
NAMES = [rule["alert"] for rule in ALERTS]
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here: apt-get install prometheus")


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROMTOOL), *words], cwd=RULES, capture_output=True, text=True, timeout=60, check=False)


@needs_promtool
@pytest.mark.parametrize(
    "words",
    [("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(words: tuple[str, ...]) -> None:
    found = promtool(*words)
    assert found.returncode == 0, found.stdout + found.stderr


@needs_promtool
@pytest.mark.parametrize(("threshold", "another"), [("== 0", "== 2"), ("> 1800", "> 180000")])
def test_a_rule_with_another_threshold_is_found_out(tmp_path: Path, threshold: str, another: str) -> None:
    rules = (RULES / "alerts.yml").read_text("utf-8")
    assert threshold in rules
    (tmp_path / "alerts.yml").write_text(rules.replace(threshold, another), "utf-8")
    shutil.copy(RULES / "alerts_test.yml", tmp_path)
    assert promtool("test", "rules", str(tmp_path / "alerts_test.yml")).returncode != 0


def test_each_alert_is_tested_to_fire() -> None:
    said = (RULES / "alerts_test.yml").read_text("utf-8")
    assert [name for name in NAMES if f'labels: ALERTS{{alertname="{name}",alertstate="firing"' not in said] == []


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_an_alert_says_how_severe_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    said = rule["annotations"]
    assert set(said) == {"summary", "description", "runbook_url"}
    assert said["runbook_url"] == f"ops/runbooks/{rule['alert']}.md"
    page = (RUNBOOKS / f"{rule['alert']}.md").read_text("utf-8")
    assert page.startswith(f"# {rule['alert']}\n\n**{rule['labels']['severity']}.** ")
    for part in ("**How bad.**", "**Look.**", "**Do.**", "**Wake somebody", "**Why these numbers.**"):
        assert part in page, f"{rule['alert']}.md lacks {part}"


def test_each_page_is_that_of_an_alert_and_in_the_list() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == set(NAMES)
    listed = (RUNBOOKS / "README.md").read_text("utf-8")
    assert [name for name in NAMES if f"[{name}]({name}.md)" not in listed] == []


@pytest.mark.parametrize(
    ("expr", "parts"),
    [
        ("up == 0", ["up"]),
        ('max by (job) (a{x=~"b|c"}) > 1e6', ['max by (job) (a{x=~"b|c"})']),
        ("a / (b > 0) > 0.25 and on (job) c > 20", ["a / (b > 0)", "c"]),
        ("absent_over_time(a[5m])", ["a[5m]"]),
        ('a{x="or > 1"} unless b', ['a{x="or > 1"}', "b"]),
    ],
)
def test_an_expression_is_taken_apart_at_its_comparisons(expr: str, parts: list[str]) -> None:
    assert operands(expr) == parts
