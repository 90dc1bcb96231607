"""Finding an App by its address, ``module:name``, the way every process of a cluster does."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from durable_cluster.app import App
from durable_cluster.errors import AppError

NAMES_SHOWN_MAX = 5


def load_app(address: str) -> App:
    """The App at ``module:name`` (``module`` alone means ``module:app``), importable from here. Raises AppError."""
    module_name, _, name = address.partition(":")
    name = name or "app"
    module = _imported(address, module_name)
    found = getattr(module, name, None)
    if isinstance(found, App):
        return found
    apps = sorted(key for key, value in vars(module).items() if isinstance(value, App))[:NAMES_SHOWN_MAX]
    hint = (
        f"name one of its Apps: {', '.join(f'{module_name}:{one}' for one in apps)}"
        if apps
        else "it holds no App at all"
    )
    what = "is not an App" if hasattr(module, name) else "is not there"
    raise AppError(f"--app {address}: '{name}' in module '{module_name}' {what}; {hint}")


def _imported(address: str, module_name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")) or module_name.endswith(".py"):
        raise AppError(f"--app {address}: '{module_name}' is no module name; write it as module:app, not as a file")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's code: a module may also end by sys.exit()
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise AppError(f"--app {address}: no module '{error.name}' to import from {here}") from error
        said = next(iter(str(error).splitlines()), "no reason given")
        raise AppError(
            f"--app {address}: importing '{module_name}' failed{_where(error)}: {type(error).__name__}: {said}"
        ) from error


def _where(error: BaseException) -> str:
    """The line of the file that raised, of a module that could be read at all."""
    if isinstance(error, SyntaxError):
        return ""  # it says so itself
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<frozen")]
    last = frames[-1]
    return "" if last.filename in (__file__, importlib.__file__) else f" at {last.filename}:{last.lineno}"
