"""``doctor``: one look at everything that has to be right, a verdict and a next step for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import psycopg

from durable_cluster import schema
from durable_cluster.errors import DatabaseError
from durable_cluster.ops import checks
from durable_cluster.ops.checks import Finding
from durable_cluster.ops.target import Database, Target
from durable_cluster.ops.terminal import Terminal

Check = Callable[[psycopg.Connection[Any]], Finding]

SERVER_CHECKS: Sequence[Check] = (
    checks.server_version,
    checks.crash_safety,
    checks.commit_durability,
    checks.isolation,
    checks.clock_skew,
    checks.session,
    checks.horizon,
    checks.connections_left,
)
SCHEMA_CHECKS: Sequence[Check] = (
    checks.log_belongs_here,
    checks.partitions,
    checks.retention,
    checks.audit,
    checks.consumers,
    checks.silent_windows,
    checks.rotation,
    checks.timeline,
    checks.chunks,
    checks.timers,
    checks.schedules,
)


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``doctor``."""

    database: str
    is_well: bool
    findings: list[Finding]


def doctor(terminal: Terminal, target: Target) -> int:
    """Check everything; 1 if anything is wrong."""
    with target.opened() as database:
        findings = list(_findings(database))
        diagnosis = Diagnosis(
            database=database.name, is_well=all(one.verdict != "wrong" for one in findings), findings=findings
        )
    terminal.answer(diagnosis, _lines(diagnosis))
    return 0 if diagnosis.is_well else 1


def _findings(database: Database) -> Iterator[Finding]:
    with database.connect("doctor") as connection:
        for check in SERVER_CHECKS:
            yield _made(check, connection)
        try:
            shards = schema.demand_installed(connection)
        except DatabaseError as error:
            yield Finding(check="schema", verdict="wrong", says=str(error), next_step="durable-cluster init")
            return
        yield Finding(check="schema", verdict="ok", says=f"this version's, {shards} shards")
        for check in SCHEMA_CHECKS:
            yield _made(check, connection)


def _made(check: Check, connection: psycopg.Connection[Any]) -> Finding:
    """The finding of one check; one that cannot be made does not keep the others from being made."""
    try:
        return check(connection)
    except psycopg.Error as error:
        return unmade(check, error)


def unmade(check: Check, error: psycopg.Error) -> Finding:
    """In place of the finding of a check that could not be made."""
    said = error.diag.message_primary or str(error)
    name = check.__name__.replace("_", " ")
    return Finding(
        check=name, verdict="wrong", says=f"it could not be looked at: {said}", next_step="use the schema's owner"
    )


def _lines(diagnosis: Diagnosis) -> list[str]:
    width = max(len(one.check) for one in diagnosis.findings)
    lines = [diagnosis.database]
    for one in diagnosis.findings:
        lines.append(f"  {one.verdict:5}  {one.check:{width}}  {one.says}")
        if one.next_step:
            lines.append(f"  {'':5}  {'':{width}}  next: {one.next_step}")
    wrong = sum(one.verdict == "wrong" for one in diagnosis.findings)
    return [
        *lines,
        "all is well" if diagnosis.is_well else f"{wrong} of {len(diagnosis.findings)} checks found something wrong",
    ]
