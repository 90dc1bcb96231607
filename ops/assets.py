"""``assets``: what an operator puts into Grafana, Prometheus, systemd and containers, written out as files."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import BadUsage, Terminal

HERE = Path(__file__).parent
PARTS = ("dashboards/*.json", "prometheus/*.yml", "deploy/*", "deploy/grafana/*", "runbooks/*.md")
BASE = "ops/runbooks"
"""What every runbook_url of the alert rules begins with."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``assets``: the files that are new or have changed, and how many are as they were."""

    directory: str
    written: list[str]
    unchanged: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to; made if it is not there")
    parser.add_argument(
        "--runbooks", metavar="URL", help="where your people read the runbooks: what alerts link to (ops/runbooks)"
    )
    parser.add_argument("--force", action="store_true", help="also over files that are not as they were written")


def assets(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    """Write them. Raises BadUsage for a file there that differs, before anything is written."""
    directory: Path = options.directory
    made = contents(base=options.runbooks or BASE)
    changed = {name: text for name, text in made.items() if _text(directory / name) != text}
    foreign = [name for name in changed if (directory / name).exists()]
    if foreign and not options.force:
        raise BadUsage(
            f"{len(foreign)} files are there and differ, such as {directory / foreign[0]}:"
            " choose another directory, or write over them with --force"
        )
    for name, text in changed.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, "utf-8")
    done = Written(directory=str(directory), written=sorted(changed), unchanged=len(made) - len(changed))
    terminal.answer(done, _lines(done))
    return 0


def contents(*, base: str = BASE) -> dict[str, str]:
    """Every file's text by its path; alerts link to the pages below ``base``."""
    found = [path for part in PARTS for path in sorted(HERE.glob(part)) if path.is_file()]
    texts = {path.relative_to(HERE).as_posix(): path.read_text("utf-8") for path in found}
    link = f"runbook_url: {base.rstrip('/')}/"
    return {name: text.replace(f"runbook_url: {BASE}/", link) for name, text in texts.items()}


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", "replace") if path.is_file() else None


def _lines(done: Written) -> list[str]:
    unchanged = f"; {done.unchanged} were there" if done.unchanged else ""
    return [
        f"{len(done.written)} files written to {done.directory}{unchanged}",
        "  dashboards/   for Grafana: Dashboards, New, Import",
        "  prometheus/   alerts.yml goes into rule_files; prometheus.yml is an example",
        "  runbooks/     a page an alert",
        "  deploy/       systemd, Dockerfile, compose, an OpenTelemetry collector",
    ]
