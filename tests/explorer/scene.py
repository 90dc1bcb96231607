"""What a schedule begins with, its actors, and its end: everything is worked off, and the invariants are asked for.

A ``Lab`` is one database for all schedules of a race: they differ in their workflows' ids, and time only goes forward. A
``Scene`` is one schedule's part of it, and all that a race has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from durable_cluster import App, Handle, side_statements, statements
from durable_cluster.database import connect
from durable_cluster.errors import UnknownWorkflow
from durable_cluster.shards import upkeep
from explorer import flows
from explorer.actors import Actor, ActorConnection, connect_actor
from explorer.audit import FUNCTION, Finding, audit
from explorer.scheduler import Choose, Schedule, run
from explorer.worker import AT_ONCE, LINES_MAX, SHARD, Worker

LETTERS = "abcdefgh"
UPKEEP_EVERY = 100
ROUNDS_MAX = 200
STEPS_TO_STAND = {"work": 2}

Act = Callable[[ActorConnection], None]
Race = Callable[["Scene"], None]


class Broken(AssertionError):
    """An invariant does not hold after a schedule."""


class Lab:
    """A database with one shard in use, sessions for actors, and the application that all of them run."""

    def __init__(self, dsn: str, control: psycopg.Connection[Any], clock: Callable[[float], None], app: App) -> None:
        self.control = control
        self.app = app
        self.offset_s = 0.0
        self._dsn = dsn
        self._clock = clock
        self.schedules = 0
        control.execute(flows.EFFECTS)
        control.execute(FUNCTION)
        control.execute("update durable.slot set shard = 0")
        control.execute("update pgque.queue set queue_rotation_period = '0'")
        control.execute("select set_config('synchronous_commit', 'off', false), set_config('jit', 'off', false)")
        self.app.secret = side_statements.secret(control)
        self._monitor = connect(dsn, name="explorer monitor")
        self._workers: list[Worker] = []
        self.settler = self._new_worker("settler")

    def close(self) -> None:
        """Close all sessions."""
        for connection in (self._monitor, self.settler.connection, *(worker.connection for worker in self._workers)):
            connection.close()
        self.app.close()

    def play(self, race: Race, choose: Choose) -> Schedule:
        """One schedule of a race. Raises Broken, with the word that repeats it."""
        self.schedules += 1
        if self.schedules % UPKEEP_EVERY == 0:
            self._keep_up()
        schedule = Schedule()
        scene = Scene(self)
        try:
            race(scene)
            run(scene.actors, choose, schedule)
            scene.demand_no_errors()
            scene.demand_invariants()
            self.settle()
            if scene.takes_time():
                self.advance(2 * flows.TIMEOUT_S)
                self.settle()
            scene.demand_outcomes()
        except AssertionError as error:
            steps = "\n  ".join(schedule.story)
            raise Broken(f"{error}\nafter the schedule {schedule.word}:\n  {steps}") from error
        for worker in self._workers:
            worker.renew()
        return schedule

    def worker(self, number: int) -> Worker:
        """The worker with this number and its session; the same ones serve all schedules."""
        while len(self._workers) <= number:
            self._workers.append(self._new_worker(f"actor {LETTERS[len(self._workers)]}"))
        return self._workers[number]

    def is_blocked(self, pid: int) -> bool:
        """Whether this session waits for a lock of another."""
        row = self._monitor.execute("select cardinality(pg_blocking_pids(%s)) > 0", (pid,)).fetchone()
        return bool(row and row[0])

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.offset_s += seconds
        self._clock(self.offset_s)

    def settle(self) -> None:
        """Work off all there is, as one living consumer beside dead ones would."""
        for _ in range(ROUNDS_MAX):
            has_work, due_s = statements.look(
                self.control, [SHARD], dead_interval=AT_ONCE, may_take=True, with_suspect=True
            )
            if due_s is not None and due_s <= 0:
                side_statements.sweep(self.control)
            elif not has_work:
                return
            if not self.settler.work(takes_over=True):
                self.settler.complete(self.settler.take())
        raise AssertionError("there is work, and it does not get less")

    def _new_worker(self, name: str) -> Worker:
        return Worker(connect_actor(self._dsn, name), self.app)

    def _keep_up(self) -> None:
        upkeep.rotate_timers(self.control)
        upkeep.keep_up(self.control)
        self.control.execute(
            "vacuum durable.win, durable.timer_control, durable.wait, durable.mailbox, durable.detached"
        )


class Flow:
    """A workflow of a scene, and what it may come to. ``find``: its handle, as soon as somebody has started it."""

    def __init__(self, find: Callable[[], Handle], *, is_paid: bool = False) -> None:
        self.is_paid = is_paid
        self.outcomes: tuple[str, ...] = ()
        self.takes_time = False
        self._find = find

    @property
    def handle(self) -> Handle:
        return self._find()

    def ends_as(self, *outcomes: str, takes_time: bool = False) -> None:
        """One of these must be its outcome, without ``takes_time`` as soon as all there is to do is done."""
        self.outcomes = outcomes
        self.takes_time = takes_time


class Scene:
    """For races: workflows as they stand before the race, and the actors that race."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.flows: list[Flow] = []
        self.actors: list[Actor] = []
        self.may_repeat = False
        self.demands: list[Callable[[], None]] = []
        self.ids: set[str] = set()
        self._since = str(lab.control.execute("select pg_snapshot_xmax(pg_current_snapshot())").fetchone()[0])  # type: ignore[index]

    @property
    def new_key(self) -> str:
        """A key that no schedule before had."""
        return f"order {self.lab.schedules}"

    # What is there before the race.

    def start(self, do: str, *, times: int = 1, timeout: bool = False, is_paid: bool = False, **more: Any) -> Flow:
        """A workflow that has just been started."""
        state = {"do": do, "times": times, "timeout": timeout, "got": [], "key": self.new_key, **more}
        handle = self.lab.app.named("paid" if is_paid else "flow").start(state, tx=self.lab.control)
        self.flows.append(Flow(lambda: handle, is_paid=is_paid))
        return self.flows[-1]

    def keyed(self, key: str) -> Flow:
        """The workflow that actors will start with this key."""
        self.flows.append(Flow(lambda: self.lab.app.named("flow").get(key=key)))
        return self.flows[-1]

    def standing(self, do: str, **options: Any) -> Flow:
        """A workflow that has come to where it stands aside: it waits, sleeps, or is detached."""
        flow = self.start(do, **options)
        for _ in range(STEPS_TO_STAND.get(do, 1)):
            self.lab.settler.work()
        return flow

    def found(self, handle: Handle) -> Flow:
        """A workflow that somebody else has started."""
        self.flows.append(Flow(lambda: handle))
        return self.flows[-1]

    def family(self, do: str, children: int, **options: Any) -> tuple[Flow, list[Flow]]:
        """A workflow that has spawned so many children, all of which wait for a signal, and they."""
        parent = self.standing(do, child="wait", children=children, **options)
        self.lab.settler.work()
        for child in parent.handle.children():
            self.found(Handle(self.lab.app.client, "flow", child.id))
        return parent, self.flows[-children:]

    def answer(self, flow: Flow) -> None:
        """A signal that has been delivered: the step that it resumes is in the log."""
        self.signal(flow, 1)
        self.lab.settler.work()

    def signal(self, flow: Flow, payload: int) -> None:
        """A signal that is on its way."""
        flow.handle.signal("answer", payload, tx=self.lab.control)

    def cancel(self, flow: Flow) -> None:
        """A cancel that is on its way."""
        flow.handle.cancel("no more", tx=self.lab.control)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.lab.advance(seconds)

    # Who races.

    def actor(self, act: Act, *, is_mortal: bool = False) -> None:
        """One more actor. ``is_mortal``: it may die before any of its statements."""
        number = len(self.actors)
        connection = self.lab.worker(number).connection
        self.actors.append(Actor(LETTERS[number], act, connection, is_mortal=is_mortal, is_blocked=self.lab.is_blocked))

    def next_worker(self) -> Worker:
        """The worker of the actor that is added next."""
        return self.lab.worker(len(self.actors))

    def page(self, *, is_mortal: bool = False, lines_max: int = LINES_MAX) -> None:
        """An actor that runs what is in the log now, in pages of so many lines; the window is claimed before the race."""
        worker = self.next_worker()
        text = worker.claim(lines_max=lines_max)
        assert text is not None, "there is nothing in the log"
        self.actor(lambda _: worker.run(text), is_mortal=is_mortal)

    def consumer(self, *, takes_over: bool = False, lines_max: int = LINES_MAX) -> None:
        """An actor that claims what there is by then and runs it."""
        worker = self.next_worker()
        self.actor(lambda _: worker.work(takes_over=takes_over, lines_max=lines_max) and None)

    def sweep(self, *, after_s: float | None = None) -> None:
        """An actor that fires what is due; ``after_s``: it lets so much time pass first."""
        offset_ms = None if after_s is None else int((self.lab.offset_s + after_s) * 1000)
        if after_s is not None:
            self.lab.offset_s += after_s

        def act(connection: ActorConnection) -> None:
            if offset_ms is not None:
                connection.execute("select setval('durable.offset_ms', %s)", (offset_ms,))
            with connection.transaction():
                side_statements.sweep(connection)

        self.actor(act)

    def client(self, act: Act) -> None:
        """An actor that does something in a transaction of its own, and is refused if the workflow has ended."""

        def in_transaction(connection: ActorConnection) -> None:
            try:
                with connection.transaction():
                    act(connection)
            except UnknownWorkflow:
                pass

        self.actor(in_transaction)

    def starter(self, key: str, *, is_mortal: bool = False) -> None:
        """An actor that starts a workflow which passes, with this key."""
        machine = self.lab.app.named("flow")

        def act(connection: ActorConnection) -> None:
            with connection.transaction():
                handle = machine.start({"do": "pass"}, key=key, tx=connection)
            self.ids.add(handle.id)

        self.actor(act, is_mortal=is_mortal)

    def completion(self, *, is_mortal: bool = False) -> Worker:
        """An actor that ends the detached steps which it has taken before the race; who that is."""
        worker = self.next_worker()
        taken = worker.take()
        assert taken, "nothing is detached"
        self.actor(lambda _: worker.complete(taken), is_mortal=is_mortal)
        return worker

    def redelivery(self, of: Worker) -> None:
        """An actor that takes another for dead, and what it ran for its own."""
        worker, owner = self.next_worker(), of.owner
        of.has_fallen = True

        def act(connection: ActorConnection) -> None:
            statements.abandon(connection, owner)
            worker.complete(worker.take())

        self.actor(act)

    def rotation(self, of: str) -> None:
        """An actor that rotates the ``timers`` or the ``log`` twice: so often until a table in use is emptied."""
        rotate = upkeep.rotate_timers if of == "timers" else upkeep.keep_up

        def act(connection: ActorConnection) -> None:
            for _ in range(2):
                rotate(connection)

        self.actor(act)

    def limit_sweep(self, *, is_mortal: bool = False) -> None:
        """An actor that deletes what is counted for keys that nobody uses, and commits a statement later."""

        def act(connection: ActorConnection) -> None:
            with connection.transaction():
                upkeep.sweep_limits(connection)

        self.actor(act, is_mortal=is_mortal)
        self.demands.append(self._demand_counts)

    def _demand_counts(self) -> None:
        """Who holds a permit or waits for one is counted. Raises AssertionError."""
        wrong = self.lab.control.execute(
            "select n.name, n.key, u.used from (select name, key from durable.permit union select name, key from durable.queued"
            " union select name, key from durable.limit_use) n left join durable.limit_use u using (name, key)"
            " where u.used is distinct from (select count(*) from durable.permit p where p.name = n.name and p.key = n.key)"
        ).fetchall()
        assert not wrong, f"counts of limits are wrong: {wrong}"

    # How it ends.

    def demand_no_errors(self) -> None:
        """Nobody may have failed. Raises AssertionError."""
        for actor in self.actors:
            if actor.error is not None:
                raise AssertionError(f"actor {actor.letter}: {actor.error!r}") from actor.error

    def demand_invariants(self) -> None:
        """Raises AssertionError."""
        for demand in self.demands:
            demand()
        for found in self._find(is_settled=False):
            broken = found.broken(may_repeat=self.may_repeat)
            assert broken is None, broken

    def takes_time(self) -> bool:
        """Whether a workflow that may has not ended yet."""
        return any(
            flow.takes_time and statements.outcome(self.lab.control, flow.handle.id) is None for flow in self.flows
        )

    def demand_outcomes(self) -> None:
        """Raises AssertionError."""
        assert len(self.ids) <= 1, f"one key gave {len(self.ids)} workflows"
        for flow, found in zip(self.flows, self._find(is_settled=True), strict=True):
            broken = found.broken(may_repeat=self.may_repeat) or found.at_the_end(flow.outcomes, is_paid=flow.is_paid)
            assert broken is None, broken

    def _find(self, *, is_settled: bool) -> list[Finding]:
        return audit(self.lab.control, [flow.handle.id for flow in self.flows], self._since, is_settled=is_settled)
