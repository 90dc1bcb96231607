"""Plain ``def`` workflows: the function runs in a greenlet, which waits wherever an ``async def`` would await."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import greenlet


async def run(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns; awaits what its lines ask for on the way."""
    lines = greenlet.greenlet(function)
    lines.gr_context = greenlet.getcurrent().gr_context  # its own would know none of the caller's context variables
    asked = lines.switch(*args)
    while not lines.dead:
        try:
            value = await asked
        except BaseException as error:
            asked = lines.throw(error)
        else:
            asked = lines.switch(value)
    return asked


def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it comes to. For the lines of the function."""
    parent = greenlet.getcurrent().parent
    assert parent is not None
    return parent.switch(coroutine)
