"""How `attention_hopper_decode` divides its work, and the warp that copies what a program needs near it.

Owns who reads what; must not know a softmax. All tiles of keys of a step, row by row, in a row head by head, are one
long sequence, of which each program gets an equal run (stream-K, Osama et al., 2023). An item is what of one head of
one row lies in a program's run: the first and the last may be parts of it, which somebody adds up in the end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .attention_hopper_feed import advance, feed_tiles, post
from .hopper_language import control, copy_async

AT_ONCE = gl.constexpr(256)  # rows whose lengths are looked at together
HALVINGS = gl.constexpr(9)  # of that, down to one row twice

# What is said of an item, in the order in which it is posted.
ROW = gl.constexpr(0)
KV_HEAD = gl.constexpr(1)
START = gl.constexpr(2)  # its first token
TILES = gl.constexpr(3)  # of keys; none: this is the end
LENGTH = gl.constexpr(4)  # tokens of the row
FIRST = gl.constexpr(5)  # the first of the programs that this row and head are divided among
LAST = gl.constexpr(6)  # and the last


@gluon.jit
def feed_rows(
    q, keys, values, tables, seq_lens, rows, table_stride, behind,
    items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Post this program's items with their queries, each followed by its keys and values, tile by tile, and then the
    end. `behind`: index of the row behind all pages, where zeros are read.

    The first tiles are asked for before the kernel in front has ended, which writes queries and the keys and values of
    the newest tokens: lengths, tables and what else is in the cache were there before the step's first layer began."""
    SIZE: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    MEMBERS: gl.constexpr = q.block_type.shape[0]
    at, end, share, more = _run(seq_lens, rows, KV_HEADS, KEYS)
    row, kv_head, tile = _place(seq_lens, at, end, rows, KV_HEADS, KEYS)
    ahead = STAGES  # tiles that the ring has room for at once
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    while at < end:
        length = gl.load(seq_lens + row)
        tiles = (length + KEYS - 1) // KEYS
        count = gl.minimum(tiles - tile, end - at)
        if count > 0:
            early = gl.minimum(ahead, count - gl.where(tile + count == tiles, 1, 0))
            ahead = 0
            table = tables + row.to(gl.int64) * table_stride
            stage, phase = feed_tiles(
                keys, values, table, tile, tile + early, length, kv_head, behind, stage, phase,
                k_tiles, v_tiles, k_full, k_free, v_full, v_free, KV_HEADS, HEAD, BLOCK_SIZE, KEYS, STAGES,
            )  # fmt: skip
            if OVERLAP:
                control("griddepcontrol.wait;")
            mbarrier.wait(q_free.index(slot), slot_phase ^ 1)
            first = _program_at(at - tile, share, more)
            last = _program_at(at - tile + tiles - 1, share, more)
            post(items, slot, (row, kv_head, tile * KEYS, count, length, first, last))
            mbarrier.expect(q_full.index(slot), MEMBERS * HEAD * SIZE)
            head = (row * KV_HEADS + kv_head) * GROUP
            copy_async(q, [head, 0], q_full.index(slot), q_tiles.index(slot))
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
            stage, phase = feed_tiles(
                keys, values, table, tile + early, tile + count, length, kv_head, behind, stage, phase,
                k_tiles, v_tiles, k_full, k_free, v_full, v_free, KV_HEADS, HEAD, BLOCK_SIZE, KEYS, STAGES,
            )  # fmt: skip
            at += count
        tile = 0
        kv_head += 1
        wraps = (kv_head == KV_HEADS) | (tiles == 0)
        row += gl.where(wraps, 1, 0)
        kv_head = gl.where(wraps, 0, kv_head)
    if OVERLAP:
        control("griddepcontrol.wait;")
    mbarrier.wait(q_free.index(slot), slot_phase ^ 1)
    post(items, slot, (0, 0, 0, 0, 0, 0, 0))
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def _run(seq_lens, rows, KV_HEADS: gl.constexpr, KEYS: gl.constexpr):
    """This program's run: its first tile of all, and the first behind it. Also how many tiles each program has, and how
    many programs, the first ones, have one more."""
    programs, program = gl.num_programs(0), gl.program_id(0)
    total = 0
    for first in range(0, rows, AT_ONCE):
        total += gl.sum(_tiles_of(seq_lens, first, rows, KEYS), 0)
    total *= KV_HEADS
    share = total // programs
    more = total - share * programs
    at = program * share + gl.minimum(program, more)
    return at, at + share + gl.where(program < more, 1, 0), share, more


@gluon.jit
def _program_at(tile, share, more):
    """The program whose run holds a tile, `share` and `more` as `_run` has them."""
    longer = more * (share + 1)  # tiles of those that have one more
    return gl.where(tile < longer, tile // (share + 1), more + (tile - longer) // gl.maximum(share, 1))


@gluon.jit
def _place(seq_lens, at, end, rows, KV_HEADS: gl.constexpr, KEYS: gl.constexpr):
    """Row, head, and tile of these, of the tile `at` of all; where that is `end`, any."""
    row, before = _row_at(seq_lens, at, end, rows, KV_HEADS, KEYS)
    tiles = gl.maximum((gl.load(seq_lens + gl.minimum(row, rows - 1)) + KEYS - 1) // KEYS, 1)
    within = at - before * KV_HEADS
    return row, within // tiles, within % tiles


@gluon.jit
def _row_at(seq_lens, at, end, rows, KV_HEADS: gl.constexpr, KEYS: gl.constexpr):
    """The row of the tile `at`, and the tiles of one head of all rows in front of that; where `at` is `end`, any."""
    row = 0
    before = 0
    first = 0
    searches = at < end
    while searches:
        tiles = _tiles_of(seq_lens, first, rows, KEYS)
        place = gl.arange(0, AT_ONCE, tiles.type.layout)
        passed = 0
        step = AT_ONCE // 2
        for _ in range(HALVINGS):
            some = gl.sum(gl.where((place >= passed) & (place < passed + step), tiles, 0), 0)
            passes = (before + some) * KV_HEADS <= at
            passed += gl.where(passes, step, 0)
            before += gl.where(passes, some, 0)
            step = gl.maximum(step // 2, 1)
        row = first + passed
        first += AT_ONCE
        searches = passed == AT_ONCE
    return row, before


@gluon.jit
def _tiles_of(seq_lens, first, rows, KEYS: gl.constexpr):
    """Tiles of each of AT_ONCE rows from `first` on, for one head."""
    row = first + gl.arange(0, AT_ONCE, gl.BlockedLayout([AT_ONCE // 32], [32], [1], [0]))
    return (gl.load(seq_lens + row, mask=row < rows, other=0) + KEYS - 1) // KEYS
