"""Which schedules are run: all of them if they are few, else a sample by a seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from random import Random

import msgspec

from explorer.scheduler import Choose, Schedule, following

Play = Callable[[Choose], Schedule]
PROBES_MAX = 50
DEATHS = 0.1


class Explored(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a race was seen: schedules run, how many of them differ, how many there are (about, unless all were seen)."""

    race: str
    seed: int
    schedules: int
    distinct: int
    of_about: int
    is_all: bool
    seconds: float

    def __str__(self) -> str:
        what = f"all {self.distinct}" if self.is_all else f"{self.distinct} of about {self.of_about:,}"
        return f"{self.race}: {what} schedules, {self.schedules / self.seconds:.0f} a second, seed {self.seed}"


def explore(race: str, play: Play, *, seed: int, schedules: int) -> Explored:
    """Play so many schedules, or all if there are no more than that: how many there are is known from a few random ones."""
    begin = time.monotonic()
    random = Random(f"{seed}:{race}")
    words: set[str] = set()
    sizes: list[float] = []

    def walk() -> None:
        size = 1.0

        def choose(_: int, options: str) -> str:
            nonlocal size
            letter, chance = _drawn(random, options)
            size /= chance
            return letter

        words.add(play(choose).word)
        sizes.append(size)

    for _ in range(min(PROBES_MAX, schedules // 4)):
        walk()
    count = len(sizes)
    is_all = sum(sizes) / len(sizes) <= schedules
    if is_all:
        budget = 2 * schedules
        words.clear()
        for word in _each_word(play):
            words.add(word)
            count += 1
            if len(words) == budget:
                is_all = False
                break
    else:
        while count < schedules:
            walk()
            count += 1
    return Explored(
        race=race,
        seed=seed,
        schedules=count,
        distinct=len(words),
        of_about=len(words) if is_all else max(len(words), int(sum(sizes) / len(sizes))),
        is_all=is_all,
        seconds=time.monotonic() - begin,
    )


def _drawn(random: Random, options: str) -> tuple[str, float]:
    """A letter, and what its chance was: any actor is as likely as another, and dies now and then."""
    living = [letter for letter in options if letter.islower()]
    letter = random.choice(living)
    if letter.upper() not in options:
        return letter, 1 / len(living)
    if random.random() < DEATHS:
        return letter.upper(), DEATHS / len(living)
    return letter, (1 - DEATHS) / len(living)


def _each_word(play: Play) -> Iterator[str]:
    """Every schedule, depth first: one, then those that decide otherwise at its last decision, and so on back."""
    open_prefixes = [""]
    while open_prefixes:
        prefix = open_prefixes.pop()
        played = play(following(prefix))
        yield played.word
        for number in range(len(prefix), len(played.word)):
            taken = played.word[number]
            others = [letter for letter in played.options[number] if letter != taken]
            open_prefixes += [played.word[:number] + letter for letter in others]
