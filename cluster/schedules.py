"""Schedules: workflows that start by themselves. Declared in code, or made and changed at run time."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

from durable_cluster import schedule_statements as sql
from durable_cluster.client import Handle
from durable_cluster.cron import Cron
from durable_cluster.durations import Duration, seconds
from durable_cluster.envelope import encode
from durable_cluster.errors import AppError, InputError, UnknownWorkflow
from durable_cluster.replays import KEPT
from durable_cluster.schedule_statements import Plan, Schedule
from durable_cluster.settings import checked_name
from durable_cluster.statements import Connection
from durable_cluster.transactions import Transaction

if TYPE_CHECKING:
    from durable_cluster.app import App
    from durable_cluster.machine import Machine

OVERLAPS = ("skip", "queue", "allow")
CATCH_UP_MAX = 1_000
BACKFILL_MAX = 1_000
JUST_BEFORE = timedelta(microseconds=1)


class Triggered(msgspec.Struct, frozen=True):
    """What became of a run that was asked for: started, queued or skipped. ``handle``: of the started workflow."""

    outcome: str
    handle: Handle | None


def planned(
    app: App,
    name: str,
    cron: str,
    workflow: Machine | str,
    value: Any,
    *,
    zone: str,
    overlap: str,
    catch_up: int | str | timedelta,
    due_as: str | None,
) -> Plan:
    """All of a schedule, checked. Raises AppError, InputError and UnknownWorkflow naming what is wrong."""
    machine = _machine(app, workflow)
    Cron(cron, zone)
    catch_up_max, catch_up_s = checked_catch_up(catch_up)
    step, payload = _opening(machine, value, due_as)
    return Plan(
        name=checked_name("schedule", name),
        cron=cron,
        zone=zone,
        workflow=machine.name,
        version=machine.version,
        step=step,
        payload=payload.decode(),
        overlap=checked_overlap(overlap),
        due_as=due_as,
        catch_up_max=catch_up_max,
        catch_up_s=catch_up_s,
    )


def checked_overlap(overlap: str) -> str:
    """``overlap`` if it is a policy. Raises InputError."""
    if overlap not in OVERLAPS:
        raise InputError(f"overlap: {str(overlap)[:40]!r} is no policy; choose {', '.join(OVERLAPS)}")
    return overlap


def checked_catch_up(catch_up: int | Duration) -> tuple[int, float | None]:
    """How many missed due times fire, and how old they may be. Raises InputError."""
    if isinstance(catch_up, int) and not isinstance(catch_up, bool):
        if not 1 <= catch_up <= CATCH_UP_MAX:
            raise InputError(
                f"catch_up: {catch_up} is out of range; give 1 to {CATCH_UP_MAX:,} due times, or a while such as '1h'"
            )
        return catch_up, None
    if not isinstance(catch_up, str | timedelta):
        raise InputError(f"catch_up: {catch_up!r} is neither a number of due times nor a while such as '1h'")
    while_s = seconds(catch_up, what="catch_up")
    if not while_s:
        raise InputError(f"catch_up: {catch_up!r} leaves no time at all; a due time is always a little late")
    return CATCH_UP_MAX, while_s


def declare(app: App, connection: psycopg.Connection[Any]) -> list[str]:
    """Make the database's schedules what the app's code declares, in one transaction; the names of those it no longer declares.

    Those go on firing until somebody deletes them. Schedules made at run time begin their workflows as this code does.
    Raises InputError for a name that belongs to another app, or was made at run time.
    """
    with connection.transaction():
        now = sql.now(connection)
        for plan in sorted(app.declared.values(), key=lambda plan: plan.name):
            sql.put(connection, _coded(app, plan), next_due=Cron(plan.cron, plan.zone).after(now), app=app.name)
        for machine in app.machines.values():
            if machine.first is not None:
                sql.reroute(connection, machine.name, version=machine.version, step=machine.first.name)
        return sql.undeclared(connection, app.name, app.declared)


class Schedules:
    """The schedules of an app's database. Every call that writes joins the transaction of ``tx``, if one is given."""

    def __init__(self, app: App) -> None:
        self._app = app

    def create(
        self,
        name: str,
        cron: str,
        workflow: Machine | str,
        value: Any = None,
        *,
        zone: str = "UTC",
        overlap: str = "skip",
        catch_up: int | str | timedelta = 1,
        due_as: str | None = None,
        tx: Transaction | None = None,
    ) -> None:
        """Make a schedule now; the arguments are those of ``App.schedule``. Raises InputError, also for a name that is taken."""
        plan = planned(
            self._app, name, cron, workflow, value, zone=zone, overlap=overlap, catch_up=catch_up, due_as=due_as
        )
        where = self._where(tx)
        sql.put(where, _coded(self._app, plan), next_due=Cron(cron, zone).after(sql.now(where)), app=None)

    def change(
        self,
        name: str,
        *,
        cron: str | None = None,
        value: Any = KEPT,
        zone: str | None = None,
        overlap: str | None = None,
        catch_up: int | str | timedelta | None = None,
        tx: Transaction | None = None,
    ) -> None:
        """Change a schedule that was made at run time; what is left out stays. Another cron or zone counts from now on.

        Raises UnknownWorkflow for a name that no schedule has, and InputError.
        """
        where = self._where(tx)
        known = self._known(where, name)
        cron, zone = known.cron if cron is None else cron, known.zone if zone is None else zone
        payload = None
        if value is not KEPT:
            machine = self._app.named(known.workflow)
            payload = machine.coded(_opening(machine, value, known.due_as)[1])
        sql.change(
            where,
            name,
            cron=cron,
            zone=zone,
            next_due=Cron(cron, zone).after(sql.now(where)),
            payload=payload,
            overlap=None if overlap is None else checked_overlap(overlap),
            due_as=None,
            catch_up=None if catch_up is None else checked_catch_up(catch_up),
        )

    def delete(self, name: str, *, tx: Transaction | None = None) -> None:
        """What it has started goes on. One that is declared in code comes back with the next start. Raises UnknownWorkflow."""
        sql.delete(self._where(tx), name)

    def pause(self, name: str, reason: str | None = None, *, tx: Transaction | None = None) -> bool:
        """From now on nothing of it starts; whether it was not paused already. Raises UnknownWorkflow, InputError."""
        return sql.pause(self._where(tx), name, reason=reason)

    def resume(self, name: str, *, tx: Transaction | None = None) -> bool:
        """Go on with the next due time; what was due meanwhile is for ``backfill``. Whether it was paused.

        Raises UnknownWorkflow.
        """
        return sql.resume(self._where(tx), name)

    def list(self) -> list[Schedule]:
        """All schedules of the database, by their names."""
        return sql.schedules(self._where(None))

    def get(self, name: str) -> Schedule:
        """What is known of one. Raises UnknownWorkflow."""
        return self._known(self._where(None), name)

    def trigger(self, name: str, *, overlap: str | None = None, tx: Transaction | None = None) -> Triggered:
        """Run it now, also while it is paused, with now as its due time. Raises UnknownWorkflow, InputError.

        ``overlap``: what happens while another of its runs lives, in place of its own policy.
        """
        where = self._where(tx)
        known = self._known(where, name)
        outcome, workflow_id = sql.trigger(where, name, overlap=None if overlap is None else checked_overlap(overlap))
        handle = None if workflow_id is None else Handle(self._app.client, known.workflow, workflow_id)
        return Triggered(outcome, handle)

    def backfill(self, name: str, begin: datetime, end: datetime, *, tx: Transaction | None = None) -> int:
        """Start what was due from ``begin`` to ``end`` and has not been started; how many. All at once, whatever ``overlap`` says.

        Raises UnknownWorkflow; InputError for a period that is not over, and for more than 1,000 due times.
        """
        where = self._where(tx)
        known = self._known(where, name)
        return sql.backfill(where, name, edition=known.edition, dues=_dues(known, begin, end, sql.now(where)))

    def _where(self, tx: Transaction | None) -> Connection:
        return self._app.client.joining(tx)

    def _known(self, connection: Connection, name: str) -> Schedule:
        found = sql.schedules(connection, checked_name("schedule", name))
        if not found:
            raise UnknownWorkflow(f"no schedule '{name}'; see 'durable-cluster schedules list'")
        return found[0]


def _coded(app: App, plan: Plan) -> Plan:
    """With the input as the database gets it."""
    return msgspec.structs.replace(plan, payload=app.named(plan.workflow).coded(plan.payload.encode()))


def _dues(known: Schedule, begin: datetime, end: datetime, now: datetime) -> list[datetime]:
    """The due times of a period that is over."""
    for what, moment in (("begin", begin), ("end", end)):
        if not isinstance(moment, datetime) or moment.utcoffset() is None:
            raise InputError(
                f"{what}: {moment!r} is no time with a time zone; give one such as datetime(2030, 1, 1, tzinfo=UTC)"
            )
    if not begin <= end <= now:
        raise InputError(
            f"the period from {begin.isoformat()} to {end.isoformat()} is not over, or ends before it begins;"
            " a backfill is of what was due"
        )
    dues = Cron(known.cron, known.zone).between(begin - JUST_BEFORE, end)
    some = list(itertools.islice(dues, BACKFILL_MAX + 1))
    if len(some) > BACKFILL_MAX:
        raise InputError(
            f"schedule '{known.name}' has more than {BACKFILL_MAX:,} due times from {begin.isoformat()} on;"
            f" backfill in parts, the first up to {some[-2].isoformat()}"
        )
    return some


def _machine(app: App, workflow: Machine | str) -> Machine:
    if isinstance(workflow, str):
        return app.named(workflow)
    if getattr(workflow, "app", None) is not app:
        raise AppError(f"{workflow!r} is no machine of app '{app.name}'; pass one, or its name")
    return workflow


def _opening(machine: Machine, value: Any, due_as: str | None) -> tuple[str, bytes]:
    """The first step, and the input as JSON: with a due time in it, it has to fit that step."""
    if due_as is None:
        return machine.opening(value)
    given = {} if value is None else value
    if not isinstance(given, dict) or not isinstance(due_as, str) or due_as in given:
        raise InputError(f"due_as={due_as!r}: the value has to be a dict without that field, which gets the due time")
    step, _ = machine.opening({**given, due_as: datetime.now(UTC).replace(microsecond=0)})
    return step, encode(given)
