"""Calls that are mostly the compiler's work, made side by side: it leaves Python to others while it compiles.

Owns the threads; must not know what the calls are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from .threads import usable_cores

T = TypeVar("T")


@contextmanager
def at_home_on(device: torch.device) -> Iterator[None]:
    """What a thread of one's own needs to launch kernels on a GPU."""
    with torch.inference_mode(), torch.cuda.device(device):
        torch.zeros(1, device=device)  # a driver's call may ask for a thread that is known to it
        yield


def side_by_side(calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """What `calls` return, in their order; on a GPU each is made in a thread of its own. Raises what the first of them
    that fails raises."""
    if device.type != "cuda" or not calls:
        return [call() for call in calls]

    def made(call: Callable[[], T]) -> T:
        with at_home_on(device):
            return call()

    with ThreadPoolExecutor(min(len(calls), usable_cores())) as pool:
        return list(pool.map(made, calls))
