"""Children: what a step spawns, what its page makes of that, and how the parent reads what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from durable_cluster.envelope import Envelope
from durable_cluster.errors import ChildFailed, InputError

CHILDREN_MAX = 1_024
CHILDREN_BYTES_MAX = 16 * 1_048_576
RESULTS_AT_ONCE = 1_000


class Child(msgspec.Struct, frozen=True, gc=False):
    """A workflow to be started by a step: made by ``machine.child(input)``. ``input``, ``attributes``: JSON; ``""``: none."""

    workflow: str
    version: int
    step: str
    input: str
    delay_s: float
    attributes: str = ""

    def __repr__(self) -> str:
        return f"<Child {self.workflow}>"


class Spawning(msgspec.Struct, frozen=True):
    """A parent that goes on with ``envelope`` at once. ``seq``: the step that spawned ``children``.

    ``keeps_group``: they are of one group with all that it spawned, also before it waited for them.
    """

    envelope: Envelope
    seq: int
    children: Sequence[Child]
    keeps_group: bool = False


class Joining(msgspec.Struct, frozen=True):
    """A parent that spawns ``children`` and waits for its group. ``envelope``: its step then; ``late``: that after ``timeout_s``.

    ``needed``: so many completed are enough (None: all have to end); ``tolerance``: more failed ones than that are enough too.
    ``names``: a signal of one of these resumes it too, if it brings the token with the number ``token_seq``, where there is one.
    """

    envelope: Envelope
    late: Envelope
    seq: int
    children: Sequence[Child]
    timeout_s: float | None
    needed: int | None
    tolerance: int | None
    cancels_rest: bool
    keeps_group: bool = False
    names: tuple[str, ...] = ()
    token_seq: int | None = None


class ChildResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a child. ``number``: its place among those spawned, from 0; ``id``: whole, a capability.

    ``status``: 'running', 'stuck' (it has a dead letter), 'completed', 'failed' or 'cancelled'. ``output``: plain JSON values;
    of one that failed or was cancelled: what says why.
    """

    number: int
    id: str
    workflow: str
    status: str
    output: Any = None

    def __repr__(self) -> str:
        return f"<ChildResult {self.number}: {self.workflow}, {self.status}>"

    @property
    def is_completed(self) -> bool:
        """Whether it has an output."""
        return self.status == "completed"

    @property
    def reason(self) -> str | None:
        """Why it failed or was cancelled; None for others."""
        return str(self.output.get("reason", "unknown")) if self.status in ("failed", "cancelled") else None

    @property
    def value(self) -> Any:
        """The output. Raises ChildFailed if there is none."""
        if self.is_completed:
            return self.output
        said = (
            f"is {self.status}"
            if self.reason is None
            else f"{'has ' if self.status == 'failed' else 'was '}{self.status}"
        )
        raise ChildFailed(f"child {self.number} ('{self.workflow}') {said}{f': {self.reason}' if self.reason else ''}")


class Results:
    """The children of a workflow's last group, by number; read a thousand at a time, however many there are.

    ``fetch(first, limit)``: so many of them from that number on; ``read``: the beginning, if somebody has read it already.
    """

    def __init__(self, fetch: Callable[[int, int], list[ChildResult]], read: list[ChildResult] | None = None) -> None:
        self._fetch = fetch
        self._read = read

    def __repr__(self) -> str:
        return "<Results>"

    def __iter__(self) -> Iterator[ChildResult]:
        part = self._fetch(0, RESULTS_AT_ONCE) if self._read is None else self._read
        while part:
            yield from part
            if len(part) < RESULTS_AT_ONCE:
                return
            part = self._fetch(part[-1].number + 1, RESULTS_AT_ONCE)

    def values(self) -> list[Any]:
        """The outputs of all. Raises ChildFailed for the first that has none."""
        return [child.value for child in self]

    def completed(self) -> list[ChildResult]:
        """Those that have an output."""
        return [child for child in self if child.is_completed]


def checked_children(children: Iterable[Child]) -> tuple[Child, ...]:
    """``children``, if they are as many and as large as a step may spawn. Raises InputError."""
    checked: list[Child] = []
    size = 0
    for child in children:
        if not isinstance(child, Child):
            raise InputError(f"{type(child).__name__} is no child; make one with machine.child(input)")
        checked.append(child)
        size += len(child.input)
        if len(checked) > CHILDREN_MAX:
            raise InputError(
                f"more than {CHILDREN_MAX:,} children in one step; ctx.spawn() a wave of them and go on to the next"
            )
        if size > CHILDREN_BYTES_MAX:
            raise InputError(
                f"the inputs of the children have more than {CHILDREN_BYTES_MAX:,} bytes; spawn them in waves, or pass references"
            )
    return tuple(checked)


def result_of(number: int, child_id: str, workflow: str, status: str, output: str | None) -> ChildResult:
    """A row of ``durable.children``."""
    value = None if output is None else msgspec.json.decode(output)
    return ChildResult(number=number, id=child_id, workflow=workflow, status=status, output=value)
