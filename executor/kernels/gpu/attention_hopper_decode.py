"""Attention of many decode rows on a Hopper card, at the rate of its memory: what `attention_decode` does, for the
shapes that most models have.

Owns when it can be asked and when that pays, and the launch: what lies in shared memory, which warps do what. Must not
know prompts or any model. There is a program for each multiprocessor, in which a warp feeds by the card's engine for
copies (`attention_hopper_decode_feed`) and a warpgroup computes (`attention_hopper_decode_rows`). All programs read as
much as each other, however unlike the rows are, and never pause between two rows. Nothing waits for the device.

Written in Gluon, the layer of Triton in which warps, copies and matrix products are asked for by name.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...backends.base import KVLayer, StepBatch
from .attention_hopper_decode_feed import feed_rows
from .attention_hopper_decode_rows import attend_rows
from .attention_hopper_feed import handover
from .attention_tiles import score_factors
from .card import processors
from .hopper_copies import can_copy, copied, copied_pages
from .hopper_language import control
from .overlap import overlapped
from .sizes import power_of_two

# Heads of a tile of queries: a group's, and what lies behind them up to a power of two. The units take no fewer.
LEAST_MEMBERS, MOST_MEMBERS = 8, 16
KEYS = 64  # of a tile of keys
STAGES = 3  # tiles of keys and values under way
SLOTS = 2  # tiles of queries under way
MOST_PARTS = 2  # of a row and a head, where rows are alike
FEED_REGISTERS = 96  # of a thread that feeds


def fits(q: Tensor, kv: KVLayer, window: int | None, soft_cap: float | None) -> bool:
    """Whether the kernel can attend with `q` [T, Hq, D] over `kv`."""
    return can_copy(q, kv, window, soft_cap) and q.shape[1] // kv.keys.shape[1] <= MOST_MEMBERS


def pays(q: Tensor, kv: KVLayer, batch: StepBatch) -> bool:
    """Whether there are so many rows that this is faster than `attention_decode`, which adds up many parts sooner."""
    # Rounded up as there, so that a recorded step is attended as an eager one of fewer rows.
    return power_of_two(batch.num_decodes) * kv.keys.shape[1] * MOST_PARTS >= processors(q.device)


def hopper_decode_attention(q: Tensor, kv: KVLayer, batch: StepBatch, scale: float, out: Tensor) -> None:
    """As `decode_attention`, for what `fits`. Launches must follow one another on the device: they share a counter.

    Raises `ValueError` for a scale that is not positive.
    """
    tokens, heads, head_size = q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    group, programs = heads // kv_heads, processors(q.device)
    factor, _ = score_factors(scale, None)
    keys, values, lines = copied_pages(kv)
    means = torch.empty((programs, 2, group, head_size), dtype=torch.float32, device=q.device)
    sizes = torch.empty((programs, 2, group), dtype=torch.float32, device=q.device)
    members = max(LEAST_MEMBERS, power_of_two(group))
    _hopper_decode[(programs,)](
        copied(q, (tokens * heads, head_size), (members, head_size)),
        keys, values, out, batch.block_tables, batch.seq_lens, means, sizes, _arrivals(q.device),
        factor, batch.num_decodes, batch.block_tables.stride(0), lines,
        KV_HEADS=kv_heads, GROUP=group, HEAD=head_size, BLOCK_SIZE=block_size, KEYS=KEYS,
        STAGES=STAGES, SLOTS=SLOTS, FEED_REGISTERS=FEED_REGISTERS, num_warps=4, **overlapped(),
    )  # fmt: skip


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    """See `attention_hopper_decode_rows._finish`: each launch leaves it at zero."""
    return torch.zeros(processors(device), dtype=torch.int32, device=device)


@gluon.jit(do_not_specialize=["rows", "table_stride", "behind"])
def _hopper_decode(
    q, keys, values, out, tables, seq_lens, means, sizes, arrivals, factor, rows, table_stride, behind,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr, FEED_REGISTERS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """All items of one program."""
    if OVERLAP:
        control("griddepcontrol.launch_dependents;")
    MEMBERS: gl.constexpr = q.block_type.shape[0]
    q_tiles = gl.allocate_shared_memory(q.dtype, [SLOTS, MEMBERS, HEAD], q.layout)
    k_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, KEYS, HEAD], keys.layout)
    v_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, KEYS, HEAD], values.layout)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MEMBERS, KEYS], q.dtype)
    weights = gl.allocate_shared_memory(q.dtype, [2, MEMBERS, KEYS], weights_layout)
    items, q_full, q_free, k_full, k_free, v_full, v_free = handover(SLOTS, STAGES, 1)
    gl.warp_specialize(
        [
            (attend_rows, (
                out, seq_lens, means, sizes, arrivals, factor, rows,
                items, q_tiles, k_tiles, v_tiles, weights, q_full, q_free, k_full, k_free, v_full, v_free,
                KV_HEADS, GROUP, HEAD, STAGES, SLOTS,
            )),
            (feed_rows, (
                q, keys, values, tables, seq_lens, rows, table_stride, behind,
                items, q_tiles, k_tiles, v_tiles, q_full, q_free, k_full, k_free, v_full, v_free,
                KV_HEADS, GROUP, HEAD, BLOCK_SIZE, KEYS, STAGES, SLOTS, OVERLAP,
            )),
        ],
        [1],
        [FEED_REGISTERS],
    )  # fmt: skip
