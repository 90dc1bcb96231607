"""The races. Each is a function that sets a scene: what stands there, who acts, and what it may come to.

To add one, write such a function under ``@race()``.
"""

from __future__ import annotations

from durable_cluster import coordination
from explorer.flows import SHORT_S, TIMEOUT_S
from explorer.register import race
from explorer.scene import Scene

RESUMED = "got 1"
BOTH = ("got 1 2", "got 2 1")
CANCELLED = "cancelled"


# --- signals


@race("log")
def signal_before_the_wait(scene: Scene) -> None:
    flow = scene.start("wait")
    flow.ends_as(RESUMED)
    scene.client(lambda tx: flow.handle.signal("answer", 1, tx=tx))
    scene.consumer()
    scene.consumer()


@race("log", "timers")
def signal_while_the_wait_begins(scene: Scene) -> None:
    flow = scene.start("wait")
    flow.ends_as(RESUMED)
    scene.page(is_mortal=True)
    scene.signal(flow, 1)
    scene.page(is_mortal=True)


@race("timers")
def signal_against_the_timeout(scene: Scene) -> None:
    flow = scene.standing("wait", timeout=True)
    flow.ends_as(RESUMED, "late", takes_time=True)
    scene.signal(flow, 1)
    scene.page(is_mortal=True)
    scene.sweep(after_s=TIMEOUT_S + 1)


@race()
def signal_against_two_sweeps_of_the_timeout(scene: Scene) -> None:
    flow = scene.standing("wait", timeout=True)
    flow.ends_as(RESUMED, "late", takes_time=True)
    scene.signal(flow, 1)
    scene.page()
    scene.sweep(after_s=TIMEOUT_S + 1)
    scene.sweep()


@race()
def two_signals_and_a_wait(scene: Scene) -> None:
    flow = scene.standing("wait", times=2)
    flow.ends_as(*BOTH)
    scene.signal(flow, 1)
    scene.page(is_mortal=True)
    scene.signal(flow, 2)
    scene.page(is_mortal=True)


@race()
def two_signals_while_the_wait_begins(scene: Scene) -> None:
    flow = scene.start("wait", times=2)
    flow.ends_as(*BOTH)
    scene.page()
    scene.signal(flow, 1)
    scene.page()
    scene.signal(flow, 2)
    scene.page()


# --- cancel


@race("log")
def cancel_while_the_wait_begins(scene: Scene) -> None:
    flow = scene.start("wait")
    flow.ends_as(CANCELLED)
    scene.page(is_mortal=True)
    scene.cancel(flow)
    scene.page(is_mortal=True)


@race()
def cancel_against_a_signal(scene: Scene) -> None:
    flow = scene.standing("wait")
    flow.ends_as(CANCELLED, RESUMED)
    scene.signal(flow, 1)
    scene.page(is_mortal=True)
    scene.cancel(flow)
    scene.page(is_mortal=True)
    scene.consumer()


@race()
def cancel_against_two_signals(scene: Scene) -> None:
    flow = scene.standing("wait", times=2)
    flow.ends_as(CANCELLED, *BOTH)
    scene.signal(flow, 1)
    scene.page()
    scene.signal(flow, 2)
    scene.page()
    scene.cancel(flow)
    scene.page()


@race()
def cancel_and_signal_while_the_wait_begins(scene: Scene) -> None:
    flow = scene.start("wait")
    flow.ends_as(CANCELLED, RESUMED)
    scene.page()
    scene.signal(flow, 1)
    scene.page()
    scene.cancel(flow)
    scene.page()


@race("timers")
def cancel_against_the_timeout(scene: Scene) -> None:
    flow = scene.standing("wait", timeout=True)
    flow.ends_as(CANCELLED, "late")
    scene.cancel(flow)
    scene.page(is_mortal=True)
    scene.sweep(after_s=TIMEOUT_S + 1)


@race("timers")
def cancel_while_the_sleep_begins(scene: Scene) -> None:
    flow = scene.start("sleep")
    flow.ends_as(CANCELLED)
    scene.page(is_mortal=True)
    scene.cancel(flow)
    scene.page(is_mortal=True)


@race("timers")
def cancel_while_the_sleep_ends(scene: Scene) -> None:
    flow = scene.standing("sleep")
    flow.ends_as(CANCELLED, "slept")
    scene.cancel(flow)
    scene.page(is_mortal=True)
    scene.sweep(after_s=TIMEOUT_S + 1)
    scene.consumer()


# --- joins


@race("log")
def last_two_children_at_once(scene: Scene) -> None:
    parent, children = scene.family("join", 2)
    parent.ends_as("joined 2")
    for child in children:
        child.ends_as(RESUMED)
        scene.answer(child)
        scene.start("nap").ends_as("slept", takes_time=True)  # so that the page takes several statements
        scene.page(is_mortal=True)
    scene.consumer(takes_over=True)


@race()
def last_child_while_the_wait_for_it_begins(scene: Scene) -> None:
    parent, (child,) = scene.family("spawn", 1)
    parent.ends_as("joined 1")
    child.ends_as(RESUMED)
    for flow in (child, parent):
        scene.answer(flow)
        scene.page(is_mortal=True)


@race("timers")
def last_child_against_the_timeout(scene: Scene) -> None:
    parent, (child,) = scene.family("join", 1, timeout=True)
    parent.ends_as("joined 1", "late", takes_time=True)
    child.ends_as(RESUMED)
    scene.answer(child)
    scene.page(is_mortal=True)
    scene.sweep(after_s=TIMEOUT_S + 1)


@race()
def last_child_while_its_parent_is_cancelled(scene: Scene) -> None:
    parent, (child,) = scene.family("join", 1)
    parent.ends_as("joined 1", CANCELLED)
    child.ends_as(RESUMED, CANCELLED)
    scene.answer(child)
    scene.page(is_mortal=True)
    scene.cancel(parent)
    scene.page(is_mortal=True)
    scene.consumer()


@race()
def cancel_while_children_are_spawned(scene: Scene) -> None:
    parent = scene.start("join", child="wait", children=2)
    parent.ends_as(CANCELLED)
    scene.page(is_mortal=True)
    scene.cancel(parent)
    scene.page(is_mortal=True)


@race("log")
def redelivery_of_the_step_that_spawns(scene: Scene) -> None:
    parent = scene.start("join", child="pass", children=2, is_paid=True)
    parent.ends_as("joined 2")
    scene.page(is_mortal=True)
    scene.consumer(takes_over=True)


# --- pauses and limits


@race()
def resume_while_a_page_puts_aside(scene: Scene) -> None:
    scene.may_repeat = True
    flow = scene.start("go")
    flow.ends_as("worked")
    flow.handle.pause()
    scene.page(is_mortal=True)
    scene.client(lambda tx: coordination.resume(tx, "workflow", flow.handle.id) and None)
    scene.consumer(takes_over=True)


@race()
def cancel_while_a_page_puts_aside(scene: Scene) -> None:
    scene.may_repeat = True
    flow = scene.start("go")
    flow.ends_as(CANCELLED)
    flow.handle.pause()
    scene.page(is_mortal=True)
    scene.cancel(flow)
    scene.page(is_mortal=True)


@race("log")
def last_permit(scene: Scene) -> None:
    """One of two holds it; who gives it back lets the other pass, or whoever takes over."""
    scene.may_repeat = True
    for _ in range(2):
        flow = scene.start("permit")
        flow.ends_as("permitted")
        scene.lab.settler.work()
        scene.page(is_mortal=True)
    scene.consumer(takes_over=True)


@race()
def cancel_of_one_that_waits_for_a_permit(scene: Scene) -> None:
    scene.may_repeat = True
    holder, waiting = scene.start("permit"), scene.start("permit")
    holder.ends_as("permitted")
    waiting.ends_as("permitted", CANCELLED)
    scene.lab.settler.work()
    scene.page(is_mortal=True)
    scene.cancel(waiting)
    scene.page(is_mortal=True)
    scene.consumer(takes_over=True)


# --- redelivery


@race("log")
def redelivery_of_the_step_that_waits(scene: Scene) -> None:
    flow = scene.start("wait", is_paid=True)
    flow.ends_as(RESUMED)
    scene.page(is_mortal=True)
    scene.consumer(takes_over=True)
    scene.signal(flow, 1)


@race()
def redelivery_of_the_step_that_waits_and_a_signal(scene: Scene) -> None:
    flow = scene.start("wait")
    flow.ends_as(RESUMED)
    scene.page(is_mortal=True)
    scene.signal(flow, 1)
    scene.page(is_mortal=True)
    scene.consumer(takes_over=True)


@race("timers")
def redelivery_of_the_step_that_sleeps(scene: Scene) -> None:
    flow = scene.start("nap", is_paid=True)
    flow.ends_as("slept", takes_time=True)
    scene.page(is_mortal=True)
    scene.consumer(takes_over=True)


@race()
def redelivery_of_one_page_of_a_window(scene: Scene) -> None:
    for flow in (scene.start("go", is_paid=True), scene.start("go", is_paid=True)):
        flow.ends_as("worked")
    scene.page(is_mortal=True, lines_max=1)
    scene.consumer(takes_over=True, lines_max=1)


@race()
def redelivery_of_a_signal_against_the_timeout(scene: Scene) -> None:
    flow = scene.standing("wait", timeout=True)
    flow.ends_as(RESUMED, "late", takes_time=True)
    scene.signal(flow, 1)
    scene.page(is_mortal=True)
    scene.sweep(after_s=TIMEOUT_S + 1)
    scene.consumer(takes_over=True)


# --- starts


@race()
def two_starts_with_one_key(scene: Scene) -> None:
    key = scene.new_key
    flow = scene.keyed(key)
    flow.ends_as("pass")
    scene.starter(key, is_mortal=True)
    scene.starter(key)
    scene.consumer()


@race()
def three_starts_with_one_key(scene: Scene) -> None:
    key = scene.new_key
    flow = scene.keyed(key)
    flow.ends_as("pass")
    scene.starter(key, is_mortal=True)
    scene.starter(key, is_mortal=True)
    scene.starter(key)


# --- timers


@race("timers")
def late_commit_of_a_timer_against_two_sweeps(scene: Scene) -> None:
    other, flow = scene.standing("nap"), scene.start("nap")
    flow.ends_as("slept", takes_time=True)
    other.ends_as("slept")
    scene.page()
    scene.sweep(after_s=SHORT_S + 1)
    scene.sweep(after_s=SHORT_S + 1)


# --- detached steps


@race()
def completion_of_a_detached_step_against_its_redelivery(scene: Scene) -> None:
    flow = scene.standing("work")
    flow.ends_as("worked")
    owner = scene.completion(is_mortal=True)
    scene.redelivery(owner)


@race()
def completion_of_a_detached_step_against_cancel(scene: Scene) -> None:
    flow = scene.standing("work")
    flow.ends_as("worked", CANCELLED)
    scene.may_repeat = True
    scene.completion(is_mortal=True)
    scene.cancel(flow)
    scene.page(is_mortal=True)
    scene.consumer()


@race()
def cancel_against_completion_and_redelivery_of_a_detached_step(scene: Scene) -> None:
    flow = scene.standing("work")
    flow.ends_as("worked", CANCELLED)
    scene.may_repeat = True
    owner = scene.completion()
    scene.redelivery(owner)
    scene.cancel(flow)
    scene.page()
