"""``replay``, ``fork`` and ``history``: start workflows over, start new ones from a point of them, and see what that can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec
import psycopg

from durable_cluster import replay_statements, schema, search, statements
from durable_cluster.context import short_id
from durable_cluster.envelope import encode
from durable_cluster.errors import DurableError
from durable_cluster.loading import load_app
from durable_cluster.ops.run import parsed
from durable_cluster.ops.show import checked_prefix, moment, whole_id
from durable_cluster.ops.target import Target
from durable_cluster.ops.terminal import PROGRAM, BadUsage, Terminal, table
from durable_cluster.replay_statements import Again
from durable_cluster.replays import KEPT, Recorded, recorded
from durable_cluster.search import Listed, Which

AT_ONCE = 100  # a transaction: each may be a payload
PREVIEWED = 5
VALUE_CHARS_MAX = 70

Connection = psycopg.Connection[Any]
Row = tuple[object, ...]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Where a fork begins, and with what in place of the original's input, or ``KEPT``. ``app``: whose code that has to fit."""

    at: str | None
    input: Any
    app: str | None


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one workflow. ``id``: of what runs now, whole if it is new; ``of``: what it was made of, truncated."""

    id: str
    is_new: bool
    of: str


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for those that match: how many were done and refused. ``refusal``: why the first of these was."""

    done: int
    refused: int
    refusal: str | None


class Path(msgspec.Struct, frozen=True):
    """A recorded await without its value, for a role that may not see it."""

    number: int
    path: str
    status: str
    bytes: int | None


class Action(NamedTuple):
    """What is done to all that match. ``some``: does it to some of them, from a cursor on."""

    what: str
    done: str
    some: Callable[..., Again]


def replay(terminal: Terminal, target: Target, *, prefix: str, actor: str | None) -> int:
    """Start one workflow over."""
    digits = checked_prefix(prefix)
    with target.opened() as database, database.connect("replay", actor=actor) as connection:
        schema.demand_installed(connection)
        of = whole_id(connection, digits)
        workflow_id, is_new = replay_statements.replay(connection, of, actor=None)
    short = short_id(of)
    if is_new:
        return _new(terminal, workflow_id, of=short, what="replayed")
    terminal.answer(Started(id=short, is_new=False, of=short), [f"{short}  starts over"])
    return 0


def fork(terminal: Terminal, target: Target, *, prefix: str, point: Point, actor: str | None) -> int:
    """Start a new workflow from a point of one."""
    digits = checked_prefix(prefix)
    with target.opened() as database, database.connect("fork", actor=actor) as connection:
        schema.demand_installed(connection)
        of = whole_id(connection, digits)
        state = None if point.app is None else statements.state_of(connection, of)
        payload = _payload(point, "" if state is None else state.workflow)
        workflow_id = replay_statements.fork(connection, of, at=point.at, input=payload, actor=None)
    return _new(terminal, workflow_id, of=short_id(of), what="forked")


def replay_all(terminal: Terminal, target: Target, *, which: Which, is_agreed: bool, actor: str | None) -> int:
    """Start all over that match."""
    action = Action("start {} over", "started over", replay_statements.replay_some)
    return _all(terminal, target, action, which, is_agreed=is_agreed, actor=actor)


def fork_all(
    terminal: Terminal, target: Target, *, which: Which, point: Point, is_agreed: bool, actor: str | None
) -> int:
    """Start a new workflow from a point of each that matches."""
    payload = _payload(point, which.workflow or "")

    def some(connection: Connection, matching: Which, **how: Any) -> Again:
        return replay_statements.fork_some(connection, matching, at=point.at, input=payload, **how)

    at = "their beginning" if point.at is None else f"'{point.at}'"
    action = Action(f"fork {{}} at {at}", "forked", some)
    return _all(terminal, target, action, which, is_agreed=is_agreed, actor=actor)


def history(terminal: Terminal, target: Target, *, prefix: str, limit: int) -> int:
    """What one has recorded: the values only for a role that may see payloads."""
    digits = checked_prefix(prefix)
    with target.opened() as database, database.connect("history") as connection:
        schema.demand_installed(connection)
        workflow_id = whole_id(connection, digits)
        are_shown = replay_statements.may_see_values(connection)
        answer, rows = (_values if are_shown else _sizes)(connection, workflow_id, limit)
    head = ("path", "status", "value" if are_shown else "bytes")
    terminal.answer(answer, table(head, rows) if rows else ["no await is recorded"])
    if answer and answer[0].number > 1:
        terminal.note(f"the newest {len(answer):,}; see more with --limit")
    return 0


def _values(connection: Connection, workflow_id: str, limit: int) -> tuple[Sequence[Recorded | Path], list[Row]]:
    found = [recorded(*row) for row in replay_statements.history(connection, workflow_id, limit=limit)]
    return found, [(one.path, one.status, _short(one)) for one in found]


def _sizes(connection: Connection, workflow_id: str, limit: int) -> tuple[Sequence[Recorded | Path], list[Row]]:
    found = [Path(*row) for row in replay_statements.paths(connection, workflow_id, limit=limit)]
    return found, [(one.path, one.status, one.bytes) for one in found]


def point_of(at: str | None, text: str | None, app: str | None) -> Point:
    """What the command line says of a fork. Raises BadUsage."""
    if app is not None and text is None:
        raise BadUsage("--app says whose code an input has to fit: give that with --input, or leave --app out")
    return Point(at=at, input=KEPT if text is None else parsed(text), app=app)


def checked_choice(prefix: str | None, is_all: bool, which: Which, *, needed: Sequence[str]) -> None:
    """One workflow, or all that match, and not a mixture. ``needed``: the filters that all must have. Raises BadUsage."""
    if prefix is not None and (is_all or which != Which()):
        raise BadUsage("an ID names one workflow: leave out --all and the filters, or leave out the ID")
    if prefix is None and not is_all:
        raise BadUsage("say which: an ID, or --all with filters, as 'durable-cluster list' has them")
    missing = [f"--{name}" for name in needed if getattr(which, name) is None] if is_all else []
    if missing:
        raise BadUsage(f"--all needs {' and '.join(missing)}: nobody wants that for whatever there is")


def _payload(point: Point, workflow: str) -> str | None:
    """The input as JSON; as one that fits, where the app was named."""
    if point.input is KEPT:
        return None
    if point.app is None:
        return encode(point.input).decode()
    return load_app(point.app).encoded_fork(workflow, point.at, point.input)


def _new(terminal: Terminal, workflow_id: str, *, of: str, what: str) -> int:
    """A new workflow: its id is the answer, whole, as that of a start."""
    terminal.answer(Started(id=workflow_id, is_new=True, of=of), [workflow_id])
    terminal.note(f"{what} from {of}; see '{PROGRAM} show {short_id(workflow_id)}'")
    return 0


def _all(
    terminal: Terminal, target: Target, action: Action, which: Which, *, is_agreed: bool, actor: str | None
) -> int:
    """Show what it would be, ask, and do it, some at a time. What comes meanwhile is not meant."""
    with target.opened() as database, database.connect(action.done, actor=actor) as connection:
        schema.demand_installed(connection)
        count, newest = search.total(connection, which)
        if newest is None:
            terminal.answer(Done(done=0, refused=0, refusal=None), ["no such workflows"])
            return 0
        if not is_agreed:
            _ask(terminal, action, count, search.listed(connection, which, limit=PREVIEWED)[:PREVIEWED])
        told = _each(terminal, action, connection, which, count, before=newest + timedelta(microseconds=1))
    lines = [f"{_counted(told.done)} {action.done}"]
    if told.refused:
        lines.append(f"{_counted(told.refused)} left as they are; the first: {told.refusal}")
    terminal.answer(told, lines)
    return 0 if told.done or not told.refused else 1


def _each(
    terminal: Terminal, action: Action, connection: Connection, which: Which, count: int, *, before: datetime
) -> Done:
    done, refused, refusal, after = 0, 0, None, None
    with terminal.progress(action.done, count) as progress:
        while True:
            some = action.some(connection, which, limit=AT_ONCE, after=after, before=before, actor=None)
            if some.after is None:
                return Done(done=done, refused=refused, refusal=refusal)
            done, refused, after = done + some.done, refused + some.refused, some.after
            refusal = refusal or some.refusal
            progress.advance(some.done + some.refused)


def _ask(terminal: Terminal, action: Action, count: int, first: list[Listed]) -> None:
    rows = [(one.id, one.workflow, one.status, moment(one.started_at), one.key) for one in first]
    head = f"{_counted(count)}, the newest first:"
    lines = table(("id", "workflow", "status", "started", "key"), rows)
    terminal.note("\n".join([head, *lines, *(["…"] if count > len(first) else [])]))
    what = action.what.format(_counted(count))
    if not terminal.is_interactive():
        raise BadUsage(f"this would {what}: say --yes if that is meant")
    if not terminal.asks(f"{what}?"):
        raise DurableError("nothing was changed")


def _counted(count: int) -> str:
    return f"{count:,} workflow" if count == 1 else f"{count:,} workflows"


def _short(one: Recorded) -> str | None:
    """What it came to, on one line that fits."""
    if one.status == "open":
        return None
    line = one.error if one.error is not None else encode(one.value).decode()
    return line if len(line) <= VALUE_CHARS_MAX else f"{line[: VALUE_CHARS_MAX - 1]}…"
