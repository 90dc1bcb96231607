"""One schedule: who makes the next statement, until all have ended; and the word that says it again.

A word has a letter a decision: ``a`` is the next statement of actor a, ``A`` its death before that statement. What waits for a
lock cannot be chosen; what a lock's release sets free goes on by itself, up to its next statement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from explorer.actors import Actor, Status, is_a_deadlock_of

Choose = Callable[[int, str], str]
"""Which of the letters, for the decision of this number."""
DEADLOCK_S_MAX = 10.0
STATEMENTS_MAX = 1_000


class Stuck(AssertionError):
    """The actors do not come to an end."""


class Schedule:
    """What was decided: ``word``, and of which letters each time; ``story``: the statements, for people."""

    def __init__(self) -> None:
        self.word = ""
        self.options: list[str] = []
        self.story: list[str] = []


def run(actors: Sequence[Actor], choose: Choose, schedule: Schedule) -> None:
    """Drive the actors to their ends. Raises Stuck."""
    for actor in actors:
        actor.begin()
    while True:
        _look_at_blocked(actors)
        options = "".join(
            letter
            for actor in actors
            if actor.status is Status.READY
            for letter in (actor.letter, actor.letter.upper() * actor.is_mortal)
        )
        if not options:
            if all(actor.status is Status.DONE for actor in actors):
                return
            _await_a_way_out(actors, schedule)
            continue
        if len(schedule.word) > STATEMENTS_MAX:
            raise Stuck(f"more than {STATEMENTS_MAX} statements: {schedule.word[-60:]}")
        letter = choose(len(schedule.word), options)
        actor = next(one for one in actors if one.letter == letter.lower())
        schedule.word += letter
        schedule.options.append(options)
        is_killed = letter.isupper()
        before = actor.next_statement
        actor.go_on(is_killed=is_killed)
        waits = ", which waits" if actor.status is Status.BLOCKED else ""
        schedule.story.append(f"{actor.letter} {'dies before ' if is_killed else ''}{before}{waits}")


def _look_at_blocked(actors: Sequence[Actor]) -> None:
    """Those that were set free go on; the end of one may set free another."""
    was = ""
    while (now := "".join(a.letter for a in actors if a.status is Status.BLOCKED)) != was:
        was = now
        for actor in actors:
            if actor.status is Status.BLOCKED:
                actor.look()


def _await_a_way_out(actors: Sequence[Actor], schedule: Schedule) -> None:
    """All wait for each other, or for the server: it finds deadlocks, and ends one of the statements."""
    assert is_a_deadlock_of(list(actors))
    blocked = [actor for actor in actors if actor.status is Status.BLOCKED]
    pauses = int(DEADLOCK_S_MAX * 1000 / len(blocked))
    if not any(actor.await_answer(0.001) for _ in range(pauses) for actor in blocked):
        raise Stuck(f"all wait for a lock: {schedule.word}")


def following(word: str) -> Choose:
    """Decide as the word says; beyond its end, and where its letter cannot be, the first that can."""
    return lambda number, options: word[number] if word[number : number + 1] in [*options] else options[0]
