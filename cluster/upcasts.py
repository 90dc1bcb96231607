"""Values that older code wrote, read as the types of today: functions from an old type to a new one, for what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import inspect as types

from durable_cluster.decoding import decoder_of
from durable_cluster.envelope import encode
from durable_cluster.errors import AppError, HandlerError


class Upcast(msgspec.Struct, frozen=True):
    """``function`` makes a value of the new type of what ``reads`` reads."""

    old: Any
    reads: msgspec.json.Decoder[Any]
    function: Callable[[Any], Any]


class Upcasts:
    """Those of one App."""

    def __init__(self) -> None:
        self._to: dict[Any, list[Upcast]] = {}
        self._own: dict[Any, msgspec.json.Decoder[Any]] = {}

    def add(self, old: Any, new: Any, function: Callable[[Any], Any]) -> None:
        """From now on what does not fit ``new``, a class, is read as ``old`` and given to ``function``. Raises AppError."""
        told = f"the upcast from {_name(old)} to {_name(new)}"
        reads, own = decoder_of(old, f"{told}: the old type"), decoder_of(new, f"{told}: the new type")
        if getattr(types.type_info(new), "cls", None) is not new:
            raise AppError(
                f"{told}: the new type has to be a class with fields (a Struct, a dataclass, a TypedDict, a model)"
            )
        if self._leads_to(new, old):
            raise AppError(f"{told} closes a circle: values of {_name(old)} are made of those of {_name(new)} already")
        self._own[new] = own
        self._to.setdefault(new, []).append(Upcast(old, reads, function))

    def _leads_to(self, old: Any, new: Any) -> bool:
        return old is new or any(self._leads_to(old, upcast.old) for upcast in self._to.get(new, ()))

    def decoded(self, decoder: msgspec.json.Decoder[Any], encoded: bytes | msgspec.Raw) -> Any:
        """What ``decoder`` reads, if need be with parts of it upcast. Raises msgspec.DecodeError, HandlerError."""
        try:
            return decoder.decode(encoded)
        except msgspec.ValidationError:
            if not self._to:
                raise
            mended = self._mended(types.type_info(decoder.type), msgspec.json.decode(encoded))
            return decoder.decode(encode(mended))

    def _mended(self, type_: types.Type, value: Any) -> Any:
        """``value`` (plain JSON), each part that does not fit its type upcast where something upcasts to that."""
        if isinstance(type_, types.UnionType):
            return value if value is None else self._one_of(type_.types, value)
        inside = self._mended_inside(type_, value)
        new = getattr(type_, "cls", None)
        if new not in self._to or _fits(self._own[new], inside):
            return inside
        for upcast in self._to[new]:
            older = encode(self._mended(types.type_info(upcast.old), value))
            if _fits(upcast.reads, msgspec.Raw(older)):
                return self._upcast(upcast, new, upcast.reads.decode(older))
        return inside

    def _mended_inside(self, type_: types.Type, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._one_of(_field_types(type_, key), one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._one_of(_item_types(type_, index), one) for index, one in enumerate(value)]
        return value

    def _one_of(self, possible: Sequence[types.Type], value: Any) -> Any:
        """As the first of these types that makes something else of it."""
        for type_ in possible:
            mended = self._mended(type_, value)
            if mended is not value and mended != value:
                return mended
        return value

    def _upcast(self, upcast: Upcast, new: Any, old: Any) -> Any:
        try:
            return msgspec.json.decode(encode(upcast.function(old)))
        except Exception as error:
            raise HandlerError(
                f"the upcast from {_name(upcast.old)} to {_name(new)} failed: {type(error).__name__}: {error}"
            ) from error


def _fits(decoder: msgspec.json.Decoder[Any], value: Any) -> bool:
    try:
        decoder.decode(encode(value))
    except msgspec.ValidationError:
        return False
    return True


def _field_types(type_: types.Type, key: str) -> Sequence[types.Type]:
    """What stands under ``key`` of an object of this type, if it has such a field."""
    if isinstance(type_, types.DictType):
        return [type_.value_type]
    return [field.type for field in getattr(type_, "fields", ()) if field.encode_name == key]


def _item_types(type_: types.Type, index: int) -> Sequence[types.Type]:
    """What stands at ``index`` of an array of this type."""
    if isinstance(type_, types.TupleType):
        return type_.item_types[index : index + 1]
    if isinstance(type_, types.StructType) and type_.array_like:
        return [field.type for field in type_.fields[index : index + 1]]
    return [type_.item_type] if hasattr(type_, "item_type") else []


def _name(type_: Any) -> str:
    return getattr(type_, "__name__", str(type_))
