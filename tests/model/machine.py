"""What may happen, as rules that Hypothesis puts into any order and then shortens; I1 is asked after each.

Two workers run the product's own pages; what one holds, the other may take over, and either may die before any of its statements.
Nothing here depends on real time: the clock is the database's, set forward by a rule.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from explorer.actors import Actor
from explorer.audit import audit
from explorer.scene import Lab
from explorer.scheduler import Schedule, run
from explorer.worker import Worker
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from durable_cluster import Handle
from durable_cluster.errors import UnknownWorkflow
from durable_cluster.shards import upkeep
from durable_cluster.side_statements import sweep
from model.reference import Reference
from model.scripts import LONG_S, OPERATIONS

WORKERS = 2
SCRIPT_MAX = 4
ALIVE = ("running", "stuck")
STATEMENT_OF_DEATH_MAX = 12
KEYS = st.sampled_from([None, "k1", "k2"])
SCRIPTS = st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=SCRIPT_MAX)
NUMBERS = st.integers(0, WORKERS - 1)


_examples = itertools.count(1)


class Known(msgspec.Struct):
    """A workflow of this example."""

    handle: Handle
    reference: Reference
    tokens: list[str]


class Model(RuleBasedStateMachine):
    """One example is a part of a database of its own: its workflows' ids and keys are new."""

    lab: Lab
    workflows = Bundle("workflows")

    def __init__(self) -> None:
        super().__init__()
        self._example = next(_examples)
        self._payloads = itertools.count(1)
        self._known: dict[str, Known] = {}
        self._held: dict[int, str] = {}
        self._taken: dict[int, list[Any]] = {}
        self._since = str(self._one("select pg_snapshot_xmax(pg_current_snapshot())"))

    # Clients.

    @initialize(target=workflows, scripts=st.lists(SCRIPTS, min_size=1, max_size=3))
    def begin(self, scripts: list[list[str]]) -> Any:
        return multiple(*(self.start(script, None) for script in scripts))

    @rule(target=workflows, script=SCRIPTS, key=KEYS)
    def start(self, script: list[str], key: str | None) -> Any:
        state = {"script": script, "trace": []}
        own_key = key and f"{key} of {self._example}"
        handle = self.lab.app.named("script").start(state, key=own_key, tx=self.lab.control)
        if handle.id in self._known:
            assert key is not None, "two starts gave one workflow"
            return multiple()
        assert key is None or all(known.reference.key != key for known in self._known.values()), (
            "one key, two workflows"
        )
        self._known[handle.id] = Known(handle, Reference(script, key=key), [])
        return handle.id

    @rule(of=workflows, key=KEYS)
    def signal(self, of: str, key: str | None) -> None:
        self._send(self._known[of], key=key, token=None)

    @rule(of=workflows)
    def answer(self, of: str) -> None:
        known = self._known[of]
        self._send(known, key=None, token=self._token(known))

    @rule(of=workflows)
    def answer_again(self, of: str) -> None:
        """With a token that has been sent before."""
        for token in self._known[of].tokens[-1:]:
            self._send(self._known[of], key=None, token=token)

    @rule(of=workflows)
    def cancel(self, of: str) -> None:
        known = self._known[of]
        known.reference.is_cancelled |= known.handle.cancel("no more", tx=self.lab.control)

    @rule(of=workflows)
    def retry(self, of: str) -> None:
        self._retry(self._known[of])

    # Workers.

    @rule(number=NUMBERS)
    def work(self, number: int) -> None:
        worker = self._worker(number)
        text = self._held.pop(number, None)
        if text is not None:
            worker.run(text)
        else:
            worker.work()
        self._come_back(number)

    @rule(number=NUMBERS)
    def work_on(self, number: int) -> None:
        """Work until there is nothing in the log, and end what is detached."""
        self.work(number)
        while self._worker(number).work():
            pass
        self._come_back(number)
        self.take(number)
        self.complete(number)

    @rule(number=NUMBERS)
    def hold(self, number: int) -> None:
        """Claim, and do nothing yet."""
        if number not in self._held and (text := self._worker(number).claim()) is not None:
            self._held[number] = text
            self._disorder()

    @rule(number=NUMBERS, statement=st.integers(0, STATEMENT_OF_DEATH_MAX), is_seen=st.booleans())
    def die(self, number: int, statement: int, is_seen: bool) -> None:
        """Work, and die before this statement. ``is_seen``: a supervisor frees at once what it held."""
        worker = self._worker(number)
        text = self._held.pop(number, None)
        actor = Actor(
            "a",
            lambda _: worker.work() and None if text is None else worker.run(text),
            worker.connection,
            is_mortal=True,
            is_blocked=self.lab.is_blocked,
        )
        run([actor], lambda decision, _: "A" if decision == statement else "a", Schedule())
        assert actor.error is None, actor.error
        self._disorder()
        self._taken.pop(number, None)
        worker.has_fallen = True
        worker.renew(is_seen=is_seen)

    @rule(number=NUMBERS)
    def take_over(self, number: int) -> None:
        """Take all others for dead."""
        self._disorder()
        worker = self._worker(number)
        if number not in self._held:
            worker.work(takes_over=True)
        elif (text := worker.rescue()) is not None:
            worker.run(text)
        if worker.has_fallen:
            self._held.pop(number, None)
        self._come_back(number)

    @rule(number=NUMBERS)
    def take(self, number: int) -> None:
        """Begin with what is detached."""
        self._taken[number] = self._taken.get(number, []) + self._worker(number).take()

    @rule(number=NUMBERS)
    def complete(self, number: int) -> None:
        self._worker(number).complete(self._taken.pop(number, []))

    # Time, and upkeep.

    @rule(seconds=st.sampled_from([1.0, 6.0, 61.0, LONG_S + 1]))
    def advance(self, seconds: float) -> None:
        self.lab.advance(seconds)
        for known in self._known.values():
            known.reference.passed_s += seconds

    @rule()
    def sweep(self) -> None:
        sweep(self.lab.control)

    @rule()
    def rotate_timers(self) -> None:
        upkeep.rotate_timers(self.lab.control)

    @rule()
    def rotate_the_log(self) -> None:
        upkeep.keep_up(self.lab.control)

    # What must hold.

    @invariant()
    def each_has_one_live_continuation(self) -> None:
        for found in audit(self.lab.control, [*self._known], self._since):
            broken = found.broken(may_repeat=True)
            assert broken is None, broken

    def teardown(self) -> None:
        """Whatever was done, all workflows can be brought to an end, and have done what they should."""
        for number in range(WORKERS):
            self._worker(number).has_fallen = True
            self._worker(number).renew()
        self.lab.settle()
        for _ in range(2 * SCRIPT_MAX + 2):
            if not (alive := [known for known in self._known.values() if known.handle.status() in ALIVE]):
                break
            self.advance(LONG_S + 1)
            for known in alive:
                self._help(known)
            self.lab.settle()
        self.each_has_one_live_continuation()
        for known in self._known.values():
            self._demand_as_told(known)

    def _help(self, known: Known) -> None:
        """Give a workflow what it waits for; what it does not, tokens that were used, is refused by now."""
        used = set(known.tokens) - {self._token(known)}
        for token in used:
            assert not self._send(known, key=None, token=token), "a token that was used works again"
        place = self._one("select place from durable.locate(%s) where step is not null", known.handle.id)
        if place == "waiting":
            self._send(known, key=None, token=self._token(known))
        elif place == "stuck":
            self._retry(known)

    def _demand_as_told(self, known: Known) -> None:
        state = known.handle.state()
        output = msgspec.json.decode(state.output or "null")
        trace = output["output"] if state.status == "cancelled" else output
        effects = [step for (step,) in self._all("select step from effect where id = %s", known.handle.id)]
        wrong = known.reference.wrong(state.status, trace, effects)
        assert wrong is None, f"{wrong}; script {known.reference.script}, trace {trace}"

    # Help.

    def _worker(self, number: int) -> Worker:
        return self.lab.worker(number)

    def _come_back(self, number: int) -> None:
        """Who lost a window is somebody else now."""
        if self._worker(number).has_fallen:
            self._taken.pop(number, None)
            self._worker(number).renew()

    def _disorder(self) -> None:
        for known in self._known.values():
            known.reference.is_ordered = False

    def _send(self, known: Known, *, key: str | None, token: str | None) -> bool:
        """Whether the signal was taken."""
        payload = next(self._payloads)
        try:
            known.handle.signal("answer", payload, key=key, token=token, tx=self.lab.control)
        except UnknownWorkflow:
            return False
        known.reference.signal(payload, key=key, token=token)
        return True

    def _retry(self, known: Known) -> None:
        line = self._one("select line from durable.dead_letter where id = %s", known.handle.id)
        try:
            known.handle.retry({**msgspec.json.decode(line)["d"], "mended": True} if line else None)
        except UnknownWorkflow:
            assert line is None, "a dead letter cannot be retried"

    def _token(self, known: Known) -> str | None:
        """What its wait demands, if it demands one."""
        token: str | None = self._one(
            "select durable.token_of(w.id, w.token_seq, durable.secret()) from durable.wait w"
            " where w.id = %s and w.token_seq is not null",
            known.handle.id,
        )
        known.tokens += [token] * (token is not None)
        return token

    def _one(self, query: str, *arguments: object) -> Any:
        row = self.lab.control.execute(query.encode(), arguments or None).fetchone()
        return row and row[0]

    def _all(self, query: str, *arguments: object) -> list[Any]:
        return self.lab.control.execute(query.encode(), arguments or None).fetchall()
