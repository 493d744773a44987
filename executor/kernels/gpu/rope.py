"""Rotary positions (Su et al., 2021), fused with the norm of q and k before them and the write to the cache behind.

Owns the kernel that takes the joint q, k and v of a step to a rotated q and filled KV slots, and the one that only
fills slots; must not know models. One program handles a tile of heads of one token: q, k and v heads are told apart
by their number, so that one launch does them all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_results, overlapped
from .sizes import power_of_two, tiles_of

HEAD_TILE = 8


def rope_and_cache(
    qkv: Tensor,
    cos_sin: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """As `Backend.rope_and_cache`: `qkv` [T, (Hq + 2 Hkv) * D], `cos_sin` [max_position, D] float32, `keys` and
    `values` [num_blocks, Hkv, BS, D], `positions` and `slot_mapping` [T] int64, the norms' weights [D].
    Returns q [T, Hq, D]."""
    tokens, width = qkv.shape
    _, kv_heads, block_size, size = keys.shape
    heads = width // size - 2 * kv_heads
    qkv, cos_sin = qkv.contiguous(), cos_sin.contiguous()
    q = torch.empty((tokens, heads, size), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        _rope_and_cache[(tokens, tiles_of(heads + 2 * kv_heads, HEAD_TILE))](
            qkv,
            cos_sin,
            positions,
            slot_mapping,
            q_norm,
            k_norm,
            q,
            keys,
            values,
            heads,
            kv_heads,
            block_size,
            *keys.stride()[:3],
            *values.stride()[:3],
            eps,
            HALF=size // 2,
            HALF_PAD=power_of_two(size // 2),
            HEAD_TILE=HEAD_TILE,
            Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None,
            num_warps=4,
            **overlapped(),
        )
    return q


def write_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Write `k` and `v` [T, Hkv, D] into `keys` and `values` [num_blocks, Hkv, BS, D] at `slot_mapping` [T] int64."""
    tokens, kv_heads, size = k.shape
    k, v = k.contiguous(), v.contiguous()
    if tokens:
        _write_kv[(tokens, kv_heads)](
            k,
            v,
            slot_mapping,
            keys,
            values,
            keys.shape[2],
            *keys.stride()[:3],
            *values.stride()[:3],
            SIZE=size,
            PAD=power_of_two(size),
            num_warps=1,
            **overlapped(),
        )


@triton.jit
def _normed(a, b, weight, column, where, eps, HALF: tl.constexpr):
    """The two halves [heads, HALF] of some heads, those of `where` normed and weighted, the others as they are."""
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    wanted = column < HALF
    first = tl.load(weight + column, wanted, 0.0).to(tl.float32)[None, :]
    second = tl.load(weight + HALF + column, wanted, 0.0).to(tl.float32)[None, :]
    return tl.where(where, a * scale * first, a), tl.where(where, b * scale * second, b)


@triton.jit
def _rope_and_cache(
    qkv,
    cos_sin,
    positions,
    slot_mapping,
    q_norm,
    k_norm,
    q,
    keys,
    values,
    heads,
    kv_heads,
    block_size,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    eps,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_results(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    total = heads + 2 * kv_heads
    head = (tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE))[:, None]
    column = tl.arange(0, HALF_PAD)
    place = column[None, :]
    inside = (head < total) & (place < HALF)
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + kv_heads)
    is_v = head >= heads + kv_heads

    source = qkv + (token * total + head) * (2 * HALF) + place
    raw_a = tl.load(source, inside, 0.0)
    raw_b = tl.load(source + HALF, inside, 0.0)
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    if Q_NORM:
        a, b = _normed(a, b, q_norm, column, is_q, eps, HALF)
    if K_NORM:
        a, b = _normed(a, b, k_norm, column, is_k, eps, HALF)
    angle = cos_sin + tl.load(positions + token) * (2 * HALF) + place
    cos = tl.load(angle, place < HALF, 0.0)
    sin = tl.load(angle + HALF, place < HALF, 0.0)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin

    target = q + (token * heads + head) * (2 * HALF) + place
    tl.store(target, turned_a, inside & is_q)
    tl.store(target + HALF, turned_b, inside & is_q)
    slot = tl.load(slot_mapping + token)
    block, offset = slot // block_size, slot % block_size
    target = keys + block * key_block + (head - heads) * key_head + offset * key_token + place
    tl.store(target, turned_a, inside & is_k)
    tl.store(target + HALF, turned_b, inside & is_k)
    target = values + block * value_block + (head - heads - kv_heads) * value_head + offset * value_token + place
    tl.store(target, raw_a, inside & is_v)
    tl.store(target + HALF, raw_b, inside & is_v)


@triton.jit
def _write_kv(
    k,
    v,
    slot_mapping,
    keys,
    values,
    block_size,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    SIZE: tl.constexpr,
    PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_results(OVERLAP)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, PAD)
    inside = column < SIZE
    source = (token * tl.num_programs(1) + head) * SIZE + column
    slot = tl.load(slot_mapping + token)
    block, offset = slot // block_size, slot % block_size
    key = keys + block * key_block + head * key_head + offset * key_token + column
    value = values + block * value_block + head * value_head + offset * value_token + column
    tl.store(key, tl.load(k + source, inside), inside)
    tl.store(value, tl.load(v + source, inside), inside)
