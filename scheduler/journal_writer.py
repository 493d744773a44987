"""The journal's file: bytes appended off the hot path, bounded, in two segments.

Owns the file and the thread that writes to it. The caller pays for a copy into a buffer; the thread waits for the
disk. A disk that is full, or slower than the engine, ends the journal, never the engine: the reason is logged once.
Must not know what the bytes mean, but for one thing: a segment begins with a header that the caller hands in.

    FILE      the segment being written
    FILE.1    the one before it; what was there is deleted when FILE takes its place
"""

from __future__ import annotations

import io
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from ..protocol.errors import StartupError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18  # handed to the thread at once: it wakes seldom
CHUNK_SECONDS = 1.0  # a record is on its way to the disk no later than this, if another follows it
QUEUE_BYTES = 64 << 20  # waiting for the disk; beyond it the disk is too slow
CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _NewSegment:
    header: bytes


class JournalWriter:
    """Appends to `path`, which begins with `header`. Raises `StartupError` if it can't be opened.

    `segment_bytes`: how many fill a segment, its header apart; the caller asks `full` and calls `begin_segment`.
    """

    def __init__(self, path: Path, header: bytes, segment_bytes: int) -> None:
        self.path = path
        self._segment_bytes = segment_bytes
        self._size = 0  # of the segment's records, those that are not written yet among them
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._since = 0.0  # time of the oldest record in the buffer
        self._handed = self._written = 0  # bytes; the first counted by the caller, the second by the thread
        self._problem: str | None = None
        self._queue: SimpleQueue[bytes | _NewSegment | None] = SimpleQueue()
        try:
            if path.exists() and path.stat().st_size:
                os.replace(path, previous(path))  # of an engine, or a life of the scheduler, that has ended
            self._file = _open(path)
            _write_all(self._file, header)
        except OSError as error:
            raise StartupError(f"the journal {path} can't be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> bool:
        """Whether nothing is written any more; why has been logged."""
        return self._problem is not None

    @property
    def full(self) -> bool:
        """Whether the segment has had its share."""
        return self._size >= self._segment_bytes and not self.stopped

    def append(self, record: bytes, now: float) -> None:
        """Add a record of the time `now` (seconds)."""
        if self._problem is not None:
            return
        if not self._buffer:
            self._since = now
        self._buffer.append(record)
        self._buffered += len(record)
        self._size += len(record)
        if self._buffered >= CHUNK_BYTES or now - self._since >= CHUNK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand over what is in the buffer."""
        if not self._buffer or self._problem is not None:
            return
        if self._handed - self._written > QUEUE_BYTES:
            self.stop(f"the disk is slower than the engine: {QUEUE_BYTES >> 20} MiB wait for it")
            return
        self._queue.put(b"".join(self._buffer))
        self._handed += self._buffered
        self._buffer, self._buffered = [], 0

    def begin_segment(self, header: bytes) -> None:
        """What is appended from now on stands in a new file behind `header`."""
        self.flush()
        self._queue.put(_NewSegment(header))
        self._size = 0

    def stop(self, reason: str) -> None:
        """Write nothing more. What was handed over still goes to the disk."""
        if self._problem is None:
            self._problem = reason
            logger.error("the journal %s ends here: %s", self.path, reason)

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        self.flush()
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        failed = False
        while (item := self._queue.get()) is not None:
            if failed:
                continue
            try:
                if isinstance(item, _NewSegment):
                    self._file.close()
                    os.replace(self.path, previous(self.path))
                    self._file = _open(self.path)
                    _write_all(self._file, item.header)
                else:
                    _write_all(self._file, item)
                    self._written += len(item)
            except OSError as error:
                failed = True
                self.stop(error.strerror or str(error))
        self._file.close()


def previous(path: Path) -> Path:
    """Where the segment before the one at `path` is."""
    return path.with_name(path.name + ".1")


def _open(path: Path) -> io.FileIO:
    private = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # prompts are in it
    return io.FileIO(private, "w")


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]
