"""A step of linear workflows: a typed function that stays one; called in a workflow, it is asked for and awaited."""

from __future__ import annotations

import asyncio.events
import inspect
import typing
from collections.abc import Callable, Coroutine
from copy import copy
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import msgspec

from durable_cluster import memo
from durable_cluster.commands import Call, Options
from durable_cluster.context import Asked, Context
from durable_cluster.decoding import decoder_of, sentence
from durable_cluster.durations import Duration
from durable_cluster.envelope import encode_part
from durable_cluster.errors import AppError, HandlerError, InputError
from durable_cluster.limits import Limit, checked_limit
from durable_cluster.loop import WorkflowLoop
from durable_cluster.machine import Step, checked_timeout_s, demand_callable
from durable_cluster.memo import Carried, carried_decoder
from durable_cluster.retry import Retry
from durable_cluster.settings import checked_name
from durable_cluster.types import Signature

if TYPE_CHECKING:
    from durable_cluster.app import App
    from durable_cluster.continuation import Continuation
    from durable_cluster.linear import Workflow

P = ParamSpec("P")
R = TypeVar("R")

RESERVED = "workflow."
"""What the names of a linear workflow's own steps begin with."""
NO_OPTIONS = Options()
BY_NAME = inspect.Parameter.KEYWORD_ONLY
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class StepFunction(Generic[P, R]):
    """Made by ``@app.step``. In a workflow ``await step(…)`` is a checkpoint; anywhere else it is the plain function.

    ``function``: the function itself. ``opts(retry=…, timeout=…)``: the same step with others of these, for one call.
    ``needs_its_own``: it cannot run in one step event with others: its transaction, or its permit, is that of
    one. ``is_quick``: it runs in its page, under the usual timeout, and may be run with the step before it.
    """

    def __init__(
        self,
        app: App,
        function: Callable[..., Any],
        *,
        name: str | None,
        transactional: bool,
        blocking: bool,
        retry: Retry | None,
        timeout: Duration | None,
        limit: Limit | None,
    ) -> None:
        self.app = app
        self.function = function
        self.name = checked_name("step", name or function.__name__)
        if self.name.startswith(RESERVED):
            raise AppError(
                f"step '{self.name}': names that begin with '{RESERVED}' are the workflow's own; name it otherwise"
            )
        self.is_async = inspect.iscoroutinefunction(function)
        demand_callable(self.name, is_async=self.is_async, transactional=transactional, blocking=blocking)
        if retry is not None and not isinstance(retry, Retry):
            raise AppError(f"retry of step '{self.name}': {retry!r} is no Retry(…)")
        self.is_transactional = transactional
        self.is_blocking = blocking
        self.policy = (retry or Retry()).policy
        self.timeout_s = checked_timeout_s(self.name, timeout, default_s=app.settings.step_timeout_s)
        self.limit = checked_limit(limit, of=f"step '{self.name}'")
        self.needs_its_own = transactional or limit is not None
        self.is_quick = not (self.needs_its_own or blocking or self.is_async or timeout is not None)
        self._options = NO_OPTIONS
        self._read_signature(function)
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def _read_signature(self, function: Callable[..., Any]) -> None:
        try:
            hints = typing.get_type_hints(function)
        except NameError as error:
            raise AppError(
                f"step '{self.name}': {error}; define the types of its parameters at module level"
            ) from error
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        self.takes_context = bool(parameters) and hints.get(parameters[0].name) is Context
        if self.takes_context:
            parameters = parameters[1:]
        for parameter in parameters:
            if parameter.kind in VARIABLE:
                raise AppError(f"step '{self.name}' takes *{parameter.name}; a step names each of its parameters")
        self._signature = signature.replace(parameters=parameters)
        self._positional = sum(parameter.kind is not BY_NAME for parameter in parameters)
        self._by_name = [parameter.name for parameter in parameters if parameter.kind is BY_NAME]
        self._names = [parameter.name for parameter in parameters]
        types = tuple(hints.get(parameter.name, Any) for parameter in parameters)
        self._args = decoder_of(tuple[types] if types else tuple[()], f"step '{self.name}': the type of a parameter")  # type: ignore[valid-type]
        returns = hints.get("return", Any)
        self.returned = decoder_of(returns, f"step '{self.name}': the type it returns")

    def __repr__(self) -> str:
        return f"<step '{self.name}'>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """In a workflow: ask for it; awaited, it gives what the step returns. Elsewhere: run the function, here and now."""
        loop = asyncio.events._get_running_loop()
        if type(loop) is not WorkflowLoop:
            return self.function(*args, **kwargs)  # type: ignore[no-any-return]
        call = Call(self, self.encoded_args(args, kwargs), self._options)
        return loop.execution.workflow.asked(loop.execution, call)  # type: ignore[no-any-return]

    def opts(self, *, retry: Retry | None = None, timeout: Duration | None = None) -> StepFunction[P, R]:
        """This step with another retry or timeout, for a call: ``await charge.opts(timeout="60s")(order)``. Raises InputError."""
        if timeout is not None and self.needs_its_own:
            raise InputError(
                f"timeout of step '{self.name}': one that is transactional or limited has that of its declaration"
            )
        timeout_s = None if timeout is None else checked_timeout_s(self.name, timeout, default_s=0)
        other: StepFunction[P, R] = object.__new__(StepFunction)
        other.__dict__.update(self.__dict__)
        other._options = Options(None if retry is None else retry.policy, timeout_s)
        return other

    def step_of(self, workflow: Workflow[Any, Any]) -> Step:
        """The step of a workflow that runs it and goes on."""
        return Step(
            name=self.name,
            handler=self._handler_async(workflow) if self.is_async else self._handler(workflow),
            signature=Signature(takes_context=True, is_async=self.is_async, state=Carried),
            is_transactional=self.is_transactional,
            is_blocking=self.is_blocking,
            retry=self.policy,
            timeout_s=self.timeout_s,
            limit=self._limit_of_args(),
            is_limited=self.limit is not None,
            is_recorded=workflow.history,
            decoder=carried_decoder,
        )

    def _handler(self, workflow: Workflow[Any, Any]) -> Callable[[Context, Carried], Continuation]:
        def run(ctx: Context, carried: Carried) -> Continuation:
            asked = _asked_of(ctx, carried)
            if not self.is_blocking:  # it is in the page's own thread
                workflow.runs_now = self.name, ctx.attempt
            try:
                with ctx.attempt_of(self.name, ctx.attempt):
                    answer = self.answer_of(self.run(ctx, asked.args))
            finally:
                if not self.is_blocking:
                    workflow.runs_now = None
            return workflow.went_on(ctx, carried, asked.key, answer)

        return run

    def _handler_async(
        self, workflow: Workflow[Any, Any]
    ) -> Callable[[Context, Carried], Coroutine[Any, Any, Continuation]]:
        async def run(ctx: Context, carried: Carried) -> Continuation:
            asked = _asked_of(ctx, carried)
            with ctx.attempt_of(self.name, ctx.attempt):
                answer = self.answer_of(await self.run(ctx, asked.args))
            return workflow.went_on(ctx, carried, asked.key, answer)

        return run

    def _limit_of_args(self) -> Limit | None:
        """Its limit, whose key is a function of the step's arguments."""
        if self.limit is None or self.limit.key is None:
            return self.limit
        key, limit = self.limit.key, copy(self.limit)

        def key_of(carried: Carried) -> object:
            args, kwargs = self.bound(carried.asked.args) if carried.asked else ((), {})
            return key(*args, **kwargs)

        limit.key = key_of
        return limit

    def run(self, ctx: Context, args: msgspec.Raw) -> Any:
        """Call the function with recorded arguments."""
        values, named = self.bound(args)
        return self.function(ctx, *values, **named) if self.takes_context else self.function(*values, **named)

    def encoded_args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The arguments of a call as a JSON array, one for each parameter. Raises TypeError as the call would, InputError."""
        if kwargs or len(args) != len(self._names):
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = (*bound.args, *(bound.kwargs[name] for name in self._by_name))
        try:
            encoded = encode_part(args)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the arguments of step '{self.name}' are not JSON: {error}") from error
        limit = self.app.settings.payload_bytes_max
        if len(encoded) > limit + len(args) + 1 and self.app.payloads.codec is None:  # each may be as large as a result
            raise InputError(
                f"the arguments of step '{self.name}' have {len(encoded):,} bytes, the limit is {limit:,}; store them, and pass a"
                " reference"
            )
        return encoded

    def bound(self, args: msgspec.Raw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with. Raises HandlerError for recorded arguments that do not fit (any more)."""
        try:
            values = self.app.upcasts.decoded(self._args, args)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            told = (
                sentence(error, bytes(args), names=self._names) if isinstance(error, msgspec.ValidationError) else error
            )
            raise HandlerError(f"the arguments do not fit step '{self.name}': {told}") from error
        if not self._by_name:
            return values, {}
        return values[: self._positional], dict(zip(self._by_name, values[self._positional :], strict=True))

    def answer_of(self, value: Any) -> tuple[bytes, Any]:
        """What the function returned, as JSON, and as the workflow sees it. Raises HandlerError."""
        try:
            encoded = encode_part(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise HandlerError(f"step '{self.name}' returned what is not JSON: {error}") from error
        limit = self.app.settings.payload_bytes_max
        if len(encoded) > limit and self.app.payloads.codec is None:  # else it counts when coded
            raise HandlerError(
                f"step '{self.name}' returned {len(encoded):,} bytes, the limit is {limit:,}; store them, and return a reference"
            )
        try:
            return encoded, self.returned.decode(encoded)
        except msgspec.ValidationError as error:
            raise HandlerError(
                f"step '{self.name}' returned what does not fit its type: {sentence(error, encoded)}"
            ) from error


class Steps(dict[str, Step]):
    """A workflow's own steps, and those of its app, each from when it is first asked for."""

    def __init__(self, workflow: Workflow[Any, Any]) -> None:
        super().__init__()
        self._workflow = workflow

    def __missing__(self, name: str) -> Step:
        function = self._workflow.app.steps[name]
        self[name] = step = function.step_of(self._workflow)
        return step

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._workflow.app.steps


def _asked_of(ctx: Context, carried: Carried) -> memo.Asked:
    asked = carried.asked
    if asked is None:
        raise HandlerError(f"step '{ctx.step}' is not asked for: its state names no await")
    ctx.answers(Asked(carried.run, asked.key, carried.tokens + 1))
    return asked
