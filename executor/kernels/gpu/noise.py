"""Random numbers on the device that are those of `executor/random.py`, bit for bit.

Owns the counter-based generator (SplitMix64; Steele, Lea & Flood, 2014) and Gumbel noise as device functions; must not
know what is drawn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import random as host

GOLDEN = tl.constexpr(host.GOLDEN - 2**64)  # as the int64 with these bits
MIX_1 = tl.constexpr(host.MIX_1 - 2**64)
MIX_2 = tl.constexpr(host.MIX_2 - 2**64)


@triton.jit
def mix(z):
    """`random._mix_tensor`: int64 products wrap as unsigned ones do; the masks make right shifts unsigned."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def stream_key(seed, position):
    """As `random.stream_keys`."""
    return mix(mix(seed + GOLDEN) ^ (position * MIX_1))


@triton.jit
def gumbel(key, counter):
    """Standard Gumbel noise, float64, for `key` and `counter` (int64, broadcast together)."""
    bits = mix(key + counter * GOLDEN)
    uniform = (((bits >> 11) & ((1 << 53) - 1)).to(tl.float64) + 0.5) * (1.0 / (1 << 53))
    return -tl.log(-tl.log(uniform))


@triton.jit
def noisy_log(weight, noise):
    """log(`weight`) + `noise`, float64, whose largest is a draw in proportion to the weights; -inf where that is 0."""
    there = weight > 0
    return tl.where(there, tl.log(tl.where(there, weight, 1.0).to(tl.float64)) + noise, -float("inf"))
