"""What a page hands on otherwise than through the log: timers, waits, children, permits, detached steps, dead letters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import msgspec
import psycopg

from durable_cluster import coordination, side_statements
from durable_cluster.beside import Run
from durable_cluster.context import short_id
from durable_cluster.dead_letters import DeadLetter
from durable_cluster.envelope import Envelope, encode, encode_line
from durable_cluster.executor import Later, OnTheWay, Parked, Result, Task
from durable_cluster.joins import Joining, Spawning
from durable_cluster.limits import OF_STEP, Pump, Queued
from durable_cluster.notes import Noted
from durable_cluster.signals import Cancel, Delivery, Waiting
from durable_cluster.statements import Outcome
from durable_cluster.timing import Timed

logger = logging.getLogger("durable_cluster.handoff")

Connection = psycopg.Connection[Any]
Kind = TypeVar("Kind")


class Detached(msgspec.Struct, frozen=True):
    """A step that leaves its page: ``run`` goes on here, or without one any process may take it. ``crashes``: see ``Run``."""

    envelope: Envelope
    run: Run | None
    crashes: int = 0


Slot = Result | Task | Detached | Timed | None
"""A line's state: its result (with its time, if it is recorded), its transactional task still to run, or None: no step event."""

NotInTheLog = Later | Parked | Queued | Detached | Waiting | Spawning | Joining | OnTheWay | DeadLetter | Noted
NOT_IN_THE_LOG = frozenset(get_args(NotInTheLog))
OfStripes = Later | Parked | Queued | Waiting | Spawning | Joining | Delivery | Cancel
OF_STRIPES = frozenset(get_args(OfStripes))
OfGroups = Spawning | Joining | Cancel
OF_GROUPS = frozenset(get_args(OfGroups))


def write(tx: Connection, results: list[Slot], *, shard: int, owner: int, giving: Sequence[Envelope]) -> None:
    """Write what does not go on in the log, in the transaction that hands the rest on.

    ``giving``: step events whose permits are given back. Of ``results``, who only spawned becomes the step that it goes on with.
    """
    for index, slot in enumerate(results):
        if isinstance(slot, NotInTheLog) and not slot.envelope.is_of_a_workflow:
            logger.error("a line of the log has no workflow's id; it is passed over")
            results[index] = None
    _lock(tx, results, giving)
    if later := _of(results, Later):
        side_statements.schedule(tx, [slot.envelope for slot in later], [slot.delay_s for slot in later])
    if parked := _of(results, Parked):
        coordination.park(tx, [slot.envelope for slot in parked])
    if detached := _of(results, Detached):
        owners = [0 if slot.run is None else owner for slot in detached]
        envelopes = [slot.envelope for slot in detached]
        crashes = [slot.crashes for slot in detached]
        side_statements.detach(tx, shard=shard, owners=owners, envelopes=envelopes, crashes=crashes)
    if dead := _of(results, DeadLetter):
        _bury(tx, dead)  # before cancels: one of the same page takes it up again
    _write_children(tx, results)
    _write_waits(tx, results)
    _write_permits(tx, results, giving)


def giving(lines: Sequence[Envelope | None], results: Sequence[Slot]) -> list[Envelope]:
    """Of these lines, those whose permits are given back with these results: not while a step runs on, or is put back as it is."""
    return [
        line
        for line, result in zip(lines, results, strict=True)
        if line is not None and line.permit & OF_STEP and not isinstance(result, Detached) and result is not line
    ]


def _of(results: Sequence[Slot], kind: type[Kind]) -> list[Kind]:
    return [slot for slot in results if isinstance(slot, kind)]


def _lock(tx: Connection, results: Sequence[Slot], giving: Sequence[Envelope]) -> None:
    """Sleeps, waits, signals and cancels of one workflow exclude each other, and so do counts of children and of permits.

    Where several statements would lock, all is locked ahead, in one order: stripes, groups, counts of limits.
    """
    kinds = set(map(type, results))
    queued = [slot for slot in results if isinstance(slot, Queued | Pump)]
    ended = [slot.workflow_id for slot in _of(results, Outcome)]
    if len(kinds & OF_STRIPES) > 1 or kinds & OF_GROUPS or queued or giving:
        ids = [slot.envelope.workflow_id for slot in results if isinstance(slot, OfStripes)]
        side_statements.lock_stripes(tx, ids)
    if kinds & OF_GROUPS:
        parents = [slot.envelope.workflow_id for slot in results if isinstance(slot, OfGroups)]
        coordination.lock_groups(tx, parents, ended)
    if queued or giving:
        coordination.lock_ahead(tx, queued, [*(one.workflow_id for one in giving), *ended])


def _write_children(tx: Connection, results: list[Slot]) -> None:
    if spawning := [slot for slot in results if isinstance(slot, Spawning | Joining) and slot.children]:
        coordination.spawn(tx, spawning)
    if joining := _of(results, Joining):
        coordination.await_children(tx, joining)
    for index, slot in enumerate(results):
        if isinstance(slot, Spawning):
            results[index] = slot.envelope


def _write_waits(tx: Connection, results: Sequence[Slot]) -> None:
    if waiting := _of(results, Waiting):
        side_statements.await_signals(tx, waiting)
    if cancels := _of(results, Cancel):
        side_statements.deliver_cancels(tx, cancels)
    deliveries = _of(results, Delivery)
    if deliveries and (dropped := side_statements.deliver(tx, deliveries)):
        logger.warning("%d signals were dropped: their workflows have ended, or their mailboxes are full", dropped)


def _write_permits(tx: Connection, results: Sequence[Slot], giving: Sequence[Envelope]) -> None:
    if giving:
        coordination.give_back(tx, giving)
    if queued := _of(results, Queued):
        coordination.take_permits(tx, queued)
    if pumps := _of(results, Pump):
        coordination.pump(tx, pumps)


def _bury(tx: Connection, dead: Sequence[DeadLetter]) -> None:
    lines, reasons = [encode_line(slot.envelope) for slot in dead], [slot.reason for slot in dead]
    side_statements.bury(tx, lines, reasons, [encode(slot.details).decode() for slot in dead])
    for slot in dead:
        of = slot.envelope
        short = short_id(of.workflow_id)
        logger.warning("step '%s' of '%s' %s… is a dead letter (%s)", of.step, of.workflow, short, slot.reason)
