"""Every expression of the dashboards and alerts is asked of a real Prometheus that reads a live cluster, and has figures."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import psycopg
import pytest
import yaml
from promql import metrics, operands

OPS = Path(__file__).parent.parent / "ops"
PROMETHEUS = shutil.which("prometheus")
JOB = "durable-cluster"
CHOSEN = {"$job": JOB, "$shard": ".*", "$workflow": ".*", "$__rate_interval": "1m", "$__range": "5m"}
DEADLINE_S = 60.0

FLOWS = '''
"""Something of everything that is counted."""
from durable_cluster import App, Context, Continuation, Retry

app = App("monitored")
order = app.machine("order", state=int, history=True)


@order.step(start=True, retry=Retry(attempts=2, backoff="10ms"))
def begin(ctx: Context, number: int) -> Continuation:
    if ctx.attempt == 1:
        raise ValueError("not at the first attempt")
    return ctx.goto(end, number)


@order.step(retry=Retry(attempts=1))
def end(ctx: Context, number: int) -> Continuation:
    if number == 0:
        raise ValueError("a dead letter")
    if number == 1:
        return ctx.fail("failed")
    if number == 2:
        return ctx.wait_for("never", then=end, state=number)
    return ctx.done(number)
'''


def exprs_of_dashboards() -> dict[str, str]:
    """By board, panel and query; with the variables as they stand there."""
    return {
        f"{path.stem}: {panel['title']}, {target['refId']}": target["expr"]
        for path in sorted((OPS / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text("utf-8"))["panels"]
        for target in panel.get("targets", [])
    }


def exprs_of_alerts() -> dict[str, str]:
    """Each without its comparisons: it has values while all is well."""
    return {
        f"{rule['alert']}, {number}": operand
        for group in yaml.safe_load((OPS / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
        for rule in group["rules"]
        for number, operand in enumerate(operands(rule["expr"]))
    }


def exprs_of_variables() -> dict[str, str]:
    """What the dashboards offer to choose from: series that have the label."""
    texts = [path.read_text("utf-8") for path in (OPS / "dashboards").glob("*.json")]
    found = {pair for text in texts for pair in re.findall(r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", text)}
    return {f"{label} of {metric}": f'{metric}{{job="$job",{label}!=""}}' for metric, label in found}


def chosen(expr: str) -> str:
    """The expression as Grafana sends it."""
    for variable, value in CHOSEN.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr
    return expr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **words: str) -> Any:
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(words)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def ask(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series that the expression has now; of a range its last value."""
        found = self.get("query", query=expr)["result"]
        return [(one["metric"], float((one.get("value") or one["values"][-1])[1])) for one in found]


def is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture
def page(dsn: str, tmp_path: Path) -> Iterator[str]:
    """The address of the metrics of a cluster that is starting."""
    (tmp_path / "monitored_flows.py").write_text(FLOWS)
    address = f"127.0.0.1:{free_port()}"
    words = ["start", "--dsn", dsn, "--app", "monitored_flows:app", "--metrics", address, "--set", "drain_grace_s=5"]
    cluster = subprocess.Popen([sys.executable, "-m", "durable_cluster.ops", *words], cwd=tmp_path)
    try:
        yield address
    finally:
        cluster.terminate()
        cluster.wait(30)


@pytest.fixture
def prometheus(page: str, dsn: str, tmp_path: Path, eventually: Callable[..., None]) -> Iterator[Prometheus]:
    """It has read the page between and after two loads; its alerts fire without delay."""
    wait = partial(eventually, seconds=DEADLINE_S)
    rules = (OPS / "prometheus" / "alerts.yml").read_text("utf-8")
    (tmp_path / "alerts.yml").write_text(re.sub(r"^( +for:) .*", r"\1 0s", rules, flags=re.MULTILINE))
    config = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [page]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    made = Prometheus(f"http://127.0.0.1:{free_port()}")
    words = [
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'series'}",
        f"--web.listen-address={made.url.removeprefix('http://')}",
    ]
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen([str(PROMETHEUS), *words], stdout=log, stderr=log)
    try:
        # Prometheus looks for its targets some seconds after its start: the cluster starts meanwhile.
        wait(lambda: is_up(f"http://{page}/-/ready"), what="the cluster being up")
        wait(lambda: is_up(f"{made.url}/-/ready"), what="Prometheus being ready")
        for times in (1, 2):
            load(dsn)
            ended = f"sum(durable_workflows_ended_total) >= {10 * times}"
            wait(lambda asked=ended: made.ask(asked), what="Prometheus having seen what ended")
            wait(lambda n=times: made.ask(f"sum(durable_dead_letters_total) == {n}"), what="and the dead letters")
        wait(lambda: made.ask("durable_stuck_workflows == 2"), what="and what the database says of them")
        wait(lambda: made.ask('ALERTS{alertstate="firing"}'), what="an alert that fires")
        yield made
    finally:
        process.terminate()
        process.wait(30)


def load(dsn: str) -> None:
    """Twelve workflows: one is stuck, one fails, one waits and is cancelled, one waits for ever, eight are completed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        started = connection.execute(
            "select durable.hex(id) from durable.start_many('order', 1, 'begin', %s)",
            ("\n".join(map(str, [0, 1, 2, 2, *range(3, 11)])),),
        ).fetchall()
        connection.execute("select durable.cancel(%s::uuid)", started[2])


@pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus here: apt-get install prometheus")
def test_every_panel_alert_and_variable_has_figures_of_a_live_cluster(prometheus: Prometheus) -> None:
    """One test, so that there is one cluster and one Prometheus."""
    asked = exprs_of_dashboards() | exprs_of_alerts() | exprs_of_variables()
    assert len(asked) > 100
    silent = {
        where: expr
        for where, expr in asked.items()
        if all(math.isnan(value) for _, value in prometheus.ask(chosen(expr)))
    }
    assert silent == {}

    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"} == {}

    firing = {labels["alertname"]: labels["severity"] for labels, _ in prometheus.ask('ALERTS{alertstate="firing"}')}
    assert "DurableDeadLetters" in firing
    assert [name for name, severity in firing.items() if severity == "critical"] == []


def test_what_is_asked_for_is_a_metric_that_the_documents_name() -> None:
    exprs = [*exprs_of_dashboards().values(), *exprs_of_alerts().values()]
    documented = (OPS.parent / "docs" / "telemetry.md").read_text("utf-8")
    named = {name for expr in exprs for name in metrics(expr)}
    assert len(named) > 20
    assert [name for name in sorted(named) if f"`{name}`" not in documented] == []
