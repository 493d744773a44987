"""What feeds the matrix units in `attention_hopper`: the warp that finds work and copies what it needs near them.

Owns the order of the work and the way from pages to shared memory; must not know a softmax. An item of work is a tile
of queries and one kv head. A program stays on its multiprocessor and takes item after item; its feeding warp runs ahead
of the computing ones by some tiles of keys, over the border of items too, so that neither the search for a row nor a
look into a block table is waited for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .attention_prefill import first_tile, row_of_tile
from .hopper_copies import CHUNK
from .hopper_language import barriers, copy_async

# What is said of an item, in the order in which it is posted.
ROW_START = gl.constexpr(0)  # index of the row's first token among those of the step
TOKEN = gl.constexpr(1)  # index of the tile's first token among those of the row
COUNT = gl.constexpr(2)  # tokens that the row has in the step
LENGTH = gl.constexpr(3)  # and in all
KV_HEAD = gl.constexpr(4)
TILES = gl.constexpr(5)  # of keys; none: this is the end
FIELDS = gl.constexpr(8)


@gluon.jit
def handover(SLOTS: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Where items are posted, and the barriers of queries, keys and values: for each, those that say when it is there,
    `full`, and those that say when `READERS` warpgroups are done with it, `free`. The engine for copies sees them."""
    items = gl.allocate_shared_memory(gl.int32, [SLOTS, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = barriers(SLOTS, 1)
    q_free = barriers(SLOTS, READERS)
    k_full = barriers(STAGES, 1)
    k_free = barriers(STAGES, READERS)
    v_full = barriers(STAGES, 1)
    v_free = barriers(STAGES, READERS)
    fence_async_shared()
    return items, q_full, q_free, k_full, k_free, v_full, v_free


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The stage behind `stage` of a ring, and the parity of its use, which changes when the ring is through."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def post(items, slot, fields):
    """Say of the item in `slot` what `fields` has, in their order."""
    layout: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [1], [0])
    at = gl.arange(0, FIELDS, layout)
    item = gl.zeros([FIELDS], gl.int32, layout)
    for which in gl.static_range(len(fields)):
        item = gl.where(at == which, fields[which], item)
    items.index(slot).store(item)


@gluon.jit
def read_item(items, slot, WARPS: gl.constexpr):
    """All fields, [FIELDS], the same in every thread."""
    return items.index(slot).load(gl.BlockedLayout([FIELDS], [32], [WARPS], [0]))


@gluon.jit
def field(item, which: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, FIELDS, item.type.layout) == which, item, 0), 0)


@gluon.jit
def feed(
    q, keys, values, tables, query_start, seq_lens, counter,
    items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
    first_row, rows, most_tiles, num_items, table_stride, behind,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr, PER_TILE: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Post this program's items with their queries, each followed by its keys and values, tile by tile, and then the
    end. The first item is given, the others are drawn from `counter` [2] int32, which the last program leaves as it
    was: zero. `behind`: index of the row behind all pages, where zeros are read."""
    SIZE: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    while number < num_items:
        following = gl.atomic_add(counter, 1) + programs
        # The last tiles of a prompt see the most keys: begin with them, so that no long one is left to the end.
        tile = most_tiles - 1 - number % most_tiles
        kv_head = number // most_tiles
        row = row_of_tile(query_start, tile, first_row, rows, PER_TILE)
        row_start = gl.load(query_start + row)
        count = gl.load(query_start + row + 1) - row_start
        token = (tile - first_tile(query_start, row, first_row, PER_TILE)) * PER_TILE
        length = gl.load(seq_lens + row)
        if (token < count) & (count <= length):
            end = gl.minimum(length - count + token + PER_TILE, length)
            tiles = (end + KEYS - 1) // KEYS
            mbarrier.wait(q_free.index(slot), slot_phase ^ 1)
            post(items, slot, (row_start, token, count, length, kv_head, tiles))
            mbarrier.expect(q_full.index(slot), q_tiles.index(slot).numel * SIZE)
            copy_async(q, [row_start + token, kv_head * GROUP, 0], q_full.index(slot), q_tiles.index(slot))
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
            table = tables + row.to(gl.int64) * table_stride
            stage, phase = feed_tiles(
                keys, values, table, 0, tiles, end, kv_head, behind, stage, phase,
                k_tiles, v_tiles, k_full, k_free, v_full, v_free, KV_HEADS, HEAD, BLOCK_SIZE, KEYS, STAGES,
            )  # fmt: skip
        number = following
    mbarrier.wait(q_free.index(slot), slot_phase ^ 1)
    post(items, slot, (0, 0, 0, 0, 0, 0))
    mbarrier.arrive(q_full.index(slot))
    if gl.atomic_add(counter + 1, 1) == programs - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def feed_tiles(
    keys, values, table, first, last, end, kv_head, behind, stage, phase,
    k_tiles, v_tiles, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the tiles [`first`, `last`) of a row's keys and values, from `stage` on. Returns stage and phase behind."""
    for tile in range(first, last):
        _feed_tile(
            keys, values, table, tile * KEYS, end, kv_head, behind, stage, phase,
            k_tiles, v_tiles, k_full, k_free, v_full, v_free, KV_HEADS, HEAD, BLOCK_SIZE, KEYS,
        )  # fmt: skip
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _feed_tile(
    keys, values, table, start, end, kv_head, behind, stage, phase, k_tiles, v_tiles, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Copy the keys and the values of tokens [start, start + KEYS), zeros for chunks from `end` on."""
    SIZE: gl.constexpr = k_tiles.dtype.primitive_bitwidth // 8
    CHUNKS: gl.constexpr = KEYS // CHUNK
    places = ()
    for c in gl.static_range(CHUNKS):
        token = start + c * CHUNK
        live = token < end
        block = gl.load(table + token // BLOCK_SIZE, mask=live, other=0)
        place = (block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
        places += (gl.where(live, place, behind),)
    mbarrier.wait(k_free.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), KEYS * HEAD * SIZE)
    for c in gl.static_range(CHUNKS):
        copy_async(keys, [places[c], 0], k_full.index(stage), k_tiles.index(stage).slice(c * CHUNK, CHUNK))
    mbarrier.wait(v_free.index(stage), phase ^ 1)
    mbarrier.expect(v_full.index(stage), KEYS * HEAD * SIZE)
    for c in gl.static_range(CHUNKS):
        copy_async(values, [places[c], 0], v_full.index(stage), v_tiles.index(stage).slice(c * CHUNK, CHUNK))
