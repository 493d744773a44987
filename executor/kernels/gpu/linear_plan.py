"""How a matrix product is cut among programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """How work is cut. `rows`, `outs`, `ins`: of one tile, powers of two of at least 16; `splits`: parts of a sum."""

    rows: int
    outs: int
    ins: int
    splits: int
    stages: int
    warps: int
    hopper: bool = False  # tiles come by the copy engine of such a GPU
