"""What the REST API takes and gives. Its OpenAPI document is made of these; whatever else comes is refused, with its path."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from durable_cluster.ops.letters import Letter
from durable_cluster.replays import Recorded
from durable_cluster.search import Listed
from durable_cluster.statements import Place

WAIT_S_MAX = 30.0
PAGE_MAX = 1_000
POINT_CHARS_MAX = 16_384
"""Of a point to fork at: a path has the names of all signals that are awaited there."""
TEXT = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"
SCALARS = {"additionalProperties": {"type": ["string", "number", "boolean", "null"]}}

Name = Annotated[str, Meta(pattern="^[a-z0-9_.-]{1,57}$")]
ShortId = Annotated[str, Meta(pattern="^[0-9a-f]{12}$", description="The first 12 hex digits of a workflow's id.")]
WholeId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
Key = Annotated[str, Meta(pattern=TEXT, min_length=1, max_length=255)]
Text = Annotated[str, Meta(pattern=TEXT, min_length=1, max_length=200)]
Attribute = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,57}=" + TEXT[1:], max_length=1_000)]
Attributes = Annotated[
    dict[Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,57}$")], Any],
    Meta(max_length=32, extra_json_schema=SCALARS, description="What it is found by: at most 4,096 bytes in all."),
]
Token = Annotated[str, Meta(pattern=TEXT, max_length=200, description="What the wait demands, if it does.")]
Point = Annotated[str, Meta(pattern=TEXT, max_length=POINT_CHARS_MAX)]
Actor = Annotated[str, Meta(pattern=TEXT, min_length=1, max_length=255, description="On whose behalf, for the audit.")]
Status = Literal["running", "stuck", "completed", "failed", "cancelled"]
Moment = Annotated[datetime, Meta(tz=True)]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every request that changes something may say."""

    actor: Actor | None = None


class Start(Body, frozen=True, kw_only=True):
    """A workflow to be started."""

    workflow: Name
    input: Any = None
    key: Annotated[Key | None, Meta(description="The same key gives the same workflow.")] = None
    attributes: Attributes | None = None


class Signal(Body, frozen=True, kw_only=True):
    """A signal to be sent."""

    name: Name
    payload: Any = None
    key: Annotated[Key | None, Meta(description="Of signals with one key the first counts.")] = None
    token: Token | None = None


class Cancel(Body, frozen=True, kw_only=True):
    """Why a workflow is to end; ``cascade``: its children too."""

    reason: Text = "cancelled"
    cascade: bool = True


class Retry(Body, frozen=True, kw_only=True):
    """How a stuck workflow is taken up again; ``state``: an edited one for its step, in place of what it was."""

    state: Any = msgspec.UNSET


class Replay(Body, frozen=True, kw_only=True):
    """A workflow to be started over."""


class Fork(Body, frozen=True, kw_only=True):
    """Where a new workflow begins: a path of the history, or a machine's step. ``input``: in place of its own."""

    at: Point | None = None
    input: Any = msgspec.UNSET


class Pause(Body, frozen=True, kw_only=True):
    """No step begins any more, or they begin again."""


class Filters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which workflows; all that are given have to be true of them."""

    workflow: Name | None = None
    status: Status | None = None
    attribute: Annotated[list[Attribute], Meta(max_length=32, description="name=value; may be repeated.")] = []
    started_from: Moment | None = None
    started_to: Moment | None = None
    parent: ShortId | None = None
    origin: ShortId | None = None
    key: Key | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_MAX)] = 50
    after: (
        Annotated[str, Meta(pattern="^[0-9a-f]{1,13}-[0-9a-f]{12}$", description="The cursor of a page before.")] | None
    ) = None


class LetterFilters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which dead letters."""

    workflow: Name | None = None
    step: Name | None = None
    reason: Literal["attempts", "given_up", "crashes", "unroutable"] | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_MAX)] = 50
    after: Annotated[Moment | None, Meta(description="The cursor of a page before.")] = None


class Wait(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long to wait for the end."""

    wait_s: Annotated[
        float, Meta(ge=0, le=WAIT_S_MAX, description="Answer when it has ended or is stuck, or so late.")
    ] = 0


class HistoryLimit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of a history, the newest."""

    limit: Annotated[int, Meta(ge=1, le=PAGE_MAX)] = PAGE_MAX


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """What runs now. ``whole_id`` is a capability, given to who started it: keep it out of logs and addresses."""

    id: ShortId
    is_new: bool
    whole_id: WholeId | None


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a workflow. ``places``: where it stands; values only where they may be seen (``has_values``)."""

    id: ShortId
    workflow: str
    version: int
    status: Status
    started_at: datetime
    finished_at: datetime | None
    attributes: dict[str, Any]
    places: list[Place]
    has_values: bool
    progress: Any = None
    output: Any = None
    failure: dict[str, Any] | None = None


class Workflows(msgspec.Struct, frozen=True, kw_only=True):
    """A page of workflows, newest first. ``next``: to be passed as ``after``; null: that was all."""

    workflows: list[Listed]
    next: str | None


class Letters(msgspec.Struct, frozen=True, kw_only=True):
    """A page of dead letters, newest first. ``next``: to be passed as ``after``; null: that was all."""

    dead_letters: list[Letter]
    next: datetime | None


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What a linear workflow has recorded; ``value``: only where it may be seen."""

    awaits: list[Recorded]
    has_values: bool


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """Whether anything has changed: a cancel of what has ended, a second pause, change nothing."""

    has_changed: bool
