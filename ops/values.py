"""What words of the command line stand for: a time, an attribute."""

from __future__ import annotations

import argparse
from datetime import datetime

import msgspec

from durable_cluster.errors import InputError
from durable_cluster.notes import Scalar, checked_attributes

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
