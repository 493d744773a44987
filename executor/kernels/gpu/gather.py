"""The two ends of a decode step on the device: what its rows are, and what they have become.

Owns the kernels behind `SlotTensors.gather` and `SlotTensors.append`; must not know who owns a slot. Each is one launch
where single operations would be a dozen, which a recorded step of a small model would feel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import tiles_of

TABLE_TILE = 1024  # entries of a block table that one program copies
AT_ONCE = 256  # rows whose lengths are compared together


def gather(
    slots: Tensor, token_ids: Tensor, lengths: Tensor, block_tables: Tensor, block_size: int, scratch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The newest known tokens of `slots` [B] int64, of which slot s knows `lengths[s]` (at least 1).

    `token_ids` [S, row_tokens] int32, `lengths` [S] int64, `block_tables` [S, max_blocks] int32. Returns lengths, token
    ids, positions and slot mapping, [B] int64 each; the slots' block tables [B, max_blocks] int32; lengths [B] int32,
    for the slot `scratch` 0, so that nothing is attended there; the rows [B] int32, the longest first, and of equals
    the first.
    """
    count, width = len(slots), block_tables.shape[1]
    rows = torch.empty((4, count), dtype=torch.int64, device=slots.device)
    tables = torch.empty((count, width), dtype=torch.int32, device=slots.device)
    seq_lens = torch.empty(count, dtype=torch.int32, device=slots.device)
    order = torch.empty_like(seq_lens)
    if count:
        _gather[(count, tiles_of(width, TABLE_TILE))](
            slots, token_ids, lengths, block_tables, rows, tables, seq_lens, order,
            token_ids.stride(0), block_tables.stride(0), width, block_size, scratch, TILE=TABLE_TILE, AT_ONCE=AT_ONCE,
            num_warps=4,
        )  # fmt: skip
    known, tokens, positions, slot_mapping = rows
    return known, tokens, positions, slot_mapping, tables, seq_lens, order


def append(slots: Tensor, known: Tensor, tokens: Tensor, token_ids: Tensor, lengths: Tensor, scratch: int) -> None:
    """Write `tokens` [R] int64 behind the `known` [R] int64 tokens of `slots` [R] int64 in `token_ids` [S, row_tokens]
    int32, and make the slots' `lengths` [S] int64 one longer, but for the slot `scratch`, whose length stays 1."""
    if len(slots):
        _append[(len(slots),)](slots, known, tokens, token_ids, lengths, token_ids.stride(0), scratch, num_warps=1)


@triton.jit
def _gather(
    slots, token_ids, lengths, block_tables, rows, tables, seq_lens, order,
    row_tokens, row_blocks, width, block_size, scratch, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row, count = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots + row)
    table = block_tables + slot * row_blocks
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    target = tables + row.to(tl.int64) * width + column
    tl.store(target, tl.load(table + column, column < width, 0), column < width)
    if tl.program_id(1) == 0:
        length = tl.load(lengths + slot)
        position = length - 1
        block = tl.load(table + position // block_size).to(tl.int64)
        tl.store(rows + row, length)
        tl.store(rows + count + row, tl.load(token_ids + slot * row_tokens + position).to(tl.int64))
        tl.store(rows + 2 * count + row, position)
        tl.store(rows + 3 * count + row, block * block_size + position % block_size)
        tl.store(seq_lens + row, tl.where(slot == scratch, 0, length).to(tl.int32))
        before = 0  # rows that come first in the order
        for first in range(0, count, AT_ONCE):
            other = first + tl.arange(0, AT_ONCE)
            inside = other < count
            theirs = tl.load(lengths + tl.load(slots + other, inside, 0), inside, 0)
            before += tl.sum(((theirs > length) | ((theirs == length) & (other < row))).to(tl.int32), 0)
        tl.store(order + before, row)


@triton.jit
def _append(slots, known, tokens, token_ids, lengths, row_tokens, scratch):
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    append_one(tl.load(slots + row), tl.load(known + row), token, token_ids, lengths, row_tokens, scratch)


@triton.jit
def append_one(slot, known, token, token_ids, lengths, row_tokens, scratch):
    """Write `token` behind the `known` ones of `slot`, as `append` says."""
    tl.store(token_ids + slot * row_tokens + known, token.to(tl.int32))
    tl.store(lengths + slot, tl.where(slot == scratch, 1, known + 1))
