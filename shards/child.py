"""What runs inside a child: the boot that every child shares, and the loops of a consumer and of maintenance."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import psycopg
from multiprocess.connection import Connection

from durable_cluster import log_output, telemetry
from durable_cluster.consumer import Consumer
from durable_cluster.database import CONNECTION_LOST, connect_worker
from durable_cluster.errors import ConnectionFailed, DatabaseError, DurableError
from durable_cluster.firing import Firing
from durable_cluster.loading import load_app
from durable_cluster.log_output import Output
from durable_cluster.meters import Report
from durable_cluster.projection import Projection
from durable_cluster.shards import maintenance, restarts
from durable_cluster.shards.endings import EXIT_BROKEN, EXIT_CANNOT_BOOT, EXIT_FAILED
from durable_cluster.shards.messages import (
    Adopt,
    Beat,
    Broken,
    ClusterConfig,
    Ready,
    decode_config,
    decode_to_child,
    encode,
)
from durable_cluster.shards.watchdog import Watchdog, end_hanging
from durable_cluster.telemetry import Tracing

logger = logging.getLogger("durable_cluster.child")

RECONNECT_S_MIN = 0.1
RECONNECT_S_MAX = 5.0
GRACE_OF_DETACHED = 0.7
PATIENCE_OF_BOOT = 0.5
LOSSES_WINDOW_S = 60.0
NEWS_OF_BEATS = 10
PR_SET_PDEATHSIG = 1
GENERATION = 10_000  # objects: a page of a thousand steps is one round of the collector, and not ten


class Orders:
    """The supervisor's end of the pipe, and whether it is time to stop."""

    def __init__(self, pipe: Connection, settings_grace_s: float) -> None:
        self.pipe = pipe
        self.is_stopping = False
        # A signal only ends a poll that also waits for this: Python goes on with any other where it was.
        self._signalled, self._signal = socket.socketpair()
        for end in (self._signalled, self._signal):
            end.setblocking(False)
        self._grace_s = settings_grace_s
        self._lock = threading.Lock()
        self._beat_at = 0.0
        self._was_holding = False

    def stop(self, signal_number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM: only notes it, and lets the alarm end a process that a step keeps from looking."""
        self.is_stopping = True
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    @property
    def wakeups(self) -> list[int]:
        """What becomes readable when the supervisor speaks or a signal comes."""
        return [self.pipe.fileno(), self._signalled.fileno()]

    def listen_to_signals(self) -> None:
        """From now on SIGTERM is an order to stop."""
        signal.set_wakeup_fd(self._signal.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self.stop)

    def pause(self, seconds: float) -> None:
        """Until something is heard, or the time is over."""
        poll = select.poll()
        for descriptor in self.wakeups:
            poll.register(descriptor, select.POLLIN)
        poll.poll(seconds * 1000)

    def say(self, message: Ready | Beat | Broken) -> None:
        """Tell the supervisor; its end being gone means that it is gone, and so are we."""
        try:
            with self._lock:
                self.pipe.send_bytes(encode(message))
        except OSError:
            self.is_stopping = True

    def beat(self, beat: Callable[[bool], Beat], is_holding: bool, *, every_s: float) -> None:
        """Say what ``beat`` makes, at most once in ``every_s`` seconds; news of work begun or ended ten times as often."""
        now = time.monotonic()
        is_news = is_holding != self._was_holding
        if now - self._beat_at >= (every_s / NEWS_OF_BEATS if is_news else every_s):
            self._beat_at, self._was_holding = now, is_holding
            self.say(beat(is_holding))

    def is_pending(self) -> bool:
        """Whether the supervisor has said something that is not heard yet, or it is time to stop."""
        return self.is_stopping or self.pipe.poll()

    def heard(self) -> list[Adopt | object]:
        """What the supervisor has said since the last time."""
        said: list[Adopt | object] = []
        try:
            while self.pipe.poll():
                said.append(decode_to_child(self.pipe.recv_bytes()))
        except (EOFError, OSError):
            self.is_stopping = True
        return said


def main(config_bytes: bytes, shard: int | None, pipe: Connection, supervisor_pid: int) -> None:
    """The target of every child: a consumer of ``shard``, or maintenance without one."""
    config = decode_config(config_bytes)
    output = log_output.configure(config.log_level, config.log_format)
    orders = Orders(pipe, config.settings.drain_grace_s)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # held since before the spawn
    orders.listen_to_signals()
    if not _dies_with(supervisor_pid):
        return
    try:
        tracing = telemetry.configure("consumer" if shard is not None else "maintenance")
        run = _booted(
            lambda: (
                _maintenance(config, orders)
                if shard is None
                else _consumer(config, shard, orders, tracing=tracing, output=output)
            ),
            orders,
            limit_s=config.settings.boot_timeout_s * PATIENCE_OF_BOOT,
        )
    except Exception as error:
        reason = str(error) if isinstance(error, DurableError) else f"{type(error).__name__}: {error}"
        orders.say(Broken(reason))
        sys.exit(EXIT_CANNOT_BOOT)
    gc.freeze()  # what is loaded by now stays
    gc.set_threshold(GENERATION)
    try:
        run()
    except Exception as error:
        logger.exception("this process cannot go on; it is started again")
        logging.shutdown()
        if tracing is not None:
            tracing.shutdown()
        is_of_the_database = isinstance(error, (psycopg.Error, DatabaseError))
        os._exit(EXIT_BROKEN if is_of_the_database else EXIT_FAILED)  # whatever its threads still do
    signal.setitimer(signal.ITIMER_REAL, 0)
    if tracing is not None:
        tracing.shutdown()


def _booted(boot: Callable[[], Callable[[], None]], orders: Orders, *, limit_s: float) -> Callable[[], None]:
    """What ``boot`` makes. A server that is away at this moment, as in a restart, is waited for."""
    stop_at = time.monotonic() + limit_s
    while True:
        try:
            return boot()
        except (ConnectionFailed, *CONNECTION_LOST):
            if orders.is_stopping or time.monotonic() > stop_at:
                raise
            orders.pause(random.uniform(RECONNECT_S_MIN, 2 * RECONNECT_S_MIN))


def _dies_with(supervisor_pid: int) -> bool:
    """Ask the kernel for SIGTERM when the supervisor dies; False if it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == supervisor_pid


def _consumer(
    config: ClusterConfig, shard: int, orders: Orders, *, tracing: Tracing | None, output: Output | None
) -> Callable[[], None]:
    app = load_app(config.app)
    app.client.use(config.dsn)
    consumer = Consumer(config.dsn, shard, app.machines, config.settings, on_hang=end_hanging, tracing=tracing)
    if output is not None:
        output.follow(lambda: consumer.inline)
    orders.say(Ready(consumer.owner))

    def beat(is_holding: bool) -> Beat:
        return Beat(consumer.owner, is_holding, consumer.meters.report(spans_dropped=tracing.dropped if tracing else 0))

    def look() -> None:
        orders.beat(beat, True, every_s=config.settings.heartbeat_s / 2)

    Watchdog(consumer, grace_s=config.settings.hang_grace_s, on_look=look).start()

    def run() -> None:
        losses: list[float] = []
        while not orders.is_stopping:
            try:
                _consume(consumer, config, orders, beat)
            except CONNECTION_LOST as error:
                logger.warning("shard %d: the connection is lost (%s)", shard, _first_line(error))
                losses = [*restarts.recent(losses, now=time.monotonic(), window_s=LOSSES_WINDOW_S), time.monotonic()]
                orders.pause(restarts.pause_s(len(losses), chance=random.random()))
                _reconnect(consumer, config, orders, beat)
        consumer.close(grace_s=config.settings.drain_grace_s * GRACE_OF_DETACHED)

    def run_and_tell() -> None:
        try:
            run()
        finally:
            orders.say(beat(False))  # the last of what it has counted

    return run_and_tell


def _consume(consumer: Consumer, config: ClusterConfig, orders: Orders, beat: Callable[[bool], Beat]) -> None:
    """Work and wait until told to stop."""
    every_s = config.settings.heartbeat_s / 2
    owner = consumer.owner

    def on_page() -> None:
        orders.beat(beat, True, every_s=every_s)

    last_work, may_have_work = time.monotonic(), True
    while not orders.is_stopping:
        for order in orders.heard():
            _obey(consumer, order)
        if may_have_work and consumer.work(orders.is_pending, on_page):
            last_work = time.monotonic()
        else:
            orders.beat(beat, False, every_s=every_s)
            may_have_work = consumer.wait(time.monotonic() - last_work, orders.wakeups)
        if consumer.owner != owner:
            owner = consumer.owner
            orders.say(Ready(owner))


def _obey(consumer: Consumer, order: object) -> None:
    assert hasattr(order, "shard")
    if isinstance(order, Adopt):
        consumer.adopt(order.shard)
    else:
        consumer.release(order.shard)


def _reconnect(consumer: Consumer, config: ClusterConfig, orders: Orders, beat: Callable[[bool], Beat]) -> None:
    """A new connection for the same incarnation, however long that takes: what runs detached goes on meanwhile."""
    pause_s = RECONNECT_S_MIN
    while not orders.is_stopping:
        try:
            consumer.reconnect()
            logger.warning("shard %d: connected again", consumer.home)
            return
        except (ConnectionFailed, *CONNECTION_LOST):
            orders.beat(beat, False, every_s=config.settings.heartbeat_s / 2)
            orders.pause(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(RECONNECT_S_MAX, pause_s * 2)


def _maintenance(config: ClusterConfig, orders: Orders) -> Callable[[], None]:
    connection = connect_worker(config.dsn, name="durable-cluster maintenance", settings=config.settings)
    orders.say(Ready(0))

    def beat(is_holding: bool) -> Beat:
        return Beat(0, is_holding, Report(cpu_s=time.process_time()))

    def run() -> None:
        current = connection
        firing, projection = Firing(), Projection()
        upkeep_at = 0.0
        while not orders.is_stopping:
            try:
                if current.closed:
                    current = connect_worker(config.dsn, name="durable-cluster maintenance", settings=config.settings)
                firing.tend(current)
                projection.tend(current)
                if time.monotonic() >= upkeep_at:
                    maintenance.run_once(current, config.settings, between=firing.tend)
                    upkeep_at = time.monotonic() + config.settings.maintenance_s * random.uniform(0.8, 1.2)
                pause_s = min(firing.rest_s, projection.rest_s, max(0.0, upkeep_at - time.monotonic()))
            except (ConnectionFailed, *CONNECTION_LOST) as error:
                logger.info("maintenance: %s; trying again", _first_line(error))
                if current.broken:
                    current.close()
                pause_s = RECONNECT_S_MAX * random.uniform(0.2, 0.4)
            orders.beat(beat, False, every_s=config.settings.heartbeat_s)
            orders.pause(pause_s)
            orders.heard()
        current.close()

    return run


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
