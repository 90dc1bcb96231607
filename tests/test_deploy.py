"""What operators copy: the files that ``assets`` writes, and that those of one refer to those of another that are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from durable_cluster import Settings
from durable_cluster.durations import seconds as seconds_of
from durable_cluster.ops import assets, cli
from durable_cluster.ops.arguments import parser

OPS = Path(__file__).parent.parent / "ops"
DEPLOY = OPS / "deploy"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def test_assets_writes_all_there_is_and_says_what_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["assets", str(tmp_path / "new")]) == 0
    assert "alerts.yml goes into rule_files" in capsys.readouterr().out
    written = {
        path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()
    }
    kept = {
        path.relative_to(OPS).as_posix()
        for part in ("dashboards", "prometheus", "deploy", "runbooks")
        for path in (OPS / part).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert written == kept
    assert len(written) > 30


def test_assets_links_the_alerts_to_where_the_runbooks_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["assets", str(tmp_path), "--runbooks", "https://wiki.example/durable/", "--json"]) == 0
    assert "prometheus/alerts.yml" in json.loads(capsys.readouterr().out)["written"]
    links = [
        rule["annotations"]["runbook_url"]
        for group in read(tmp_path / "prometheus" / "alerts.yml")["groups"]
        for rule in group["rules"]
    ]
    assert all(link.startswith("https://wiki.example/durable/Durable") for link in links)
    assert links == list(dict.fromkeys(links))


def test_assets_does_not_write_over_what_somebody_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["assets", str(tmp_path)]) == 0
    mine = tmp_path / "prometheus" / "prometheus.yml"
    mine.write_text("mine", "utf-8")
    (tmp_path / "prometheus" / "alerts.yml").unlink()
    capsys.readouterr()
    assert cli.main(["assets", str(tmp_path)]) == 2
    assert "prometheus.yml" in (said := capsys.readouterr().err)
    assert "--force" in said
    assert mine.read_text("utf-8") == "mine"
    assert not (tmp_path / "prometheus" / "alerts.yml").exists()
    assert cli.main(["assets", str(tmp_path), "--force", "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["written"]) == [
        "prometheus/alerts.yml",
        "prometheus/prometheus.yml",
    ]


def test_every_file_that_compose_mounts_is_there() -> None:
    services = read(DEPLOY / "compose.yaml")["services"]
    mounts = [one.split(":")[0] for of in services.values() for one in of.get("volumes", []) if one.startswith(".")]
    assert len(mounts) >= 5
    assert [mount for mount in mounts if not (DEPLOY / mount).exists()] == []
    for of in services.values():
        assert set(of.get("depends_on", ())) <= set(services)
    build = services["cluster"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()


def test_compose_gives_commands_that_exist_and_a_drain_its_time() -> None:
    services = read(DEPLOY / "compose.yaml")["services"]
    for name in ("schema", "cluster"):
        _, rest = parser().parse_known_args(services[name]["command"])
        assert rest == []
    assert (
        seconds_of(services["cluster"]["stop_grace_period"], what="stop_grace_period") >= Settings().drain_grace_s + 10
    )


def test_compose_publishes_nothing_beyond_this_machine() -> None:
    ports = [port for of in read(DEPLOY / "compose.yaml")["services"].values() for port in of.get("ports", [])]
    assert len(ports) >= 3
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_prometheus_and_grafana_look_where_compose_puts_things() -> None:
    services = read(DEPLOY / "compose.yaml")["services"]
    (scrape,) = read(OPS / "prometheus" / "prometheus.yml")["scrape_configs"]
    assert [target.split(":")[0] for target in scrape["static_configs"][0]["targets"]] == ["cluster"]
    assert scrape["job_name"].startswith("durable")
    urls = [source["url"] for source in read(DEPLOY / "grafana" / "datasources.yml")["datasources"]]
    assert [url.split("/")[2].split(":")[0] in services for url in urls] == [True, True]
    (provider,) = read(DEPLOY / "grafana" / "dashboards.yml")["providers"]
    assert f"../dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_the_collectors_pipelines_are_made_of_what_it_declares() -> None:
    made = read(DEPLOY / "otel-collector.yaml")
    pipelines = made["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == set(made[kind])
    host = read(DEPLOY / "compose.yaml")["services"]
    assert made["exporters"]["otlp/traces"]["endpoint"].split(":")[0] in host


@pytest.mark.slow
def test_the_wheel_brings_them_along(tmp_path: Path) -> None:
    root = OPS.parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert [name for name in assets.contents() if f"durable_cluster/ops/{name}" not in listed] == []
