"""Attention of prompts on a Hopper card, near the rate of its matrix units: what `attention_prefill` does, for the
shapes that most models have and where there is much to do.

Owns when it can be asked and when that pays, and the launch: what lies in shared memory, which warps do what. Must not
know decode rows or any model. Two warpgroups compute (`attention_hopper_rows`), a warp feeds them
(`attention_hopper_feed`) by the card's engine for copies. Nothing waits for the device.

Written in Gluon, the layer of Triton in which warps, copies and matrix products are asked for by name.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...backends.base import KVLayer, StepBatch
from .attention_hopper_feed import feed, handover
from .attention_hopper_rows import attend
from .attention_tiles import score_factors
from .card import processors
from .hopper_copies import can_copy, copied, copied_pages
from .sizes import power_of_two

ROWS = 128  # of a tile of queries
KEYS = 128  # of a tile of keys
STAGES = 2  # tiles of keys under way, and of values
SLOTS = 2  # tiles of queries under way
LEAST_USE = 0.6  # of a tile's rows, where a group does not fill the power of two that is copied
LEAST_ITEMS = 2  # of a program: with less there is nothing to run ahead of, and smaller tiles fill the card better
LEAST_TOKENS = 512  # of a row, on average: an item of few keys is mostly its beginning and its end
REGISTERS, FEED_REGISTERS = 240, 24  # of a thread that computes, and of one that feeds


def fits(q: Tensor, kv: KVLayer, window: int | None, soft_cap: float | None) -> bool:
    """Whether the kernel can attend with `q` [T, Hq, D] over `kv`, and well."""
    group = q.shape[1] // kv.keys.shape[1]
    pack = power_of_two(group)
    return can_copy(q, kv, window, soft_cap) and pack <= ROWS // 2 and group >= LEAST_USE * pack


def pays(q: Tensor, kv: KVLayer, batch: StepBatch) -> bool:
    """Whether the step's prompts are so long, and so much work, that this is faster than `attention_prefill`."""
    kv_heads = kv.keys.shape[1]
    per_tile = ROWS // power_of_two(q.shape[1] // kv_heads)
    tokens, rows = q.shape[0] - batch.num_decodes, batch.seq_lens.shape[0] - batch.num_decodes
    return tokens >= LEAST_TOKENS * rows and tokens // per_tile * kv_heads >= LEAST_ITEMS * processors(q.device)


def hopper_attention(q: Tensor, kv: KVLayer, batch: StepBatch, scale: float, out: Tensor) -> None:
    """As `prefill_attention`, for what `fits`. Launches must follow one another on the device: they share a counter.

    Raises `ValueError` for a scale that is not positive.
    """
    tokens, heads, head_size = q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    group = heads // kv_heads
    pack = power_of_two(group)
    factor, _ = score_factors(scale, None)
    first, rows = batch.num_decodes, batch.seq_lens.shape[0]
    most_tiles = (tokens - first) // (ROWS // pack) + rows - first  # as `attention_prefill.first_tile` counts them
    items = most_tiles * kv_heads
    keys, values, lines = copied_pages(kv)
    _hopper_prefill[(min(items, processors(q.device)),)](
        copied(q, (tokens, heads, head_size), (ROWS // pack, pack, head_size)),
        keys, values, out, batch.block_tables, batch.query_start, batch.seq_lens, _counter(q.device),
        factor, first, rows, most_tiles, items, batch.block_tables.stride(0), lines,
        KV_HEADS=kv_heads, GROUP=group, PACK=pack, HEAD=head_size, BLOCK_SIZE=block_size, TILE=ROWS, KEYS=KEYS,
        STAGES=STAGES, SLOTS=SLOTS, REGISTERS=REGISTERS, FEED_REGISTERS=FEED_REGISTERS, num_warps=4,
    )  # fmt: skip


@functools.cache
def _counter(device: torch.device) -> Tensor:
    """See `attention_hopper_feed.feed`: each launch leaves it at zero."""
    return torch.zeros(2, dtype=torch.int32, device=device)


@gluon.jit(do_not_specialize=["first_row", "rows", "most_tiles", "num_items", "table_stride", "behind"])
def _hopper_prefill(
    q, keys, values, out, tables, query_start, seq_lens, counter,
    factor, first_row, rows, most_tiles, num_items, table_stride, behind,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All items of one program."""
    q_tiles = gl.allocate_shared_memory(q.dtype, [SLOTS, TILE // PACK, PACK, HEAD], q.layout)
    k_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, KEYS, HEAD], keys.layout)
    v_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, KEYS, HEAD], values.layout)
    items, q_full, q_free, k_full, k_free, v_full, v_free = handover(SLOTS, STAGES, 2)
    gl.warp_specialize(
        [
            (attend, (
                out, factor, items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
                KV_HEADS, GROUP, PACK, HEAD, TILE // 2, KEYS, STAGES, SLOTS, 0,
            )),
            (attend, (
                out, factor, items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
                KV_HEADS, GROUP, PACK, HEAD, TILE // 2, KEYS, STAGES, SLOTS, 1,
            )),
            (feed, (
                q, keys, values, tables, query_start, seq_lens, counter,
                items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
                first_row, rows, most_tiles, num_items, table_stride, behind,
                KV_HEADS, GROUP, HEAD, BLOCK_SIZE, TILE // PACK, KEYS, STAGES, SLOTS,
            )),
        ],
        [4, 1],
        [REGISTERS, FEED_REGISTERS],
    )  # fmt: skip
