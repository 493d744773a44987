"""The part of `attention_hopper` that computes: a warpgroup for each half of a tile's rows.

Owns the matrix products, the online softmax between them and the write of the result; must not know pages or the order
of the work (`attention_hopper_feed`). While the softmax of one tile of keys is taken, the matrix units work at the
product of the weights before it with their values, and at what the other warpgroup has asked for (FlashAttention-3,
Shah et al., 2024).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_hopper_feed import COUNT, KV_HEAD, LENGTH, ROW_START, TILES, TOKEN, advance, field, read_item
from .hopper_language import all_threads

WARPS = gl.constexpr(4)  # of a warpgroup
LINES = gl.constexpr(32)  # of a tile of values that are cleaned at a time


@gluon.jit
def attend(
    out, factor, items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Rows [HALF * ROWS, (HALF + 1) * ROWS) of each item's tile. A row is one of PACK query heads of a token, of which
    GROUP are real."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    row = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    mbarrier.wait(q_full.index(slot), slot_phase)
    item = read_item(items, slot, WARPS)
    tiles = field(item, TILES)
    while tiles > 0:
        first_position = field(item, LENGTH) - field(item, COUNT) + field(item, TOKEN)
        positions = first_position + row // PACK
        whole = gl.minimum(gl.maximum((first_position + 1) // KEYS, 1), tiles)  # tiles behind them need a mask
        q_tile = q_tiles.index(slot).reshape([2 * ROWS, HEAD]).slice(HALF * ROWS, ROWS)
        stage, phase, total, mixed = _attend_item(
            q_tile, q_free.index(slot), k_tiles, v_tiles, k_full, k_free, v_full, v_free, stage, phase,
            field(item, LENGTH), positions, whole, tiles, factor, STAGES,
        )  # fmt: skip
        _store(out, item, total, mixed, KV_HEADS, GROUP, PACK, HALF)
        slot, slot_phase = advance(slot, slot_phase, SLOTS)
        mbarrier.wait(q_full.index(slot), slot_phase)
        item = read_item(items, slot, WARPS)
        tiles = field(item, TILES)


@gluon.jit
def _attend_item(
    q_tile, q_free, k_tiles, v_tiles, k_full, k_free, v_full, v_free, stage, phase,
    length, positions, whole, tiles, factor, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend with `q_tile` over the `tiles` tiles of keys and values of `length` tokens, from `stage` on, and let go of
    the queries. Line i sees the tokens up to `positions[i]`; all lines see all of the tiles 1 to `whole` - 1. Returns
    the stage and phase behind, and of each line the sum of its weights, and the weighted sum of values."""
    ROWS: gl.constexpr = q_tile.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[1]
    HEAD: gl.constexpr = v_tiles.shape[2]
    SCORES: gl.constexpr = positions.type.layout.parent
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    mbarrier.wait(k_full.index(stage), phase)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    scoring = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scoring])
    mbarrier.arrive(k_free.index(stage))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    mixed = gl.zeros([ROWS, HEAD], gl.float32, MIXED)
    exact, top, total, _ = _weigh(_masked(scores, 0, positions), top, total, factor)
    weights = gl.convert_layout(exact.to(q_tile.dtype), WEIGHTS)
    tile = 1
    for MASKED in gl.static_range(2):
        end = tiles if MASKED else whole
        while tile < end:
            stage, phase, weights, top, total, mixed = _step(
                q_tile, k_tiles, v_tiles, k_full, k_free, v_full, v_free, stage, phase, tile * KEYS, positions,
                weights, top, total, mixed, factor, ROWS, KEYS, STAGES, MASKED,
            )  # fmt: skip
            tile += 1
    mbarrier.arrive(q_free)  # for the item after the next
    mbarrier.wait(v_full.index(stage), phase)
    written = length - (tiles - 1) * KEYS
    if written < KEYS:
        clean(v_tiles, stage, written)  # where two warpgroups do so it is with the same bytes
    mixing = warpgroup_mma(weights, v_tiles.index(stage), mixed, is_async=True)
    mixed, weights = warpgroup_mma_wait(0, deps=[mixing, weights])
    mbarrier.arrive(v_free.index(stage))
    stage, phase = advance(stage, phase, STAGES)
    return stage, phase, total, mixed


@gluon.jit
def _step(
    q_tile, k_tiles, v_tiles, k_full, k_free, v_full, v_free, stage, phase, start, positions,
    weights, top, total, mixed, factor,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Score the tile of keys that begins at `start`, and meanwhile mix the values of the tile before, in `stage`."""
    SCORES: gl.constexpr = top.type.layout.parent
    MIXED: gl.constexpr = mixed.type.layout
    next_stage, next_phase = advance(stage, phase, STAGES)
    mbarrier.wait(k_full.index(next_stage), next_phase)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    scoring = warpgroup_mma(q_tile, k_tiles.index(next_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    mixing = warpgroup_mma(weights, v_tiles.index(stage), mixed, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scoring])
    mbarrier.arrive(k_free.index(next_stage))
    if MASKED:
        scores = _masked(scores, start, positions)
    exact, top, total, shrink = _weigh(scores, top, total, factor)
    mixed, weights = warpgroup_mma_wait(0, deps=[mixing, weights])
    mbarrier.arrive(v_free.index(stage))
    mixed = mixed * gl.convert_layout(shrink, gl.SliceLayout(1, MIXED))[:, None]
    weights = gl.convert_layout(exact.to(weights.dtype), weights.type.layout)
    return next_stage, next_phase, weights, top, total, mixed


@gluon.jit
def clean(tiles, stage, written):
    """Zeros in a tile of values for the slots that hold no token yet, from line `written` on: such a slot may hold a
    NaN, which a weight of zero does not take out of a sum."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    KEYS: gl.constexpr = tiles.shape[1]
    line = gl.arange(0, LINES, gl.SliceLayout(1, layout))
    for first in gl.static_range(0, KEYS, LINES):
        part = tiles.index(stage).slice(first, LINES)
        part.store(gl.where((first + line < written)[:, None], part.load(layout), 0.0))
    fence_async_shared()
    all_threads()


@gluon.jit
def _weigh(scores, top, total, factor):
    """One step of the online softmax, as `attention_tiles.absorb` takes it, but for the weighted sum: (weights, top,
    total, what the sums so far are worth now). Every row must see something in the first tile."""
    higher = gl.maximum(top, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - higher[:, None])
    shrink = gl.exp2(top - higher)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _masked(scores, start, positions):
    """-inf for the tokens, of which the first is `start`, that a row of `positions` does not see."""
    tokens = start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))


@gluon.jit
def _store(
    out, item, total, mixed, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, HALF: gl.constexpr
):
    """Write the results of the rows that are real."""
    layout: gl.constexpr = mixed.type.layout
    ROWS: gl.constexpr = mixed.shape[0]
    HEAD: gl.constexpr = mixed.shape[1]
    mean = mixed * gl.convert_layout(1.0 / total, gl.SliceLayout(1, layout))[:, None]
    row = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token = field(item, TOKEN) + row // PACK
    member = row % PACK
    real = (token < field(item, COUNT)) & (member < GROUP)
    head = field(item, KV_HEAD) * GROUP + member
    place = ((field(item, ROW_START) + token).to(gl.int64) * (KV_HEADS * GROUP) + head) * HEAD
    dim = gl.arange(0, HEAD, gl.SliceLayout(0, layout))
    gl.store(out + place[:, None] + dim[None, :], mean.to(out.dtype.element_ty), mask=real[:, None])
