"""Messages to bytes and back: `encode` and `decode` are exact inverses; decoding is strict.

A frame is msgpack `[type name, {field: value}]`; arrays are raw little-endian bytes; a field that holds its default
may be left out. A reader and a writer for every message are put together once, at import, from the dataclass
annotations. An unknown type, a missing field, a wrong type, a size over its limit raise `ProtocolError` naming the
field; an unknown *field* is ignored, so that a newer peer may add one. Must not know sockets or what a message
means.
"""

from __future__ import annotations

import dataclasses
import reprlib
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

_Reader = Callable[[Any], Any]
_Writer = Callable[[Any], Any]


class _Misfit(Exception):
    """A value that does not fit; collects its path on the way out, so that a value that fits costs no path."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: list[str] = []


# A message and its frame, for the one who encodes it next.
_kept: tuple[Message | None, bytes] = (None, b"")


def encode(message: Message, *, keep: bool = False) -> bytes:
    """One message as one frame. Raises `ProtocolError` for what no frame can hold: an integer over 64 bits, text that
    is no Unicode (a lone surrogate from JSON), too many bytes.

    With `keep`, the next call for this very object, which must not change until then, gets the same frame: who
    records a message before it is sent does not make its sender encode it again."""
    global _kept
    if message is _kept[0]:
        return _kept[1]
    cls = type(message)
    try:
        frame = cast(bytes, msgpack.packb([cls.__name__, _WRITERS[cls](message)]))
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"{cls.__name__} can't be sent: {error}") from None
    if len(frame) > MAX_FRAME_BYTES:  # its receiver would cut the connection
        raise ProtocolError(f"{cls.__name__} of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    if keep:
        _kept = (message, frame)
    return frame


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
    name, fields = value
    reader = _READERS.get(name)
    if reader is None:
        raise ProtocolError(f"unknown message type {name!r:.80}")
    try:
        return cast(Message, reader(fields))
    except _Misfit as misfit:
        path = ".".join([name, *reversed(misfit.path)])
        raise ProtocolError(f"{path} {misfit.problem}", param=path) from None


# ---- readers: one closure per annotation -------------------------------------------------------------------------


def _wrong(wanted: str, value: Any) -> _Misfit:
    return _Misfit(f"must be {wanted}, got {type(value).__name__} {reprlib.repr(value)}")


def _scalar_reader(kind: type) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise _wrong(kind.__name__, value)

    return read


def _read_int(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _wrong("a 64-bit int", value)
    return value


def _read_float(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value)
    raise _wrong("float", value)


def _read_plain(value: Any, depth: int = 0) -> Any:
    """An untyped JSON-like value: checked for depth only."""
    if depth > MAX_DEPTH:
        raise _Misfit(f"is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _wrong("a map with str keys", key)
            _read_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _read_plain(item, depth + 1)
    elif not isinstance(value, str | int | float | bool | None):
        raise _wrong("plain data", value)
    return value


def _array_reader(dtype: str) -> _Reader:
    kind = np.dtype(dtype)
    size = kind.itemsize
    frombuffer = np.frombuffer

    def read(value: Any) -> Any:
        if type(value) is not bytes:
            raise _wrong(f"bytes of {kind.name}", value)
        if len(value) % size:
            raise _Misfit(f"has {len(value)} bytes, no multiple of {size}")
        return frombuffer(value, kind)

    return read


def _sequence_reader(item: _Reader, make: Callable[[list[Any]], Any]) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _wrong("list", value)
        return make([item(v) for v in value])

    return read


def _read_texts(value: Any) -> list[str]:
    """`list[str]`, which is long in a `TextBatch`: checked without a call per item."""
    if type(value) is not list:
        raise _wrong("list", value)
    if not set(map(type, value)) <= {str}:
        raise _wrong("str", next(item for item in value if type(item) is not str))
    return value


def _dict_reader(key: _Reader, item: _Reader) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _wrong("map", value)
        return {key(k): item(v) for k, v in value.items()}

    return read


def _union_reader(readers: list[_Reader], optional: bool, kinds: str) -> _Reader:
    def read(value: Any) -> Any:
        if value is None and optional:
            return None
        if len(readers) == 1:
            return readers[0](value)
        for reader in readers:
            try:
                return reader(value)
            except _Misfit:  # the next kind may fit; the last word is below
                continue
        raise _wrong(kinds, value)

    return read


def _reader_for(hint: Any) -> _Reader:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _array_reader(args[1])
    if origin in (Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        names = " or ".join(getattr(a, "__name__", str(a)) for a in kinds)
        return _union_reader([_reader_for(a) for a in kinds], len(kinds) < len(args), names)
    if hint == list[str]:
        return _read_texts
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


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _struct_reader(cls: type) -> _Reader:
    hints = get_type_hints(cls, include_extras=True)
    readers = {f.name: _reader_for(hints[f.name]) for f in dataclasses.fields(cls)}
    required = frozenset(f.name for f in dataclasses.fields(cls) if _required(f))

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _wrong("map of fields", value)
        known = {}
        name = ""
        try:
            for name, item in value.items():
                if (reader := readers.get(name)) is not None:  # else a newer peer's field
                    known[name] = reader(item)
        except _Misfit as misfit:
            misfit.path.append(name)
            raise
        if not known.keys() >= required:
            missing = _Misfit("is missing")
            missing.path.append(min(required - known.keys()))
            raise missing
        try:
            return cls(**known)
        except InvalidRequest as error:  # SamplingParams checks its own ranges
            raise _Misfit(f"is refused: {error.message}") from None

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
        inside = _writer_for(args[1])
        return None if inside is None else lambda value: {k: inside(v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _struct_writer(cast(type, hint))
    return None


_NO_DEFAULT = object()


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """The object that stands in a field nobody gave; a new list or dict each time counts as none."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _NO_DEFAULT


def _struct_writer(cls: type) -> _Writer:
    """A field that holds its default object is left out: the reader puts it back."""
    hints = get_type_hints(cls, include_extras=True)
    fields = [(f.name, _writer_for(hints[f.name]), _default_of(f)) for f in dataclasses.fields(cls)]

    def write(value: Any) -> Any:
        out = {}
        for name, writer, default in fields:
            item = getattr(value, name)
            if item is not default:
                out[name] = item if writer is None else writer(item)
        return out

    return write


_TYPES: tuple[type, ...] = get_args(messages.Message)
_READERS: dict[str, _Reader] = {cls.__name__: _struct_reader(cls) for cls in _TYPES}
_WRITERS: dict[type, _Writer] = {cls: _struct_writer(cls) for cls in _TYPES}
