"""Grafana dashboards: described here in Python, and beside it as the JSON that Grafana imports.

``python -m durable_cluster.ops.dashboards`` writes the files anew after a change.
"""
