"""Arrays between the host and the model's device, without waiting.

Owns pinned staging and the events that say when a copy has landed; must not know what the arrays mean. On the CPU
host and device are the same memory, and nothing is copied.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 16  # bytes; each array in a staging buffer starts at a multiple


class Transfer:
    """Copies to and from `device`, in the order of its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shared = device.type == "cpu"

    def up(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """`arrays` as tensors on the device, in one copy. On the CPU they share memory with the arrays."""
        if self.shared:
            return [torch.from_numpy(a) for a in arrays]
        starts, end = [], 0
        for a in arrays:
            starts.append(end)
            end += -(-a.nbytes // ALIGN) * ALIGN
        # The caching host allocator hands this buffer out again only when the copy has landed.
        staging = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        raw = staging.numpy()
        for a, start in zip(arrays, starts, strict=True):
            raw[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        landed = staging.to(self.device, non_blocking=True)
        return [
            landed[start : start + a.nbytes].view(torch.from_numpy(np.empty(0, a.dtype)).dtype).view(a.shape)
            for a, start in zip(arrays, starts, strict=True)
        ]

    def write(self, array: NDArray[Any], target: Tensor) -> None:
        """Copy `array` into `target`, of the same shape and type, after all that reads it in its stream's order."""
        source = torch.from_numpy(array)
        if not self.shared:
            source = torch.empty(array.shape, dtype=target.dtype, pin_memory=True).copy_(source)
        target.copy_(source, non_blocking=True)

    def down(self, tensor: Tensor) -> Tensor:
        """`tensor` on the host: to be read only after a `Mark` made later is done."""
        if self.shared:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        """A point in the device's queue: what was enqueued before it."""
        return Mark(self.shared)


class Mark:
    """A point in the device's queue, with its time."""

    def __init__(self, shared: bool) -> None:
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if not shared:
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds on the device from `earlier` to here; both must be done."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000
