"""Messages to bytes and back: `encode` and `decode` are exact inverses; decoding is strict.

A frame is msgpack `[type name, {field: value}]`; arrays are raw little-endian bytes. A reader and a writer for every
message are put together once, at import, from the dataclass annotations. An unknown type, a missing field, a wrong
type, a size over its limit raise `ProtocolError` naming the field; an unknown *field* is ignored, so that a newer
peer may add one. Must not know sockets or what a message means.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from . import messages
from .errors import InvalidRequest, ProtocolError
from .messages import Message

MAX_FRAME_BYTES = 64 << 20
MAX_STRING_BYTES = 16 << 20
MAX_ITEMS = 1 << 22
MAX_DEPTH = 24  # of untyped values (chat messages)

_Reader = Callable[[Any, str], Any]
_Writer = Callable[[Any], Any]


def encode(message: Message) -> bytes:
    """One message as one frame."""
    cls = type(message)
    return cast(bytes, msgpack.packb([cls.__name__, _WRITERS[cls](message)]))


def decode(frame: bytes | memoryview) -> Message:
    """One frame as one message. Raises `ProtocolError`, and nothing else, for anything that is not one."""
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        # strict_map_key stays off: logit_bias has integer keys
        value = msgpack.unpackb(
            frame,
            strict_map_key=False,
            max_str_len=MAX_STRING_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        # UnicodeDecodeError is a ValueError; TypeError: an unhashable map key
        raise ProtocolError(f"frame is not msgpack: {type(error).__name__}: {error}") from None
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise ProtocolError("frame must be [type name, fields]")
    reader = _READERS.get(value[0])
    if reader is None:
        raise ProtocolError(f"unknown message type {value[0]!r:.80}")
    return cast(Message, reader(value[1], value[0]))


# ---- readers: one closure per annotation -------------------------------------------------------------------------


def _wrong(path: str, wanted: str, value: Any) -> ProtocolError:
    return ProtocolError(f"{path} must be {wanted}, got {type(value).__name__} {value!r:.60}", param=path)


def _scalar_reader(kind: type) -> _Reader:
    def read(value: Any, path: str) -> Any:
        if type(value) is kind:
            return value
        raise _wrong(path, kind.__name__, value)

    return read


def _read_int(value: Any, path: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _wrong(path, "a 64-bit int", value)
    return value


def _read_float(value: Any, path: str) -> float:
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value)
    raise _wrong(path, "float", value)


def _read_plain(value: Any, path: str, depth: int = 0) -> Any:
    """An untyped JSON-like value: checked for depth only."""
    if depth > MAX_DEPTH:
        raise ProtocolError(f"{path} is nested deeper than {MAX_DEPTH}", param=path)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _wrong(path, "a map with str keys", key)
            _read_plain(item, path, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _read_plain(item, path, depth + 1)
    elif not isinstance(value, str | int | float | bool | None):
        raise _wrong(path, "plain data", value)
    return value


def _array_reader(dtype: str) -> _Reader:
    kind = np.dtype(dtype)

    def read(value: Any, path: str) -> Any:
        if type(value) is not bytes:
            raise _wrong(path, f"bytes of {kind.name}", value)
        if len(value) % kind.itemsize:
            raise ProtocolError(f"{path} has {len(value)} bytes, no multiple of {kind.itemsize}", param=path)
        return np.frombuffer(value, kind)

    return read


def _sequence_reader(item: _Reader, make: Callable[[list[Any]], Any]) -> _Reader:
    def read(value: Any, path: str) -> Any:
        if type(value) is not list:
            raise _wrong(path, "list", value)
        return make([item(v, path) for v in value])

    return read


def _dict_reader(key: _Reader, item: _Reader) -> _Reader:
    def read(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise _wrong(path, "map", value)
        return {key(k, path): item(v, path) for k, v in value.items()}

    return read


def _union_reader(readers: list[_Reader], optional: bool, kinds: str) -> _Reader:
    def read(value: Any, path: str) -> Any:
        if value is None and optional:
            return None
        if len(readers) == 1:
            return readers[0](value, path)
        for reader in readers:
            try:
                return reader(value, path)
            except ProtocolError:  # the next kind may fit; the last word is below
                continue
        raise _wrong(path, kinds, value)

    return read


def _reader_for(hint: Any) -> _Reader:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _array_reader(args[1])
    if origin in (Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        names = " or ".join(getattr(a, "__name__", str(a)) for a in kinds)
        return _union_reader([_reader_for(a) for a in kinds], len(kinds) < len(args), names)
    if origin is tuple:
        return _sequence_reader(_reader_for(args[0]), tuple)
    if origin is list:
        return _sequence_reader(_reader_for(args[0]), list)
    if origin is dict:
        return _dict_reader(_reader_for(args[0]), _reader_for(args[1]))
    if dataclasses.is_dataclass(hint):
        return _struct_reader(cast(type, hint))
    if hint is Any:
        return _read_plain
    if hint is int:
        return _read_int
    if hint is float:
        return _read_float
    if hint in (str, bool, bytes):
        return _scalar_reader(hint)
    raise TypeError(f"no wire form for {hint}")


def _struct_reader(cls: type) -> _Reader:
    hints = get_type_hints(cls, include_extras=True)
    fields = [
        (
            f.name,
            _reader_for(hints[f.name]),
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
        )
        for f in dataclasses.fields(cls)
    ]

    def read(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise _wrong(path, "map of fields", value)
        known = {}
        for name, reader, required in fields:
            if name in value:
                known[name] = reader(value[name], f"{path}.{name}")
            elif required:
                raise ProtocolError(f"{path}.{name} is missing", param=f"{path}.{name}")
        try:
            return cls(**known)
        except InvalidRequest as error:  # SamplingParams checks its own ranges
            raise ProtocolError(f"{path}: {error.message}", param=error.param) from None

    return read


# ---- writers -----------------------------------------------------------------------------------------------------


def _array_writer(dtype: str) -> _Writer:
    kind = np.dtype(dtype)

    def write(value: Any) -> Any:
        # msgpack takes any contiguous buffer as it is: no copy before the one into the frame
        return np.ascontiguousarray(value, kind).data

    return write


def _writer_for(hint: Any) -> _Writer | None:
    """None: the value goes as it is."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _array_writer(args[1])
    if origin in (Union, types.UnionType):
        inner = [w for a in args if a is not type(None) and (w := _writer_for(a)) is not None]
        if not inner:
            return None
        one = inner[0]  # only "X | None" unions hold anything that needs writing
        return lambda value: None if value is None else one(value)
    if origin in (tuple, list):
        item = _writer_for(args[0])
        if item is None:
            return None
        return lambda value: [item(v) for v in value]
    if origin is dict:
        item = _writer_for(args[1])
        return None if item is None else lambda value: {k: item(v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _struct_writer(cast(type, hint))
    return None


def _struct_writer(cls: type) -> _Writer:
    hints = get_type_hints(cls, include_extras=True)
    fields = [(f.name, _writer_for(hints[f.name])) for f in dataclasses.fields(cls)]

    def write(value: Any) -> Any:
        return {
            name: getattr(value, name) if writer is None else writer(getattr(value, name)) for name, writer in fields
        }

    return write


_TYPES: tuple[type, ...] = get_args(messages.Message)
_READERS: dict[str, _Reader] = {cls.__name__: _struct_reader(cls) for cls in _TYPES}
_WRITERS: dict[type, _Writer] = {cls: _struct_writer(cls) for cls in _TYPES}
