"""What both attention kernels share: the shape of a tile, keys and values gathered from pages, and the online softmax.

Owns the walk's single steps, as Triton functions that are inlined into `attention_decode` and `attention_prefill`; must
not know rows, splits or masks of a step. Scores are kept in units of log2, so that exp2 stands in for exp.

The softmax over tiles is that of Milakov & Gimelshein (2018) and FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...backends.base import KVLayer

LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_GROUP = 128  # query heads per key/value head: they share one tile
MAX_HEAD_SIZE = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """How much one program holds at a time: `rows` of queries by `keys` tokens, by so many warps, with the loads of
    `stages` tiles under way."""

    rows: int
    keys: int
    warps: int
    stages: int


def unsupported(q: torch.Tensor, kv: KVLayer) -> str | None:
    """Why the kernels can't attend with `q` [T, Hq, D] over `kv`, or None where they can.

    Raises `ValueError` for what no backend could do: shapes or dtypes that contradict each other.
    """
    _, kv_heads, _, head_size = kv.keys.shape
    heads = q.shape[1]
    if q.shape[2] != head_size or heads % kv_heads or kv.values.shape != kv.keys.shape:
        raise ValueError(f"q {list(q.shape)} does not fit the cache {list(kv.keys.shape)}, {list(kv.values.shape)}")
    if kv.keys.dtype is not q.dtype or not (kv.keys.is_contiguous() and kv.values.is_contiguous()):
        raise ValueError(f"keys and values must be contiguous {q.dtype} [num_blocks, kv_heads, block_size, head_size]")
    if q.dtype not in DTYPES:
        return f"the attention kernels compute in bfloat16, float16 or float32, not {q.dtype}"
    if head_size > MAX_HEAD_SIZE:
        return f"the attention kernels take heads of at most {MAX_HEAD_SIZE}, not {head_size}"
    if heads // kv_heads > MAX_GROUP:
        return f"the attention kernels take at most {MAX_GROUP} query heads per kv head, not {heads // kv_heads}"
    return None


def score_factors(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """(factor, cap) that turn a product of query and key into a score in units of log2: product * factor, or
    cap * tanh(product * factor) where there is a soft cap. Raises `ValueError` for a scale that is not positive."""
    if not scale > 0:  # the running maximum is taken before the scores are scaled
        raise ValueError(f"scale must be over 0, got {scale}")
    if soft_cap:
        return scale / soft_cap, soft_cap * LOG2_E
    return scale * LOG2_E, 0.0


@triton.jit
def page_offsets(table, tokens, live, block_stride, BLOCK_SIZE: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """Where the keys (or values) of `tokens` [N] start within one head of the cache, [N] int64, by the row's block
    table. With MASKED, only those that are `live` [N] are looked up."""
    if MASKED:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=live, other=0)
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE)
    return blocks.to(tl.int64) * block_stride + (tokens % BLOCK_SIZE) * HEAD


@triton.jit
def load_rows(base, offsets, live, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, MASKED: tl.constexpr):
    """[N, HEAD_PAD]: HEAD elements from each of `offsets` [N], zeros beyond them and, with MASKED, in rows that are not
    `live`: a slot that holds no token yet may hold a NaN."""
    dims = tl.arange(0, HEAD_PAD)
    pointers = base + offsets[:, None] + dims[None, :]
    if MASKED:
        if HEAD == HEAD_PAD:
            rows = tl.load(pointers, mask=live[:, None], other=0.0)
        else:
            rows = tl.load(pointers, mask=live[:, None] & (dims < HEAD)[None, :], other=0.0)
    else:
        if HEAD == HEAD_PAD:
            rows = tl.load(pointers)
        else:
            rows = tl.load(pointers, mask=(dims < HEAD)[None, :], other=0.0)
    return rows


@triton.jit
def soft_capped(products, factor, cap):
    """cap * tanh(products * factor); tanh by exp2, exact at both infinities."""
    growth = tl.exp2(products * (factor * 2.8853900817779268))  # 2 log2(e)
    return cap - 2.0 * cap / (growth + 1.0)


@triton.jit
def absorb(scores, values, factor, top, total, mixed, CAN_BE_EMPTY: tl.constexpr):
    """One step of the online softmax: `scores` [M, N] (times `factor`: units of log2; -inf is unseen) and `values`
    [N, D] join the running maximum `top` [M], sum `total` [M] and weighted sum `mixed` [M, D].

    CAN_BE_EMPTY: a row may have seen nothing yet, its maximum being -inf.
    """
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    if CAN_BE_EMPTY:
        zero = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        zero = higher
    weights = tl.exp2(scores * factor - zero[:, None])
    shrink = tl.exp2(top - zero)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
    return higher, total, mixed
