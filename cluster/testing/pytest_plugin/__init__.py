"""The fixtures of durable-cluster for pytest. They import the package when they are used, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from durable_cluster import App
    from durable_cluster.testing import Cluster


@pytest.fixture
def durable_app() -> App:
    """The app that ``durable`` runs. Define it in your conftest.py; it returns your App."""
    pytest.fail(
        "the fixture 'durable' runs the app that the fixture 'durable_app' returns; define that in conftest.py:"
        "\n\n    @pytest.fixture\n    def durable_app():\n        return app",
        pytrace=False,
    )


@pytest.fixture
def durable(durable_app: App) -> Iterator[Cluster]:
    """A cluster for this test: your app on a database of its own, with a clock that you move; see durable_cluster.testing."""
    from durable_cluster import testing

    with testing.cluster(durable_app) as cluster:
        yield cluster
