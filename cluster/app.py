"""An App holds the kinds of workflows of one program, machines and linear ones, and the database they live in."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

import msgspec

from durable_cluster.asynchronous import asynchronous
from durable_cluster.client import Client, Handle
from durable_cluster.clock import Clock
from durable_cluster.codec import Codec, Payloads, Where
from durable_cluster.context import Context
from durable_cluster.durations import Duration
from durable_cluster.errors import AppError, UnknownWorkflow
from durable_cluster.functions import StepFunction
from durable_cluster.interactive import is_interactive
from durable_cluster.limits import Limit
from durable_cluster.linear import Workflow
from durable_cluster.machine import Machine
from durable_cluster.notes import Attributes
from durable_cluster.replay_statements import Declared
from durable_cluster.retry import Retry
from durable_cluster.runner import run_beside, run_here
from durable_cluster.schedule_statements import Plan
from durable_cluster.schedules import Schedules, planned
from durable_cluster.search import Listed, Which, listed
from durable_cluster.settings import Settings, checked_name
from durable_cluster.types import encoded_input
from durable_cluster.upcasts import Upcasts

P = ParamSpec("P")
R = TypeVar("R")
In = TypeVar("In")
Old = TypeVar("Old")
New = TypeVar("New")


class Anything:
    """Nobody's type: a step whose first parameter accepts it takes anything there, and that is not the context."""


class App:
    """The machines of one program, and the database they live in.

    ``dsn``: argument, else ``DURABLE_DSN``, else a local Postgres under ``data`` (``./.durable``), started when it is needed.
    ``codec``: what payloads go through on their way into the database and out of it (see ``codec.Codec``); None: as they are.
    Raises AppError.
    """

    def __init__(
        self,
        name: str,
        *,
        dsn: str | None = None,
        data: Path | str | None = None,
        settings: Settings | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.name = checked_name("app", name)
        self.settings = settings or Settings()
        self.payloads = Payloads(codec, bytes_max=self.settings.payload_bytes_max)
        self.machines: dict[str, Machine] = {}
        self.steps: dict[str, StepFunction[..., Any]] = {}
        self.upcasts = Upcasts()
        self.clock = Clock()
        self.declared: dict[str, Plan] = {}
        self.schedules = Schedules(self)
        self.secret: bytes | None = None
        self.runs_alone = False
        self.client = Client(
            dsn=dsn,
            data=Path(data) if data else None,
            encode_state=self.encoded_state,
            encode_fork=self.encoded_fork,
            payloads=self.payloads,
        )

    def machine(
        self, name: str, *, state: Any = Any, version: int = 1, limit: Limit | None = None, history: bool = False
    ) -> Machine:
        """A new kind of workflow called ``name`` ([a-z0-9_.-], at most 57). ``state``: the type of states that say no type.

        ``limit``: how many of its workflows may live at once, or begin a period; the others wait, in order. ``version``,
        ``history``: see ``workflow``. Raises AppError.
        """
        machine = Machine(self, name, state=state, version=version, limit=limit, history=history)
        self._add(machine)
        return machine

    @overload
    def step(
        self, function: Callable[Concatenate[Anything, P], Coroutine[Any, Any, R]], /
    ) -> StepFunction[Concatenate[Any, P], R]: ...
    @overload
    def step(self, function: Callable[Concatenate[Anything, P], R], /) -> StepFunction[Concatenate[Any, P], R]: ...
    @overload
    def step(self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> StepFunction[P, R]: ...
    @overload
    def step(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> StepFunction[P, R]: ...
    @overload
    def step(self, function: Callable[Concatenate[Context, P], R], /) -> StepFunction[P, R]: ...
    @overload
    def step(self, function: Callable[P, R], /) -> StepFunction[P, R]: ...
    @overload
    def step(
        self,
        *,
        name: str | None = None,
        transactional: bool = False,
        blocking: bool = False,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        limit: Limit | None = None,
    ) -> StepDecorator: ...
    def step(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        transactional: bool = False,
        blocking: bool = False,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        limit: Limit | None = None,
    ) -> Any:
        """Make a function a step that linear workflows await: ``@app.step`` or ``@app.step(retry=Retry(attempts=8))``.

        It takes what it likes, with a type each (JSON: msgspec Structs, dataclasses, pydantic models, TypedDicts, plain values),
        and first, if it asks for one, ``ctx: Context``, which its callers leave out. ``async def`` runs beside the others, for
        minutes if it must; a ``def`` is quick, or ``blocking=True`` (a thread), or ``transactional=True``: inside the transaction
        that hands the workflow on, with ``ctx.tx``. ``retry``, ``timeout``, ``limit``: as for a machine's step. Raises AppError,
        InputError.
        """

        def register(function: Callable[..., Any]) -> StepFunction[..., Any]:
            made: StepFunction[..., Any] = StepFunction(
                self,
                function,
                name=name,
                transactional=transactional,
                blocking=blocking,
                retry=retry,
                timeout=timeout,
                limit=limit,
            )
            if made.name in self.steps and not is_interactive():
                raise AppError(f"app '{self.name}' has a step '{made.name}' already; give one of them another name")
            self.steps[made.name] = made
            for machine in self.machines.values():
                machine.forget_step(made.name)
            return made

        return StepDecorator(register) if function is None else register(function)

    @overload
    def workflow(self, function: Callable[[In], Coroutine[Any, Any, R]], /) -> Workflow[In, R]: ...
    @overload
    def workflow(self, function: Callable[[], Coroutine[Any, Any, R]], /) -> Workflow[None, R]: ...
    @overload
    def workflow(self, function: Callable[[In], R], /) -> Workflow[In, R]: ...
    @overload
    def workflow(
        self,
        *,
        name: str | None = None,
        version: int = 1,
        limit: Limit | None = None,
        keeps_memo: bool = False,
        history: bool = False,
    ) -> WorkflowDecorator: ...
    def workflow(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        version: int = 1,
        limit: Limit | None = None,
        keeps_memo: bool = False,
        history: bool = False,
    ) -> Any:
        """Make a function a workflow: linear code whose awaits of steps, sleeps, signals and children are checkpoints.

        It takes one input, or none. Between its awaits it has to come to the same again: time, chance and I/O belong into steps,
        ``now()``, ``uuid4()``, ``random()`` and ``side_effect()``. ``limit``: how many may live at once, or begin a period.
        ``keeps_memo``: one that completed keeps what it recorded, for ``history()`` and ``fork()``, as the others do in any case.
        ``history``: when each of its steps ran, for how long, and what it came to, is recorded for ``timeline()``.
        ``version``: a whole number; a workflow goes on with the code of its version if there is any (under the same ``name``), else
        with that of the next version, and waits where all code is older. Raises AppError.
        """

        def register(function: Callable[..., Any]) -> Workflow[Any, Any]:
            if not callable(function):
                raise AppError(f"@app.workflow makes a function a workflow; app.named({function!r}) finds one")
            made: Workflow[Any, Any] = Workflow(
                self, function, name=name, version=version, limit=limit, history=history
            )
            made.keeps_memo = keeps_memo
            self._add(made)
            return made

        return WorkflowDecorator(register) if function is None else register(function)

    def upcast(self, old: type[Old], new: type[New]) -> Callable[[Callable[[Old], New]], Callable[[Old], New]]:
        """Make a function the way from ``old``, a type that older code wrote, to ``new``, the class that took its place.

        ``@app.upcast(OrderV1, Order)``. It is asked where a stored value does not fit ``new``, by itself or inside of another one:
        inputs, states, arguments and results of steps, payloads of signals, results. One upcast may lead to the old type of
        another. Raises AppError.
        """

        def register(function: Callable[[Old], New]) -> Callable[[Old], New]:
            self.upcasts.add(old, new, function)
            return function

        return register

    def _add(self, machine: Machine) -> None:
        known = self.machines.get(machine.name)
        self.machines[machine.name] = machine if known is None else machine.beside(known, may_replace=is_interactive())

    def named(self, name: str) -> Machine:
        """The workflow called ``name``, in its newest version. Raises UnknownWorkflow."""
        if name not in self.machines:
            raise UnknownWorkflow(
                f"app '{self.name}' has no workflow '{name}'; it has {', '.join(self.machines) or 'none'}"
            )
        return self.machines[name]

    def declared_types(self, settings: Settings) -> Sequence[Declared]:
        """What the database is told of the workflows that can be started. ``settings``: those that they run under."""
        sample = settings.history_sample
        return [machine.declared(sample) for machine in self.machines.values() if machine.first is not None]

    def schedule(
        self,
        name: str,
        cron: str,
        workflow: Machine | str,
        value: Any = None,
        *,
        zone: str = "UTC",
        overlap: str = "skip",
        catch_up: int | str | timedelta = 1,
        due_as: str | None = None,
    ) -> None:
        """Declare a schedule: at each due time of ``cron`` in ``zone`` the workflow starts with ``value``, once.

        It is made, or changed, when a cluster of this app starts. ``overlap``: while an earlier run lives, the new one is left out
        ("skip"), waits for its end ("queue"; one waits at the most) or starts beside it ("allow"). ``catch_up``: how many due times
        that nobody was there for still fire, the newest, or those of the last while ("1h"). ``due_as``: the field of ``value`` (a
        dict) that gets the due time, as the clocks of ``zone`` show it. Raises AppError, InputError, UnknownWorkflow.
        """
        if name in self.declared and not is_interactive():
            raise AppError(f"app '{self.name}' declares a schedule '{name}' already")
        self.declared[name] = planned(
            self, name, cron, workflow, value, zone=zone, overlap=overlap, catch_up=catch_up, due_as=due_as
        )

    def get(self, workflow_id: str) -> Handle:
        """Re-attach to a workflow by its whole id, from any process. Raises UnknownWorkflow."""
        return self.client.by_id(workflow_id)

    def list(
        self,
        workflow: str | None = None,
        *,
        status: str | None = None,
        attributes: Attributes | None = None,
        started_from: datetime | None = None,
        started_to: datetime | None = None,
        parent: str | None = None,
        key: str | None = None,
        origin: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Sequence[Listed]:
        """Workflows of the database, newest first, ids truncated; ``after``: the ``cursor`` of the last one so far.

        ``attributes``: those that have all of these. ``parent``: an id, whole or its first digits; ``origin``: likewise, of
        what they were replayed or forked from. More than ``limit`` (at most
        10,000) come only where several share their moment and digits. The database role has to be a viewer. Raises InputError.
        """
        which = Which(
            workflow=workflow,
            status=status,
            attributes=attributes,
            started_from=started_from,
            started_to=started_to,
            parent=parent,
            key=key,
            origin=origin,
        )
        return listed(self.client.connection(), which, limit=limit, after=after)

    get_async = asynchronous(get)
    list_async = asynchronous(list)

    def encoded_state(self, workflow: str, step: str, value: Any, where: Where) -> str:
        """``value`` as the database gets it, if it fits the step; one that this app does not know takes any JSON.

        Raises InputError, CodecError.
        """
        machine = self.machines.get(workflow)
        known = machine.steps[step] if machine is not None and step in machine.steps else None
        decoder = known.decoder if known is not None else msgspec.json.Decoder(Any)
        what = f"the state of step '{step}'"
        encoded = encoded_input(value, decoder=decoder, what=what)
        if machine is not None and known is not None:
            machine.demand_fitting(known, encoded)
        return self.payloads.fitting(encoded, where, what)

    def encoded_fork(self, workflow: str, at: str | None, value: Any) -> str:
        """``value`` as JSON that fits what a fork at ``at`` begins with. Raises InputError, AppError."""
        machine = self.machines.get(workflow)
        step = at or "" if machine is None else machine.fork_step(at)
        return self.encoded_state(workflow, step, value, Where(workflow, "input"))

    def run(self, *, until_idle: bool = False, timeout: float | None = None) -> int:
        """Run this app's workflows here, in this process and thread: for scripts, debuggers and notebooks.

        ``until_idle``: return when no step is ready, due within a minute, or held by a process that died, which others take up
        ``dead_interval_s`` after it was last heard of; else run until ``timeout`` seconds have passed, or for ever. Gives how
        many steps ran. Steps that this app has no code for are not waited for; how many there are, the log says.
        A database without the schema gets it first when it is the local one; any other raises NotInstalled.
        """
        limit = None if timeout is None else timedelta(seconds=timeout)
        return run_here(self, until_idle=until_idle, limit=limit)

    async def run_async(self, *, until_idle: bool = False, timeout: float | None = None) -> int:
        """As ``run``, in a thread beside the event loop: ``asyncio.create_task(app.run_async())`` in a notebook or a web server.

        Cancelled, it ends within a second or so, after the steps that run in this moment.
        """
        limit = None if timeout is None else timedelta(seconds=timeout)
        return await run_beside(self, until_idle=until_idle, limit=limit)

    def close(self) -> None:
        """Close this app's connections; the local Postgres stops with its last user."""
        self.client.close()


class StepDecorator:
    """What ``@app.step(…)`` gives."""

    def __init__(self, register: Callable[[Callable[..., Any]], StepFunction[..., Any]]) -> None:
        self._register = register

    @overload
    def __call__(
        self, function: Callable[Concatenate[Anything, P], Coroutine[Any, Any, R]], /
    ) -> StepFunction[Concatenate[Any, P], R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Anything, P], R], /) -> StepFunction[Concatenate[Any, P], R]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /
    ) -> StepFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> StepFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], R], /) -> StepFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> StepFunction[P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Make it a step."""
        return self._register(function)


class WorkflowDecorator:
    """What ``@app.workflow(…)`` gives."""

    def __init__(self, register: Callable[[Callable[..., Any]], Workflow[Any, Any]]) -> None:
        self._register = register

    @overload
    def __call__(self, function: Callable[[In], Coroutine[Any, Any, R]], /) -> Workflow[In, R]: ...
    @overload
    def __call__(self, function: Callable[[], Coroutine[Any, Any, R]], /) -> Workflow[None, R]: ...
    @overload
    def __call__(self, function: Callable[[In], R], /) -> Workflow[In, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Make it a workflow."""
        return self._register(function)
