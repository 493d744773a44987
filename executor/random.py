"""Random numbers that are a function of (seed, position, what they are for), and of nothing else.

A token must not depend on which requests share its batch, on how its prompt was cut into chunks, or on a restart.
So no generator with a state: the 64 random bits of each draw are a hash of a counter. The hash is the output
function of SplitMix64 (Steele, Lea & Flood, 2014), in which n-th output = mix(start + n * GOLDEN); a stream's start
is itself a mix of seed and position. Integer arithmetic only, so that every device draws the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def stream_keys(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The start of the stream of each (seed, position); arrays [N]."""
    seed = _mix(seeds.view(np.uint64) + np.uint64(GOLDEN))
    return _mix(seed ^ (positions.astype(np.uint64) * np.uint64(MIX_1))).view(np.int64)


def stream_keys_tensor(seeds: Tensor, positions: Tensor) -> Tensor:
    """As `stream_keys`, on the tensors' device; [N] int64 each."""
    return _mix_tensor(_mix_tensor(seeds + _signed(GOLDEN)) ^ (positions * _signed(MIX_1)))


def gumbel(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for each pair of `keys` and `counters` (int64, broadcast together)."""
    bits = _mix_tensor(keys + counters * _signed(GOLDEN))
    uniform = ((bits >> 11) & (2**53 - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53)  # in (0, 1), ends excluded
    return uniform.log_().neg_().log_().neg_()


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def _mix_tensor(z: Tensor) -> Tensor:
    """`_mix` on int64, whose products wrap as unsigned ones do; the masks make its right shifts unsigned."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(MIX_1)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(MIX_2)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
