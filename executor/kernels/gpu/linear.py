"""Matrix products for decode steps: 1 to some hundred rows, where the weight is what must be read, and read once.

Owns the kernel, its endings (bias, residual, activation, norm) and what a plan of it is; must not know when it is
better than cuBLAS (`linear_table.py`). The product is computed transposed, weight times rows, so that the weight's
many rows fill the matrix units however few rows there are. Where its tiles are too few for the device, the sums are
cut into parts (split-K), added up in a fixed order by the ending: the same rows give the same result each time.

bfloat16 and float16; sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_plan import Plan
from .norm import scaled, warps_for
from .overlap import await_results, overlapped
from .silu import gated
from .sizes import power_of_two, tiles_of

FINISH_TILE = 1024


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype, plan: Plan
) -> Tensor:
    """`x` [T, in] @ `weight` [out, in].T (+ `bias` [out]) (+ `residual` [T, out]) -> [T, out] in `out_dtype`."""
    out = torch.empty((len(x), len(weight)), dtype=out_dtype, device=x.device)
    if plan.splits == 1:
        _launch(x, weight, bias, residual, out, plan)
        return out
    rows, size = out.shape
    parts = _parts(x, weight, plan)
    _finish[(rows, tiles_of(size, FINISH_TILE))](
        parts, bias, residual, out, rows, size, SPLITS=plan.splits, BIAS=bias is not None,
        RESIDUAL=residual is not None, TILE=FINISH_TILE, num_warps=4, **overlapped(),
    )  # fmt: skip
    return out


def multiply_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """silu of the product with the first half of `weight` [2I, in], times that with the second: [T, I] in x's dtype.
    One program computes a tile of both halves; the plan has one split."""
    out = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, None, out, plan, gate=True)
    return out


def multiply_add_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(root mean square norm of the sum, times `norm` [out]; the sum of the product and `residual`): [T, out] each, in
    the residual's dtype. The ending that adds up the parts of the sums has whole rows in hand, and norms them too."""
    parts = _parts(x, weight, plan)
    residual = residual.contiguous()
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    rows, size = total.shape
    block = power_of_two(size)
    _finish_norm[(rows,)](
        parts, bias, residual, norm, normed, total, rows, size, eps, SPLITS=plan.splits, BIAS=bias is not None,
        BLOCK=block, num_warps=warps_for(block), **overlapped(),
    )  # fmt: skip
    return normed, total


def _parts(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """[splits, T, out] float32, which add up to the product."""
    parts = torch.empty((plan.splits, len(x), len(weight)), dtype=torch.float32, device=x.device)
    _launch(x, weight, None, None, parts, plan)
    return parts


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    plan: Plan,
    gate: bool = False,
) -> None:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    if plan.hopper:
        from .linear_hopper import launch_hopper  # its language may be missing where nothing asks for it

        launch_hopper(x, weight, bias, residual, out, plan, gate)
        return
    rows, width = x.shape
    size = out.shape[-1]
    row_tiles, out_tiles = tiles_of(rows, plan.rows), tiles_of(size, plan.outs)
    steps = tiles_of(tiles_of(width, plan.ins), plan.splits)
    _product[(row_tiles * out_tiles, plan.splits)](
        x, weight, bias, residual, out,
        rows, size, width, row_tiles, steps,
        GATE=gate, BIAS=bias is not None, RESIDUAL=residual is not None, WHOLE=width % (plan.ins * plan.splits) == 0,
        ROWS=plan.rows, OUTS=plan.outs, INS=plan.ins, num_stages=plan.stages, num_warps=plan.warps, **overlapped(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "row_tiles", "steps"])  # else 1, 16 and 17 rows would each be compiled
def _product(
    x, weight, bias, residual, out, rows, size, width, row_tiles, steps,
    GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Tiles of the same weights lie side by side, so that those are read from memory once.
    tile, split = tl.program_id(0), tl.program_id(1)
    row = ((tile % row_tiles) * ROWS + tl.arange(0, ROWS))[None, :]
    feature = ((tile // row_tiles) * OUTS + tl.arange(0, OUTS))[:, None]
    place = split * steps * INS + tl.arange(0, INS)
    weights = weight + feature.to(tl.int64) * width + place[None, :]
    more_weights = weight + (feature + size).to(tl.int64) * width + place[None, :]  # of the second half, for a gate
    inputs = x + row.to(tl.int64) * width + place[:, None]
    total = tl.zeros((OUTS, ROWS), tl.float32)
    second = tl.zeros((OUTS, ROWS), tl.float32)
    await_results(OVERLAP)
    for step in range(steps):
        if WHOLE:
            inside_w, inside_x = feature < size, row < rows
        else:
            left = width - step * INS
            inside_w = (feature < size) & (place[None, :] < left)
            inside_x = (row < rows) & (place[:, None] < left)
        part = tl.load(inputs, inside_x, 0.0)
        total = tl.dot(tl.load(weights, inside_w, 0.0, eviction_policy="evict_first"), part, total)
        if GATE:
            second = tl.dot(tl.load(more_weights, inside_w, 0.0, eviction_policy="evict_first"), part, second)
            more_weights += INS
        weights += INS
        inputs += INS

    if BIAS:
        total += tl.load(bias + feature, feature < size, 0.0).to(tl.float32)
    if GATE:
        if BIAS:
            second += tl.load(bias + size + feature, feature < size, 0.0).to(tl.float32)
        total = gated(total, second)
    inside = (feature < size) & (row < rows)
    target = (split * rows + row).to(tl.int64) * size + feature
    if RESIDUAL:
        total += tl.load(residual + target, inside, 0.0).to(tl.float32)
    tl.store(out + target, total, inside)


@triton.jit
def _sum_parts(parts, row, column, inside, rows, size, SPLITS: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * size + column, inside, 0.0)
    return total


@triton.jit(do_not_specialize=["rows"])
def _finish(
    parts, bias, residual, out, rows, size,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < size
    await_results(OVERLAP)
    total = _sum_parts(parts, row, column, inside, rows, size, SPLITS, TILE)
    if BIAS:
        total += tl.load(bias + column, inside, 0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + row * size + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * size + column, total, inside)


@triton.jit(do_not_specialize=["rows"])
def _finish_norm(
    parts, bias, residual, norm, normed, total, rows, size, eps,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    factor = tl.load(norm + column, inside, 0.0).to(tl.float32)
    await_results(OVERLAP)
    value = _sum_parts(parts, row, column, inside, rows, size, SPLITS, BLOCK)
    if BIAS:
        value += tl.load(bias + column, inside, 0.0).to(tl.float32)
    value += tl.load(residual + row * size + column, inside, 0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row * size + column, rounded, inside)
    tl.store(normed + row * size + column, scaled(rounded.to(tl.float32), factor, size, eps), inside)
