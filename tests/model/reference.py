"""What the trace of a workflow must be, given what was done to it. No database, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.scripts import LATE, LONG_S

WAITS = ("wait", "timed", "token")


class Reference:
    """One workflow: its script, and what it was told.

    ``is_ordered``: signals reach it in the order in which they were sent: no window was held back while another was run.
    """

    def __init__(self, script: Sequence[str], *, key: str | None = None) -> None:
        self.script = tuple(script)
        self.key = key
        self.sent: list[tuple[int, str | None, str | None]] = []
        self.is_cancelled = False
        self.is_ordered = True
        self.passed_s = 0.0

    def signal(self, payload: int, *, key: str | None, token: str | None) -> None:
        """A signal that was taken. Payloads differ; of those with one key one counts, and of those with one token."""
        self.sent.append((payload, key, token))

    def wrong(self, status: str, trace: list[Any], effects: Sequence[str]) -> str | None:
        """What is wrong with how it ended, if anything is."""
        if status not in ("completed", "cancelled"):
            return f"it is {status}"
        if status == "cancelled" and not self.is_cancelled:
            return "nobody cancelled it"
        if status == "completed" and len(trace) != len(self.script):
            return f"it did {len(trace)} of {len(self.script)} operations and is completed"
        done = self.script[: len(trace)]
        return (
            self._wrong_steps(done, trace)
            or self._wrong_signals(done, trace)
            or self._wrong_effects(done, effects, is_cleaned=status == "cancelled")
        )

    def _wrong_steps(self, done: Sequence[str], trace: list[Any]) -> str | None:
        for operation, what in zip(done, trace, strict=True):
            if operation not in WAITS and what != operation:
                return f"'{operation}' left {what!r}"
            if what == LATE and (operation != "timed" or self.passed_s < LONG_S):
                return f"'{operation}' timed out after {self.passed_s:g} s"
        return None

    def _wrong_signals(self, done: Sequence[str], trace: list[Any]) -> str | None:
        known = {payload: (key, token) for payload, key, token in self.sent}
        taken = [
            (operation, what)
            for operation, what in zip(done, trace, strict=True)
            if operation in WAITS and what != LATE
        ]
        payloads = [payload for _, payload in taken]
        if strange := [payload for payload in payloads if payload not in known]:
            return f"it took signals that nobody sent: {strange}"
        keys = [known[payload][0] for payload in payloads if known[payload][0] is not None]
        tokens = [known[payload][1] for payload in payloads if known[payload][1] is not None]
        for what in (payloads, keys, tokens):
            if len(set(what)) < len(what):
                return f"it took a signal twice: {payloads}, keys {keys}, tokens {tokens}"
        if forced := [payload for operation, payload in taken if operation == "token" and not known[payload][1]]:
            return f"it took signals without a token: {forced}"
        order = [payload for payload, _, _ in self.sent if payload in payloads]
        if self.is_ordered and "token" not in self.script and payloads != order:
            return f"it took signals as {payloads} that were sent as {order}"
        return None

    def _wrong_effects(self, done: Sequence[str], effects: Sequence[str], *, is_cleaned: bool) -> str | None:
        steps = sorted(effect.partition(" ")[0] for effect in effects)
        expected = sorted([*(operation for operation in done if operation == "tx"), *["clean"] * is_cleaned])
        return None if steps == expected else f"its transactional steps left {steps}, not {expected}"
