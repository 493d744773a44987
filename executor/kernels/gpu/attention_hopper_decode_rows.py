"""The part of `attention_hopper_decode` that computes: a warpgroup with a group's query heads.

Owns the matrix products, the online softmax between them, the write of the result, and how parts are added up; must not
know pages or how work is divided (`attention_hopper_decode_feed`).

The matrix units take 64 lines at least, and a group has few heads. So the products are taken transposed: the lines are
keys in one and dimensions of the values in the other, and heads are columns, of which eight are enough. That is an
eighth of the work, which the time does not show, since memory binds it, but the card's power does: what is not spent
here lets the other kernels of a step run at a higher clock.
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

from .attention_hopper_decode_feed import FIRST, KV_HEAD, LAST, LENGTH, ROW, START, TILES
from .attention_hopper_feed import advance, field, read_item
from .attention_hopper_rows import WARPS, clean
from .hopper_language import all_threads

NO_HEAD = gl.constexpr(1e30)  # the maximum of a column that is no head: all its weights are zero
ZEROS = gl.constexpr(1024)  # that are written at a time


@gluon.jit
def attend_rows(
    out, seq_lens, means, sizes, arrivals, factor, rows,
    items, q_tiles, k_tiles, v_tiles, weights, q_full, q_free, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """All items that are posted, one after the other. Of a tile of queries GROUP are real."""
    MEMBERS: gl.constexpr = q_tiles.shape[1]
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MEMBERS, 16])
    member = gl.arange(0, MEMBERS, gl.SliceLayout(0, MIXED))
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    mbarrier.wait(q_full.index(slot), slot_phase)  # from here on the kernel in front has ended
    _write_empty(out, seq_lens, rows, KV_HEADS * GROUP * HEAD)
    item = read_item(items, slot, WARPS)
    tiles = field(item, TILES)
    while tiles > 0:
        top = gl.where(member < GROUP, float("-inf"), NO_HEAD)
        stage, phase, top, total, mixed = _attend_item(
            q_tiles.index(slot), q_free.index(slot), k_tiles, v_tiles, weights, k_full, k_free, v_full, v_free,
            stage, phase, field(item, START), field(item, LENGTH), tiles, top, factor, STAGES,
        )  # fmt: skip
        _finish(out, means, sizes, arrivals, item, top, total, mixed, KV_HEADS, GROUP)
        slot, slot_phase = advance(slot, slot_phase, SLOTS)
        mbarrier.wait(q_full.index(slot), slot_phase)
        item = read_item(items, slot, WARPS)
        tiles = field(item, TILES)


@gluon.jit
def _write_empty(out, seq_lens, rows, WIDTH: gl.constexpr):
    """Zeros for rows without tokens, which are nobody's item."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    at = gl.arange(0, ZEROS, layout)
    for row in range(gl.program_id(0), rows, gl.num_programs(0)):
        if gl.load(seq_lens + row) == 0:
            for first in range(0, WIDTH, ZEROS):
                zeros = gl.zeros([ZEROS], out.dtype.element_ty, layout)
                gl.store(out + row.to(gl.int64) * WIDTH + first + at, zeros, mask=first + at < WIDTH)


@gluon.jit
def _attend_item(
    q_tile, q_free, k_tiles, v_tiles, weights, k_full, k_free, v_full, v_free, stage, phase,
    start, length, tiles, top, factor, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend with the MEMBERS heads of `q_tile` over `tiles` tiles of keys and values, from `stage` on, and let go of
    the queries. The tiles begin with token `start` of a row of `length` tokens.

    `weights` [2, MEMBERS, KEYS] in shared memory is where those of a tile wait for its values; `top`: each head's
    maximum so far. Returns the stage and phase behind, and of each head the maximum, the sum of its weights, and the
    weighted sum of values [HEAD, MEMBERS]."""
    MEMBERS: gl.constexpr = q_tile.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[1]
    HEAD: gl.constexpr = v_tiles.shape[2]
    MIXED: gl.constexpr = top.type.layout.parent
    heads = q_tile.permute((1, 0))
    nothing = gl.zeros([KEYS, MEMBERS], gl.float32, MIXED)
    mbarrier.wait(k_full.index(stage), phase)
    scoring = warpgroup_mma(k_tiles.index(stage), heads, nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scoring])
    mbarrier.arrive(k_free.index(stage))
    totals = gl.zeros([KEYS, MEMBERS], gl.float32, MIXED)  # each thread adds up its own keys' until the end
    mixed = gl.zeros([HEAD, MEMBERS], gl.float32, MIXED)
    top, totals, _ = _weigh(scores, start, length, top, totals, factor, weights.index(0))
    for tile in range(1, tiles):
        next_stage, next_phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase)
        scoring = warpgroup_mma(k_tiles.index(next_stage), heads, nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), phase)
        mixing = _mix(v_tiles.index(stage), weights.index((tile - 1) % 2), mixed)
        scores = warpgroup_mma_wait(1, deps=[scoring])
        mbarrier.arrive(k_free.index(next_stage))
        # No warp still reads the weights that are overwritten: all have met since, when the last ones were written.
        top, totals, shrink = _weigh(
            scores, start + tile * KEYS, length, top, totals, factor, weights.index(tile % 2)
        )  # fmt: skip
        mixed = warpgroup_mma_wait(0, deps=[mixing])
        mbarrier.arrive(v_free.index(stage))
        mixed = mixed * shrink[None, :]
        stage, phase = next_stage, next_phase
    mbarrier.arrive(q_free)  # for the item after the next
    mbarrier.wait(v_full.index(stage), phase)
    written = length - start - (tiles - 1) * KEYS
    if written < KEYS:
        clean(v_tiles, stage, written)
    mixed = warpgroup_mma_wait(0, deps=[_mix(v_tiles.index(stage), weights.index((tiles - 1) % 2), mixed)])
    mbarrier.arrive(v_free.index(stage))
    stage, phase = advance(stage, phase, STAGES)
    return stage, phase, top, gl.sum(totals, 0), mixed


@gluon.jit
def _mix(v_tile, weights, mixed):
    """Begin to add the values, weighted."""
    return warpgroup_mma(v_tile.permute((1, 0)), weights.permute((1, 0)), mixed, is_async=True)


@gluon.jit
def _weigh(scores, start, length, top, totals, factor, weights):
    """One step of the online softmax, as `attention_tiles.absorb` takes it, over the keys from `start` on, of which
    those up to `length` are there: write the weights, and return (top, totals, what the sums so far are worth now)."""
    KEYS: gl.constexpr = scores.shape[0]
    LAYOUT: gl.constexpr = scores.type.layout
    token = start + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    scores = gl.where((token < length)[:, None], scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 0) * factor)
    exact = gl.exp2(scores * factor - higher[None, :])
    shrink = gl.exp2(top - higher)
    weights.permute((1, 0)).store(exact.to(weights.dtype))
    fence_async_shared()
    all_threads()
    return higher, totals * shrink[None, :] + exact, shrink


@gluon.jit
def _finish(out, means, sizes, arrivals, item, top, total, mixed, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Write the result of an item. Of a part, leave the mean and the size; the last program that does so for a row and
    a head adds all of its parts up, in their order."""
    HEAD: gl.constexpr = mixed.shape[0]
    MEMBERS: gl.constexpr = mixed.shape[1]
    layout: gl.constexpr = mixed.type.layout
    member = gl.arange(0, MEMBERS, gl.SliceLayout(0, layout))
    dim = gl.arange(0, HEAD, gl.SliceLayout(1, layout))
    within = member[None, :] * HEAD + dim[:, None]
    real, wide = member < GROUP, (member < GROUP)[None, :]
    first, last = field(item, FIRST), field(item, LAST)
    mean = mixed * (1.0 / total)[None, :]
    complete = first == last
    if first != last:
        place = _place_of(gl.program_id(0), first)
        gl.store(means + place * (GROUP * HEAD) + within, mean, mask=wide)
        gl.store(sizes + place * GROUP + member, top + gl.log2(total), mask=real)
        all_threads()
        complete = gl.atomic_add(arrivals + first, 1, sem="acq_rel") == last - first
        if complete:
            gl.store(arrivals + first, 0)
            top = gl.full([MEMBERS], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
            total = gl.zeros([MEMBERS], gl.float32, gl.SliceLayout(0, layout))
            mean = gl.zeros([HEAD, MEMBERS], gl.float32, layout)
            for program in range(first, last + 1):
                place = _place_of(program, first)
                size = gl.load(sizes + place * GROUP + member, mask=real, other=0.0, cache_modifier=".cg")
                part = gl.load(means + place * (GROUP * HEAD) + within, mask=wide, other=0.0, cache_modifier=".cg")
                higher = gl.maximum(top, size)
                weight, shrink = gl.exp2(size - higher), gl.exp2(top - higher)
                total = total * shrink + weight
                mean = mean * shrink[None, :] + part * weight[None, :]
                top = higher
            mean = mean * (1.0 / total)[None, :]
    row = field(item, ROW).to(gl.int64)
    target = out + ((row * KV_HEADS + field(item, KV_HEAD)) * GROUP) * HEAD + within
    gl.store(target, mean.to(out.dtype.element_ty), mask=wide & complete)


@gluon.jit
def _place_of(program, first):
    """Where a program leaves a part. It may have two: of an item that it begins, and of one that others began."""
    return 2 * program + gl.where(program == first, 1, 0)
