"""What a step of a device costs, and what lies between a client and the device.

    seconds = base + per_token * prefill_tokens + per_row * rows + per_context * context

The form is that of `scheduler/step_model.py`, and its terms mean the same. Owns the built-in calibrations, those in
files, and the fit of a calibration to steps that were measured. Must not know schedulers or workloads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import InvalidRequest
from ..scheduler.least_squares import non_negative

TERMS = ("base", "per_token", "per_row", "per_context")
LEAST_STEPS = 8  # two for each coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A device as the simulator sees it. Times in seconds."""

    name: str
    base: float  # of every step
    per_token: float  # known tokens in chunks
    per_row: float  # rows of one token
    per_context: float  # tokens whose keys the rows read
    per_copy: float = 0.0  # blocks copied between device and host memory
    gap: float = 0.0  # from the end of a step to the start of the next one, where that was there already
    request: float = 0.0  # from a client's sending to the scheduler, and from there back: both ways together
    num_blocks: int = 4096
    block_size: int = 16
    block_bytes: int = 2**20  # keys and values of one block
    max_model_len: int = 8192

    def seconds(self, prefill_tokens: int, rows: int, context: int) -> float:
        """How long such a step takes."""
        return self.base + self.per_token * prefill_tokens + self.per_row * rows + self.per_context * context

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step that ran, `seconds` long on the device. Counts as in `Calibration.seconds`."""

    prefill_tokens: int
    rows: int
    context: int
    seconds: float


# Derived from figures of this engine with llama-8b's shape in bf16 on one H200 (docs/performance.md): 3.95 ms a step
# with one row of 560 tokens, 4.78 with 32, 7.03 with 128, 11.55 with 256; prompts alone 41,604 tokens/s. Keys and
# values have 110 GB, 128 KiB a token, read at 4.1 TB/s; copies to the host are taken to run at 50 GB/s.
H200_LLAMA_8B = Calibration(
    name="h200-llama-8b",
    base=3.9e-3,
    per_token=23e-6,
    per_row=11e-6,
    per_context=32e-9,
    per_copy=42e-6,
    gap=0.01e-3,
    request=3.5e-3,
    num_blocks=52_000,
    block_bytes=2**21,
    max_model_len=32_768,
)
BUILT_IN = {calibration.name: calibration for calibration in (H200_LLAMA_8B,)}


def calibration(name_or_file: str) -> Calibration:
    """A built-in calibration by its name, or one from a JSON file, as `Calibration.to_json` or a benchmark writes it.

    A file may hold `steps` ([prefill_tokens, rows, context, seconds] each) in place of the four coefficients.
    Raises `InvalidRequest` naming the field that is missing or out of range.
    """
    if name_or_file in BUILT_IN:
        return BUILT_IN[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        known = ", ".join(BUILT_IN)
        raise InvalidRequest(
            f"calibrate must be {known}, a JSON file or a journal; got {name_or_file!r}", param="calibrate"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidRequest(f"calibrate: {path} is not JSON: {error}", param="calibrate") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"calibrate: {path} must hold an object, got {type(values).__name__}", param="calibrate")
    return _from_values(values, path)


def fitted(steps: Sequence[MeasuredStep], **others: Any) -> Calibration:
    """The calibration that explains `steps` best; `others` are the fields that steps say nothing about.

    Least squares with no coefficient below zero; a step's error counts the less the longer it took, as its spread
    grows with it. All steps together take as long as they did. Raises `InvalidRequest` for fewer than 8 steps.
    """
    if len(steps) < LEAST_STEPS:
        raise InvalidRequest(f"steps must be at least {LEAST_STEPS}, got {len(steps)}", param="steps")
    rows = np.array([(1, step.prefill_tokens, step.rows, step.context) for step in steps], np.float64)
    seconds = np.array([step.seconds for step in steps])
    weight = 1 / np.sqrt(np.maximum(seconds, 1e-9))
    weighted = rows * weight[:, None]
    found = np.array(non_negative((weighted.T @ weighted).tolist(), (weighted.T @ (seconds * weight)).tolist()))
    # what weights take from slow steps is given back to all: throughput and queues depend on the sum
    found *= seconds.sum() / max(float((rows @ found).sum()), 1e-12)
    return Calibration(**dict(zip(TERMS, found.tolist(), strict=True)), **others)


def _from_values(values: dict[str, Any], path: Path) -> Calibration:
    steps = values.pop("steps", None)
    values.setdefault("name", path.name)
    known = {field.name for field in fields(Calibration)}
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"calibrate: {path} has the unknown field {name!r}", param=name)
        if name != "name" and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise InvalidRequest(f"calibrate: {name} must be a number of 0 or more, got {value!r}", param=name)
    if steps is not None:
        return fitted([_step(number, step) for number, step in enumerate(steps)], **values)
    for name in TERMS:
        if name not in values:
            wanted = f"{', '.join(TERMS)} or steps"
            raise InvalidRequest(f"calibrate: {path} must have {wanted}; {name} is missing", param=name)
    return Calibration(**values)


def _step(number: int, values: Any) -> MeasuredStep:
    try:
        prefill, rows, context, seconds = values
        return MeasuredStep(int(prefill), int(rows), int(context), float(seconds))
    except (TypeError, ValueError):
        form = "[prefill_tokens, rows, context, seconds]"
        raise InvalidRequest(f"calibrate: steps[{number}] must be {form}, got {values!r:.80}", param="steps") from None
