"""The races of schedules: several hosts see a due time, and somebody changes the schedule meanwhile.

A due time starts one workflow, whoever looks; what fires is what stands when it fires; nobody moves the next due time back.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from durable_cluster import Handle, schedule_statements
from durable_cluster.cron import Cron
from durable_cluster.firing import Firing
from explorer.actors import ActorConnection
from explorer.register import race
from explorer.scene import Act, Scene

MINUTELY = "* * * * *"
YEARLY = "30 4 1 1 *"
ZONE = "UTC"


class Timetable:
    """The one schedule of a scene, every minute, and what must have become of its due times.

    ``dues``: those that have come; ``fired_by_then``: how many had fired when somebody paused or changed it, if anybody did.
    """

    def __init__(self, scene: Scene, *, overlap: str = "skip", catch_up: int = 1) -> None:
        self.name = f"race-{scene.lab.schedules}"
        self.dues: list[datetime] = []
        self.fired_by_then: int | None = None
        self.next_then: datetime | None = None
        self._scene = scene
        self._control = scene.lab.control
        self._schedules = scene.lab.app.schedules
        self._control.execute("delete from durable.schedule")
        self._schedules.create(
            self.name, MINUTELY, "flow", {"do": "pass"}, overlap=overlap, catch_up=catch_up, tx=self._control
        )
        scene.demands.append(self._demand)

    def come(self) -> None:
        """Time passes up to the next due time."""
        self._scene.advance(self._passing_s())

    def fire(self) -> None:
        """What is due fires, before the race or after it."""
        while Firing().tend(self._control, is_asked=True):
            pass

    # Who races.

    def host(self, *, is_mortal: bool = False, is_late: bool = False) -> None:
        """An actor that fires what is due, as maintenance does. ``is_late``: it lets the next due time come first."""
        offset_ms = None
        if is_late:
            self._scene.lab.offset_s += self._passing_s()
            offset_ms = int(self._scene.lab.offset_s * 1000)

        def act(connection: ActorConnection) -> None:
            if offset_ms is not None:
                connection.execute("select setval('durable.offset_ms', %s)", (offset_ms,))
            Firing().tend(connection, is_asked=True)

        self._scene.actor(act, is_mortal=is_mortal)

    def pause(self) -> None:
        """An actor that pauses it."""
        self._client(lambda tx: self._schedules.pause(self.name, tx=tx) and None)

    def change(self) -> None:
        """An actor that gives it another cron."""
        self._client(lambda tx: self._schedules.change(self.name, cron=YEARLY, tx=tx))

    def _client(self, act: Act) -> None:
        def in_transaction(tx: ActorConnection) -> None:
            act(tx)
            self.fired_by_then, self.next_then = self._row(tx, "fired, next_due")

        self._scene.client(in_transaction)

    # What must hold.

    def _demand(self) -> None:
        """Raises AssertionError."""
        self.fire()
        edition, next_due, fired, skipped, queued = self._row(
            self._control, "edition, next_due, fired, skipped, queued"
        )
        rows = self._control.execute(
            "select durable.hex(id), split_part(key, '@', 2)::timestamptz from durable.started"
            " where key like %s order by key",
            (f"{self.name}@%",),
        ).fetchall()
        dues = [due for _, due in rows] + ([queued] if queued else [])
        expected = self.dues if self.fired_by_then is None else self.dues[: self.fired_by_then]
        assert dues == expected, f"due times {dues} have fired, not {expected}"
        assert fired == len(rows), f"{len(rows)} runs are counted as {fired}"
        assert skipped == 0, "a due time that had fired was met again"
        if self.fired_by_then is not None:
            assert next_due == self.next_then, f"edition {edition} is due next at {next_due}, not at {self.next_then}"
        else:
            now = schedule_statements.now(self._control)
            assert next_due == Cron(MINUTELY, ZONE).after(now), f"at {now} it is due next at {next_due}"
        for workflow_id, _ in rows:
            self._scene.found(Handle(self._scene.lab.app.client, "flow", workflow_id)).ends_as("pass")

    def _passing_s(self) -> float:
        """How long until the next due time has come that has not yet; from now on it has."""
        now = schedule_statements.now(self._control)
        if self.dues:
            due = self.dues[-1] + timedelta(minutes=1)
        else:
            (due,) = self._row(self._control, "next_due")
        self.dues.append(due)
        return (due - now).total_seconds() + 1

    def _row(self, connection: Any, columns: str) -> Any:
        query = f"select {columns} from durable.schedule where name = %s"
        return connection.execute(query.encode(), (self.name,)).fetchone()


@race("log")
def schedule_on_two_hosts(scene: Scene) -> None:
    timetable = Timetable(scene)
    timetable.come()
    timetable.host(is_mortal=True)
    timetable.host(is_mortal=True)


@race()
def schedule_on_two_hosts_a_due_time_apart(scene: Scene) -> None:
    timetable = Timetable(scene, overlap="allow", catch_up=10)
    timetable.come()
    timetable.host(is_mortal=True)
    timetable.host(is_late=True)


@race()
def schedule_on_two_hosts_while_it_is_paused(scene: Scene) -> None:
    timetable = Timetable(scene)
    timetable.come()
    timetable.host()
    timetable.host()
    timetable.pause()


@race()
def schedule_on_two_hosts_while_it_is_changed(scene: Scene) -> None:
    timetable = Timetable(scene)
    timetable.come()
    timetable.host()
    timetable.host()
    timetable.change()


@race()
def queued_run_on_two_hosts_while_the_one_before_it_ends(scene: Scene) -> None:
    timetable = Timetable(scene, overlap="queue")
    for _ in range(2):
        timetable.come()
        timetable.fire()
    timetable.host(is_mortal=True)
    timetable.host()
    scene.page(is_mortal=True)
