"""The races by their names: ``@race()`` puts a function there.

``rotations``: the race is also played with an actor that rotates these; at full size each race is, with either.
"""

from __future__ import annotations

from collections.abc import Callable

from explorer.scene import Race, Scene

RACES: dict[str, Race] = {}
ALL_RACES: dict[str, Race] = {}
"""``RACES``, and each beside a rotation of the log and of the timers."""


def race(*rotations: str) -> Callable[[Race], Race]:
    """Register a race, and once more for each rotation that it is run beside."""

    def register(function: Race) -> Race:
        RACES[function.__name__] = ALL_RACES[function.__name__] = function
        for of in ("log", "timers"):
            name = f"{function.__name__}_beside_a_rotation_of_{of}"
            ALL_RACES[name] = _beside_a_rotation(function, of)
            if of in rotations:
                RACES[name] = ALL_RACES[name]
        return function

    return register


def _beside_a_rotation(function: Race, of: str) -> Race:
    def set_scene(scene: Scene) -> None:
        function(scene)
        scene.rotation(of)

    return set_scene
