"""Recording work on the device, to be launched again as a whole: a CUDA graph.

Owns the one place that touches `torch.cuda.CUDAGraph`: warm-up, capture, replay, and the memory that all graphs
share. Must not know what is recorded. On a CPU there is nothing to record, and a replay runs the function again: so
whatever is built on recordings is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Work = Callable[[], Tensor]

WARM_UPS = 2  # before a capture: the first compiles kernels and makes workspaces, the second runs as the capture will


class Recorder:
    """Records work on `device`. What is recorded reads and writes tensors that stay where they are, never asks the
    device anything, and returns a tensor that each replay overwrites."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # Recordings never run at the same time, so they share their scratch memory; the largest goes first.
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def record(self, work: Work) -> Work:
        """The replay of `work`, which is run a few times here: its effects must not matter. Raises what `work`
        raises, and `RuntimeError` where it can't be captured."""
        if self._stream is None:
            work()
            return work
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a live model's process has threads of its own, whose calls must not break a capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
