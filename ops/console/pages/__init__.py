"""The pages: each module has its ``routes``; this is the one place where they are put together."""

from __future__ import annotations

from starlette.routing import Route

from durable_cluster.ops.console.pages import (
    cost,
    dead_letters,
    limits,
    overview,
    pauses,
    processes,
    schedules,
    settings,
    waiting,
    workflow,
    workflows,
)

PAGES = (overview, workflows, workflow, waiting, dead_letters, schedules, limits, pauses, processes, cost, settings)

routes: list[Route] = [route for page in PAGES for route in page.routes]
