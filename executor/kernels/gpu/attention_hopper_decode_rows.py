"""The part of `attention_hopper_decode` that computes: a warpgroup with a group's query heads.

Owns what a line of the tile of queries is, the write of the result, and how parts are added up; must not know pages or
how work is divided (`attention_hopper_decode_feed`). The way over tiles of keys is the prompts' (`attend_item`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .attention_hopper_decode_feed import FIRST, KV_HEAD, LAST, LENGTH, ROW, START, TILES
from .attention_hopper_feed import advance, field, read_item
from .attention_hopper_rows import WARPS, attend_item
from .hopper_language import all_threads

NO_HEAD = gl.constexpr(1e30)  # the maximum of a row of the tile that is no head: all its weights are zero
ZEROS = gl.constexpr(1024)  # that are written at a time


@gluon.jit
def attend_rows(
    out, seq_lens, means, sizes, arrivals, factor, rows,
    items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """All items that are posted, one after the other. Of a tile of queries GROUP are real."""
    TILE: gl.constexpr = q_tiles.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD, 16])
    member = gl.arange(0, TILE, gl.SliceLayout(1, SCORES))
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    mbarrier.wait(q_full.index(slot), slot_phase)  # from here on the kernel in front has ended
    _write_empty(out, seq_lens, rows, KV_HEADS * GROUP * HEAD)
    item = read_item(items, slot, WARPS)
    tiles = field(item, TILES)
    while tiles > 0:
        newest = gl.full([TILE], 0, gl.int32, gl.SliceLayout(1, SCORES)) + field(item, LENGTH) - 1
        top = gl.where(member < GROUP, float("-inf"), NO_HEAD)
        stage, phase, top, total, mixed = attend_item(
            q_tiles.index(slot), q_free.index(slot), k_tiles, v_tiles, k_full, k_free, v_full, v_free, stage, phase,
            field(item, START), field(item, LENGTH), newest, tiles - 1, tiles, top, factor, STAGES,
        )  # fmt: skip
        total = gl.convert_layout(total, gl.SliceLayout(1, MIXED))
        top = gl.convert_layout(top, gl.SliceLayout(1, MIXED))
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
def _finish(out, means, sizes, arrivals, item, top, total, mixed, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Write the result of an item. Of a part, leave the mean and the size; the last program that does so for a row and
    a head adds all of its parts up, in their order."""
    TILE: gl.constexpr = mixed.shape[0]
    HEAD: gl.constexpr = mixed.shape[1]
    layout: gl.constexpr = mixed.type.layout
    member = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    dim = gl.arange(0, HEAD, gl.SliceLayout(0, layout))
    within = member[:, None] * HEAD + dim[None, :]
    real, wide = member < GROUP, (member < GROUP)[:, None]
    first, last = field(item, FIRST), field(item, LAST)
    mean = mixed * (1.0 / total)[:, None]
    complete = first == last
    if first != last:
        place = _place_of(gl.program_id(0), first)
        gl.store(means + place * (GROUP * HEAD) + within, mean, mask=wide)
        gl.store(sizes + place * GROUP + member, top + gl.log2(total), mask=real)
        all_threads()
        complete = gl.atomic_add(arrivals + first, 1, sem="acq_rel") == last - first
        if complete:
            gl.store(arrivals + first, 0)
            top = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
            total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, layout))
            mean = gl.zeros([TILE, HEAD], gl.float32, layout)
            for program in range(first, last + 1):
                place = _place_of(program, first)
                size = gl.load(sizes + place * GROUP + member, mask=real, other=0.0, cache_modifier=".cg")
                part = gl.load(means + place * (GROUP * HEAD) + within, mask=wide, other=0.0, cache_modifier=".cg")
                higher = gl.maximum(top, size)
                weight, shrink = gl.exp2(size - higher), gl.exp2(top - higher)
                total = total * shrink + weight
                mean = mean * shrink[:, None] + part * weight[:, None]
                top = higher
            mean = mean * (1.0 / total)[:, None]
    row = field(item, ROW).to(gl.int64)
    target = out + ((row * KV_HEADS + field(item, KV_HEAD)) * GROUP) * HEAD + within
    gl.store(target, mean.to(out.dtype.element_ty), mask=wide & complete)


@gluon.jit
def _place_of(program, first):
    """Where a program leaves a part. It may have two: of an item that it begins, and of one that others began."""
    return 2 * program + gl.where(program == first, 1, 0)
