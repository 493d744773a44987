"""The activation of a gated MLP: silu(gate) * up.

Owns that kernel and its device function; must not know models or backends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_results, overlapped
from .sizes import tiles_of

BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """`gate_up` [T, 2I] -> silu(first half) * second half, [T, I], computed in float32."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = rows, tiles_of(width // 2, BLOCK)
        _silu_mul[grid](gate_up, out, width // 2, BLOCK=BLOCK, num_warps=4, **overlapped())
    return out


@triton.jit
def gated(gate, up):
    """silu(`gate`) * `up`, both float32; exp of a large number is inf, and the quotient then 0, as it should be."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    await_results(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * size + column, gated(gate, up), inside)
