"""The races of permits with the sweep that deletes the counts of keys which nobody uses."""

from __future__ import annotations

from explorer.register import race
from explorer.scene import Scene


@race()
def permit_of_a_key_that_is_swept(scene: Scene) -> None:
    """Its count is there from an earlier use, and is deleted while somebody takes one."""
    scene.may_repeat = True
    used = scene.start("permit")
    used.ends_as("permitted")
    scene.lab.settle()
    scene.start("permit").ends_as("permitted")
    scene.lab.settler.work()
    scene.page(is_mortal=True)
    scene.limit_sweep(is_mortal=True)


@race()
def permit_given_back_while_its_key_is_swept(scene: Scene) -> None:
    scene.may_repeat = True
    flow = scene.start("permit")
    flow.ends_as("permitted")
    for _ in range(2):
        scene.lab.settler.work()
    scene.page()
    scene.limit_sweep()
