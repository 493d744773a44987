"""Where top-k and top-p cut a row of weights, found by bisection instead of a sort.

Owns the device functions that find the smallest weight that `executor/logits.least_kept` would keep; must not know
how a token is drawn. Weights are probabilities up to a factor, the largest 1, computed anew from the logits each time
they are looked at. As non-negative floats they are in the order of their bits, and are searched as integers.

The row is cut into groups of neighbours, whose largest weights are known. Only groups that reach the lower end of what
is searched are looked at: with a top-k of 50, at most some fifty groups of the hundreds of a large vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(0x7FFFFFFF)  # above the bits of every weight


@triton.jit
def weigh(logit, best, temperature):
    """exp((`logit` - `best`) / `temperature`), rounded after each operation as torch does."""
    return tl.exp(tl.div_rn(logit - best, temperature))


@triton.jit
def list_groups(maxima, least, order, PAD: tl.constexpr):
    """Write the numbers of the groups whose `maxima` [PAD] reach `least` (bits) to `order` [PAD] int32; how many."""
    group = tl.arange(0, PAD)
    active = (maxima >= least).to(tl.int32)
    tl.debug_barrier()  # what other threads still read
    tl.store(order + tl.cumsum(active, 0) - 1, group, active > 0)
    tl.debug_barrier()  # what other threads wrote
    return tl.sum(active, 0)


@triton.jit
def load_groups(logits, order, first, active, vocab, best, temperature, GROUP: tl.constexpr, TILE: tl.constexpr):
    """(numbers [TILE, 1], weights [TILE, GROUP]) of the groups `order[first : first + TILE]`; of those from `active`
    on, and behind the vocabulary, the weights are -1."""
    place = first + tl.arange(0, TILE)
    number = tl.load(order + place, place < active, 0)[:, None]
    token = number * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (place < active)[:, None] & (token < vocab)
    value = tl.load(logits + token, inside, 0.0)
    return number, tl.where(inside, weigh(value, best, temperature), -1.0)


@triton.jit
def _measure(
    logits, order, active, low, middle, by_mass, vocab, best, temperature,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the weights above `middle`: their sum or number, and the smallest; of those above `low` and not above
    `middle`: the largest, or -1. Bits of weights, but for the sum (float64)."""
    amount = tl.zeros((TILE, GROUP), tl.float64)
    above = tl.full((TILE, GROUP), NEVER, tl.int32)
    below = tl.full((TILE, GROUP), -1, tl.int32)
    for first in range(0, active, TILE):
        _, weight = load_groups(logits, order, first, active, vocab, best, temperature, GROUP, TILE)
        bits = weight.to(tl.int32, bitcast=True)
        over = bits > middle
        amount += tl.where(over, tl.where(by_mass, weight, 1.0), 0.0).to(tl.float64)
        above = tl.minimum(above, tl.where(over, bits, NEVER))
        below = tl.maximum(below, tl.where((bits > low) & (bits <= middle), bits, -1))
    return tl.sum(tl.sum(amount, 1), 0), tl.min(tl.min(above, 1), 0), tl.max(tl.max(below, 1), 0)


@triton.jit
def _smallest(
    logits, order, active, low, high, wanted, by_mass, vocab, best, temperature,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The smallest weight in (`low`, `high`] such that the weights above it, summed up `by_mass` or counted, amount to
    less than `wanted`; all as bits.

    `high` is the largest weight, `order` [active] holds the groups that may have one above `low`. Both ends move to
    weights that are there, so that one is left in the end, after some ten rounds; 31 are always enough.
    """
    while low + 1 < high:
        middle = low + (high - low) // 2
        amount, above, below = _measure(
            logits, order, active, low, middle, by_mass, vocab, best, temperature, GROUP, TILE
        )
        if amount >= wanted:
            low = above - 1
        elif below >= 0:
            high = below
        else:  # nothing there between low and middle: the next above is the smallest
            high = above
            low = above - 1
    return high


@triton.jit
def _kth_largest(maxima, k):
    """The `k`-th largest of `maxima` [PAD] (bits, -1 for none), or -1."""
    low, high = -1, tl.max(maxima, 0)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((maxima >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def least_kept(
    logits, order, maxima, vocab, best, temperature, top_k, top_p, min_p,
    GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The bits of the smallest weight that survives min-p, then top-k, then top-p: `logits.least_kept` of one row.

    `maxima` [PAD] int32: the bits of each group's largest weight, -1 behind the groups; `order`: room for as many
    numbers of groups; `top_k` int64 (0: all), `top_p` and `min_p` float32. Tokens that tie with the last one kept are
    kept too, but count for the mass of top-k no more often than it has places.
    """
    floor = min_p.to(tl.int32, bitcast=True)
    high = tl.max(maxima, 0)
    for by_mass in range(2):  # one search, whose code is long, for the cut of top-k and then for that of top-p
        if ((by_mass == 0) & (top_k > 0)) | ((by_mass == 1) & (top_p < 1.0)):
            if by_mass == 0:
                # The largest of each of k groups are k weights: the k-th largest of all is no smaller than theirs.
                floor = tl.maximum(floor, _kth_largest(maxima, top_k))
            active = list_groups(maxima, floor, order, PAD)
            wanted = top_k.to(tl.float64)
            if by_mass == 1:
                total = _kept_mass(logits, order, active, floor, top_k, vocab, best, temperature, GROUP, TILE)
                wanted = top_p.to(tl.float64) * total
                # All weights under this amount to no more than half of what may go, so none of them is the cut.
                sure = ((1.0 - top_p.to(tl.float64)) * total / (2.0 * vocab)).to(tl.float32)
                floor = tl.maximum(floor, sure.to(tl.int32, bitcast=True))
                active = list_groups(maxima, floor, order, PAD)
            floor = _smallest(
                logits, order, active, floor - 1, high, wanted, by_mass == 1, vocab, best, temperature, GROUP, TILE
            )
    return floor


@triton.jit
def _kept_mass(logits, order, active, floor, top_k, vocab, best, temperature, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The sum, float64, of the weights of at least `floor` (bits), of at most `top_k` of them where it is not 0."""
    mass = tl.zeros((TILE, GROUP), tl.float64)
    above = tl.zeros((TILE, GROUP), tl.int32)
    ties = tl.zeros((TILE, GROUP), tl.int32)
    for first in range(0, active, TILE):
        _, weight = load_groups(logits, order, first, active, vocab, best, temperature, GROUP, TILE)
        bits = weight.to(tl.int32, bitcast=True)
        mass += tl.where(bits > floor, weight, 0.0).to(tl.float64)
        above += (bits > floor).to(tl.int32)
        ties += (bits == floor).to(tl.int32)
    places = tl.sum(tl.sum(ties, 1), 0).to(tl.int64)
    if top_k > 0:
        places = tl.minimum(places, top_k - tl.sum(tl.sum(above, 1), 0))
    return tl.sum(tl.sum(mass, 1), 0) + floor.to(tl.float32, bitcast=True).to(tl.float64) * places.to(tl.float64)
