"""The REST API keeps what its OpenAPI document says, for whatever schemathesis comes up with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console import OPERATOR_TOKEN, served

from durable_cluster import App, Context, Continuation, Retry, replay_statements
from durable_cluster.ops.console import api, security

EXAMPLES = os.environ.get("DURABLE_SCHEMATHESIS_EXAMPLES", "25")
ABOUT = """
[generation]
allow-x00 = true

[checks.positive_data_acceptance]
# What the database alone can tell: an unknown workflow, one in another state.
expected-statuses = ["2xx", 401, 403, 404, 409]

[[operations]]
include-name = "POST /api/workflows/{id}/fork"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 422]  # a step that the workflow has not got
"""


@pytest.fixture
def url(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A console over some workflows."""
    monkeypatch.setattr(api, "WAITERS_MAX", 0)  # nobody waits
    monkeypatch.setattr(security, "FAILURES_MAX", 1_000_000)  # wrong tokens are tried, too
    app = App("fuzzed", dsn=dsn)
    for name in ("a", "0", "echo"):
        _machine(app, name)
    replay_statements.declare_types(app.client.connection(), app.declared_types(app.settings))
    app.named("echo").start_many(range(5))
    app.run(until_idle=True)
    app.close()
    with served(dsn, operator_token=OPERATOR_TOKEN) as url:
        yield url


def test_the_edges_of_what_the_document_allows_do_what_it_says(url: str, tmp_path: Path) -> None:
    _demand_clean(url, tmp_path, "--phases", "coverage", "--max-examples", "1")


@pytest.mark.slow
def test_whatever_the_document_allows_does_what_it_says(url: str, tmp_path: Path) -> None:
    _demand_clean(url, tmp_path, "--max-examples", EXAMPLES)


def _demand_clean(url: str, tmp_path: Path, *options: str) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(ABOUT)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "run"),
        *(
            f"{url}/api/openapi.json",
            "--header",
            f"Authorization: Bearer {OPERATOR_TOKEN}",
            "--seed",
            "1",
            "--no-color",
        ),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9][0-9]+ generated, [1-9][0-9]+ passed", done.stdout), done.stdout


def _machine(app: App, name: str) -> None:
    machine = app.machine(name)

    @machine.step(start=True, retry=Retry(attempts=1))
    def step(ctx: Context, what: Any) -> Continuation:
        if what == 3:
            raise ValueError("three is too many")
        return ctx.done(what)
