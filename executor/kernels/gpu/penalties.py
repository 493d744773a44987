"""What changes logits before a token is chosen: penalties for earlier tokens, and biases.

Owns the kernels that do in place what `executor/logits.py` does; must not know how a token is drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import tiles_of

HISTORY_TILE = 1024
VOCAB_TILE = 4096
SEEN = tl.constexpr(1 << 30)  # in a count: the token occurs at all, be it in the prompt
BIAS_TILE = 256


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    slots: Tensor,
    longest: int,
    lengths: Tensor,
    num_prompt: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """As `logits.penalize`, for `rows` [P] int64 of `logits` [R, V] float32, whose earlier tokens are the first
    `lengths` [P] int64 (`longest` at most) of rows `slots` [P] int64 of `token_ids` [S, row_tokens] int32; the first
    `num_prompt` [P] int64 of them are the prompt. The penalties are [P] float32."""
    count, vocab = len(rows), logits.shape[1]
    if not count:
        return
    counts = torch.zeros((count, vocab), dtype=torch.int32, device=logits.device)
    _count[(count, max(1, tiles_of(longest, HISTORY_TILE)))](
        counts, token_ids, slots, lengths, num_prompt, vocab, token_ids.stride(0), TILE=HISTORY_TILE, num_warps=4
    )
    _penalize[(count, tiles_of(vocab, VOCAB_TILE))](
        logits, counts, rows, presence, frequency, repetition, vocab, logits.stride(0), TILE=VOCAB_TILE, num_warps=4
    )


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add `values[i]` at (`rows[i]`, `tokens[i]`) of `logits` [R, V] float32; [N] each, a pair comes at most once."""
    count = len(rows)
    if count:
        _add_bias[(tiles_of(count, BIAS_TILE),)](
            logits, rows, tokens, values, count, logits.stride(0), TILE=BIAS_TILE, num_warps=4
        )


@triton.jit
def _count(counts, token_ids, slots, lengths, num_prompt, vocab, row_tokens, TILE: tl.constexpr):
    """How often each token was generated, and a bit for those that are there at all."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    known = place < tl.load(lengths + row)
    token = tl.load(token_ids + tl.load(slots + row) * row_tokens + place, known, 0)
    target = counts + row * vocab + token
    tl.atomic_or(target, tl.full((TILE,), SEEN, tl.int32), known)
    tl.atomic_add(target, tl.full((TILE,), 1, tl.int32), known & (place >= tl.load(num_prompt + row)))


@triton.jit
def _penalize(logits, counts, rows, presence, frequency, repetition, vocab, row_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    count = tl.load(counts + row * vocab + token, token < vocab, 0)
    seen = count >= SEEN
    times = (count & (SEEN - 1)).to(tl.float32)
    target = logits + tl.load(rows + row) * row_stride + token
    value = tl.load(target, seen, 0.0)
    factor = tl.load(repetition + row)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    once = tl.where(times > 0, tl.load(presence + row), 0.0)
    tl.store(target, value - (tl.load(frequency + row) * times + once), seen)


@triton.jit(do_not_specialize=["count"])
def _add_bias(logits, rows, tokens, values, count, row_stride, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < count
    row, token = tl.load(rows + place, inside, 0), tl.load(tokens + place, inside, 0)
    target = logits + row * row_stride + token
    tl.store(target, tl.load(target, inside, 0.0) + tl.load(values + place, inside, 0.0), inside)
