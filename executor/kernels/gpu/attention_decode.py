"""Attention of rows with one query token each, over paged keys and values: flash-decoding (Dao et al., 2023).

Owns the kernel, its tiles and its parts; must not know prompts (see `attention_prefill`) or any model. One program
attends with all query heads of a group, so that each key and value is read once. Nothing waits for the device: lengths
are read there, and the number of parts does not depend on them, so a CUDA graph captured once serves all lengths, and
gives to the bit what a call without a graph gives.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...backends.base import KVLayer, StepBatch
from .attention_splits import choose_splits, make_parts, merge_parts, store_part
from .attention_tiles import Tile, absorb, load_rows, page_offsets, score_factors, soft_capped
from .card import processors
from .overlap import await_results, overlapped
from .sizes import power_of_two

PROGRAMS_PER_PROCESSOR = 2  # that are resident at a time: one begins while another is in full swing
TILE_BYTES = 96 << 10  # of shared memory for keys and values under way
ANY_LENGTH = 1 << 31


def decode_attention(
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
    """Attention of the first `batch.num_decodes` tokens of `q` [T, Hq, D], written to the same rows of `out`
    [T, Hq * D]; both contiguous and of the cache's dtype. A row with `seq_lens` 0 gives zeros.

    `splits`: parts of a row, each attended by a program of its own, at most 64; None: as the number of rows asks.
    `tile`: None: as `choose_tile` says. Raises `ValueError` for a scale that is not positive.
    """
    rows, (_, heads, head_size) = batch.num_decodes, q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    factor, cap = score_factors(scale, soft_cap)
    if tile is None:
        tile = choose_tile(heads // kv_heads, head_size, q.element_size())
    if splits is None:
        # Rows are rounded up as the sizes of graphs are: a batch is cut as it is in the graph that it is padded for.
        programs = power_of_two(rows) * kv_heads
        resident = PROGRAMS_PER_PROCESSOR * processors(q.device)
        splits = choose_splits(programs, resident, window or ANY_LENGTH, tile.keys)
    means, sizes = make_parts(out, rows, heads, splits)
    _decode[(rows, kv_heads, splits)](
        q, kv.keys, kv.values, batch.block_tables, batch.seq_lens, batch.order, means, sizes,
        factor, cap, window or 0, splits, batch.block_tables.stride(0), kv.keys.stride(0),
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD=head_size, HEAD_PAD=power_of_two(head_size),
        BLOCK_SIZE=block_size, ROWS=tile.rows, TILE=tile.keys, WINDOWED=bool(window), CAPPED=bool(soft_cap),
        SPLIT=splits > 1, num_warps=tile.warps, num_stages=tile.stages, **overlapped(),
    )  # fmt: skip
    if splits > 1:
        merge_parts(means, sizes, out)


def choose_tile(group: int, head_size: int, itemsize: int) -> Tile:
    """64 keys at a time, as many stages as shared memory has room for."""
    rows = max(16, power_of_two(group))
    head_bytes = power_of_two(head_size) * itemsize
    keys = 64 if head_bytes <= 512 else 32
    stages = max(2, min(3, TILE_BYTES // (2 * keys * head_bytes)))
    return Tile(rows, keys, 2 if rows == 16 else 4 if rows == 32 else 8, stages)


@triton.jit(do_not_specialize=["window", "splits", "table_stride"])
def _decode(
    q, keys, values, tables, seq_lens, order, means, sizes,
    factor, cap, window, splits, table_stride, block_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row, one kv head, one part."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    await_results(OVERLAP)
    if order is not None:  # long rows that came last would keep few processors busy at the end
        row = tl.load(order + row)
    length = tl.load(seq_lens + row)
    first = tl.maximum(length - window, 0) if WINDOWED else 0
    first_tile = first // TILE
    share = tl.cdiv(tl.cdiv(length, TILE) - first_tile, splits)
    begin = (first_tile + split * share) * TILE
    end = tl.minimum(begin + share * TILE, length)
    member = tl.arange(0, ROWS)
    head = row.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member
    q_tile = load_rows(q, head * HEAD, member < GROUP, HEAD, HEAD_PAD, True)
    table = tables + row.to(tl.int64) * table_stride
    keys += kv_head * (BLOCK_SIZE * HEAD)
    values += kv_head * (BLOCK_SIZE * HEAD)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        live = tokens < end
        offsets = page_offsets(table, tokens, live, block_stride, BLOCK_SIZE, HEAD, True)
        k = load_rows(keys, offsets, live, HEAD, HEAD_PAD, True)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = soft_capped(scores, factor, cap)
        visible = live
        if WINDOWED:
            visible = live & (tokens >= first)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        v = load_rows(values, offsets, live, HEAD, HEAD_PAD, True)
        # Every tile holds a token that is seen, and all rows see the same.
        top, total, mixed = absorb(scores, v, 1.0 if CAPPED else factor, top, total, mixed, False)
    store_part(means, sizes, head, member < GROUP, top, total, mixed, split, splits, HEAD, HEAD_PAD, SPLIT)
