"""How long a kernel takes on the device: events around a graph of many launches, so that the host has no part in it.

Must not know any kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

REPLAYS = 7  # of which the median counts


def seconds_per_launch(launches: Sequence[Callable[[], Tensor]], least: int) -> float:
    """The median over `REPLAYS` of one graph that holds all `launches`, as often as it takes to have `least`."""
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
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / (rounds * len(launches))


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all measurements: libraries keep workspace for each stream that they are used on."""
    return torch.cuda.Stream()
