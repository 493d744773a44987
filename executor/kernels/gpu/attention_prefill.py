"""Attention of rows with several query tokens, prompts or their chunks, over paged keys and values that may begin with
a cached prefix.

Owns the kernel and the choice of its tiles; must not know decode rows (see `attention_decode`) or any model. A tile of
queries holds some neighbouring tokens of one row with all query heads of a group, so that they share each load. Rows
have any lengths: the grid has as many programs as there can be tiles, each finds its row by a search, and the few too
many leave at once. Nothing waits for the device.

FlashAttention-2 (Dao, 2023) over pages (Kwon et al., 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...backends.base import KVLayer, StepBatch
from .attention_splits import choose_splits, make_parts, merge_parts, store_part
from .attention_tiles import Tile, absorb, load_rows, page_offsets, score_factors, soft_capped
from .card import processors
from .sizes import power_of_two

PROGRAMS_PER_PROCESSOR = 2  # that are resident at a time
LEAST_KEYS = 512  # of a part


def prefill_attention(
    q: Tensor,
    kv: KVLayer,
    batch: StepBatch,
    scale: float,
    out: Tensor,
    window: int | None = None,
    soft_cap: float | None = None,
    splits: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Attention of the tokens of `q` [T, Hq, D] from row `batch.num_decodes` on, written to the same rows of `out`
    [T, Hq * D]; both contiguous and of the cache's dtype.

    `splits`: parts into which a tile is cut along its keys, at most 64; None: as the number of tiles asks. `tile`:
    None: as `choose_tile` says; its rows must hold a group. Raises `ValueError` for a scale that is not positive.
    """
    tokens, heads, head_size = q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    group = heads // kv_heads
    factor, cap = score_factors(scale, soft_cap)
    if tile is None:
        tile = choose_tile(group, head_size, q.element_size())
    first, rows = batch.num_decodes, batch.seq_lens.shape[0]
    most_tiles = (tokens - first) // (tile.rows // group) + rows - first
    if splits is None:
        resident = PROGRAMS_PER_PROCESSOR * processors(q.device)
        longest = min(batch.max_seq_len, window or batch.max_seq_len)
        splits = choose_splits(most_tiles * kv_heads, resident, longest, LEAST_KEYS)
    means, sizes = make_parts(out[first:], tokens - first, heads, splits)
    _prefill[(most_tiles, kv_heads, splits)](
        q, kv.keys, kv.values, batch.block_tables, batch.query_start, batch.seq_lens, means, sizes,
        factor, cap, window or 0, splits, first, rows, batch.block_tables.stride(0), kv.keys.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD=head_size, HEAD_PAD=power_of_two(head_size),
        BLOCK_SIZE=block_size, ROWS=tile.rows, TILE=tile.keys, WINDOWED=bool(window), CAPPED=bool(soft_cap),
        SPLIT=splits > 1, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        merge_parts(means, sizes, out[first:])


def choose_tile(group: int, head_size: int, itemsize: int) -> Tile:
    """As large as registers and shared memory allow; at least one token's group of heads."""
    head_pad = power_of_two(head_size)
    least = power_of_two(group)
    if itemsize > 2:  # float32 is multiplied outside the matrix units
        return Tile(max(32 if head_pad > 128 else 64, least), 32, 8, 2)
    return Tile(max(128, least), 64, 8, 2 if head_pad > 128 else 3)


@triton.jit(do_not_specialize=["window", "splits", "first_row", "rows", "table_stride"])
def _prefill(
    q, keys, values, tables, query_start, seq_lens, means, sizes,
    factor, cap, window, splits, first_row, rows, table_stride, block_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of queries, one kv head, one part of the keys. `first_row` is the first token too: decodes have one."""
    PER_TILE: tl.constexpr = ROWS // GROUP  # tokens
    kv_head, split = tl.program_id(1), tl.program_id(2)
    # The last tiles of a prompt see the most keys: begin with them, so that no long one is left to the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = row_of_tile(query_start, tile, first_row, rows, PER_TILE)
    row_start = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - row_start
    first_token = (tile - first_tile(query_start, row, first_row, PER_TILE)) * PER_TILE
    if first_token >= count:
        return
    length = tl.load(seq_lens + row)
    member = tl.arange(0, ROWS)
    token = first_token + member // GROUP
    real = (member < PER_TILE * GROUP) & (token < count)
    head = (row_start + token).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member % GROUP
    q_tile = load_rows(q, head * HEAD, real, HEAD, HEAD_PAD, True)
    first_position = length - count + first_token
    last_position = tl.minimum(first_position + PER_TILE, length) - 1
    positions = length - count + token
    table = tables + row.to(tl.int64) * table_stride
    keys += kv_head * (BLOCK_SIZE * HEAD)
    values += kv_head * (BLOCK_SIZE * HEAD)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    begin = tl.maximum(first_position - window + 1, 0) // TILE * TILE if WINDOWED else 0
    end = last_position + 1
    # Every query of the tile sees all of the keys in [whole_begin, whole_end): they need no mask.
    whole_begin = tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE) * TILE if WINDOWED else 0
    whole_end = tl.maximum((first_position + 1) // TILE * TILE, whole_begin)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, TILE), splits) * TILE
        begin += split * share
        end = tl.minimum(end, begin + share)
    if WINDOWED:
        top, total, mixed = _walk(
            q_tile, keys, values, table, positions, begin, tl.minimum(whole_begin, end), top, total, mixed,
            factor, cap, window, block_stride, HEAD, HEAD_PAD, BLOCK_SIZE, TILE, WINDOWED, CAPPED, True,
        )  # fmt: skip
    top, total, mixed = _walk(
        q_tile, keys, values, table, positions, tl.maximum(whole_begin, begin), tl.minimum(whole_end, end),
        top, total, mixed,
        factor, cap, window, block_stride, HEAD, HEAD_PAD, BLOCK_SIZE, TILE, WINDOWED, CAPPED, False,
    )  # fmt: skip
    top, total, mixed = _walk(
        q_tile, keys, values, table, positions, tl.maximum(whole_end, begin), end, top, total, mixed,
        factor, cap, window, block_stride, HEAD, HEAD_PAD, BLOCK_SIZE, TILE, WINDOWED, CAPPED, True,
    )  # fmt: skip
    head -= first_row.to(tl.int64) * (KV_HEADS * GROUP)
    store_part(means, sizes, head, real, top, total, mixed, split, splits, HEAD, HEAD_PAD, SPLIT)


@triton.jit
def _walk(
    q_tile, keys, values, table, positions, begin, end, top, total, mixed, factor, cap, window,
    block_stride, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Over the keys in [begin, end); without MASKED, whole tiles that every query sees."""
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        live = tokens < end
        offsets = page_offsets(table, tokens, live, block_stride, BLOCK_SIZE, HEAD, MASKED)
        k = load_rows(keys, offsets, live, HEAD, HEAD_PAD, MASKED)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = soft_capped(scores, factor, cap)
        if MASKED:
            visible = live[None, :] & (tokens[None, :] <= positions[:, None])
            if WINDOWED:
                visible = visible & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        v = load_rows(values, offsets, live, HEAD, HEAD_PAD, MASKED)
        top, total, mixed = absorb(scores, v, 1.0 if CAPPED else factor, top, total, mixed, MASKED)
    return top, total, mixed


@triton.jit
def first_tile(query_start, row, first_row, PER_TILE: tl.constexpr):
    """A number for `row`'s first tile that leaves room for the tiles of all rows before it, without a sum over them:
    a row of n tokens has at most n // PER_TILE + 1."""
    return (tl.load(query_start + row) - tl.load(query_start + first_row)) // PER_TILE + row - first_row


@triton.jit
def row_of_tile(query_start, tile, first_row, rows, PER_TILE: tl.constexpr):
    """The last row whose first tile is not after `tile`."""
    low = first_row
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if first_tile(query_start, middle, first_row, PER_TILE) <= tile:
            low = middle
        else:
            high = middle
    return low
