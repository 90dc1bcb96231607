"""Payloads that a codec has made, on the command line: read by the App that ``--app`` names, else told to be coded."""

from __future__ import annotations

from typing import Any

from durable_cluster.app import App
from durable_cluster.codec import is_coded
from durable_cluster.loading import load_app
from durable_cluster.ops.terminal import pretty

CODED = "is coded: --app module:app names the App whose codec reads it"


def app_of(address: str | None) -> App | None:
    """The App, if one is named. Raises AppError."""
    return None if address is None else load_app(address)


def payload_lines(name: str, value: Any) -> list[str]:
    """A payload under its name: plain JSON values or ``Raw``."""
    if is_coded(value):
        return [f"  {name:9} {CODED}"]
    return [f"  {name}", *(f"    {line}" for line in pretty(value).splitlines())]
