"""JSON read as a type: what msgspec knows, and models that read themselves, as pydantic's do; what does not fit, with its path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from durable_cluster.envelope import encode_part
from durable_cluster.errors import AppError

VALUE_CHARS_MAX = 40


class Misfit(ValueError):
    """What a model says of JSON that is not its own: ``text``, and ``path``, from the model on."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(f"{path.removeprefix('.')}: {text}" if path else text)
        self.text = text
        self.path = path


def decoder_of(type_: Any, what: str) -> msgspec.json.Decoder[Any]:
    """Reads JSON as ``type_``. Raises AppError naming ``what``."""
    try:
        return msgspec.json.Decoder(type_, dec_hook=_read)
    except TypeError as error:
        raise AppError(f"{what} cannot be read from JSON: {error}") from error


def sentence(error: msgspec.ValidationError, encoded: bytes, *, names: Sequence[str] = ()) -> str:
    """msgspec says: Expected `int`, got `str` - at `$.lines[2].quantity`. The value that stands there is added.

    ``names``: of the elements, where ``encoded`` is an array of arguments.
    """
    text, path = _parted(error)
    value = _value_at(msgspec.json.decode(encoded), path)
    shown = "" if isinstance(value, dict | list) else f" ({msgspec.json.encode(value).decode()[:VALUE_CHARS_MAX]})"
    path = re.sub(r"^\$\.?", "", path)
    if names and (place := re.match(r"\[(\d+)\]", path)):
        path = names[int(place[1])] + path[place.end() :]
    return f"{path}: {text[:1].lower()}{text[1:]}{shown}" if path else f"{text}{shown}"


def _parted(error: msgspec.ValidationError) -> tuple[str, str]:
    """What is wrong, and where."""
    inner = error.__cause__
    if not isinstance(inner, Misfit):
        text, _, path = str(error).replace("`", "").partition(" - at ")
        return text, path
    outer = str(error).removeprefix(str(inner)).replace("`", "").removeprefix(" - at ")
    return inner.text, (outer or "$") + inner.path


def _read(type_: Any, value: Any) -> Any:
    """A model by its own rules; of another class, a value that is of it already."""
    validate = getattr(type_, "model_validate_json", None)
    if validate is not None:
        try:
            return validate(encode_part(value))
        except ValueError as error:
            _refuse(error)
    if isinstance(value, type_):
        return value
    raise TypeError(f"{getattr(type_, '__name__', type_)} cannot be read from JSON")


def _refuse(error: ValueError) -> NoReturn:
    """The first of the things that pydantic finds wrong."""
    errors = getattr(error, "errors", None)
    if errors is None:
        raise error
    first = errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    raise Misfit(first["msg"].replace("Input should be", "expected", 1), path) from error


def _value_at(value: Any, path: str) -> Any:
    """What stands at msgspec's ``path``, as far as it can be followed: ``[...]`` is any key of a mapping."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if name and isinstance(value, dict) and name in value:
            value = value[name]
        elif index.isdecimal() and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            break
    return value
