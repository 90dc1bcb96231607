"""The SQL of the product, in install order: tables by numbered migration, then functions, replaced whole."""

from __future__ import annotations

from importlib.resources import files

MIGRATIONS = (
    *("001_engine", "002_durable", "003_survival", "004_waits"),
    *("005_coordination", "006_schedules", "007_search", "008_linear", "009_values", "010_replay"),
    *("011_timeline", "012_traceparent", "013_marks"),
)
ENGINE = ("queues", "events", "ticks", "consumers", "batches", "rotation", "info", "grants")
DURABLE = (
    *("clock", "shards", "audit", "lifecycle", "pages", "claim", "commit", "spill", "takeover"),
    *("timers", "detached", "history", "dead_letters", "signals", "pause", "priority", "limits", "cancel", "joins"),
    *("attributes", "progress", "schedules", "schedule_runs"),
    *("maintain", "retention", "views", "search", "waiting", "processes", "costs", "console", "timeline", "figures"),
    *("replay", "fork", "grants"),
)
TESTING = ("clock",)
"""What the testing kit installs besides, in databases of its own."""


def read(folder: str, name: str) -> str:
    """The text of ``sql/<folder>/<name>.sql``."""
    return (files(__package__) / folder / f"{name}.sql").read_text("utf-8")
