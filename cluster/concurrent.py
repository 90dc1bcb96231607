"""Several steps of one linear workflow at once: in one step event, beside the pages; the function goes on as each ends.

What has ended is said as the event's progress: if this process dies, the next one feeds the function with that first.
"""

from __future__ import annotations

import asyncio
import random
import time
from asyncio import timeout
from contextlib import suppress
from typing import Any

import msgspec

from durable_cluster import memo
from durable_cluster.commands import Alarm, Call
from durable_cluster.context import Context
from durable_cluster.continuation import Continuation, Goto, Stuck
from durable_cluster.dead_letters import brief_of
from durable_cluster.envelope import encode
from durable_cluster.errors import NOT_RETRIED, STEP_FAILURES, InputError, TerminalError
from durable_cluster.execution import Execution, Pending
from durable_cluster.failures import failure_of, timed_out
from durable_cluster.notes import noted_too
from durable_cluster.running import RUNNING, Running


class Answered(msgspec.Struct, frozen=True):
    """What a call came to: JSON and as the workflow sees it, or a failure."""

    encoded: bytes = b"null"
    value: Any = None
    error: BaseException | None = None


async def run_several(ctx: Context, execution: Execution) -> Continuation:
    """Run what the function waits for until none of it runs any more, and hand on what it waits for then."""
    several = _Several(ctx, execution)
    try:
        await several.run()
    finally:
        several.drop_all()
    return several.end or execution.workflow.handed_on(ctx, execution)


class _Several:
    def __init__(self, ctx: Context, execution: Execution) -> None:
        self.ctx = ctx
        self.execution = execution
        self.running: dict[str, asyncio.Task[Answered]] = {}
        self.said: list[msgspec.Raw] = []
        self.room = execution.workflow.app.settings.payload_bytes_max - len(b"[]")
        self.end: Continuation | None = None
        self._alarms: dict[str, float] = {}

    async def run(self) -> None:
        self._take_up()
        while self.end is None and not self.execution.is_done:
            self._begin()
            if not self.running:
                return
            await asyncio.wait(
                self.running.values(), timeout=self._until_alarm_s(), return_when=asyncio.FIRST_COMPLETED
            )
            self._answer()

    def drop_all(self) -> None:
        for task in self.running.values():
            task.cancel()

    def _take_up(self) -> None:
        """What an earlier attempt has said it came to."""
        for value in self.ctx.progress or ():
            encoded = encode(value)
            entry = memo.decoded_entry(encoded)
            pending = self.execution.pending.get(entry.key)
            if pending is None:
                continue
            self._say(encoded)
            if entry.failure is not None:
                self.execution.fail(entry.key, entry.failure)
            else:
                self.execution.answer(entry.key, encoded, pending.command.decoded(entry.value))

    def _begin(self) -> None:
        """Begin what it asks for now, and end what it no longer waits for."""
        waits = {one.key: one for one in self.execution.waits}
        loop, now = asyncio.get_running_loop(), self.execution.now()
        for key, pending in waits.items():
            if type(pending.command) is Alarm:
                self._alarms.setdefault(key, loop.time() + pending.command.due - now)
        for key in [key for key in self.running if key not in waits]:
            self.running.pop(key).cancel()
        for key, pending in waits.items():
            command = pending.command
            if type(command) is Call and key not in self.running and not command.function.needs_its_own:
                self.running[key] = asyncio.create_task(self._call(key, command))

    def _answer(self) -> None:
        """Feed the function with what has ended, one at a time: what went well, what failed, then times that are over.

        A failure that nobody catches ends this: whatever else failed at that time is not on record, and is retried with it.
        """
        ended = {key: task.result() for key, task in self.running.items() if task.done()}
        for key in sorted(ended, key=lambda key: ended[key].error is not None):
            del self.running[key]
            answered = ended[key]
            if key not in self.execution.pending:
                continue
            if answered.error is not None:
                self._fail(key, answered.error)
                if self.end is not None:
                    return
            else:
                entry = memo.completed(key, answered.encoded)
                self._say(entry)
                self.execution.answer(key, entry, answered.value)
        for pending in self._over():
            self.execution.answer(pending.key, memo.completed(pending.key, b"null"), None)
        with suppress(InputError):  # a codec may make it larger than there is room for: what was said before stands
            self.ctx.heartbeat(self.said)

    def _fail(self, key: str, error: BaseException) -> None:
        """A step failed for good. If the function does not catch that, a retry begins with this step, and what else did not end."""
        execution, failure = self.execution, failure_of(error)
        before = msgspec.Raw(execution.encoded(""))
        execution.fail(key, failure)
        self._say(memo.failed(key, failure))
        if execution.is_last_failure_uncaught and not isinstance(error, TerminalError):
            self.end = Stuck(Goto(self.ctx.step, before), error)
            execution.close()

    def _say(self, entry: bytes) -> None:
        """Let it be known if this process dies, as far as there is room: what is not known runs again."""
        if len(entry) < self.room:
            self.room -= len(entry) + 1
            self.said.append(msgspec.Raw(entry))

    def _over(self) -> list[Pending]:
        now = asyncio.get_running_loop().time()
        return [one for one in self.execution.waits if self._alarms.get(one.key, now + 1) <= now]

    def _until_alarm_s(self) -> float | None:
        due = [self._alarms[one.key] for one in self.execution.waits if one.key in self._alarms]
        return max(0.0, min(due) - asyncio.get_running_loop().time()) if due else None

    async def _call(self, key: str, call: Call) -> Answered:
        """All attempts of one step."""
        function = call.function
        policy = call.options.retry or function.policy
        timeout_s = call.options.timeout_s or function.timeout_s
        attempt, said = 1, None
        while True:
            began = time.monotonic()
            context = self.execution.context_of(self.ctx, key, function.name, attempt=attempt, progress=said)
            RUNNING.set(Running(self.ctx.envelope, function.name, attempt))
            try:
                with self.ctx.attempt_of(function.name, attempt):
                    encoded, decoded = function.answer_of(await self._run(call, context, timeout_s))
            except STEP_FAILURES as error:
                is_last = attempt >= policy.attempts or not policy.is_retried(error)
                is_last = is_last or isinstance(error, (*NOT_RETRIED, TerminalError))
                self._tell(call, began, attempt, error, "failed" if is_last else "retrying")
                if is_last:
                    return Answered(error=error)
                said = context.said
                pause_s = policy.pause_s(attempt, chance=random.random())
                await asyncio.sleep(self.execution.workflow.app.clock.real_s(pause_s))
                attempt += 1
            else:
                self.ctx.notes = noted_too(self.ctx.notes, context.notes)
                self._tell(call, began, attempt)
                return Answered(encoded, decoded)

    def _tell(
        self, call: Call, began: float, attempt: int, error: BaseException | None = None, outcome: str = "continued"
    ) -> None:
        """An attempt has ended: for the timeline of a workflow that is recorded."""
        if self.ctx.timing is not None:
            said = "" if error is None else brief_of(self.execution.workflow, error)
            self.ctx.timing.lap(call.name, began, attempt=attempt, outcome=outcome, error=said)

    async def _run(self, call: Call, context: Context, timeout_s: float) -> Any:
        """One attempt. Raises StepTimeout for one that takes longer, and what the function raises."""
        function = call.function
        try:
            async with timeout(timeout_s) as limit:
                if function.is_async:
                    return await function.run(context, msgspec.Raw(call.args))
                if function.is_blocking:
                    return await asyncio.to_thread(function.run, context, msgspec.Raw(call.args))
                return function.run(context, msgspec.Raw(call.args))
        except TimeoutError as error:
            if limit.expired():
                raise timed_out(call.name, timeout_s) from error
            raise
