"""Kernels that start while the one in front of them runs out: programmatic dependent launch, on Hopper and later.

Owns where that can be done, and the two instructions of it; must not know any kernel. The start of a kernel costs a
microsecond or more, as much as the smaller ones of a decode step take. So each is launched early: it says that the next
may be, then waits until all in front have ended and what they wrote is there. Before that it may read only what was
written before the last kernel without such a launch, which is a step's embedding: the weights, what a step is told of
its rows, and what earlier steps have cached.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime import driver


def overlapped() -> dict[str, Any]:
    """Arguments of the launch of a kernel that begins with `await_results(OVERLAP)`."""
    return {"OVERLAP": True, "launch_pdl": True} if can_overlap() else {"OVERLAP": False}


@cache
def can_overlap() -> bool:
    """Whether kernels are compiled for a device that can launch them early."""
    if triton.knobs.runtime.interpret:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


@triton.jit
def await_results(OVERLAP: tl.constexpr):
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
