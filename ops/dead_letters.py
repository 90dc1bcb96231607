"""``dead-letters``: the steps that cannot go on by themselves; look at them, take them up again, or end their workflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import psycopg

from durable_cluster import schema, side_statements
from durable_cluster.app import App
from durable_cluster.codec import TEXTS, Where, is_coded, state_of
from durable_cluster.context import short_id
from durable_cluster.envelope import encode
from durable_cluster.errors import DurableError, InvalidState, UnknownWorkflow
from durable_cluster.ops import letters
from durable_cluster.ops.coded import CODED, app_of, payload_lines
from durable_cluster.ops.letters import Filter, Letter, WholeLetter
from durable_cluster.ops.run import parsed
from durable_cluster.ops.show import ambiguous, checked_prefix, moment
from durable_cluster.ops.target import Database, Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal, table

PREVIEWED = 5
MESSAGE_CHARS_MAX = 70
WHY = {
    "attempts": "its last attempt failed",
    "given_up": "another attempt would not help",
    "crashes": "processes died while it ran",
    "unroutable": "no running code knows it, or can read it",
}

Connection = psycopg.Connection[Any]


class Action(NamedTuple):
    """What is done to all that match. ``some``: a function that does it to some and says to how many."""

    what: str
    some: Callable[..., int]
    done: str


RETRY = Action("take {} up again", letters.retry_some, "taken up again")
PURGE = Action("end {} for good, as failed", letters.purge_some, "ended as failed")


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``show``. ``state``: only for a role that may see payloads."""

    id: str
    letter: WholeLetter
    is_state_shown: bool
    state: msgspec.Raw | None


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``retry`` and ``purge``: how many workflows go on, or have ended. ``id``: if one was named."""

    done: int
    id: str | None = None


def list_(terminal: Terminal, target: Target, *, which: Filter, limit: int) -> int:
    """Dead letters, newest first."""
    with target.opened() as database, _connected(database) as connection:
        found = letters.listed(connection, which, limit=limit)
        count, _ = letters.total(connection, which)
    terminal.answer(found, _table(found) if found else ["no dead letters"])
    if len(found) < count:
        terminal.note(f"the newest {len(found):,} of {count:,}; see more with --limit")
    return 0


def show(terminal: Terminal, target: Target, *, prefix: str, app_address: str | None) -> int:
    """One, by its workflow's id or the first digits of it; ``app_address``: who reads what is coded."""
    digits = checked_prefix(prefix)
    app = app_of(app_address)
    with target.opened(app=app) as database, _connected(database) as connection:
        workflow_id, letter = known(connection, digits)
        is_shown = letters.may_see_states(connection)
        state = letters.state(connection, workflow_id) if is_shown else None
    if app is not None:
        letter, state = _read(app, workflow_id, letter, state)
    shown = Shown(
        id=short_id(workflow_id),
        letter=letter,
        is_state_shown=is_shown,
        state=None if state is None else msgspec.Raw(state.encode()),
    )
    terminal.answer(shown, _lines(shown))
    return 0


def retry(
    terminal: Terminal, target: Target, *, prefix: str, state: str | None, app_address: str | None, actor: str | None
) -> int:
    """Take one stuck workflow up again, with its state or an edited one; ``app_address``: whose step the state has to fit."""
    digits = checked_prefix(prefix)
    value = None if state is None else parsed(state, option="--state")
    app = app_of(app_address)
    with target.opened(app=app) as database, _connected(database, actor) as connection:
        workflow_id, letter = known(connection, digits)
        if state is None:
            side_statements.retry_dead_letter(connection, workflow_id)
        else:
            payload = edited_state(connection, app, workflow_id, letter, value)
            side_statements.retry_dead_letter(connection, workflow_id, state=payload, seq=letter.seq)
    short = short_id(workflow_id)
    edited = "" if state is None else " with the edited state"
    terminal.answer(Done(done=1, id=short), [f"{short}  {letter.workflow} goes on in step '{letter.step}'{edited}"])
    return 0


def purge(terminal: Terminal, target: Target, *, prefix: str, actor: str | None) -> int:
    """End one stuck workflow as failed."""
    digits = checked_prefix(prefix)
    with target.opened() as database, _connected(database, actor) as connection:
        workflow_id, letter = known(connection, digits)
        letters.purge(connection, workflow_id)
    short = short_id(workflow_id)
    terminal.answer(Done(done=1, id=short), [f"{short}  {letter.workflow} has ended: failed in step '{letter.step}'"])
    return 0


def retry_all(terminal: Terminal, target: Target, *, which: Filter, is_agreed: bool, actor: str | None) -> int:
    """Take all up again that match."""
    return _all(terminal, target, RETRY, which, is_agreed, actor=actor)


def purge_all(terminal: Terminal, target: Target, *, which: Filter, is_agreed: bool, actor: str | None) -> int:
    """End all that match."""
    return _all(terminal, target, PURGE, which, is_agreed, actor=actor)


def checked_choice(
    prefix: str | None, is_all: bool, which: Filter, *, state: str | None = None, app_address: str | None = None
) -> None:
    """One workflow, or all that match, and not a mixture. Raises BadUsage."""
    if prefix is not None and (is_all or not which.is_empty):
        raise BadUsage("an ID names one workflow: leave out --all and the filters, or leave out the ID")
    if prefix is None and not is_all:
        raise BadUsage("say which: an ID, or --all, which --workflow, --step and --reason narrow down")
    if is_all and state is not None:
        raise BadUsage("--state is for one workflow: name it by its ID")
    if app_address is not None and state is None:
        raise BadUsage("--app says whose step an edited state has to fit: give that with --state, or leave --app out")


@contextmanager
def _connected(database: Database, actor: str | None = None) -> Iterator[Connection]:
    with database.connect("dead-letters", actor=actor) as connection:
        schema.demand_installed(connection)
        yield connection


def known(connection: Connection, digits: str) -> tuple[str, WholeLetter]:
    """The whole id that begins with these digits, and its letter. Raises UnknownWorkflow for none, InvalidState for several."""
    found = letters.by_prefix(connection, digits)
    if len(found) > 1:
        raise InvalidState(ambiguous(found, digits, "dead letter"))
    letter = letters.whole(connection, found[0]) if found else None
    if letter is None:
        raise UnknownWorkflow(
            f"no dead letter begins with {short_id(digits)}: it was retried or ended, or there never was one;"
            " see 'durable-cluster dead-letters list'"
        )
    return found[0], letter


def _read(app: App, workflow_id: str, letter: WholeLetter, state: str | None) -> tuple[WholeLetter, str | None]:
    """What its step said and its state, as the app's codec reads them."""
    said = app.payloads.unveiled(letter.details, Where(letter.workflow, "failure", workflow_id))
    if state is not None:
        where = state_of(letter.workflow, workflow_id, letter.seq, letter.attempt)
        state = app.payloads.plain(state.encode(), where).decode()
    return msgspec.structs.replace(letter, details=said), state


def edited_state(connection: Connection, app: App | None, workflow_id: str, letter: WholeLetter, value: Any) -> str:
    """An edited state as the database gets it, if it fits its step, where the app was named."""
    if app is not None:
        app.named(letter.workflow).step_name(letter.step)
        where = state_of(letter.workflow, workflow_id, letter.seq, letter.attempt)
        return app.encoded_state(letter.workflow, letter.step, value, where)
    state = letters.state(connection, workflow_id) if letters.may_see_states(connection) else None
    if TEXTS in letter.details or (state is not None and is_coded(msgspec.Raw(state.encode()))):
        raise BadUsage(
            "its payloads are coded: name the App whose codec codes the edited state too, with --app module:app"
        )
    return encode(value).decode()


def _all(
    terminal: Terminal, target: Target, action: Action, which: Filter, is_agreed: bool, *, actor: str | None
) -> int:
    """Show what it would be, ask, and do it, some at a time. What comes meanwhile is not meant."""
    with target.opened() as database, _connected(database, actor) as connection:
        count, newest = letters.total(connection, which)
        if newest is None:
            terminal.answer(Done(done=0), ["no dead letters"])
            return 0
        if not is_agreed:
            _ask(terminal, action, count, letters.listed(connection, which, limit=PREVIEWED)[:PREVIEWED])
        done = 0
        with terminal.progress(action.done, count) as progress:
            while some := action.some(connection, which, newest=newest):
                done += some
                progress.advance(some)
    terminal.answer(Done(done=done), [f"{_counted(done, 'workflow')} {action.done}"])
    return 0


def _ask(terminal: Terminal, action: Action, count: int, first: list[Letter]) -> None:
    head = f"{_counted(count, 'dead letter')}, the newest first:"
    terminal.note("\n".join([head, *_table(first), *(["…"] if count > len(first) else [])]))
    what = action.what.format(_counted(count, "workflow"))
    if not terminal.is_interactive():
        raise BadUsage(f"this would {what}: say --yes if that is meant")
    if not terminal.asks(f"{what}?"):
        raise DurableError("nothing was changed")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _table(found: list[Letter]) -> list[str]:
    rows = [
        (one.id, one.workflow, one.step, one.seq, one.attempt, one.reason, moment(one.at), _short(one.message))
        for one in found
    ]
    return table(("id", "workflow", "step", "seq", "attempt", "reason", "since", "message"), rows)


def _short(message: str | None) -> str:
    line = next(iter((message or "").splitlines()), "")
    return line if len(line) <= MESSAGE_CHARS_MAX else f"{line[: MESSAGE_CHARS_MAX - 1]}…"


def _lines(shown: Shown) -> list[str]:
    letter = shown.letter
    lines = [
        f"{shown.id}  {letter.workflow}  stuck in step {letter.seq} '{letter.step}'",
        f"  since     {moment(letter.at)}, attempt {letter.attempt}",
        f"  because   {WHY.get(letter.reason, '')} ({letter.reason})",
        f"  message   {letter.details.get('reason', 'unknown')}",
        *(f"    {line}" for line in str(letter.details.get("traceback", "")).splitlines()),
    ]
    if TEXTS in letter.details:
        lines.append(f"  text      {CODED}")
    if shown.state is not None:
        lines += payload_lines("state", shown.state)
    elif shown.is_state_shown:
        lines.append("  state     cannot be read as JSON")
    else:
        lines.append("  state     is not shown to this role")
    return [*lines, f"  next      {PROGRAM} dead-letters retry {shown.id}, or purge to end it"]
