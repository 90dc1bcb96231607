"""What a linear workflow waits for when it runs no step: which continuation that is, and what ended it.

Of several waits at once (branches, ``select``) the first that ends resumes the workflow; the others go on waiting after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from durable_cluster import memo
from durable_cluster.commands import Alarm, ChildrenWait, SignalWait
from durable_cluster.context import Context
from durable_cluster.continuation import Continuation, Goto, Join, Sleep, Spawn, Stuck, Wait
from durable_cluster.coordination import group_of
from durable_cluster.envelope import encode
from durable_cluster.errors import HandlerError
from durable_cluster.joins import Child, ChildResult
from durable_cluster.memo import Asked

if TYPE_CHECKING:
    from durable_cluster.execution import Execution, Pending

OnGoto = Callable[[Asked | None], Goto]


def answer(ctx: Context, execution: Execution, asked: Asked | None) -> None:
    """Feed the function with what resumed it: a signal, the end of a time (``asked``: whose), or children."""
    signal = ctx.signal
    if signal is not None:
        for pending in execution.waits:
            if type(pending.command) is SignalWait and signal.name in pending.command.names:
                execution.answer(pending.key, memo.completed(pending.key, bytes(ctx.envelope.event)), signal)
                return
        execution.demand_waiting(f" wait_for({signal.name})")
    if ctx.envelope.has_children and answer_children(execution, ctx.results):
        return
    if asked is not None:
        execution.demand_waiting(asked.key)
        execution.answer(asked.key, memo.completed(asked.key, b"null"), None)


def answer_children(execution: Execution, children: Iterable[ChildResult] | None = None) -> bool:
    """Feed it with children that have ended, for the first wait to which they are enough. Whether there was one."""
    for pending in execution.waits:
        command = pending.command
        if type(command) is not ChildrenWait:
            continue
        known = command.read(command.numbers) if children is None else list(children)
        ended = command.ended(known)
        if ended is not None:
            numbers = encode([child.number for child in ended])
            execution.answer(pending.key, memo.completed(pending.key, numbers), ended)
            return True
    return False


def continuation(ctx: Context, execution: Execution, children: tuple[Child, ...], goto: OnGoto) -> Continuation:
    """A sleep, a wait for signals or for children, whichever the function's awaits amount to."""
    pending = execution.waits
    if not pending:
        if children:
            return Spawn(children, goto(None), keeps_group=True)
        nothing = HandlerError(
            f"workflow '{execution.workflow.name}' awaits something that no step, sleep, signal or child will bring;"
            " what it awaits has to be made by this package"
        )
        return Stuck(goto(None), nothing)
    signals = [one.command for one in pending if type(one.command) is SignalWait]
    of_children = [one for one in pending if type(one.command) is ChildrenWait]
    if children and not _is_of_all(execution, of_children):
        return Spawn(children, goto(None), keeps_group=True)
    first, timeout_s = _first_due(execution, pending)
    then = goto(None if first is None else Asked(first.key))
    names = tuple(dict.fromkeys(name for one in signals for name in one.names))
    token = next((one.token for one in signals if one.token is not None), None)
    if of_children:
        join = Join((), then, then, timeout_s, keeps_group=True, names=names, token_seq=token)
        return _joined(ctx, execution, of_children, children, join)
    return Wait(names, then, then, timeout_s, token is not None, token) if signals else Sleep(timeout_s or 0.0, then)


def _is_of_all(execution: Execution, waiting: Sequence[Pending]) -> bool:
    """Whether it waits once, for all children that it ever spawned."""
    return len(waiting) == 1 and len(getattr(waiting[0].command, "numbers", ())) == execution.spawned


def _first_due(execution: Execution, pending: Sequence[Pending]) -> tuple[Pending | None, float | None]:
    """The wait whose time is over first, and in how many seconds that is."""
    timed = [
        (one.command.due, one.command.timeout_s, one) for one in pending if isinstance(one.command, Alarm | SignalWait)
    ]
    due = [(due, timeout_s, one) for due, timeout_s, one in timed if due is not None and timeout_s is not None]
    if not due:
        return None, None
    at, timeout_s, first = min(due, key=lambda one: one[0])
    return first, max(0.0, timeout_s if first.turn == execution.turn else at - execution.now())


def _joined(
    ctx: Context, execution: Execution, waiting: Sequence[Pending], children: tuple[Child, ...], join: Join
) -> Continuation:
    """Until all of its children have ended, or so many; where it waits for some of them, until one more has."""
    if _is_of_all(execution, waiting):
        command = waiting[0].command
        assert isinstance(command, ChildrenWait)
        return structs.replace(join, children=children, needed=command.needed or None)
    _, completed, failed = group_of(execution.workflow.app.client.connection(), ctx.workflow_id) or (0, 0, 0)
    if answer_children(execution):
        return execution.workflow.handed_on(ctx, execution)
    return structs.replace(join, needed=completed + 1, tolerance=failed)
