"""Linear workflows: an ordinary function, run as a state machine whose steps are the steps that it awaits.

A step event carries the function's input and what its awaits came to (see ``memo``). Whoever runs the event runs the step, lets the
function go on with the result (resumed, where this process still has it, else entered anew and fed with all that is recorded), and
hands on whatever it waits for then: the next step, a sleep, signals, children, or its end.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from durable_cluster import bridge, memo, waits
from durable_cluster.ahead import Ahead, FirstAttemptFailed, ahead_of
from durable_cluster.chunks import Chunks
from durable_cluster.commands import Call, Command
from durable_cluster.concurrent import run_several
from durable_cluster.context import Context
from durable_cluster.continuation import Continuation, Done, Fail, Goto, Spawn, Stuck
from durable_cluster.decoding import decoder_of
from durable_cluster.envelope import Envelope, encode
from durable_cluster.errors import AppError, HandlerError, InputError, NonDeterminismError, TerminalError
from durable_cluster.execution import ContinueAsNew, Execution
from durable_cluster.failures import failure_of
from durable_cluster.functions import Steps
from durable_cluster.joins import CHILDREN_MAX
from durable_cluster.keeping import kept_of, kept_with_failure
from durable_cluster.machine import Step
from durable_cluster.memo import Asked, Carried, carried_decoder
from durable_cluster.notes import Notes, noted_too
from durable_cluster.recorded import INLINE_BYTES_MAX, Recorded
from durable_cluster.retry import Retry
from durable_cluster.typed import In, R, TypedMachine
from durable_cluster.types import Signature, input_of

if TYPE_CHECKING:
    from durable_cluster.app import App
    from durable_cluster.executor import Task

START, RESUME, SEVERAL, CANCELLED = "workflow.start", "workflow.resume", "workflow.gather", "workflow.cancelled"
UNUSED_S = 30.0
SEVERAL_TIMEOUT_S = 10 * 365 * 86_400.0


class Workflow(TypedMachine[In, R]):
    """Made by ``@app.workflow``: started, looked up, scheduled and spawned as any machine is."""

    is_linear = True
    state_bytes_more = 2 * INLINE_BYTES_MAX

    def __init__(self, app: App, function: Callable[..., Any], *, name: str | None, **kind: Any) -> None:
        super().__init__(app, name or function.__name__, state=Any, **kind)
        self.function = function
        self.is_sync = not inspect.iscoroutinefunction(function)
        self.takes_input, input_type, returns = input_of(function)
        self.returned = decoder_of(returns, f"workflow '{self.name}': the type it returns")
        inputs = decoder_of(input_type, f"workflow '{self.name}': the type of its input")
        self.steps = Steps(self)
        self.first = self._own(START, self._start, decoder=inputs, is_limited=self.limit is not None)
        self._own(RESUME, self._resume, is_limited=self.limit is not None)
        self._own(SEVERAL, self._run_several, is_async=True, timeout_s=SEVERAL_TIMEOUT_S)
        self.on_cancel = self._own(CANCELLED, self._clean_up)
        self._known: dict[str, Execution] = {}
        self._lock = threading.Lock()
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<workflow '{self.name}'>"

    def step_name(self, step: str | Callable[..., Any]) -> str:
        """The name of one of its steps. Raises AppError for any other."""
        name = step if isinstance(step, str) else getattr(step, "name", "")
        if name in self.steps:
            return name
        raise AppError(
            f"workflow '{self.name}' has no step '{name}'; its app's are {', '.join(self.app.steps) or 'none yet'}"
        )

    def counted(self, step: Step, state: Any) -> Any:
        """A fork begins with all that it carries; the workflow's limit counts it by its input."""
        is_fork = isinstance(state, Carried) and step.limit is None
        return self.app.upcasts.decoded(self._first().decoder, state.input) if is_fork else state

    def asked(self, execution: Execution, command: Command) -> Any:
        """What a line of the function gets for asking: a coroutine, or in a plain ``def`` what it came to."""
        coroutine = _awaited(execution, command)
        return bridge.wait(coroutine) if self.is_sync else coroutine

    # Its own steps.

    def _start(self, ctx: Context, value: Any) -> Continuation:
        recorded = self._recorded(ctx, Carried(ctx.envelope.state))
        execution = self._entered(recorded, value, is_first=True, ahead=self._ahead(ctx))
        return self.handed_on(ctx, execution)

    def _resume(self, ctx: Context, carried: Carried) -> Continuation:
        execution = self.execution(ctx, carried)
        execution.demand_right()
        execution.ahead = self._ahead(ctx)
        waits.answer(ctx, execution, carried.asked)
        return self.handed_on(ctx, execution)

    async def _run_several(self, ctx: Context, carried: Carried) -> Continuation:
        execution = self.execution(ctx, carried)
        execution.demand_right()
        try:
            return await run_several(ctx, execution)
        finally:
            _take_rows(ctx, execution)

    def _clean_up(self, ctx: Context, carried: Carried) -> Continuation:
        execution = self.execution(ctx, carried)
        execution.demand_right()
        execution.cancel(ctx.cancelled or "cancelled")
        return self.handed_on(ctx, execution)

    # What its steps do with the function.

    def went_on(self, ctx: Context, carried: Carried, key: str, answer: tuple[bytes, Any]) -> Continuation:
        """The function goes on with what its step came to. Where its code does not fit any more, that is kept for when it does."""
        encoded, decoded = answer
        execution = self.execution(ctx, carried)
        entry = memo.completed(key, encoded)
        try:
            execution.demand_waiting(key)
        except NonDeterminismError as wrong:
            return Stuck(Goto(RESUME, memo.with_entries(carried, [entry])), wrong)
        execution.ahead = self._ahead(ctx)
        execution.answer(key, entry, decoded)
        return self.handed_on(ctx, execution)

    def after_failure(self, task: Task, error: BaseException, ctx: Context) -> Continuation | None:
        """The function is told that its step failed for good; None if it does not catch that: the step is a dead letter."""
        if task.step.name in OWN:
            return None
        carried = task.step.decoder.decode(ctx.read().state)
        execution = self.execution(ctx, carried)
        if carried.asked is None:
            return None
        try:
            execution.demand_waiting(carried.asked.key)
        except NonDeterminismError:
            return None
        execution.fail(carried.asked.key, failure_of(error))
        if execution.is_last_failure_uncaught:
            execution.close()
            return None
        return self.handed_on(ctx, execution)

    def cleanup_state(self, envelope: Envelope) -> msgspec.Raw:
        """The first step's state is the bare input; all others' carry it. What has ended of several at once is on record too."""
        if envelope.step == START:
            return msgspec.Raw(encode(Carried(envelope.state)))
        ended = Context(self, envelope).progress if envelope.step == SEVERAL else None
        if isinstance(ended, list):
            with suppress(msgspec.DecodeError):  # somebody may have put the line into the log by hand
                carried = carried_decoder.decode(envelope.state)
                return msgspec.Raw(encode(memo.with_entries(carried, map(encode, ended))))
        return envelope.state

    def memo_of(self, envelope: Envelope, error: BaseException) -> bytes:
        """With the failure that ends it."""
        return kept_with_failure(self, envelope, error)

    def demand_fitting(self, step: Step, state: bytes) -> None:
        """Whether an edited state carries an input that fits the function, and arguments that fit the step. Raises InputError."""
        if step.name == START:
            return
        carried = carried_decoder.decode(state)
        if carried.chain is None or bytes(carried.input):
            self._payload(self._first(), carried.input)
        if carried.asked is not None and step.name not in OWN:
            try:
                self.app.steps[step.name].bound(carried.asked.args)
            except HandlerError as error:
                raise InputError(str(error)) from error

    def execution(self, ctx: Context, carried: Carried) -> Execution:
        """The function where this step event finds it: taken out of what is known here, or entered anew."""
        with self._lock:
            known = self._known.pop(ctx.workflow_id, None)
        if known is not None:
            if known.expects == bytes(ctx.envelope.state) and (
                not known.is_sync or known.thread_id == threading.get_ident()
            ):
                known.expects = b""  # until it has handed something on
                return known
            known.close()
        recorded = self._recorded(ctx, carried)
        try:
            value = self.app.upcasts.decoded(self._first().decoder, msgspec.Raw(recorded.input))
        except msgspec.DecodeError as error:
            raise HandlerError(f"the input does not fit workflow '{self.name}' any more: {error}") from error
        return self._entered(recorded, value, is_first=_begins_again(ctx, carried))

    def handed_on(self, ctx: Context, execution: Execution) -> Continuation:
        """What the function waits for now, or its end."""
        continuation = self._handed_on(ctx, execution)
        if execution.recorded.rows:
            _take_rows(ctx, execution)
        return continuation

    def _handed_on(self, ctx: Context, execution: Execution) -> Continuation:
        ahead, execution.ahead = execution.ahead, None
        failed = None if ahead is None else ahead.run_on(execution)
        if failed is not None:
            execution.close()
            return failed
        if execution.notes is not None:
            ctx.notes, execution.notes = noted_too(ctx.notes, execution.notes), None
        if execution.overrun is not None:
            return self._stuck(execution, execution.overrun)
        if execution.is_done:
            return self._ended(ctx, execution)
        waiting = self._waiting(ctx, execution)
        self._keep(ctx.workflow_id, execution)
        return waiting

    def _waiting(self, ctx: Context, execution: Execution) -> Continuation:
        pending = execution.waits
        if len(pending) == 1 and not execution.children and type(pending[0].command) is Call:
            return self._calling(execution, pending, is_alone=True)  # as most do
        children = tuple(execution.children[:CHILDREN_MAX])
        del execution.children[:CHILDREN_MAX]
        execution.spawned += len(children)
        if execution.children:
            return Spawn(children, self._goto(execution, RESUME), keeps_group=True)
        calls = [one for one in pending if type(one.command) is Call]
        if not calls:
            return waits.continuation(ctx, execution, children, lambda asked: self._goto(execution, RESUME, asked))
        goto = self._calling(execution, calls, is_alone=len(pending) == 1)
        return Spawn(children, goto, keeps_group=True) if children else goto

    def _calling(self, execution: Execution, calls: list[Any], *, is_alone: bool) -> Goto:
        """The event of the one step that the function waits for, of the first that needs one of its own, or of all together."""
        own = calls[0] if is_alone and calls[0].command.options.timeout_s is None else None
        own = own or next((one for one in calls if one.command.function.needs_its_own), None)
        if own is None:
            return self._goto(execution, SEVERAL)
        call: Call = own.command
        name = call.function.name
        _ = self.steps[name]
        return Goto(name, msgspec.Raw(execution.encoded(own.key, call.args)), call.options.retry)

    def _goto(self, execution: Execution, step: str, asked: Asked | None = None) -> Goto:
        return Goto(step, msgspec.Raw(execution.encoded("" if asked is None else asked.key)))

    def _ended(self, ctx: Context, execution: Execution) -> Continuation:
        main = execution.main
        if main.cancelled():
            if ctx.cancelled:
                return Done(None, kept_of(execution))
            why = f"workflow '{self.name}' cancelled itself; let it return, or raise TerminalError"
            return self._stuck(execution, HandlerError(why))
        error = main.exception()
        if error is None:
            return self._returned(execution, main.result(), is_kept=self.keeps_memo or bool(ctx.cancelled))
        if isinstance(error, ContinueAsNew):
            return Goto(RESUME, msgspec.Raw(encode(execution.as_new(self._input(error.value)))))
        if isinstance(error, TerminalError) or execution.is_failure_uncaught:
            reason = error.reason if isinstance(error, TerminalError) else f"{type(error).__name__}: {error}"
            return Fail(reason, kept_of(execution))
        return self._stuck(execution, error)

    def _returned(self, execution: Execution, value: Any, *, is_kept: bool) -> Continuation:
        try:
            encoded = encode(value)
            self.returned.decode(encoded)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            wrong = f"workflow '{self.name}' returned what is not {_told(self.returned.type)} as JSON: {error}"
            return self._stuck(execution, HandlerError(wrong))
        return Done(msgspec.Raw(encoded), kept_of(execution) if is_kept else b"")

    def _input(self, value: Any) -> msgspec.Raw:
        return msgspec.Raw(self.opening(value)[1])

    def _stuck(self, execution: Execution, error: BaseException) -> Stuck:
        """Its own lines failed: a dead letter that enters the function anew, when it is mended."""
        stuck = Stuck(self._goto(execution, RESUME), error)
        execution.close()
        return stuck

    def _ahead(self, ctx: Context) -> Ahead | None:
        """Quick steps may run ahead in a page, and not where it has to be found out which step ends its process."""
        run_ahead_ms = self.app.settings.run_ahead_ms
        if not run_ahead_ms or self.app.runs_alone or not self.steps[ctx.step].is_inline:
            return None
        return ahead_of(ctx, time.monotonic() + run_ahead_ms / 1000)

    def _recorded(self, ctx: Context, carried: Carried) -> Recorded:
        return Recorded(carried, Chunks(self.app, self.name, ctx.workflow_id))

    def _entered(self, recorded: Recorded, value: Any, *, is_first: bool, ahead: Ahead | None = None) -> Execution:
        execution = Execution(self, recorded)
        execution.thread_id = threading.get_ident()
        execution.ahead = ahead
        execution.enter(self._main(execution, value), is_first=is_first)
        return execution

    def _main(self, execution: Execution, value: Any) -> Coroutine[Any, Any, Any]:
        args = (value,) if self.takes_input else ()
        return bridge.run(self.function, *args) if self.is_sync else self.function(*args)

    def forget_all(self) -> None:
        """Put away every function that is kept: the next step of each enters it anew."""
        with self._lock:
            known = list(self._known.values())
            self._known.clear()
        for execution in known:
            execution.close()

    def forget_step(self, name: str) -> None:
        """It is asked for anew, and so are functions that may have begun with another."""
        self.steps.pop(name, None)
        self.forget_all()

    def _keep(self, workflow_id: str, execution: Execution) -> None:
        """Keep the function for its next step. Where there is no room, who is there stays, but for who has not been used for long.

        Steps come round by turns: to put away the least recently used would be to put away each just before its turn.
        """
        now, leaving = time.monotonic(), None
        with self._lock:  # steps end in several threads
            if len(self._known) >= self.app.settings.functions_max:
                oldest = next(iter(self._known), None)
                is_unused = oldest is not None and now - self._known[oldest].kept_at > UNUSED_S
                leaving = self._known.pop(oldest) if oldest is not None and is_unused else execution
            if leaving is not execution:
                execution.kept_at = now
                self._known[workflow_id] = execution
        if leaving is not None:
            leaving.close()

    def _own(
        self,
        name: str,
        handler: Callable[..., Any],
        *,
        decoder: msgspec.json.Decoder[Any] = carried_decoder,
        is_async: bool = False,
        is_limited: bool = False,
        timeout_s: float | None = None,
    ) -> Step:
        step = Step(
            name=name,
            handler=handler,
            signature=Signature(takes_context=True, is_async=is_async, state=Carried),
            is_transactional=False,
            is_blocking=False,
            retry=Retry().policy,
            timeout_s=timeout_s or self.app.settings.step_timeout_s,
            limit=None,
            is_limited=is_limited,
            is_recorded=self.history,
            is_reported_soon=name == SEVERAL,
            decoder=decoder,
        )
        self.steps[name] = step
        return step


def _take_rows(ctx: Context, execution: Execution) -> None:
    """What the function's state refers to is written with it."""
    if rows := execution.recorded.taken():
        ctx.notes = noted_too(ctx.notes, Notes(spilled=rows))


OWN = (START, RESUME, SEVERAL, CANCELLED)


def _begins_again(ctx: Context, carried: Carried) -> bool:
    """Whether this is the first event after ``continue_as_new``, of a replay or of a fork: nothing is recorded or answered."""
    answers = carried.asked is not None or ctx.signal is not None or ctx.envelope.has_children
    is_new = carried.run > 0 or carried.is_forked
    is_empty = carried.chain is None and bytes(carried.entries) == b"[]"
    return ctx.step == RESUME and is_new and is_empty and not answers


async def _awaited(execution: Execution, command: Command) -> Any:
    if execution.ahead is not None and type(command) is Call and command.function.is_quick:
        key = execution.key(command.name)
        if execution.ahead.may_run(execution, command):
            with suppress(FirstAttemptFailed):
                return execution.ahead.run(execution, key, command)
        return await execution.begin(command, key)
    return await execution.begin(command)


def _told(type_: Any) -> str:
    return getattr(type_, "__name__", str(type_))
