"""A calibration from a run that was recorded: the journal of an engine tells what each step held and how long it took.

Owns the reading of a journal as steps; must not know how a calibration is used. The steps are counted as the device
saw them, so a journal whose tokens are left out (`--journal-redact`) does as well. What lies between a client and the
scheduler is in no journal: `request` is 0 unless the caller has measured it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..protocol.codec import decode
from ..protocol.errors import InvalidRequest
from ..protocol.messages import Deliver, EngineInfo, ExecutorReady, Step, StepResult, StreamEnd
from ..scheduler.core import DETOKENIZER, EXECUTOR
from ..scheduler.journal import Call, JournalError, Reader, Record
from .costs import BUILT_IN, Calibration, MeasuredStep, calibration, fitted


@dataclass(slots=True)
class Observed:
    """What a journal tells of its run. Times in seconds."""

    info: EngineInfo | None = None
    steps: list[MeasuredStep] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # of each step: what it took beside its own time, or less than it
    copied_blocks: int = 0  # between device and host, in all steps
    copy_seconds: float = 0.0
    times: list[float] = field(default_factory=list)  # of each step: when its result came
    ends: list[StreamEnd] = field(default_factory=list)

    def outside(self, begun: float, ended: float) -> Observed:
        """What came before `begun` or after `ended`."""
        kept = [place for place, time in enumerate(self.times) if not begun <= time <= ended]
        return Observed(
            info=self.info,
            steps=[self.steps[place] for place in kept],
            gaps=[self.gaps[place] for place in kept],
            copied_blocks=self.copied_blocks,
            copy_seconds=self.copy_seconds,
            times=[self.times[place] for place in kept],
            ends=[end for end in self.ends if not begun <= end.finished <= ended],
        )

    def calibrated(self, name: str, *, request: float = 0.0) -> Calibration:
        """The device and the actors around it. Raises `InvalidRequest` for too few steps."""
        facts: dict[str, int] = {}
        if self.info is not None:
            facts = {
                "num_blocks": self.info.num_blocks,
                "block_size": self.info.block_size,
                "max_model_len": self.info.max_model_len,
            }
            if self.info.block_bytes:
                facts["block_bytes"] = self.info.block_bytes
        return fitted(
            self.steps,
            name=name,
            gap=max(sum(self.gaps) / len(self.gaps), 0.0) if self.gaps else 0.0,
            request=request,
            per_copy=self.copy_seconds / self.copied_blocks if self.copied_blocks else 0.0,
            **facts,
        )


class _Device:
    """How far each slot has come, as far as the steps say: those of a rotated journal's first requests don't."""

    def __init__(self) -> None:
        self._computed: dict[int, int] = {}
        self._known: dict[int, int] = {}

    def run(self, step: Step) -> tuple[int, int, int] | None:
        """(prefill_tokens, rows, context) of `step`; None if it names a slot that was filled before the journal."""
        for slot in step.retire.tolist():
            self._known.pop(slot, None)
        for admit in step.admit:
            self._computed[admit.slot], self._known[admit.slot] = admit.cached_len, len(admit.token_ids)
        admitted = {admit.slot for admit in step.admit}
        prefill = rows = context = 0
        whole = True
        for slot, count in zip(step.work_slots.tolist(), step.work_counts.tolist(), strict=True):
            known = self._known.get(slot)
            if known is None:
                whole = False
                continue
            computed = self._computed[slot]
            if known - computed == 1 and slot not in admitted:
                rows += 1
            else:
                prefill += count
            computed += count
            context += computed
            self._computed[slot] = computed
            if computed == known:
                self._known[slot] = known + 1
        return (prefill, rows, context) if whole else None


def observe(records: Iterable[Record]) -> Observed:
    """Read `records` of a journal, in order."""
    seen, device = Observed(), _Device()
    held: dict[int, tuple[float, tuple[int, int, int]]] = {}  # step -> when it was sent, what it holds
    last_end = 0.0
    for record in records:
        if record.call is Call.HANDLE and record.frame is not None and record.sender == EXECUTOR:
            message = decode(record.frame)
            if isinstance(message, ExecutorReady):
                seen.info, device = message.info, _Device()
                held.clear()
            elif isinstance(message, StepResult):
                found = held.pop(message.number, None)
                if found is not None and message.seconds > 0:
                    sent, counts = found
                    seen.steps.append(MeasuredStep(*counts, message.seconds))
                    seen.times.append(record.now)
                    # A result that waited while the host launched the step behind it is late, and that step's is early
                    # for it: its gap is below zero, and both together are right.
                    seen.gaps.append(record.now - max(sent, last_end) - message.seconds - message.copy_seconds)
                seen.copy_seconds += message.copy_seconds
                last_end = record.now
        for name, content in record.outputs or ():
            if name == EXECUTOR and isinstance(content, bytes):
                step = decode(content)
                if not isinstance(step, Step):
                    continue
                seen.copied_blocks += len(step.swap_out_from) + len(step.swap_in_from)
                work = device.run(step)
                if work is not None:
                    held[step.number] = (record.now, work)
            elif name == DETOKENIZER and isinstance(content, bytes):
                delivered = decode(content)
                if isinstance(delivered, Deliver):
                    seen.ends += delivered.ended
    return seen


def from_journal(path: Path) -> Calibration:
    """The calibration of the run whose journal is at `path`. Raises `InvalidRequest` for what is no journal, or one
    with too few steps."""
    try:
        reader = Reader(path)
        try:
            return observe(reader).calibrated(path.name)
        finally:
            reader.close()
    except JournalError as error:
        raise InvalidRequest(f"calibrate: {error.message}", param="calibrate") from None


def find_calibration(text: str) -> Calibration:
    """A built-in calibration by its name, one in a JSON file, or that of a journal. Raises `InvalidRequest`."""
    path = Path(text)
    if text in BUILT_IN or not path.is_file():
        return calibration(text)
    with path.open("rb") as file:
        first = file.read(1)
    return calibration(text) if first in (b"", b"{", b"[") else from_journal(path)
