"""Between which two weights a row is cut, guessed from what is known of its groups and from a sample of them.

Owns the guesses, the sure ones and the likely ones; must not know how the cut itself is found (`search.py`). Weights
are compared as the bits of non-negative floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import load_weights

SOME = tl.constexpr(8)  # groups more than needed that are as good as none: looking closer costs more than they do
ROUGH, FINE = tl.constexpr(10), tl.constexpr(14)  # halvings of a range of weights, for a guess and for a good one
ERRORS = tl.constexpr(5.0)  # standard errors within which a sample tells how much there is of all
SAFETY = tl.constexpr(1.25)  # and the factor within which it tells how many there are


@triton.jit
def kth_peak(peaks, k, low):
    """A weight that `k` groups of `peaks` [PAD] (bits, -1 for none) reach, and not many more; `low` if fewer than `k`
    reach that. The largest of each of k groups are k weights: the k-th largest of all is no smaller."""
    high = tl.max(peaks, 0) + 1
    reaching = tl.sum((peaks >= low).to(tl.int32), 0)
    while (low + 1 < high) & (reaching > k + SOME):
        middle = low + (high - low) // 2
        here = tl.sum((peaks >= middle).to(tl.int32), 0)
        if here >= k:
            low = middle
            reaching = here
        else:
            high = middle
    return low


@triton.jit
def sure_mass(peaks, amounts, spare, GROUP: tl.constexpr):
    """A weight under which all weights together surely amount to no more than `spare`; as bits, 0 if there is none.

    `peaks` [PAD] int32 and `amounts` [PAD] float32: the largest weight of each group, as bits, and their sums. Of a
    group that reaches a weight, what lies under that is at most what its largest leaves of the sum, and at most as much
    as a group full of it.
    """
    peak = tl.where(peaks > 0, peaks, 0).to(tl.float32, bitcast=True)
    rest = tl.maximum(amounts - peak, 0.0) + 1e-6 * peak  # sums are rounded
    low, high = 0, tl.max(peaks, 0) + 1
    for _ in range(ROUGH):
        middle = low + (high - low) // 2
        weight = middle.to(tl.float32, bitcast=True)
        under = tl.sum(tl.where(peaks >= middle, tl.minimum(rest, GROUP * weight), amounts), 0)
        if under <= spare:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def likely_cut(
    logits, order, active, low, high, spare, vocab, best, temperature, room,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(low, high), bits: two weights such that all up to the one very likely amount to less than `spare` and up to the
    other to more, `low` and `high` being sure; these themselves, where the weights in between likely find `room`.

    `spare` is of the groups `order[:active]`, all others left out. Looks at `TILE` of them: under a cut are many small
    weights, which a sample tells best, and from how its groups differ follows how far it may be trusted.
    """
    if active > TILE:
        spread = active.to(tl.float32) / TILE
        place = (tl.arange(0, TILE) * spread).to(tl.int32)
        weight = load_weights(logits, tl.load(order + place)[:, None], vocab, best, temperature, GROUP)
        bits = weight.to(tl.int32, bitcast=True)
        number = tl.sum(tl.sum((bits > low).to(tl.int32), 1), 0)
        if number * spread * SAFETY > room:
            weight = tl.maximum(weight, 0.0)
            aim = spare / spread
            cut, _ = _amounts_to(weight, bits, low, high, aim, ROUGH)
            of_group = tl.sum(tl.where(bits <= cut, weight, 0.0), 1)
            total = tl.sum(of_group, 0)
            apart = of_group - total / TILE
            doubt = ERRORS * tl.sqrt(tl.sum(apart * apart, 0) * TILE / (TILE - 1)) / tl.maximum(total, 1e-30)
            less, _ = _amounts_to(weight, bits, low, high, aim * tl.maximum(1.0 - doubt, 0.0), FINE)
            _, more = _amounts_to(weight, bits, low, high, aim * (1.0 + doubt), FINE)
            low, high = less, more
    return low, high


@triton.jit
def _amounts_to(weight, bits, low, high, aim, ROUNDS: tl.constexpr):
    """Two weights close together between `low` and `high` (bits): those up to the one amount to no more than `aim`, up
    to the other to more; unless that is true of none in between."""
    for _ in range(ROUNDS):
        middle = low + (high - low) // 2
        if tl.sum(tl.sum(tl.where(bits <= middle, weight, 0.0), 1), 0) <= aim:
            low = middle
        else:
            high = middle
    return low, high
