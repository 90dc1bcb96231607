"""Whether this program is a notebook or a prompt."""

from __future__ import annotations

import sys


def is_interactive() -> bool:
    """There a cell is run again when it was edited: of two definitions under one name the later counts, as with any function."""
    return hasattr(sys, "ps1")  # as the interpreter and IPython say it
