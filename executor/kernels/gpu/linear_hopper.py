"""The product kernel of Hopper GPUs: tiles come by the copy engine, through a ring of stages, to the warpgroups' units.

Owns the kernel and its launch; must not know when it is used (`linear_table.py`) or what finishes parts of sums
(`linear.py`). As there, the product is computed transposed: a tile of weights by a tile of rows. A program asks for its
first weights before it waits for the kernel in front, whose results are the rows: while that one runs out, the memory
is busy already.

bfloat16 and float16; sums in float32. Written in Gluon, which has no interpreter: it runs on such a GPU only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_language import all_threads, control, copy_async
from .linear_plan import Plan
from .overlap import overlapped
from .sizes import tiles_of

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def launch_hopper(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, plan: Plan, gate: bool
) -> None:
    """`out` [T, out] or, of parts of sums, [splits, T, out]: the tiles of `plan`, each by one program."""
    rows, width = x.shape
    size = out.shape[-1]
    row_tiles, out_tiles = tiles_of(rows, plan.rows), tiles_of(size, plan.outs)
    steps = tiles_of(tiles_of(width, plan.ins), plan.splits)
    element = ELEMENTS[x.dtype]
    weights_layout = gl.NVMMASharedLayout.get_default_for([plan.outs, plan.ins], element)
    inputs_layout = gl.NVMMASharedLayout.get_default_for([plan.rows, plan.ins], element)
    _product_hopper[(row_tiles * out_tiles, plan.splits)](
        TensorDescriptor(weight, list(weight.shape), [width, 1], [plan.outs, plan.ins], weights_layout),
        TensorDescriptor(x, [rows, width], [width, 1], [plan.rows, plan.ins], inputs_layout),
        bias, residual, out, rows, size, row_tiles, steps,
        GATE=gate, BIAS=bias is not None, RESIDUAL=residual is not None,
        STAGES=plan.stages, num_warps=plan.warps, **overlapped(),
    )  # fmt: skip


@gluon.jit(do_not_specialize=["rows", "row_tiles", "steps"])
def _product_hopper(
    weights, inputs, bias, residual, out, rows, size, row_tiles, steps,
    GATE: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, OVERLAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    OUTS: gl.constexpr = weights.block_type.shape[0]
    INS: gl.constexpr = weights.block_type.shape[1]
    ROWS: gl.constexpr = inputs.block_type.shape[0]
    HALVES: gl.constexpr = 2 if GATE else 1  # of the weights: those of the gate and those beside them
    BYTES: gl.constexpr = (HALVES * OUTS + ROWS) * INS * 2
    DOWN: gl.constexpr = min(gl.num_warps(), OUTS // 16)  # warps; those left lie across
    ACROSS: gl.constexpr = gl.num_warps() // DOWN
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [DOWN, ACROSS], [16, ROWS // ACROSS, 16])

    # Tiles of the same weights lie side by side, so that those are read from memory once.
    tile, split = gl.program_id(0), gl.program_id(1)
    row, feature, start = (tile % row_tiles) * ROWS, (tile // row_tiles) * OUTS, split * steps
    tiles = gl.allocate_shared_memory(weights.dtype, [STAGES * HALVES, OUTS, INS], weights.layout)
    parts = gl.allocate_shared_memory(inputs.dtype, [STAGES, ROWS, INS], inputs.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if OVERLAP:
        control("griddepcontrol.launch_dependents;")
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
        fence_async_shared()
        _ask_weights(weights, arrived, tiles, stage, feature, size, (start + stage) * INS, stage < steps, BYTES, HALVES)
    if OVERLAP:
        control("griddepcontrol.wait;")
    for stage in gl.static_range(STAGES):
        copy_async(inputs, [row, (start + stage) * INS], arrived.index(stage), parts.index(stage), pred=stage < steps)

    total = gl.zeros([OUTS, ROWS], gl.float32, LAYOUT)
    second = gl.zeros([OUTS, ROWS], gl.float32, LAYOUT)
    stage = 0
    before = 0
    phase = 0
    for step in range(steps):
        mbarrier.wait(arrived.index(stage), phase)
        part = parts.index(stage).permute((1, 0))
        total = warpgroup_mma(tiles.index(stage * HALVES), part, total, is_async=True)
        if GATE:
            second = warpgroup_mma(tiles.index(stage * HALVES + 1), part, second, is_async=True)
            total, second = warpgroup_mma_wait(HALVES, deps=(total, second))
        else:
            total = warpgroup_mma_wait(HALVES, deps=(total,))
        # All products but the ones just begun are done: the stage before this one can be filled again.
        ahead = step + STAGES - 1
        more = (step > 0) & (ahead < steps)
        all_threads()
        _ask_weights(weights, arrived, tiles, before, feature, size, (start + ahead) * INS, more, BYTES, HALVES)
        copy_async(inputs, [row, (start + ahead) * INS], arrived.index(before), parts.index(before), pred=more)
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if GATE:
        total, second = warpgroup_mma_wait(0, deps=(total, second))
    else:
        total = warpgroup_mma_wait(0, deps=(total,))
    all_threads()  # what follows takes the memory of the tiles, which other warps' products may still have read
    _store(
        total, second, bias, residual, out + split.to(gl.int64) * rows * size, feature, row, rows, size,
        GATE, BIAS, RESIDUAL,
    )  # fmt: skip


@gluon.jit
def _ask_weights(
    weights, arrived, tiles, stage, feature, size, place, wanted, BYTES: gl.constexpr, HALVES: gl.constexpr
):  # fmt: skip
    """Begin to fill a stage with weights, and have its barrier expect the bytes of the whole stage."""
    mbarrier.expect(arrived.index(stage), BYTES, pred=wanted)
    for half in gl.static_range(HALVES):
        copy_async(
            weights,
            [feature + half * size, place],
            arrived.index(stage),
            tiles.index(stage * HALVES + half),
            pred=wanted,
        )


@gluon.jit
def _store(
    total, second, bias, residual, out, feature, row, rows, size,
    GATE: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The ending, in a layout whose neighbours along the features are neighbours in memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    feature += gl.arange(0, total.shape[0], gl.SliceLayout(1, LAYOUT))
    row += gl.arange(0, total.shape[1], gl.SliceLayout(0, LAYOUT))
    total = gl.convert_layout(total, LAYOUT)
    if BIAS:
        total += gl.expand_dims(gl.load(bias + feature, feature < size, 0.0).to(gl.float32), 1)
    if GATE:
        second = gl.convert_layout(second, LAYOUT)
        if BIAS:
            second += gl.expand_dims(gl.load(bias + size + feature, feature < size, 0.0).to(gl.float32), 1)
        total = total / (1.0 + gl.exp(-total)) * second  # `silu.gated`
    feature, row = gl.expand_dims(feature, 1), gl.expand_dims(row, 0)
    inside = (feature < size) & (row < rows)
    target = row.to(gl.int64) * size + feature
    if RESIDUAL:
        total += gl.load(residual + target, inside, 0.0).to(gl.float32)
    gl.store(out + target, total.to(out.dtype.element_ty), inside)
