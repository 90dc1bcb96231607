"""A purchase and its approval: who is asked, reminded, and passed over.

    approval:  submit → ask ⟲ late → decided
    reminder:  remind

``ask`` writes the link into the mail and begins the wait in one transaction: a link that was sent can be answered. The link carries
the id and the token of this very wait, so it works once and for this approver alone. Nothing waits in a process: the wait, its
timeout and the reminder are rows, for days if they must.

Who does not answer in time is passed over: ``late`` closes the link and asks the next. A reminder is a workflow of its own that
begins later: it sends the same link again if that is still open, and else does nothing.
"""

from __future__ import annotations

from decimal import Decimal
from hashlib import sha256
from importlib.resources import files
from typing import Any

import msgspec
import psycopg

from durable_cluster import App, Context, Continuation

PREPARE_LOCK = 0x6170_7072_6F76_6573  # "approves": one at a time makes the tables


class Approver(msgspec.Struct, frozen=True):
    """Somebody to be asked, when to remind them, and how long to wait for them. Durations: "3d", "90s"."""

    name: str
    remind_after: str = "1d"
    patience: str = "3d"


class Purchase(msgspec.Struct, frozen=True):
    """The input, and the state of most steps. ``approvers``: asked one after the other; ``asked``: which of them is asked now."""

    ref: str
    asked_by: str
    what: str
    amount: Decimal
    approvers: tuple[Approver, ...]
    asked: int = 0

    @property
    def approver(self) -> Approver:
        return self.approvers[self.asked]


class Answer(msgspec.Struct, frozen=True):
    """What comes with a click."""

    note: str = ""


class Reminder(msgspec.Struct, frozen=True):
    """Whom to remind of what."""

    ref: str
    approver: str


class Decision(msgspec.Struct, frozen=True):
    """The output. ``by``: who decided; nobody, if it expired."""

    ref: str
    status: str
    by: str | None = None
    note: str = ""


app = App("approvals")
approval = app.machine("approval", state=Purchase)
reminder = app.machine("reminder", state=Reminder)


@approval.step(start=True, transactional=True)
def submit(ctx: Context, new: Purchase) -> Continuation:
    """Put it where the page finds it."""
    ctx.tx.execute(
        "insert into approvals.purchase (ref, asked_by, what, amount) values (%s, %s, %s, %s)",
        (new.ref, new.asked_by, new.what, new.amount),
    )
    return ctx.goto(ask, new)


@approval.step(transactional=True)
def ask(ctx: Context, new: Purchase) -> Continuation:
    """The mail, the alarm for its reminder and the wait commit together."""
    name, path = new.approver.name, path_of(ctx.workflow_id, ctx.token)
    ctx.tx.execute(
        "insert into approvals.link (digest, ref, approver) values (%s, %s, %s)", (digest_of(path), new.ref, name)
    )
    ctx.tx.execute(
        "insert into approvals.letter (ref, approver, kind, path) values (%s, %s, 'question', %s)",
        (new.ref, name, path),
    )
    reminder.start(Reminder(new.ref, name), key=f"{new.ref}/{name}", after=new.approver.remind_after, tx=ctx.tx)
    return ctx.wait_for(
        "approved",
        "rejected",
        then=decided,
        state=new,
        timeout=new.approver.patience,
        on_timeout=late,
        require_token=True,
    )


@approval.step(transactional=True)
def late(ctx: Context, new: Purchase) -> Continuation:
    """The link of who did not answer is closed: from now on it is as good as a wrong one. After the last approver it expires."""
    ctx.tx.execute("update approvals.link set is_open = false where ref = %s", (new.ref,))
    if new.asked + 1 < len(new.approvers):
        return ctx.goto(ask, msgspec.structs.replace(new, asked=new.asked + 1))
    return conclude(ctx, Decision(new.ref, "expired"))


@approval.step(transactional=True)
def decided(ctx: Context, new: Purchase) -> Continuation:
    """The signal is the decision: its name says which, its actor who."""
    assert ctx.signal is not None
    note = ctx.signal.payload_as(Answer).note if ctx.signal.payload else ""
    return conclude(ctx, Decision(new.ref, ctx.signal.name, ctx.signal.actor, note))


@reminder.step(start=True, transactional=True)
def remind(ctx: Context, of: Reminder) -> Continuation:
    """The same link once more, if nobody has answered it and it was not passed on."""
    sent = ctx.tx.execute(
        "insert into approvals.letter (ref, approver, kind, path)"
        " select l.ref, l.approver, 'reminder', l.path from approvals.letter l"
        " join approvals.purchase p on p.ref = l.ref and p.status = 'open'"
        " join approvals.link k on k.digest = sha256(convert_to(l.path, 'UTF8')) and k.is_open"
        " where l.ref = %s and l.approver = %s and l.kind = 'question'",
        (of.ref, of.approver),
    ).rowcount
    return ctx.done(sent)


def conclude(ctx: Context, decision: Decision) -> Continuation:
    """The page says it from the moment on at which the workflow has ended."""
    ctx.tx.execute(
        "update approvals.purchase set status = %s, decided_by = %s, decided_at = now(), note = %s where ref = %s",
        (decision.status, decision.by, decision.note, decision.ref),
    )
    return ctx.done(decision)


def path_of(workflow_id: str, token: str) -> str:
    """Where the page of an approval is: whoever has it may answer."""
    return f"/{workflow_id}/{token}"


def digest_of(path: str) -> bytes:
    """What is kept of a link: enough to know it again."""
    return sha256(path.encode()).digest()


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the tables, in one transaction; what is there stays as it is."""
    with connection.transaction():
        connection.execute("select pg_advisory_xact_lock(%s)", (PREPARE_LOCK,))
        connection.execute("select set_config('client_min_messages', 'warning', true)")
        connection.execute((files("durable_cluster.examples.approvals") / "tables.sql").read_bytes())
