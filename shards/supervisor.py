"""The supervisor: desired minus alive, in one loop.

    supervisor ── consumer of shard 0 … n-1 (one connection each)
               ├─ maintenance (one connection)
               └─ its own connection: heartbeats for living children that hold work, and the windows of dead ones set free

Signal handlers only note the signal; the loop acts. A child that cannot boot stops the cluster with its error; one that dies
later is started again, with backoff and a limit. While a shard has no consumer of its own, a sibling reads it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import multiprocess
import psycopg
from multiprocess.connection import wait
from psycopg.errors import LockNotAvailable

from durable_cluster import schema, statements
from durable_cluster.database import CONNECTION_LOST, connect_worker
from durable_cluster.errors import ConnectionFailed, DurableError
from durable_cluster.shards import child, endings, restarts
from durable_cluster.shards.messages import Adopt, Beat, Broken, ClusterConfig, Ready, Release, encode
from durable_cluster.shards.place import Place
from durable_cluster.shards.process import Child
from durable_cluster.shards.systemd import Notifier

logger = logging.getLogger("durable_cluster.supervisor")

LOOP_S_MAX = 0.25
RECONNECT_S = 1.0
STOPPED_S = 5.0  # no round of the loop takes so long
OUTSIDE_PAUSE_S_MAX = 1.0  # whoever was ended from outside will not end the same way for it


class ClusterStopped(DurableError):
    """The supervisor gave up: a child cannot boot, or dies too often."""


class Supervisor:
    """Keeps a cluster's processes alive until it is told to stop."""

    def __init__(self, config: ClusterConfig, *, on_up: Callable[[Supervisor], None] | None = None) -> None:
        self.config = config
        self._settings = config.settings
        self._config_bytes = encode(config)
        self._context = multiprocess.get_context("spawn")
        self._connection = connect_worker(config.dsn, name="durable-cluster supervisor", settings=config.settings)
        schema.demand_installed(self._connection, shards=config.shards)
        self.places = [
            Place(f"shard-{shard}" if config.consumers_per_shard == 1 else f"shard-{shard}.{number}", shard)
            for shard in range(config.shards)
            for number in range(config.consumers_per_shard)
        ]
        self.places.append(Place("maintenance", None))
        self._to_abandon: list[tuple[int, int]] = []
        self._out_of_memory_kills = endings.out_of_memory_kills()
        self._on_up = on_up
        self._notifier = Notifier()
        self._has_been_up = False
        self._signals = 0
        self._deadline: float | None = None
        self._checked_at = time.monotonic()
        self._heartbeat_at = 0.0
        self._reconnect_at = 0.0

    @property
    def restarts(self) -> int:
        """How many children ended unasked and were, or will be, started again."""
        return sum(place.restarts for place in self.places)

    @property
    def unread(self) -> list[int]:
        """The shards that no process of this cluster reads at this moment: all, before it is up and once it drains."""
        read = {shard for place in self.places for shard in place.reads} if not self._signals else set()
        return [shard for shard in range(self.config.shards) if shard not in read]

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each living child by its name."""
        return {place.name: place.child.pid for place in self.places if place.child is not None}

    @property
    def owners(self) -> dict[int, list[int]]:
        """The incarnations of each living consumer, by its process id: under which it may hold windows."""
        return {
            place.child.pid: list(place.owners) for place in self.places if place.child is not None and place.owners
        }

    def stop(self) -> None:
        """Drain and end; a second call kills. Safe from a signal handler and from another thread."""
        self._signals += 1
        try:
            self._wakeup_write.send(b"\0")
        except (AttributeError, OSError):
            return

    def run(self, *, with_signals: bool = True) -> None:
        """Start the children and keep them until ``stop`` or SIGTERM or SIGINT. Raises ClusterStopped."""
        self._wakeup_read, self._wakeup_write = socket.socketpair()
        for end in (self._wakeup_read, self._wakeup_write):
            end.setblocking(False)
        handlers = self._take_signals() if with_signals else {}
        try:
            while not self._is_over():
                self._act()
                self._listen()
        except BaseException:
            self._kill_all()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if with_signals:
                signal.set_wakeup_fd(-1)
            self._flush_abandoned()
            self._connection.close()
            self._wakeup_read.close()
            self._wakeup_write.close()

    # The loop's steps.

    def _act(self) -> None:
        now = time.monotonic()
        self._notifier.alive(now)
        if self._signals:
            self._drain(now)
        else:
            self._start_due(now)
        self._check_hangs(now)
        self._flush_abandoned()
        self._heartbeat(now)

    def _listen(self) -> None:
        waitables: list[object] = [self._wakeup_read]
        for place in self.places:
            if place.child is not None:
                waitables += place.child.waitables
        due = [place.start_at - time.monotonic() for place in self.places if place.child is None and not self._signals]
        wait(waitables, timeout=max(0.0, min([LOOP_S_MAX, *due])))
        with contextlib.suppress(BlockingIOError):
            self._wakeup_read.recv(64)
        for place in self.places:
            if place.child is not None:
                has_ended = place.child.exitcode is not None  # asked first: what it said before it ended is heard
                self._hear(place)
                if has_ended:
                    self._reap(place)

    def _is_over(self) -> bool:
        return bool(self._signals) and all(place.child is None for place in self.places)

    # Starting and hearing.

    def _start_due(self, now: float) -> None:
        for place in self.places:
            if place.child is None and place.start_at <= now:
                place.child = Child(self._context, child.main, self._config_bytes, name=place.name, shard=place.shard)
                place.pid = place.child.pid
                place.is_ready = place.is_holding = place.is_hanging = place.is_stood_in_for = False
                place.heard_at = now

    def _hear(self, place: Place) -> None:
        assert place.child is not None
        for message in place.child.heard():
            place.heard_at = time.monotonic()
            if place.is_stood_in_for:
                place.is_stood_in_for = False
                self._release(place)
            if isinstance(message, Ready):
                self._is_up(place, message.owner)
            elif isinstance(message, Beat):
                place.is_holding, place.told = message.is_holding, place.told.heard(message.report)
                # Its Ready was never said if it lost its connection right after it had come back under new bits.
                if message.owner and message.owner not in place.owners:
                    place.owners.append(message.owner)
            elif isinstance(message, Broken):
                if not place.deaths:
                    raise ClusterStopped(f"{place.name} cannot start: {message.reason}")
                # Its place was up before: what is in the way now may pass, such as a server that recovers. Restarts are limited.
                logger.warning("%s cannot start: %s", place.name, message.reason)

    def _is_up(self, place: Place, owner: int) -> None:
        if owner:
            place.owners.append(owner)
        place.is_ready = True
        self._release(place)
        if not self._has_been_up and all(one.is_ready for one in self.places):
            self._has_been_up = True
            self._notifier.up(f"{self.config.shards} shards, {len(self.places) + 1} processes")
            if self._on_up is not None:
                self._on_up(self)

    def _release(self, place: Place) -> None:
        """The shard of this place has its own consumer again."""
        for sibling in self.places:
            if sibling is not place and place.shard in sibling.adopted and sibling.child is not None:
                assert place.shard is not None
                sibling.adopted.remove(place.shard)
                sibling.released.add(place.shard)
                sibling.child.tell(Release(place.shard))

    # Dying.

    def _reap(self, place: Place) -> None:
        assert place.child is not None
        code = place.child.exitcode
        place.child.reap()
        place.child, place.pid, was_ready = None, None, place.is_ready
        place.told = place.told.ended()
        place.is_ready = place.is_holding = False
        is_at_fault = self._is_of_its_own(place, code)
        self._abandon(place, is_at_fault=is_at_fault)
        if self._signals:
            return
        # One that a signal ended while it started was killed from outside; one that ended itself cannot boot.
        if not was_ready and not place.deaths and (code is None or code >= 0):
            raise ClusterStopped(f"{place.name} ended while it started ({endings.told(code)}); its error stands above")
        now = time.monotonic()
        place.deaths = [*restarts.recent(place.deaths, now=now, window_s=self._settings.restart_window_s), now]
        if len(place.deaths) > self._settings.restarts_max:
            raise ClusterStopped(
                f"{place.name} died {len(place.deaths)} times in {self._settings.restart_window_s:.0f} s"
                f" (last: {endings.told(code)})"
            )
        place.restarts += 1
        pause_s = restarts.pause_s(len(place.deaths), chance=random.random())
        place.start_at = now + (pause_s if is_at_fault else min(pause_s, OUTSIDE_PAUSE_S_MAX))
        logger.warning("%s ended (%s); started again in %.1f s", place.name, endings.told(code), place.start_at - now)
        self._flush_abandoned()
        for shard in {place.shard, *place.adopted} - {None}:
            assert shard is not None
            self._find_adopter(shard)
        # Windows of these it may not have read to their end, and their own consumers are busy with others.
        for shard in place.released - {place.shard, *place.adopted}:
            self._find_adopter(shard, is_brief=True)
        place.adopted, place.released = [], set()

    def _is_of_its_own(self, place: Place, code: int | None) -> bool:
        kills, before = endings.out_of_memory_kills(), self._out_of_memory_kills
        self._out_of_memory_kills = kills
        if self._signals and code == 0:
            return False  # it was told to go, and went
        return endings.is_of_its_own(code, was_hanging=place.is_hanging, was_out_of_memory=kills > before)

    def _abandon(self, place: Place, *, is_at_fault: bool) -> None:
        """Its owners are gone; if it died of what it ran, the lines of its page are suspects."""
        suspects = self._settings.page_lines_max if is_at_fault else 0
        self._to_abandon += [(owner, suspects) for owner in place.owners]
        place.owners = []

    def _find_adopter(self, shard: int, *, is_brief: bool = False) -> None:
        """Have the least burdened living consumer read a shard whose windows are free now; its own sibling first.

        One that may still have a window of the shard open comes late. ``is_brief``: for one window, beside the shard's own
        consumer.
        """
        living = [
            place for place in self.places if place.is_up and place.shard is not None and not place.is_stood_in_for
        ]
        if not living:
            return
        adopter = min(
            living,
            key=lambda place: (
                (place.shard == shard) is is_brief,
                shard in place.released,
                len(place.adopted),
                place.is_holding,
            ),
        )
        assert adopter.child is not None
        adopter.child.tell(Adopt(shard))
        if is_brief and shard not in adopter.adopted:
            adopter.released.add(shard)
            adopter.child.tell(Release(shard))
        elif adopter.shard != shard and shard not in adopter.adopted:
            adopter.adopted.append(shard)

    def _check_hangs(self, now: float) -> None:
        passed_s, self._checked_at = now - self._checked_at, now
        for place in self.places:
            if place.child is None or place.child.exitcode is not None:
                continue
            if passed_s > STOPPED_S:
                place.heard_at += passed_s  # this process was stopped, and so perhaps was the child
            silent_s = now - place.heard_at
            if not place.is_ready and not place.deaths and silent_s > self._settings.boot_timeout_s:
                raise ClusterStopped(f"{place.name} did not start within {self._settings.boot_timeout_s:.0f} s")
            limit_s = self._settings.hang_timeout_s if place.is_ready else self._settings.boot_timeout_s
            if silent_s > limit_s:
                what = "hangs" if place.is_ready else "does not start"
                logger.error("%s %s: silent for %.0f s; it is killed", place.name, what, silent_s)
                place.is_hanging = place.is_ready and not place.is_stood_in_for and not place.child.is_frozen
                place.child.kill()
                place.heard_at = float("inf")

    def _drain(self, now: float) -> None:
        living = [place.child for place in self.places if place.child is not None]
        if self._deadline is None:
            self._deadline = now + self._settings.drain_grace_s
            self._notifier.stopping()
            for one in living:
                one.drain()
        elif now > self._deadline or self._signals > 1:
            for one in living:
                one.kill()

    def _kill_all(self) -> None:
        for place in self.places:
            if place.child is not None:
                place.child.kill()
                place.child.reap()
                place.child = place.pid = None
                self._abandon(place, is_at_fault=False)

    # The database.

    def _heartbeat(self, now: float) -> None:
        if now < self._heartbeat_at:
            return
        self._heartbeat_at = now + self._settings.dead_interval_s / 4
        living: list[int] = []
        for place in self.places:
            if place.child is not None and place.child.is_frozen:
                self._stand_in_for(place, now)
            elif place.child is not None:
                living += place.owners
        self._ask(partial(statements.heartbeat, owners=living))

    def _stand_in_for(self, place: Place, now: float) -> None:
        """A stopped process is silent: once that is long enough, a sibling takes its work over, until it is heard again."""
        if place.shard is None or now - place.heard_at <= self._settings.dead_interval_s:
            return
        if not place.is_stood_in_for:
            logger.warning("%s is stopped (SIGSTOP): siblings read its shards", place.name)
        place.is_stood_in_for = True
        read = {shard for other in self.places if other.is_up for shard in other.adopted if other is not place}
        for shard in {place.shard, *place.adopted} - read:
            self._find_adopter(shard)

    def _flush_abandoned(self) -> None:
        """Set the windows of dead owners free; whoever still holds such a row is asked about again in the next round."""
        gone, self._to_abandon = self._to_abandon, []
        for owner, suspects in gone:
            if not self._ask(partial(statements.abandon, owner=owner, suspects=suspects)):
                self._to_abandon.append((owner, suspects))

    def _ask(self, question: Callable[[psycopg.Connection[Any]], object]) -> bool:
        """Run a statement; whether it went through. A lost connection is opened again, at most once a second."""
        try:
            if self._connection.closed or self._connection.broken:
                if time.monotonic() < self._reconnect_at:
                    return False
                self._reconnect_at = time.monotonic() + RECONNECT_S
                self._connection = connect_worker(
                    self.config.dsn, name="durable-cluster supervisor", settings=self._settings
                )
            question(self._connection)
            return True
        except LockNotAvailable:
            return False
        except (ConnectionFailed, *CONNECTION_LOST) as error:
            logger.info("the supervisor's statement failed (%s); trying again", type(error).__name__)
            if not self._connection.closed:
                self._connection.close()
            return False

    def _take_signals(self) -> dict[int, Any]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        signal.set_wakeup_fd(self._wakeup_write.fileno(), warn_on_full_buffer=False)
        return {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
