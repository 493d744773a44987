"""Between which two weights a row is cut, guessed from what is known of its groups and from a sample of them.

Owns the guesses, the sure ones and the likely ones; must not know how the cut itself is found (`search.py`). Weights
are compared as the bits of non-negative floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import load_weights

SOME = tl.constexpr(8)  # groups more than needed that are as good as none: looking closer costs more than they do
ROUNDS = tl.constexpr(14)  # halvings of a range of weights, after which it is as narrow as a guess has to be
# A guess of the mass under the cut, taken from a sample, is trusted to be right to within this factor.
TRUST = tl.constexpr(1.6)
DOUBT = tl.constexpr(1.25)  # likewise for a number of weights


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
    for _ in range(ROUNDS):
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
    """(low, high), bits: two weights such that all up to the one likely amount to less than `spare` and up to the other
    to more, `low` and `high` being sure; these themselves, where weights in between are likely no more than `room`.

    `spare` is of the groups `order[:active]`, all others left out. Looks at `TILE` of them: under a cut are many small
    weights, which a sample tells best.
    """
    if active > TILE:
        spread = active.to(tl.float32) / TILE
        place = (tl.arange(0, TILE) * spread).to(tl.int32)
        weight = load_weights(logits, tl.load(order + place)[:, None], vocab, best, temperature, GROUP)
        bits = weight.to(tl.int32, bitcast=True)
        number = tl.sum(tl.sum((bits > low).to(tl.int32), 1), 0)
        if number * spread * DOUBT > room:
            weight = tl.maximum(weight, 0.0)
            less, more = spare / (spread * TRUST), spare / spread * TRUST
            least, most = low, high
            under, over = high, low  # the other end of the search for each
            for _ in range(ROUNDS):
                middle = least + (under - least) // 2
                is_less = tl.sum(tl.sum(tl.where(bits <= middle, weight, 0.0), 1), 0) <= less
                least = tl.where(is_less, middle, least)
                under = tl.where(is_less, under, middle)
                middle = over + (most - over) // 2
                is_more = tl.sum(tl.sum(tl.where(bits <= middle, weight, 0.0), 1), 0) > more
                most = tl.where(is_more, middle, most)
                over = tl.where(is_more, over, middle)
            low, high = least, most
    return low, high
