"""Inputs and states: what a handler's signature says, and values checked against it with the path of what does not fit."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from durable_cluster.context import Context
from durable_cluster.decoding import sentence
from durable_cluster.envelope import encode
from durable_cluster.errors import AppError, InputError

KEY_CHARS_MAX = 255
NOT_OF_A_KEY = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """How to call a handler: with the context or without, awaited or not, and the type of its state."""

    takes_context: bool
    is_async: bool
    state: Any


def signature_of(function: Callable[..., Any], *, default: Any) -> Signature:
    """Read ``function``'s signature: ``(state)`` or ``(ctx: Context, state)``. Raises AppError naming what is wrong."""
    name = getattr(function, "__qualname__", repr(function))
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise AppError(f"step '{name}': {error}; define the types of its parameters at module level") from error
    parameters = list(inspect.signature(function).parameters.values())
    takes_context = bool(parameters) and hints.get(parameters[0].name) is Context
    rest = parameters[1:] if takes_context else parameters
    if len(rest) != 1 or rest[0].kind not in (rest[0].POSITIONAL_ONLY, rest[0].POSITIONAL_OR_KEYWORD):
        raise AppError(f"step '{name}' takes {len(rest)} states; write it as (state) or (ctx: Context, state)")
    return Signature(
        takes_context=takes_context,
        is_async=inspect.iscoroutinefunction(function),
        state=hints.get(rest[0].name, default),
    )


def input_of(function: Callable[..., Any]) -> tuple[bool, Any, Any]:
    """Whether a workflow's function takes an input, of what type, and what it returns. Raises AppError."""
    name = getattr(function, "__qualname__", repr(function))
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise AppError(
            f"workflow '{name}': {error}; define the types of its input and output at module level"
        ) from error
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) > 1 or any(
        one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters
    ):
        raise AppError(
            f"workflow '{name}' takes {len(parameters)} inputs; give it one (a Struct, a dataclass, a dict), or none"
        )
    input_type = hints.get(parameters[0].name, Any) if parameters else Any
    return bool(parameters), input_type, hints.get("return", Any)


def encoded_input(value: Any, *, decoder: msgspec.json.Decoder[Any], what: str) -> bytes:
    """``value`` as JSON that fits ``decoder``'s type. Raises InputError naming ``what``, the path and the mismatch."""
    try:
        encoded = encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {error}") from error
    try:
        decoded = decoder.decode(encoded)
    except msgspec.ValidationError as error:
        raise InputError(f"{what} does not fit {_type_name(decoder.type)}: {sentence(error, encoded)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not valid UTF-8: {error}") from error
    if type(value) is not decoder.type:
        unknown = _unknown_path(msgspec.json.decode(encoded), decoded, "")
        if unknown:
            raise InputError(f"{what} has a field '{unknown}' that {_type_name(decoder.type)} does not know")
    return encoded


def _type_name(of: Any) -> str:
    return getattr(of, "__name__", str(of))


def _unknown_path(given: Any, kept: Any, path: str) -> str | None:
    """The path of the first key in ``given`` (plain JSON) that decoding it as ``kept`` dropped, or None."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(kept, msgspec.Raw) or hasattr(kept, "model_dump"):
        return None  # it is kept as it is; a model says itself what it allows
    if isinstance(given, dict):
        fields = _fields(kept)
        for key, value in given.items():
            at = f"{path}.{key}".lstrip(".")
            if key in fields:
                pairs.append((at, value, fields[key]))
            else:
                return at
    elif isinstance(given, list) and isinstance(kept, list | tuple):
        pairs = [(f"{path}[{i}]", one, other) for i, (one, other) in enumerate(zip(given, kept, strict=False))]
    return next((found for at, one, other in pairs if (found := _unknown_path(one, other, at))), None)


def _fields(kept: Any) -> dict[str, Any]:
    """The values of an object by their names in JSON; a tag counts as one."""
    if isinstance(kept, msgspec.Struct):
        named = zip(kept.__struct_encode_fields__, kept.__struct_fields__, strict=True)
        tag = {kept.__struct_config__.tag_field: None} if kept.__struct_config__.tag_field else {}
        return {**tag, **{name: getattr(kept, field) for name, field in named}}
    if dataclasses.is_dataclass(kept):
        return {field.name: getattr(kept, field.name) for field in dataclasses.fields(kept)}
    return {str(key): value for key, value in kept.items()} if isinstance(kept, dict) else {}


def checked_key(key: str) -> str:
    """``key`` if it is one: 1 to 255 characters, no control characters. Raises InputError."""
    is_text = isinstance(key, str) and 1 <= len(key) <= KEY_CHARS_MAX
    if not is_text or NOT_OF_A_KEY.search(key):
        raise InputError(f"a key has 1 to 255 characters and no control characters; {str(key)[:40]!r} is none")
    return key
