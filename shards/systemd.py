"""What systemd is told of a supervisor that it runs (``Type=notify``): up, alive, stopping. A datagram each."""

from __future__ import annotations

import logging
import socket

from durable_cluster.settings import ServiceManager, service_manager

logger = logging.getLogger("durable_cluster.systemd")


class Notifier:
    """Speaks to whatever listens at the address in ``NOTIFY_SOCKET``. That somebody does not listen is no reason to stop."""

    def __init__(self, manager: ServiceManager | None = None) -> None:
        manager = manager or service_manager()
        self._address = manager.address
        self._beat_s = None if manager.watchdog_s is None else manager.watchdog_s / 2
        self._beat_at = 0.0

    def up(self, status: str) -> None:
        """All processes are up: what waits for this unit may start. ``status`` is what ``systemctl status`` shows."""
        self._say(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """The drain begins."""
        self._say("STOPPING=1\nSTATUS=draining")

    def alive(self, now: float) -> None:
        """Say so as often as the watchdog demands, which is twice as often as it looks; ``now`` in seconds of any one clock."""
        if self._beat_s is not None and now >= self._beat_at:
            self._beat_at = now + self._beat_s
            self._say("WATCHDOG=1")

    def _say(self, lines: str) -> None:
        if self._address is None:
            return
        # A leading @ stands for a name that is in no file system.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as speaker:
                speaker.sendto(lines.encode(), address)
        except OSError as error:
            logger.warning("systemd was not told '%s': %s", lines.splitlines()[0], error)
