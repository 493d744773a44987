"""A journal run again: the same calls of a new core must give the same outputs.

Owns the comparison and how a difference is told; must not know how a journal is shown or where it comes from. A
journal from a bug report is a test in one line: `assert_replays("bug.journal")`.
"""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.codec import decode
from .core import Effect, SchedulerCore
from .journal import Call, Output, Reader, Record, outputs_of
from .snapshot import thaw_core

PROGRESS_EVERY = 1000  # records


@dataclass(frozen=True, slots=True)
class Difference:
    """The first call whose outputs are not those of the journal. `record` counts from 1; `lines` say what differs,
    field by field."""

    record: int
    now: float
    call: str
    lines: list[str]

    def __str__(self) -> str:
        moment = datetime.fromtimestamp(self.now, UTC).isoformat(timespec="microseconds")
        return "\n".join([f"record {self.record} at {self.now!r} ({moment}): {self.call}", *self.lines])


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a replay: `difference` is None if every output was the same."""

    core: SchedulerCore
    records: int
    steps: int
    first: float  # times of the first and the last record, seconds
    last: float
    redacted: bool
    cut_off: bool  # the file ends within a record
    difference: Difference | None


def replay(
    path: str | Path, on_progress: Callable[[int, int], None] | None = None, followed: Iterable[str] = ()
) -> Replay:
    """Run the journal at `path` again, to its end or to the first difference.

    Args:
        on_progress: is given bytes done and bytes in all, now and then.
        followed: names of requests whose timelines are kept however many others end (`Replay.core.timelines`).

    Raises: `JournalError` for what is no journal, `SnapshotError` for one of another version of the scheduler.
    """
    reader = Reader(Path(path))
    try:
        return _replay(reader, on_progress, frozenset(followed))
    finally:
        reader.close()


def assert_replays(path: str | Path) -> None:
    """Raise `AssertionError`, which tells the first difference, unless the journal at `path` replays as it stands."""
    difference = replay(path).difference
    if difference is not None:
        raise AssertionError(str(difference))


def _replay(reader: Reader, on_progress: Callable[[int, int], None] | None, followed: frozenset[str]) -> Replay:
    header = reader.header
    core = SchedulerCore(header.config)
    if header.snapshot is not None:
        thaw_core(core, header.snapshot)
    core.stories.followed = followed
    count = steps = 0
    first = last = 0.0
    difference = None
    for count, record in enumerate(reader, start=1):
        first, last = first or record.now, record.now
        lines = _run(core, record, redacted=header.redacted)
        if record.call is Call.SCHEDULE and record.outputs:
            steps += 1
        if lines:
            difference = Difference(count, record.now, _name_of(record), lines)
            break
        if on_progress is not None and count % PROGRESS_EVERY == 0:
            on_progress(reader.position, reader.size)
    if on_progress is not None:
        on_progress(reader.position, reader.size)
    cut_off = difference is None and reader.cut_off
    return Replay(core, count, steps, first, last, header.redacted, cut_off, difference)


def _run(core: SchedulerCore, record: Record, *, redacted: bool) -> list[str]:
    """Make the call of `record`; returns what is different about its outputs."""
    try:
        outputs = outputs_of(_call(core, record), redacted=redacted)
    except Exception as error:  # noqa: BLE001  # the question is whether the journal's core raised as well
        if record.outputs is None:
            return []
        return [f"  raised {type(error).__name__}: {error}", f"  the journal has {len(record.outputs)} outputs"]
    if record.outputs is None:
        return ["  raised nothing; in the journal the scheduler failed here"]
    return [] if outputs == record.outputs else list(_different(record.outputs, outputs))


def _call(core: SchedulerCore, record: Record) -> Any:
    if record.call is Call.SCHEDULE:
        return core.schedule(record.now)
    if record.call is Call.END_ALL:
        return core.end_all(record.now)
    effects: list[Effect] = core.handle(decode(record.frame or b""), record.now, record.sender)
    return effects


def _name_of(record: Record) -> str:
    if record.frame is None:
        return record.call.name.lower()
    return f"handle {type(decode(record.frame)).__name__} from {record.sender!r}"


# ---- differences, field by field ---------------------------------------------------------------------------------


def _different(recorded: list[Output], replayed: list[Output]) -> Iterator[str]:
    for number, (old, new) in enumerate(itertools.zip_longest(recorded, replayed), start=1):
        if old == new:
            continue
        if old is None or new is None:
            name, content = old or new
            side = "the journal" if new is None else "the replay"
            yield f"  output {number} is only in {side}: {name}: {_shown(_message(content))}"
            continue
        if old[0] != new[0]:
            yield f"  output {number}: to {old[0]!r} in the journal, to {new[0]!r} in the replay"
        message = _message(old[1])
        for line in _fields(type(message).__name__, message, _message(new[1])):
            yield f"  output {number} to {old[0]}: {line}"


def _message(content: bytes | str) -> Any:
    return content if isinstance(content, str) else decode(content)


def _fields(path: str, old: Any, new: Any) -> Iterator[str]:
    """Where two values differ, down to the single field or array element."""
    if type(old) is not type(new):
        yield f"{path}: journal {_shown(old)}, replay {_shown(new)}"
    elif dataclasses.is_dataclass(old):
        for field in dataclasses.fields(old):
            yield from _fields(f"{path}.{field.name}", getattr(old, field.name), getattr(new, field.name))
    elif isinstance(old, np.ndarray):
        if old.shape != new.shape:
            yield f"{path}: journal {_shown(old.tolist())}, replay {_shown(new.tolist())}"
        elif old.tobytes() != new.tobytes():
            at = np.flatnonzero(old != new)
            i = int(at[0])
            yield f"{path}[{i}]: journal {old[i]}, replay {new[i]} ({len(at)} of {len(old)} differ)"
    elif isinstance(old, tuple | list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _fields(f"{path}[{index}]", a, b)
    elif old != new:
        yield f"{path}: journal {_shown(old)}, replay {_shown(new)}"


def _shown(value: Any) -> str:
    return f"{type(value).__name__}" if dataclasses.is_dataclass(value) else reprlib.repr(value)
