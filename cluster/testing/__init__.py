"""For tests of your own workflows: a database for each, a clock that you move, processes that die where you say, old histories.

    with testing.cluster(app) as cluster:
        handle = remind.start("ada")
        cluster.advance("7d")
        assert handle.result(timeout=0) == "reminded"

With pytest the fixture ``durable`` is such a cluster; see docs/guide/testing.md.
"""

from durable_cluster.testing.crashes import Crash
from durable_cluster.testing.histories import History, check_replay, record
from durable_cluster.testing.kit import Cluster, cluster

__all__ = ["Cluster", "Crash", "History", "check_replay", "cluster", "record"]
