"""Attention of rows with one query token each, over paged keys and values: flash-decoding (Dao et al., 2023).

Owns the kernel, its merge and the choice of how many parts a row is cut into; must not know prompts (see
`attention_prefill`) or any model. One program attends with all query heads of a group, so that each key and value is
read once. Nothing waits for the device: lengths are read there, and the number of parts follows from shapes alone, so a
CUDA graph captured once serves all lengths, and gives what a call without a graph gives.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.base import KVLayer, StepBatch
from .attention_tiles import Tile, absorb, load_rows, page_offsets, score_factors, soft_capped

PROGRAMS_PER_PROCESSOR = 4  # that are resident at a time
MIN_TOKENS = 128  # of a part: less is not worth the merge
MAX_SPLITS = 64
TILE_BYTES = 128 << 10  # of shared memory for keys and values under way


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

    `splits`: parts of a row, each attended by a program of its own; None: as `choose_splits` says. `tile`: None: as
    `choose_tile` says. Raises `ValueError` for a scale that is not positive.
    """
    rows, (_, heads, head_size) = batch.num_decodes, q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    factor, cap = score_factors(scale, soft_cap)
    if splits is None:
        longest = batch.block_tables.shape[1] * block_size
        splits = choose_splits(rows * kv_heads, min(longest, window or longest), _processors(q.device))
    if tile is None:
        tile = choose_tile(heads // kv_heads, head_size, q.element_size())
    parts = q.new_empty((rows, heads, splits, head_size), dtype=torch.float32) if splits > 1 else out
    sizes = q.new_empty((rows, heads, splits), dtype=torch.float32) if splits > 1 else out
    head_pad = triton.next_power_of_2(head_size)
    _decode[(rows, kv_heads, splits)](
        q, kv.keys, kv.values, batch.block_tables, batch.seq_lens, parts, sizes,
        factor, cap, window or 0, splits, batch.block_tables.stride(0), kv.keys.stride(0),
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, HEAD=head_size, HEAD_PAD=head_pad, BLOCK_SIZE=block_size,
        ROWS=tile.rows, TILE=tile.keys, WINDOWED=bool(window), CAPPED=bool(soft_cap), SPLIT=splits > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _merge[(rows * heads,)](
            parts, sizes, out, splits, HEAD=head_size, HEAD_PAD=head_pad, SPLITS_PAD=triton.next_power_of_2(splits)
        )


def choose_splits(programs: int, longest: int, processors: int) -> int:
    """Into how many parts to cut each row: as many as fill the device, where `programs` (rows x kv heads) alone do not,
    but none so short that its merge would cost more than it gains. `longest`: the most tokens that a row can attend to.

    A power of two for powers of two around `programs`, so that a batch that is padded to one is cut as it is without.
    """
    room = processors * PROGRAMS_PER_PROCESSOR // triton.next_power_of_2(programs)
    return max(1, min(room, longest // MIN_TOKENS, MAX_SPLITS))


def choose_tile(group: int, head_size: int, itemsize: int) -> Tile:
    """64 keys at a time, as many stages as shared memory has room for."""
    rows = max(16, triton.next_power_of_2(group))
    head_bytes = triton.next_power_of_2(head_size) * itemsize
    keys = 64 if head_bytes <= 512 else 32
    stages = max(2, min(4, TILE_BYTES // (2 * keys * head_bytes)))
    return Tile(rows, keys, 4 if rows <= 32 else 8, stages)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit(do_not_specialize=["window", "splits"])
def _decode(
    q, keys, values, tables, seq_lens, parts, sizes,
    factor, cap, window, splits, table_stride, block_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One row, one kv head, one part. With SPLIT, writes the part's mean of values to `parts` [rows, Hq, splits, D] and
    log2 of its sum of weights to `sizes` [rows, Hq, splits]; else the result to `parts`, the output."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    total = tl.where(total > 0.0, total, 1.0)
    mixed = mixed / total[:, None]
    dims = tl.arange(0, HEAD_PAD)
    mask = (member < GROUP)[:, None] & (dims < HEAD)[None, :]
    if SPLIT:
        at = head * splits + split
        filled = member < tl.where(begin < end, GROUP, 0)  # an empty part needs no values
        tl.store(parts + at[:, None] * HEAD + dims[None, :], mixed, mask=mask & filled[:, None])
        tl.store(sizes + at, top + tl.log2(total), mask=member < GROUP)
    else:
        tl.store(parts + head[:, None] * HEAD + dims[None, :], mixed.to(parts.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _merge(parts, sizes, out, splits, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """The parts of one query head, each weighted by its share of the softmax's sum. Empty parts were never written."""
    head = tl.program_id(0).to(tl.int64)
    split, dims = tl.arange(0, SPLITS_PAD), tl.arange(0, HEAD_PAD)
    size = tl.load(sizes + head * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(size, 0)
    weight = tl.exp2(size - tl.where(top == float("-inf"), 0.0, top))
    mask = (size > float("-inf"))[:, None] & (dims < HEAD)[None, :]
    part = tl.load(parts + (head * splits + split)[:, None] * HEAD + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + head * HEAD + dims, mixed.to(out.dtype.element_ty), mask=dims < HEAD)
