"""What one console is told: its database, who may come in, by which names it is reached."""

from __future__ import annotations

import ipaddress
import secrets

import msgspec

from durable_cluster.app import App
from durable_cluster.errors import ConfigurationError

TOKEN_CHARS_MIN = 16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MAKE_ONE = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


class ConsoleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One console. Without any token whoever reaches it is an operator, so that only what loopback alone reaches can be without.

    ``hosts``: the names in Host headers that are answered; empty: any. ``is_https``: browsers reach it by https. ``redact``: names
    of values that are masked besides the usual ones. ``app``: reads coded payloads and checks inputs. ``metrics``: the pages of
    clusters, which tell the processor time. ``secret`` signs sessions.
    """

    dsn: str
    host: str = "127.0.0.1"
    port: int = 8100
    operator_token: str | None = None
    viewer_token: str | None = None
    hosts: tuple[str, ...] = LOOPBACK_NAMES
    is_https: bool = False
    redact: tuple[str, ...] = ()
    app: App | None = None
    metrics: tuple[str, ...] = ()
    secret: str = msgspec.field(default_factory=lambda: secrets.token_hex(32))

    def __post_init__(self) -> None:
        for variable, token in (
            ("DURABLE_CONSOLE_TOKEN", self.operator_token),
            ("DURABLE_CONSOLE_VIEWER_TOKEN", self.viewer_token),
        ):
            if token is not None and len(token) < TOKEN_CHARS_MIN:
                raise ConfigurationError(
                    f"{variable} has {len(token)} characters; a token has at least {TOKEN_CHARS_MIN}: make one with {MAKE_ONE}"
                )
        if self.operator_token is not None and self.operator_token == self.viewer_token:
            raise ConfigurationError(
                "DURABLE_CONSOLE_TOKEN and DURABLE_CONSOLE_VIEWER_TOKEN are the same; whoever may only look gets one of their own"
            )
        if not self.needs_login and (elsewhere := self._reached_by()):
            raise ConfigurationError(
                f"a console with {elsewhere} can be reached from elsewhere and needs a token: set DURABLE_CONSOLE_TOKEN (make"
                f" one with {MAKE_ONE}), DURABLE_CONSOLE_VIEWER_TOKEN for people who may only look, or leave that out"
            )

    def __repr__(self) -> str:
        return f"<ConsoleSettings {self.host}:{self.port}>"  # the rest is secret

    def _reached_by(self) -> str | None:
        """What says that others than this machine reach it."""
        if not is_loopback(self.host):
            return f"--host {self.host}"
        name = next((name for name in self.hosts if not is_loopback(name)), None)
        return f"--allow-host {name}" if name is not None else "--https" if self.is_https else None

    @property
    def needs_login(self) -> bool:
        """Whether anybody has to show a token."""
        return self.operator_token is not None or self.viewer_token is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
