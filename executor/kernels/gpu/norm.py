"""Root mean square norm, alone and behind the addition of the residual (Zhang & Sennrich, 2019).

Owns both kernels; must not know models or backends. One program a row, which it holds in registers: computed in
float32, read once and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_results, overlapped
from .sizes import power_of_two


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [..., H] over its last dimension, times `weight` [H]. Returns the like of `x`, contiguous."""
    x = x.contiguous()
    size = x.shape[-1]
    out = torch.empty_like(x)
    if rows := x.numel() // size:
        block = power_of_two(size)
        _rms_norm[(rows,)](x, weight, out, size, eps, BLOCK=block, num_warps=warps_for(block), **overlapped())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of `x` + `residual`, `x` + `residual`), all [T, H] of one dtype; `weight` [H].

    The sum is rounded to that dtype before it is normed, as if it had been stored and read again.
    """
    x, residual = x.contiguous(), residual.contiguous()
    size = x.shape[-1]
    normed, total = torch.empty_like(x), torch.empty_like(x)
    if rows := x.numel() // size:
        block = power_of_two(size)
        _add_rms_norm[(rows,)](
            x, residual, weight, normed, total, size, eps, BLOCK=block, num_warps=warps_for(block), **overlapped()
        )
    return normed, total


def warps_for(block: int) -> int:
    """Warps for a row of `block` elements: 16 elements a thread at most, up to 16 warps."""
    return max(1, min(16, block // 512))


@triton.jit
def scaled(x, weight, size, eps):
    """`x` [BLOCK] float32 with zeros behind `size`, normed and multiplied by `weight` [BLOCK]."""
    return x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * weight


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32)
    await_results(OVERLAP)
    value = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    tl.store(out + row + column, scaled(value, factor, size, eps), inside)


@triton.jit
def _add_rms_norm(x, residual, weight, normed, total, size, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    factor = tl.load(weight + column, inside, 0.0).to(tl.float32)
    await_results(OVERLAP)
    value = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    value += tl.load(residual + row + column, inside, 0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row + column, rounded, inside)
    tl.store(normed + row + column, scaled(rounded.to(tl.float32), factor, size, eps), inside)
