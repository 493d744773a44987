"""Rows cut into parts along their keys, so that few rows fill the device too, and the parts merged again.

Owns how many parts there are, where the parts lie and the merge, for both attention kernels; must not know how a part
is attended. Flash-decoding (Dao et al., 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_results, overlapped
from .sizes import power_of_two

MAX_SPLITS = 64  # a power of two: the merge is compiled for it, and serves all numbers up to it
AT_ONCE = 8  # parts that the merge reads at a time: mostly there are no more


def choose_splits(programs: int, resident: int, longest: int, least: int) -> int:
    """Into how many parts to cut each row: as many as fill the device, which holds `resident` programs at a time, where
    `programs` alone do not; but, with rows of `longest` tokens, none of less than `least`, which would cost more than
    it gains."""
    return max(1, min(resident // programs, longest // least, MAX_SPLITS))


def make_parts(out: Tensor, tokens: int, heads: int, splits: int) -> tuple[Tensor, Tensor]:
    """Room for `splits` parts of `tokens` x `heads` results: their means [tokens, heads, splits, D] and the log2 of
    their sums of weights [tokens, heads, splits], float32. With one part there is nothing to merge: `out` itself."""
    if splits == 1:
        return out, out
    head_size = out.shape[1] // heads
    means = out.new_empty((tokens, heads, splits, head_size), dtype=torch.float32)
    return means, out.new_empty((tokens, heads, splits), dtype=torch.float32)


def merge_parts(means: Tensor, sizes: Tensor, out: Tensor) -> None:
    """Each result of `out` [tokens, heads * D] from its parts, as `make_parts` lays them out. A part whose size is -inf
    is empty, and its mean is not looked at; where all are, the result is zero."""
    tokens, heads, splits, head_size = means.shape
    _merge[(tokens * heads,)](
        means, sizes, out, splits,
        HEAD=head_size, HEAD_PAD=power_of_two(head_size), SPLITS_PAD=MAX_SPLITS, AT_ONCE=AT_ONCE,
        **overlapped(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _merge(
    means, sizes, out, splits,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one token: its parts, each weighted by its share of the softmax's sum."""
    await_results(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    means += head * splits * HEAD
    sizes += head * splits
    every = tl.arange(0, SPLITS_PAD)
    top = tl.max(tl.load(sizes + every, mask=every < splits, other=float("-inf")), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    some, dims = tl.arange(0, AT_ONCE), tl.arange(0, HEAD_PAD)
    weights = tl.zeros([AT_ONCE], tl.float32)
    mixed = tl.zeros([AT_ONCE, HEAD_PAD], tl.float32)
    for first in range(0, splits, AT_ONCE):
        split = first + some
        size = tl.load(sizes + split, mask=split < splits, other=float("-inf"))
        weight = tl.exp2(size - top)
        mask = (size > float("-inf"))[:, None] & (dims < HEAD)[None, :]
        mean = tl.load(means + split[:, None] * HEAD + dims[None, :], mask=mask, other=0.0)
        weights += weight
        mixed += mean * weight[:, None]
    total = tl.sum(weights, 0)
    mean = tl.sum(mixed, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + head * HEAD + dims, mean.to(out.dtype.element_ty), mask=dims < HEAD)


@triton.jit
def store_part(
    means, sizes, head, real, top, total, mixed, split, splits,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The end of a part's online softmax (`top`, `total` [M] and `mixed` [M, D], see `attention_tiles.absorb`) for the
    rows that are `real` [M]: its mean and size, or, without SPLIT, the result to `means`, the output. `head` [M]:
    index of each among all heads of all tokens."""
    mean = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    dims = tl.arange(0, HEAD_PAD)
    mask = real[:, None] & (dims < HEAD)[None, :]
    if SPLIT:
        at = head * splits + split
        tl.store(means + at[:, None] * HEAD + dims[None, :], mean, mask=mask & (total > 0.0)[:, None])
        tl.store(sizes + at, top + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=real)
    else:
        tl.store(means + head[:, None] * HEAD + dims[None, :], mean.to(means.dtype.element_ty), mask=mask)
