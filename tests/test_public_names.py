"""Whatever a program may import is documented: it has a docstring, and docs/api.md has its first sentence.

``python tests/test_public_names.py > docs/api.md`` writes that page anew.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import durable_cluster

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# Public names

What `from durable_cluster import …` gives, each with the first sentence of its docstring; `help(durable_cluster.App)` has the rest,
with units and errors. Anything else is not public. Errors are a tree, drawn in `cluster/errors.py`. Kept true by
`tests/test_public_names.py`, which also writes it.

| name | |
|---|---|
"""

ALIASES = {
    "Continuation": "What a step of a machine returns: made by `ctx.goto`, `ctx.done` and the others of `Context`."
}
"""Names of types that cannot have a docstring."""


def members(name: str) -> Iterator[tuple[str, Any]]:
    """A name and, of a class, its own public methods and properties."""
    thing = getattr(durable_cluster, name)
    yield name, thing
    for member in dir(thing) if inspect.isclass(thing) else []:
        found = inspect.getattr_static(thing, member)
        found = getattr(found, "fget", None) or getattr(found, "__func__", found)
        if (
            not member.startswith("_")
            and isinstance(found, FunctionType)
            and found.__module__.startswith("durable_cluster")
        ):
            yield f"{name}.{member}", found


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(
        f"| `{name}` | {ALIASES.get(name) or sentence(getattr(durable_cluster, name))} |\n" for name in names()
    )


def names() -> list[str]:
    return sorted(durable_cluster.__all__, key=lambda name: (name[0].islower(), name.lower()))


def sentence(thing: Any) -> str:
    """The first of its docstring, on one line, as a cell of a table."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


@pytest.mark.parametrize("name", durable_cluster.__all__)
def test_a_public_name_and_its_methods_have_docstrings(name: str) -> None:
    assert [named for named, thing in members(name) if len((thing.__doc__ or "").strip()) < 10] == []


def test_methods_are_looked_at() -> None:
    found = {named for name in durable_cluster.__all__ for named, _ in members(name)}
    assert {"App.run", "Handle.result", "Context.tx", "WorkflowHandle.result", "Results.values"} <= found


def test_the_page_has_each_name_with_its_sentence() -> None:
    assert PAGE.read_text("utf-8") == page(), "python tests/test_public_names.py > docs/api.md"


if __name__ == "__main__":
    print(page(), end="")
