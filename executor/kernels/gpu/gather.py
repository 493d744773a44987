"""Where the rows of a decode step stand, found on the device from each slot's own state.

Owns the kernel that reads slots' last tokens, positions and KV slots, and the one that writes sampled tokens back
and makes slots one longer; must not know who owns a slot. With both in a CUDA graph, a decode step in which nothing
changes needs no copy from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """B rows, each with its newest known token to compute."""

    token_ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    slot_mapping: Tensor  # [B] int64
    seq_lens: Tensor  # [B] int32


def decode_rows(slots: Tensor, token_ids: Tensor, lengths: Tensor, block_tables: Tensor, block_size: int) -> DecodeRows:
    """The rows of `slots` [B] (int32 or int64), of which slot s knows `lengths[s]` (at least 1) tokens.

    `token_ids` [S, row_tokens] int32, `lengths` [S] int32 or int64, `block_tables` [S, blocks] int32.
    """
    count = slots.shape[0]
    rows = torch.empty((3, count), dtype=torch.int64, device=slots.device)
    seq_lens = torch.empty(count, dtype=torch.int32, device=slots.device)
    if count:
        _decode_rows[(count,)](
            slots,
            token_ids,
            lengths,
            block_tables,
            rows,
            seq_lens,
            token_ids.stride(0),
            block_tables.stride(0),
            block_size,
            num_warps=1,
        )
    return DecodeRows(rows[0], rows[1], rows[2], seq_lens)


def write_back(slots: Tensor, sampled: Tensor, token_ids: Tensor, lengths: Tensor) -> None:
    """Make `sampled` [B] int64 the newest tokens of `slots` [B] in `token_ids` [S, row_tokens] int32, whose `lengths`
    [S] grow by one; never beyond a row, so that a scratch slot for padding may be named again and again."""
    if slots.shape[0]:
        _write_back[(slots.shape[0],)](
            slots, sampled, token_ids, lengths, token_ids.stride(0), token_ids.shape[1], num_warps=1
        )


@triton.jit
def _decode_rows(slots, token_ids, lengths, block_tables, rows, seq_lens, row_tokens, row_blocks, block_size):
    row, count = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(lengths + slot)
    position = length.to(tl.int64) - 1
    block = tl.load(block_tables + slot * row_blocks + position // block_size).to(tl.int64)
    tl.store(rows + row, tl.load(token_ids + slot * row_tokens + position).to(tl.int64))
    tl.store(rows + count + row, position)
    tl.store(rows + 2 * count + row, block * block_size + position % block_size)
    tl.store(seq_lens + row, length.to(tl.int32))


@triton.jit
def _write_back(slots, sampled, token_ids, lengths, row_tokens, most):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(lengths + slot)
    place = tl.minimum(length, most - 1).to(tl.int64)
    tl.store(token_ids + slot * row_tokens + place, tl.load(sampled + row).to(tl.int32))
    tl.store(lengths + slot, tl.minimum(length + 1, most))
