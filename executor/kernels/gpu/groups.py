"""The vocabulary cut into groups of neighbours: the largest logit of each, and how much its members weigh.

Owns the one pass over all logits that every choice of a token begins with, several programs a row, and how some groups
are looked at again; must not know how a token is chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import await_results, overlapped
from .sizes import tiles_of

GROUP = 256  # as in executor/sampler.py: part of what a seed means
PASS_TILE = 8  # groups of one program
ALIGNED = 16  # rows of what is kept of the groups begin at multiples of it
LOG2_E = tl.constexpr(1.4426950408889634)


def survey(
    logits: Tensor, rows: Tensor | None, temperature: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(peaks, masses): of each group its largest logit, and the sum of its weights relative to that of the largest;
    [D, groups or more] float32 each, for `rows` [D] int64 of `logits` [R, V] float32 (None: all, D is R).

    Row i has `temperature[columns[i]]` (None: `temperature[i]`), float32; where that is 0 its masses are undefined, and
    without `temperature` there are none.
    """
    count, vocab = len(logits) if rows is None else len(rows), logits.shape[1]
    groups = tiles_of(vocab, GROUP)
    width = tiles_of(groups, ALIGNED) * ALIGNED
    peaks = torch.empty((count, width), dtype=torch.float32, device=logits.device)
    masses = None if temperature is None else torch.empty_like(peaks)
    _survey[(tiles_of(groups, PASS_TILE), count)](
        logits, rows, temperature, columns, peaks, masses, vocab, groups, logits.stride(0), width,
        GROUP=GROUP, TILE=PASS_TILE, num_warps=4 if masses is None else 2, **overlapped(),
    )  # fmt: skip
    return peaks, masses


@triton.jit
def weigh(logit, best, temperature):
    """exp((`logit` - `best`) / `temperature`), rounded after each operation as torch does."""
    return tl.exp(tl.div_rn(logit - best, temperature))


@triton.jit
def larger(a, b):
    """The larger of two; a NaN is larger than all."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_largest(value, index, inside, end):
    """The largest of `value` and its `index`, the smallest of equals; a NaN is larger than all."""
    largest = tl.reduce(tl.where(inside, value, -float("inf")), 0, larger)
    hit = inside & ((value == largest) | (value != value))
    return largest, tl.min(tl.where(hit, index, end), 0)


@triton.jit
def largest_token(logits, group, vocab, GROUP: tl.constexpr):
    """The token with the largest of `logits` [V] in `group`, the first of equals."""
    token = group * GROUP + tl.arange(0, GROUP)
    return first_largest(tl.load(logits + token, token < vocab, 0.0), token, token < vocab, vocab - 1)[1]


@triton.jit
def _survey(
    logits, rows, temperature, columns, peaks, masses, vocab, groups, row_stride, width,
    GROUP: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_results(OVERLAP)
    place = tl.program_id(1)
    row = place.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + place)
    group = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(logits + row * row_stride + token, token < vocab, -float("inf"))
    peak = tl.reduce(value, 1, larger)
    target = place.to(tl.int64) * width + group
    tl.store(peaks + target, peak, group < groups)
    if temperature is not None:
        column = place.to(tl.int64)
        if columns is not None:
            column = tl.load(columns + place)
        heat = tl.load(temperature + column)
        if heat > 0:
            # A group that is forbidden as a whole weighs 0.
            over = tl.maximum(value - tl.where(peak == -float("inf"), 0.0, peak)[:, None], -1e30)  # not infinite
            exact = LOG2_E / heat.to(tl.float64)
            scale = exact.to(tl.float32)
            rest = (exact - scale).to(tl.float32)  # else all small weights would be off, and all the same way
            tl.store(masses + target, tl.sum(tl.exp2(over * scale + over * rest), 1), group < groups)


@triton.jit
def list_groups(peaks, least, order, PAD: tl.constexpr):
    """Write the numbers of the groups whose `peaks` [PAD] reach `least` (bits) to `order` [PAD] int32; how many."""
    group = tl.arange(0, PAD)
    active = (peaks >= least).to(tl.int32)
    tl.debug_barrier()  # what other threads still read
    tl.store(order + tl.cumsum(active, 0) - 1, group, active > 0)
    tl.debug_barrier()  # what other threads wrote
    return tl.sum(active, 0)


@triton.jit
def load_weights(logits, number, vocab, best, temperature, GROUP: tl.constexpr):
    """The weights [TILE, GROUP] of the groups `number` [TILE, 1]; behind the vocabulary -1."""
    token = number * GROUP + tl.arange(0, GROUP)[None, :]
    inside = token < vocab
    return tl.where(inside, weigh(tl.load(logits + token, inside, 0.0), best, temperature), -1.0)


@triton.jit
def load_groups(
    logits, order, first, active, vocab, best, temperature, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The weights [TILE, GROUP] of the groups `order[first : first + TILE]`; of those from `active` on, and behind the
    vocabulary, -1."""
    place = first + tl.arange(0, TILE)
    # Groups that are not there are loaded from behind the vocabulary, which is not at all.
    number = tl.load(order + place, place < active, vocab // GROUP + 1)[:, None]
    return load_weights(logits, number, vocab, best, temperature, GROUP)
