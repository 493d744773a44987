"""The log-probability and the rank of chosen tokens, without a sort.

Owns the kernels behind `executor/logprobs.top_logprobs`; must not know who asked. Several programs share a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import power_of_two, tiles_of

TILE = 4096  # logits of one program


def chosen_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `tokens` [N] int64 in `logits` [N, V] float32: log-probability and rank (1: none is likelier), and what each
    row's logits lose to become log-probabilities; ([N] float32, [N] int64, [N] float32)."""
    rows, vocab = logits.shape
    own, normalizer = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        tiles = tiles_of(vocab, TILE)
        largest, sums = torch.empty((2, rows, tiles), dtype=torch.float32, device=logits.device)
        likelier = torch.empty((rows, tiles), dtype=torch.int32, device=logits.device)
        _tile_sums[(rows, tiles)](
            logits, tokens, largest, sums, likelier, vocab, logits.stride(0), TILE=TILE, num_warps=4
        )
        _merge_sums[(rows,)](
            logits, tokens, largest, sums, likelier, own, ranks, normalizer, tiles, logits.stride(0),
            PAD=power_of_two(tiles), num_warps=1,
        )  # fmt: skip
    return own, ranks, normalizer


@triton.jit
def _tile_sums(logits, tokens, largest, sums, likelier, vocab, row_stride, TILE: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * row_stride + column, column < vocab, -float("inf"))
    own = tl.load(logits + row * row_stride + tl.load(tokens + row))
    top = tl.max(value, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)  # a tile that is forbidden as a whole sums up to 0
    place = row * tl.num_programs(1) + tile
    tl.store(largest + place, top)
    tl.store(sums + place, tl.sum(tl.exp(value - shift), 0))
    tl.store(likelier + place, tl.sum((value > own).to(tl.int32), 0))


@triton.jit
def _merge_sums(
    logits, tokens, largest, sums, likelier, own, ranks, normalizer, tiles, row_stride, PAD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PAD)
    inside = tile < tiles
    tops = tl.load(largest + row * tiles + tile, inside, -float("inf"))
    top = tl.max(tops, 0)
    parts = tl.load(sums + row * tiles + tile, inside, 0.0) * tl.exp(tops - top)
    loss = top + tl.log(tl.sum(parts, 0))
    value = tl.load(logits + row * row_stride + tl.load(tokens + row))
    tl.store(own + row, value - loss)
    tl.store(normalizer + row, loss)
    count = tl.sum(tl.load(likelier + row * tiles + tile, inside, 0), 0)
    tl.store(ranks + row, count.to(tl.int64) + 1)
