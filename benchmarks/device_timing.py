"""How long a kernel takes on the device, against what the card can do at most.

Owns the measured ceilings and the figures made of them and of a kernel's time; must not know any kernel. The clock is
the engine's own, `executor/backends/launch_clock.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fast_inference.executor.backends.check import relative_difference
from fast_inference.executor.backends.launch_clock import seconds_per_launch
from torch import Tensor

BEYOND_L2 = 256 << 20  # bytes to walk through so that none is found in the cache
LAUNCHES = 20  # in a graph, at least


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one shape. `launches` do the same work on buffers of their own, `BEYOND_L2` bytes in all."""

    name: str
    launches: Sequence[Callable[[], Tensor]]
    reference: Callable[[], Tensor]  # what the first of them must give
    size: int  # bytes that a launch has to read and write
    operations: int  # floating-point operations that it has to do


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card does at most, as measured."""

    copy: float  # bytes read and written per second by a kernel that goes over one large tensor and fills another
    product: float  # floating-point operations per second of a large bfloat16 matrix product


def copies_beyond_l2(size: int) -> int:
    """How many buffers of `size` bytes outgrow the cache."""
    return max(1, -(-BEYOND_L2 // size))


def measure_ceilings(device: torch.device) -> Ceilings:
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    side = 8192
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return Ceilings(
        copy=2 * source.nbytes / seconds_per_launch([lambda: torch.neg(source, out=target)], LAUNCHES),
        product=2 * side**3 / seconds_per_launch([lambda: a @ b], LAUNCHES),
    )


def figures(case: Case, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """The rates, and the share of the ceiling that binds: that of the resource which `case` would need for longer."""
    by_memory, by_product = case.size / ceilings.copy, case.operations / ceilings.product
    return {
        "name": case.name,
        "microseconds": seconds * 1e6,
        "bytes_per_second": case.size / seconds,
        "operations_per_second": case.operations / seconds,
        "bound": "copy" if by_memory > by_product else "product",
        "share": max(by_memory, by_product) / seconds,
    }


def largest_difference(case: Case) -> float:
    """Between the first launch and its reference, as the check of a backend at start takes it."""
    return relative_difference(case.launches[0](), case.reference())
