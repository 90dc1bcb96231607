"""Whatever clients, workers, clocks and deaths do in whatever order: each workflow does what its script says, once.

``make explore`` plays more and longer examples; a failure says the shortest one that Hypothesis found.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import hypothesis
import psycopg
import pytest
from explorer.scene import Lab
from hypothesis import HealthCheck
from hypothesis.stateful import run_state_machine_as_test
from model.machine import Model
from model.scripts import application

from durable_cluster import handoff

SEED = int(os.environ.get("DURABLE_TEST_SEED", "0")) or random.randrange(10**6)
EXAMPLES = int(os.environ.get("DURABLE_MODEL_EXAMPLES", "20"))
STEPS = 25


@pytest.fixture
def lab(
    dsn: str, conn: psycopg.Connection, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    monkeypatch.setattr(handoff, "CONFLICT_PAUSE_S_MAX", 0.0)
    lab = Lab(dsn, conn, clock, application(dsn))
    yield lab
    lab.close()


def test_workflows_do_what_their_scripts_say_whatever_happens(
    lab: Lab, record_property: Callable[[str, object], None]
) -> None:
    print(f"seed {SEED}")

    @hypothesis.seed(SEED)
    class ModelHere(Model):
        pass

    ModelHere.lab = lab
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(ModelHere, settings=settings)
    record_property("explored", f"the model: {EXAMPLES} examples of up to {STEPS} rules, seed {SEED}")
