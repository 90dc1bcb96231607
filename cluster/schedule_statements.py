"""One Python function for each SQL function about schedules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from durable_cluster.errors import translated
from durable_cluster.statements import Connection, plain_cursor

T = TypeVar("T", bound=msgspec.Struct)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a schedule does: when it is due, and what it starts then. ``payload``: the input, as JSON.

    ``catch_up_max``: of missed due times so many of the newest fire; ``catch_up_s``: and none older than that.
    """

    name: str
    cron: str
    zone: str
    workflow: str
    version: int
    step: str
    payload: str
    overlap: str
    due_as: str | None
    catch_up_max: int
    catch_up_s: float | None


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a schedule.

    ``app``: whose code declares it, or did (``is_in_code``); None: it was made at run time. ``next_due``: None while it is paused,
    or never due again. ``last_id``: truncated, of the workflow that ``last_due`` started; ``running``: how many of its workflows
    live; ``queued``: the due time that waits for their end. ``fired`` and ``skipped`` are counts; from ``missed_from`` to before
    ``missed_until`` nobody ran.
    """

    name: str
    edition: int
    workflow: str
    cron: str
    zone: str
    overlap: str
    catch_up_max: int
    catch_up_s: float | None
    due_as: str | None
    app: str | None
    is_in_code: bool
    paused_at: datetime | None
    pause_reason: str | None
    next_due: datetime | None
    last_due: datetime | None
    last_id: str | None
    running: int
    queued: datetime | None
    fired: int
    skipped: int
    missed_from: datetime | None
    missed_until: datetime | None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What a due time started. ``id``: truncated."""

    due: datetime
    id: str
    status: str
    started_at: datetime
    finished_at: datetime | None


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule whose time has come, and the clock that says so."""

    name: str
    edition: int
    cron: str
    zone: str
    since: datetime
    next_due: datetime
    catch_up_max: int
    catch_up_s: float | None
    now: datetime


def now(connection: Connection) -> datetime:
    """The database's clock."""
    with translated():
        row = plain_cursor(connection).execute("select durable.now()").fetchone()
    assert row is not None
    moment: datetime = row[0]
    return moment


def put(tx: Connection, plan: Plan, *, next_due: datetime | None, app: str | None) -> str:
    """Make a schedule, or for the ``app`` that declares it change it: made, changed or same. Raises InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute(
                "select durable.put_schedule(%s, %s, %s, %s::timestamptz, %s, %s::int, %s, %s, %s, %s, %s::int, %s::float8, %s)",
                (
                    *(plan.name, plan.cron, plan.zone, next_due, plan.workflow, plan.version, plan.step, plan.payload),
                    *(plan.overlap, plan.due_as, plan.catch_up_max, plan.catch_up_s, app),
                ),
            )
            .fetchone()
        )
    return str(row and row[0])


def change(
    tx: Connection,
    name: str,
    *,
    cron: str,
    zone: str,
    next_due: datetime | None,
    payload: str | None,
    overlap: str | None,
    due_as: str | None,
    catch_up: tuple[int, float | None] | None,
) -> str:
    """Change what was made at run time, None being as it is: changed or same. Raises UnknownWorkflow, InputError."""
    count, seconds = (None, None) if catch_up is None else (catch_up[0], catch_up[1] or float("inf"))
    with translated():
        row = (
            plain_cursor(tx)
            .execute(
                "select durable.change_schedule(%s, %s, %s, %s::timestamptz, null, null, null, %s, %s, %s, %s::int, %s::float8)",
                (name, cron, zone, next_due, payload, overlap, due_as, count, seconds),
            )
            .fetchone()
        )
    return str(row and row[0])


def undeclared(connection: Connection, app: str, names: Iterable[str]) -> list[str]:
    """The app's schedules that its code no longer declares; it declares ``names``."""
    with translated():
        rows = plain_cursor(connection).execute("select durable.undeclared(%s, %s::text[])", (app, list(names)))
        return [row[0] for row in rows.fetchall()]


def reroute(connection: Connection, workflow: str, *, version: int, step: str) -> None:
    """From now on schedules of this workflow begin it at this step and version."""
    with translated():
        plain_cursor(connection).execute("select durable.reroute_schedules(%s, %s::int, %s)", (workflow, version, step))


def pause(tx: Connection, name: str, *, reason: str | None) -> bool:
    """Whether it was not paused already. Raises UnknownWorkflow, InputError."""
    return bool(_answer(tx, "select durable.pause_schedule(%s, %s)", name, reason))


def resume(tx: Connection, name: str) -> bool:
    """Whether it was paused. Raises UnknownWorkflow."""
    return bool(_answer(tx, "select durable.resume_schedule(%s)", name))


def delete(tx: Connection, name: str) -> None:
    """Raises UnknownWorkflow."""
    _answer(tx, "select durable.delete_schedule(%s)", name)


def trigger(tx: Connection, name: str, *, overlap: str | None) -> tuple[str, str | None]:
    """A run now: started and the workflow's id, queued or skipped. Raises UnknownWorkflow, InputError."""
    with translated():
        row = (
            plain_cursor(tx)
            .execute("select outcome, durable.hex(id) from durable.trigger_schedule(%s, %s)", (name, overlap))
            .fetchone()
        )
    assert row is not None
    return row[0], row[1]


def backfill(tx: Connection, name: str, *, edition: int, dues: Sequence[datetime]) -> int:
    """Start what these due times have not started yet; how many. Raises UnknownWorkflow, InputError."""
    query = "select durable.backfill_schedule(%s, %s::int, %s::timestamptz[])"
    return int(_answer(tx, query, name, edition, list(dues)))


def schedules(connection: Connection, name: str | None = None) -> list[Schedule]:
    """All, or the one called ``name``, by their names."""
    with translated():
        return _structs(connection, Schedule, "durable.schedules(%s)", name)


def runs_of(connection: Connection, name: str, dues: Sequence[datetime]) -> list[Run]:
    """What these due times started, the newest first; nothing of those that started nothing."""
    with translated():
        return _structs(connection, Run, "durable.runs_of(%s, %s::timestamptz[])", name, list(dues))


def may_see_inputs(connection: Connection) -> bool:
    """Whether this role is shown payloads."""
    return bool(_answer(connection, "select has_function_privilege('durable.schedule_input(text)', 'execute')"))


def payload(connection: Connection, name: str) -> str | None:
    """What a schedule's workflows start with, as JSON."""
    found: str | None = _answer(connection, "select durable.schedule_input(%s)", name)
    return found


def next_schedule(connection: Connection) -> float | None:
    """In how many seconds a schedule has something to do; None: none will. Reads only."""
    found = _answer(connection, "select durable.next_schedule()")
    return None if found is None else float(found)


def due(connection: Connection, *, limit: int, without: Iterable[str]) -> list[Due]:
    """Schedules whose time has come, the longest due first, but those named in ``without``."""
    with translated():
        return _structs(connection, Due, "durable.due_schedules(%s::int, %s::text[])", limit, list(without))


def start_queued(connection: Connection) -> int:
    """Start the runs that waited for others to end; how many."""
    return int(_answer(connection, "select durable.start_queued()"))


def fire(
    connection: Connection,
    of: Due,
    *,
    dues: Sequence[datetime],
    next_due: datetime | None,
    missed: tuple[datetime, datetime] | None,
) -> int | None:
    """Start what is due and move on to ``next_due``; how many were started, None when somebody else did that, or is at it."""
    missed_from, missed_until = missed or (None, None)
    found = _answer(
        connection,
        "select durable.fire_schedule(%s, %s::int, %s::timestamptz, %s::timestamptz[], %s::timestamptz, %s::timestamptz,"
        " %s::timestamptz)",
        *(of.name, of.edition, of.next_due, list(dues), next_due, missed_from, missed_until),
    )
    return None if found is None else int(found)


def _answer(connection: Connection, query: str, *arguments: object) -> Any:
    with translated():
        row = plain_cursor(connection).execute(query.encode(), arguments).fetchone()
    return row and row[0]


def _structs(connection: Connection, kind: type[T], call: str, *arguments: object) -> list[T]:
    fields = kind.__struct_fields__
    rows = plain_cursor(connection).execute(f"select {', '.join(fields)} from {call}".encode(), arguments)
    return [kind(**dict(zip(fields, row, strict=True))) for row in rows]
