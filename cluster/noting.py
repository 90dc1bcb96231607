"""What the steps of a page said beside their results, and what clients set: written in the transaction that hands the page on."""

from __future__ import annotations

import logging
from collections.abc import MutableSequence, Sequence
from typing import Any

from durable_cluster import side_statements
from durable_cluster.context import short_id
from durable_cluster.dead_letters import DeadLetter, dead_letter
from durable_cluster.envelope import Envelope, encode
from durable_cluster.memo import Spilled
from durable_cluster.notes import ATTRIBUTES_BYTES_MAX, ATTRIBUTES_MAX, Noted, Notes, Setting
from durable_cluster.statements import Connection

logger = logging.getLogger("durable_cluster.noting")

NOTES = frozenset((Noted, Setting))


def spilled(slots: MutableSequence[Any]) -> dict[int, Sequence[Spilled]]:
    """What workflows do not carry any more, by index; ``slots`` without it."""
    found: dict[int, Sequence[Spilled]] = {}
    for index, slot in enumerate(slots):
        if type(slot) is Noted and slot.notes.spilled:
            found[index] = slot.notes.spilled
            rest = Notes(slot.notes.attributes, slot.notes.progress)
            slots[index] = slot.result if rest == Notes() else Noted(slot.envelope, slot.result, rest)
    return found


def write(tx: Connection, slots: MutableSequence[Any]) -> dict[int, DeadLetter]:
    """Write the notes among ``slots`` and leave there what goes on without them; by index, steps that ask for too many attributes.

    Locks: attributes, then progress, each in the order of ids, before the stripes.
    """
    notes = [(index, slot) for index, slot in enumerate(slots) if type(slot) in NOTES]
    changes: dict[str, dict[str, Any]] = {}
    progress: dict[str, str] = {}
    for index, note in notes:
        workflow_id = note.envelope.workflow_id
        if note.attributes:
            changes[workflow_id] = {**changes.get(workflow_id, {}), **note.attributes}
        if isinstance(note, Noted) and note.notes.progress is not None:
            progress[workflow_id] = bytes(note.notes.progress).decode()
        slots[index] = note.result if isinstance(note, Noted) else None
    refused: set[str] = set()
    if changes:
        refused = side_statements.merge_attributes(tx, {key: encode(of).decode() for key, of in changes.items()})
    if progress:
        side_statements.publish(tx, progress)
    for _, note in notes:
        if isinstance(note, Setting) and note.envelope.workflow_id in refused:
            logger.warning("attributes that a client set of %s… were dropped: they are too many", _short(note.envelope))
    return {
        index: dead_letter(note.envelope, "given_up", _too_many(note.envelope))
        for index, note in notes
        if isinstance(note, Noted) and note.attributes and note.envelope.workflow_id in refused
    }


def _too_many(envelope: Envelope) -> str:
    return (
        f"step '{envelope.step}' would give its workflow more than {ATTRIBUTES_MAX} attributes, or more than"
        f" {ATTRIBUTES_BYTES_MAX:,} bytes of them; take some away with None"
    )


def _short(envelope: Envelope) -> str:
    return short_id(envelope.workflow_id)
