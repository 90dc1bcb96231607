"""What words of the command line stand for: a time, an attribute, a number, a name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime

import msgspec

from durable_cluster.errors import InputError
from durable_cluster.notes import Scalar, checked_attributes

ACTOR_MAX = 255

_scalar = msgspec.json.Decoder(Scalar)


def moment(text: str) -> datetime:
    """A date or a time in ISO 8601; without a time zone it is of this place."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text[:40]}' is no time: write it as 2030-01-31 or 2030-01-31T12:00:00+00:00"
        ) from error
    return at if at.tzinfo is not None else at.astimezone()


def attribute(text: str) -> tuple[str, Scalar]:
    """``name=value``; a value that is a number, a boolean or quoted text in JSON is that, any other is text."""
    name, is_given, value = text.partition("=")
    if not is_given:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no attribute: write it as NAME=VALUE")
    try:
        known: Scalar = _scalar.decode(value.encode())
    except (msgspec.DecodeError, UnicodeError):
        known = value
    try:
        checked_attributes({name: known})
    except (InputError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name, known


def seconds(text: str) -> float:
    """A number of seconds from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds")
    return number


def actor(text: str) -> str:
    """Who does something, for the audit."""
    if not 1 <= len(text) <= ACTOR_MAX or not text.isprintable():
        raise argparse.ArgumentTypeError(f"1 to {ACTOR_MAX} characters, none of them a control character")
    return text


def between(low: int, high: int) -> Callable[[str], int]:
    """Reads whole numbers in these bounds."""

    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {low} to {high:,}")
        return int(text)

    return number
