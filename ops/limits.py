"""``limits``: what is limited, what holds and what waits; and other numbers than the code declares, at once."""

from __future__ import annotations

import argparse

import msgspec

from durable_cluster import coordination, schema
from durable_cluster.limits import parsed_rate
from durable_cluster.ops import lookups
from durable_cluster.ops.lookups import LimitShown
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal, elapsed, table


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``limits set`` and ``reset``."""

    name: str
    changed: bool


def limits(terminal: Terminal, target: Target, options: argparse.Namespace) -> int:
    """``list``, ``set`` or ``reset``."""
    with target.opened() as database, database.connect("limits") as connection:
        schema.demand_installed(connection)
        if options.action == "list":
            found = lookups.limits(connection)
            terminal.answer(found, _lines(found))
            return 0
        if options.action == "reset":
            has_changed = coordination.reset_limit(connection, options.name)
            told = "counts again as the code declares it" if has_changed else "was as the code declares it"
        else:
            if options.concurrency is None and options.rate is None:
                raise BadUsage(f"give --concurrency N or --rate 100/1s; to undo: {PROGRAM} limits reset {options.name}")
            rate, period_s = (None, None) if options.rate is None else parsed_rate(options.name, options.rate)
            coordination.set_limit(
                connection, options.name, concurrency=options.concurrency, rate=rate, period_s=period_s
            )
            has_changed, told = True, "is set, in place of what the code declares"
    terminal.answer(Changed(name=options.name, changed=has_changed), [f"limit '{options.name}' {told}"])
    return 0


def _lines(found: list[LimitShown]) -> list[str]:
    if not found:
        return ["no limits; a step or a machine declares one: limit=Limit('stripe', concurrency=10, rate='100/1s')"]
    rows = [
        (
            one.name,
            "-" if one.concurrency is None else one.concurrency,
            "-" if one.rate is None else f"{one.rate:,}/{elapsed(one.period_s or 0)}",
            "set" if one.is_set else "declared",
            one.keys,
            one.used,
            one.waiting,
        )
        for one in found
    ]
    return table(("limit", "at once", "rate", "by", "keys", "held", "waiting"), rows)
