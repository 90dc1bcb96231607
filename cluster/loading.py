"""Finding an App by its address, ``module:name``, the way every process of a cluster does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from durable_cluster.app import App
from durable_cluster.errors import AppError


def load_app(address: str) -> App:
    """The App at ``module:name`` (``module`` alone means ``module:app``), importable from here. Raises AppError."""
    module_name, _, name = address.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "\0"):
            raise AppError(f"--app {address}: no module '{error.name}' to import from {here}") from error
        raise AppError(f"--app {address}: importing '{module_name}' failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name or "app", None)
    if isinstance(found, App):
        return found
    apps = sorted(key for key, value in vars(module).items() if isinstance(value, App))
    hint = f"it holds {', '.join(apps)}" if apps else "it holds no App at all"
    raise AppError(f"--app {address}: '{name or 'app'}' in module '{module_name}' is not an App; {hint}")
