"""How long a kernel takes on the device: for a moment, or while it keeps the card busy and warm.

Must not know any kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

REPLAYS = 7  # of which the median counts
SETTLED = 1 / 3  # the part of a long measurement that does not count


def seconds_per_launch(launches: Sequence[Callable[[], Tensor]], least: int) -> float:
    """The median over `REPLAYS` of one graph that holds all `launches`, as often as it takes to have `least`: the host
    has no part in it."""
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they need
        launches[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()  # nothing else is to run on the device meanwhile
    rounds = -(-least // len(launches))
    graph = torch.cuda.CUDAGraph()
    # thread_local: whatever other threads of the process do.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for launch in launches:
                launch()
    graph.replay()
    return statistics.median(_seconds([graph.replay]) for _ in range(REPLAYS)) / (rounds * len(launches))


def seconds_at_length(launches: Sequence[Callable[[], Tensor]], seconds: float) -> float:
    """The mean over the later part of `seconds` in which all `launches` are made again and again, by when the card has
    found the clock that its power allows. For kernels that take longer than the host needs to launch them."""
    times: list[float] = []
    began = now = time.monotonic()
    while not times or now - began < seconds:
        taken = _seconds(launches)
        now = time.monotonic()
        if now - began > SETTLED * seconds:
            times.append(taken)
    return statistics.fmean(times) / len(launches)


def _seconds(launches: Sequence[Callable[[], object]]) -> float:
    """What the device takes for all of them, waited for."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for launch in launches:
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all measurements: libraries keep workspace for each stream that they are used on."""
    return torch.cuda.Stream()
