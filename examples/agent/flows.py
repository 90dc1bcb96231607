"""An agent: it thinks, calls tools, sees what they gave, and thinks again, until it answers.

    agent:  begin → think → record ⟲ observe;  stop, when it is cancelled
    tool:   begin → look_up, or act, or ask → approved → act

``think`` calls the model and may run twice, if its process dies: the model gets one key for all attempts and gives one answer. What
it said goes into the transcript in ``record``, in the transaction that also starts the tools: each once. The tools of a turn are
children and run at the same time, wherever there is room; one with an effect passes its key on, one that needs a person waits.

The transcript is a table, not the state: a state is carried from step to step and has at most 256 KiB. Here it is a name and a
number, however long the conversation gets. One turn of the model is handed from ``think`` to ``record`` and must fit; what may be
larger, such as a file, a tool stores elsewhere, and gives the model a reference.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from durable_cluster import App, Context, Continuation, Retry
from durable_cluster.examples.agent import model
from durable_cluster.examples.agent.model import Message, Reply

TURNS_MAX = 6
PATIENCE = "1d"
PREPARE_LOCK = 0x6167_656E_7473  # "agents": one at a time makes the tables
CALLS = Retry(attempts=12, backoff="50ms", max_backoff="10s")
SHELF = {"order 17": "a lamp, 40 EUR, delivered on Monday", "policy": "what arrives broken is refunded"}


class Question(msgspec.Struct, frozen=True):
    """The input of an agent. ``address``: where its model is."""

    conversation: str
    address: str
    text: str


class Turn(msgspec.Struct, frozen=True):
    """The state of an agent. ``number``: of the turn, from 0; ``reply``: what the model has just said."""

    conversation: str
    address: str
    number: int = 0
    reply: Reply | None = None


class Call(msgspec.Struct, frozen=True):
    """The input of a tool, and its state."""

    conversation: str
    address: str
    tool: str
    argument: dict[str, Any]


app = App("agent")
agent = app.machine("agent", state=Turn)
tool = app.machine("tool", state=Call)


@agent.step(start=True, transactional=True)
def begin(ctx: Context, asked: Question) -> Continuation:
    """The transcript begins with the question."""
    say(ctx, asked.conversation, 0, "user", asked.text)
    return ctx.goto(think, Turn(asked.conversation, asked.address))


@agent.step(blocking=True, retry=CALLS, timeout="5m")
def think(ctx: Context, turn: Turn) -> Continuation:
    """Ask the model. Onlookers are told of the turn; the next attempt, of how many parts had come."""
    ctx.set_progress({"turn": turn.number})
    with psycopg.connect(app.client.dsn) as connection:
        so_far = transcript(connection, turn.conversation)
    reply = model.ask(
        turn.address, so_far, key=ctx.idempotency_key, on_part=lambda parts: ctx.heartbeat({"parts": parts})
    )
    return ctx.goto(record, msgspec.structs.replace(turn, reply=reply))


@agent.step(transactional=True)
def record(ctx: Context, turn: Turn) -> Continuation:
    """What the model said, and the tools it wants, in one transaction."""
    assert turn.reply is not None
    say(ctx, turn.conversation, 2 * turn.number + 1, "model", turn.reply)
    if turn.reply.answer is not None:
        return ctx.done(turn.reply.answer)
    if turn.number + 1 == TURNS_MAX:
        return ctx.fail(f"no answer within {TURNS_MAX} turns")
    calls = [Call(turn.conversation, turn.address, wanted.tool, wanted.argument) for wanted in turn.reply.calls]
    return ctx.gather(
        [tool.child(call) for call in calls], then=observe, state=msgspec.structs.replace(turn, reply=None)
    )


@agent.step(transactional=True)
def observe(ctx: Context, turn: Turn) -> Continuation:
    """What the tools gave, in the order in which they were asked for; one that failed says why."""
    found = [child.output if child.is_completed else {"error": child.reason} for child in ctx.results]
    say(ctx, turn.conversation, 2 * turn.number + 2, "tools", found)
    return ctx.goto(think, msgspec.structs.replace(turn, number=turn.number + 1))


@agent.step(on_cancel=True, transactional=True)
def stop(ctx: Context, turn: Turn) -> Continuation:
    """In place of the next step of a cancelled agent; its tools are cancelled too. Nobody is asked any more."""
    ctx.tx.execute("delete from agent.approval where conversation = %s", (turn.conversation,))
    row = ctx.tx.execute(
        "select count(*)::int from agent.message where conversation = %s", (turn.conversation,)
    ).fetchone()
    say(ctx, turn.conversation, row[0] if row else 0, "system", f"cancelled: {ctx.cancelled}")
    return ctx.done()


@tool.step(start=True)
def choose(ctx: Context, call: Call) -> Continuation:
    """Each tool begins with a step of its own; of one that is not there the model is told."""
    first = {"look_up": look_up, "mail": act, "refund": ask}.get(call.tool)
    return ctx.done({"error": f"there is no tool {call.tool}"}) if first is None else ctx.goto(first, call)


@tool.step()
def look_up(ctx: Context, call: Call) -> Continuation:
    """A tool that changes nothing may run twice."""
    return ctx.done(SHELF.get(str(call.argument.get("what")), "nothing is known about that"))


@tool.step(transactional=True)
def ask(ctx: Context, call: Call) -> Continuation:
    """Money: a person decides. Who is asked, and the wait for the answer, commit together."""
    ctx.tx.execute(
        "insert into agent.approval (workflow, conversation, token, tool, argument) values (%s, %s, %s, %s, %s)",
        (ctx.workflow_id, call.conversation, ctx.token, call.tool, Jsonb(call.argument)),
    )
    return ctx.wait_for("approved", "rejected", then=approved, state=call, timeout=PATIENCE, require_token=True)


@tool.step(transactional=True)
def approved(ctx: Context, call: Call) -> Continuation:
    """Whether it was; silence is a no."""
    ctx.tx.execute("delete from agent.approval where workflow = %s", (ctx.workflow_id,))
    if ctx.signal is None or ctx.signal.name == "rejected":
        return ctx.done({"refused by": None if ctx.signal is None else ctx.signal.actor})
    return ctx.goto(act, call)


@tool.step(blocking=True, retry=CALLS, timeout="1m")
def act(ctx: Context, call: Call) -> Continuation:
    """An effect outside the database: the same key for all attempts, so it is done once."""
    return ctx.done(model.act(call.address, call.tool, call.argument, key=ctx.idempotency_key))


def say(ctx: Context, conversation: str, number: int, role: str, content: object) -> None:
    """Add a message to the transcript, in the transaction of the step."""
    ctx.tx.execute(
        "insert into agent.message (conversation, number, role, content) values (%s, %s, %s, %s)",
        (conversation, number, role, Jsonb(msgspec.to_builtins(content))),
    )


def transcript(connection: psycopg.Connection[Any], conversation: str) -> list[Message]:
    """What was said so far."""
    rows = connection.execute(
        "select role, content from agent.message where conversation = %s order by number", (conversation,)
    )
    return [Message(*row) for row in rows]


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the tables, in one transaction; what is there stays as it is."""
    with connection.transaction():
        connection.execute("select pg_advisory_xact_lock(%s)", (PREPARE_LOCK,))
        connection.execute("select set_config('client_min_messages', 'warning', true)")
        connection.execute((files("durable_cluster.examples.agent") / "tables.sql").read_bytes())
