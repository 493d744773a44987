"""How long a kernel takes on the device, against what the card can do at most.

Owns the clock (events around a CUDA graph of many launches, so that the host has no part in it), the measured ceilings
and the figures made of both; must not know any kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fast_inference.executor.backends.check import relative_difference
from torch import Tensor

BEYOND_L2 = 256 << 20  # bytes to walk through so that none is found in the cache
LAUNCHES = 20  # in a graph, at least
REPLAYS = 7  # of which the median counts


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

    copy: float  # bytes read and written per second by a copy of one large tensor to another
    product: float  # floating-point operations per second of a large bfloat16 matrix product


def copies_beyond_l2(size: int) -> int:
    """How many buffers of `size` bytes outgrow the cache."""
    return max(1, -(-BEYOND_L2 // size))


def measure_ceilings(device: torch.device) -> Ceilings:
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return Ceilings(
        copy=2 * source.nbytes / seconds_per_launch([lambda: target.copy_(source)]),
        product=2 * side**3 / seconds_per_launch([lambda: a @ b]),
    )


def seconds_per_launch(launches: Sequence[Callable[[], Tensor]]) -> float:
    """The median over `REPLAYS` of one graph that holds all `launches`, as often as it takes to have `LAUNCHES`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they need
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    rounds = -(-LAUNCHES // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / (rounds * len(launches))


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
