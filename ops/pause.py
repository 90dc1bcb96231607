"""``pause`` and ``resume``: a workflow, all workflows of a type, or a shard stands still for a while."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
import psycopg

from durable_cluster import coordination, schema
from durable_cluster.context import short_id
from durable_cluster.ops.show import checked_prefix, whole_id
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal


class Paused(msgspec.Struct, frozen=True, kw_only=True):
    """What a pause or a resume met; ``name`` is truncated if it is an id. ``changed``: whether it was not so already.

    ``step_events``: how many a resume set free.
    """

    scope: str
    name: str
    changed: bool
    step_events: int | None = None


def pause(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    """Let no step of it begin."""
    with target.opened() as database, database.connect("pause") as connection:
        schema.demand_installed(connection)
        scope, name = _meant(connection, options)
        is_new = coordination.pause(connection, scope, name, actor=options.actor)
    shown, words = _shown(scope, name)
    told = (
        f"{words} is paused; go on with '{PROGRAM} resume {_option(scope, shown)}'"
        if is_new
        else f"{words} was paused already"
    )
    terminal.answer(Paused(scope=scope, name=shown, changed=is_new), [told])
    return 0


def resume(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    """Let it go on."""
    with target.opened() as database, database.connect("resume") as connection:
        schema.demand_installed(connection)
        scope, name = _meant(connection, options)
        freed = coordination.resume(connection, scope, name, actor=options.actor)
    shown, words = _shown(scope, name)
    told = f"{words} was not paused" if freed is None else f"{words} goes on; {freed:,} steps had been held"
    terminal.answer(Paused(scope=scope, name=shown, changed=freed is not None, step_events=freed), [told])
    return 0


def _meant(connection: psycopg.Connection[Any], options: argparse.Namespace) -> tuple[str, str]:
    given = [of for of in (options.id, options.workflow, options.shard) if of is not None]
    if len(given) != 1:
        raise BadUsage("name one thing: the ID of a workflow, --workflow NAME for all of a type, or --shard N")
    if options.id is not None:
        return "workflow", whole_id(connection, checked_prefix(options.id))
    return ("type", options.workflow) if options.workflow is not None else ("shard", str(options.shard))


def _shown(scope: str, name: str) -> tuple[str, str]:
    """The name as it may be shown, and the thing in words."""
    if scope == "workflow":
        return short_id(name), f"workflow {short_id(name)}…"
    return name, f"workflow type '{name}'" if scope == "type" else f"shard {name}"


def _option(scope: str, shown: str) -> str:
    return shown if scope == "workflow" else f"{'--workflow' if scope == 'type' else '--shard'} {shown}"
