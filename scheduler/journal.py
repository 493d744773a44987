"""The journal's format: what a file of it holds, record by record; reading it.

A file is a sequence of msgpack objects: a header, then one record for each call of the core that did something, in
order. Messages in it are frames of the wire's codec. Owns the format and its reader; `journal_writer.py` puts the
bytes into a file, `recorder.py` makes the records, `replay.py` runs them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgpack

from ..protocol.codec import encode
from ..protocol.config import EngineConfig
from ..protocol.errors import EngineError, InvalidRequest
from ..protocol.messages import PROTOCOL_VERSION, Step
from .core import EXECUTOR, Effect, Log, Send
from .redaction import hidden

FORMAT = "fast_inference journal"
FORMAT_VERSION = 1
READ_BYTES = 1 << 20
MOST_BYTES = 2**31 - 1  # of one record: a snapshot may be large

_PACKER = msgpack.Packer()
# (name, frame) is a message and whom it is for, (level, text) a line for the log
Output = tuple[str, bytes | str]


class JournalError(EngineError):
    """A file that is no journal, or one that this version can't read."""


class Call(IntEnum):
    """Which method of the core a record is of."""

    HANDLE = 0
    SCHEDULE = 1
    END_ALL = 2


@dataclass(frozen=True, slots=True)
class Header:
    """How a core must be set up for the records behind it. `snapshot`: its state (`snapshot.py`), None for a new one;
    `redacted`: prompts and generated tokens are replaced (`redaction.py`)."""

    config: EngineConfig
    redacted: bool
    snapshot: Any = None

    def pack(self) -> bytes:
        # the key is a secret, and a core knows nothing of journals
        settings = self.config.replace(api_key=None, journal=None, journal_redact=False)
        return _pack(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "protocol": PROTOCOL_VERSION,
                "config": dataclasses.asdict(settings),
                "redacted": self.redacted,
                "snapshot": self.snapshot,
            }
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One call. `frame`: the message that was handed in (`HANDLE`); `outputs`: what came out, None if the call
    raised."""

    call: Call
    now: float
    sender: str
    frame: bytes | None
    outputs: list[Output] | None

    def pack(self) -> bytes:
        return pack_record(self.call, self.now, self.sender, self.frame, self.outputs)


def pack_record(call: Call, now: float, sender: str, frame: bytes | None, outputs: list[Output] | None) -> bytes:
    """The bytes of a `Record` with these fields: making one first would cost more than packing it."""
    return _pack((int(call), now, sender, frame, outputs))


def outputs_of(result: list[Effect] | Step | None, *, redacted: bool) -> list[Output]:
    """What a call returned, as a record holds it. The frame of the last message is kept for its sender."""
    if isinstance(result, list):
        return [_output(effect, redacted) for effect in result]
    return [] if result is None else [_output(Send(EXECUTOR, result), redacted)]


def _output(effect: Effect, redacted: bool) -> Output:
    if isinstance(effect, Log):
        return effect.level, effect.text
    return effect.to, encode(hidden(effect.message)) if redacted else encode(effect.message, keep=True)


class Reader:
    """The records of one file, in order: `header`, then iterate. Raises `JournalError`, as iterating may."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self.size = path.stat().st_size
        except OSError as error:
            raise JournalError(f"{path} can't be read: {error.strerror}") from error
        self._unpacker = msgpack.Unpacker(self._file, read_size=READ_BYTES, max_buffer_size=MOST_BYTES)
        try:
            self.header = self._read_header()
        except JournalError:
            self.close()
            raise

    @property
    def position(self) -> int:
        """Bytes that have been read so far, of `size`."""
        return int(self._unpacker.tell())

    @property
    def cut_off(self) -> bool:
        """Whether, all records read, part of one is left: its writer was killed in the middle of it."""
        return self.position < self.size

    def __iter__(self) -> Iterator[Record]:
        try:
            for fields in self._unpacker:
                call, now, sender, frame, outputs = fields
                made = None if outputs is None else [(name, content) for name, content in outputs]
                yield Record(Call(call), float(now), sender, frame, made)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise JournalError(f"{self.path} is broken at byte {self.position}: {error}") from error

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> Header:
        try:
            fields = self._unpacker.unpack()
        except (ValueError, msgpack.UnpackException):
            fields = None
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise JournalError(f"{self.path} is no journal of fast_inference")
        version, protocol = fields.get("version"), fields.get("protocol")
        if version != FORMAT_VERSION or not isinstance(protocol, list) or protocol[:1] != [PROTOCOL_VERSION[0]]:
            raise JournalError(
                f"{self.path} has journal version {version} and protocol {protocol}, this is version {FORMAT_VERSION} "
                f"and protocol {list(PROTOCOL_VERSION)}"
            )
        try:
            return Header(EngineConfig(**fields["config"]), fields["redacted"], fields["snapshot"])
        except (KeyError, TypeError, InvalidRequest) as error:  # a setting that this version does not have
            raise JournalError(f"{self.path} was written with other settings: {error}") from error


def _pack(value: Any) -> bytes:
    packed: bytes = _PACKER.pack(value)
    return packed
