"""Where top-k and top-p cut a row of weights, found by bisection instead of a sort.

Owns the device functions that find the smallest weight that `executor/logits.least_kept` would keep; must not know
how a token is drawn. Weights are probabilities up to a factor, the largest 1, computed anew from the logits each time
they are looked at. As non-negative floats they are in the order of their bits, and are searched as integers.

Two weights between which the cut must be are guessed first (`bracket.py`). One pass over the groups that reach the
lower one lists what lies in between, and that list, which is short, is searched. Where there is no room for so many, or
the guess is wrong, the groups are searched themselves, which is always right and always slow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bracket import kth_peak, likely_cut, sure_mass
from .groups import list_groups, load_groups

LISTED = 16384  # room in the list of weights
LIST_ROWS, LIST_COLUMNS = tl.constexpr(16), tl.constexpr(128)  # of the list that are looked at together
SEARCH_TILE = 32  # groups that are looked at together
NEVER = tl.constexpr(0x7FFFFFFF)  # above the bits of every weight


@triton.jit
def least_kept(
    logits, order, listed, peaks, amounts, vocab, best, temperature, top_k, top_p, min_p,
    GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The bits of the smallest weight that survives min-p, then top-k, then top-p: `logits.least_kept` of one row.

    `peaks` [PAD] int32: the bits of each group's largest weight, -1 behind the groups; `amounts` [PAD] float32: the
    groups' sums; `order`: room for as many numbers of groups; `listed`: room for `LISTED` weights. `top_k` int64 (0:
    all), `top_p` and `min_p` float32. Tokens that tie with the last one kept are kept too, but count for the mass of
    top-k no more often than it has places.
    """
    least = min_p.to(tl.int32, bitcast=True)
    if (top_k > 0) | (top_p < 1.0):
        top = tl.max(peaks, 0)
        total = tl.full((), 0.0, tl.float64)  # not known yet
        spare = total
        if top_k > 0:
            least = kth_peak(peaks, top_k, least)
        elif min_p == 0.0:
            total = tl.sum(amounts.to(tl.float64), 0)
            spare = (1.0 - top_p.to(tl.float64)) * total
            least = sure_mass(peaks, amounts, (0.999 * spare).to(tl.float32), GROUP)
        active = list_groups(peaks, least, order, PAD)
        low, high = least - 1, top
        if total > 0.0:
            spare -= tl.sum(tl.where(peaks < least, amounts, 0.0).to(tl.float64), 0)
            low, high = likely_cut(
                logits, order, active, low, high, spare.to(tl.float32), vocab, best, temperature, LISTED, GROUP, TILE
            )
        count, mass, above = _list_weights(
            logits, order, active, listed, low, high, vocab, best, temperature, GROUP, TILE, LISTED
        )
        wanted = top_p.to(tl.float64) * total - above
        if (count <= LISTED) & ((high == top) | (wanted > 0.0)) & ((low < least) | (wanted <= mass)):
            least = _cut(
                logits, order, listed, count, low, high, total, above, vocab, best, temperature, top_k, top_p,
                True, LIST_COLUMNS, LIST_ROWS,
            )  # fmt: skip
        else:
            least = _cut(
                logits, order, listed, active, least - 1, top, total, 0.0, vocab, best, temperature, top_k, top_p,
                False, GROUP, TILE,
            )  # fmt: skip
    return least


@triton.jit
def _list_weights(
    logits, order, active, listed, low, high, vocab, best, temperature,
    GROUP: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Write the weights in (`low`, `high`] to `listed`, as far as there is room. Returns how many there are, their sum,
    and the sum of those above `high`; sums are float64."""
    count = 0
    between, above = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
    for first in range(0, active, TILE):
        weight = load_groups(logits, order, first, active, vocab, best, temperature, GROUP, TILE)
        bits = weight.to(tl.int32, bitcast=True)
        hit = (bits > low) & (bits <= high)
        number = hit.to(tl.int32)
        of_group = tl.sum(number, 1)
        behind = count + tl.cumsum(of_group, 0) - of_group
        place = behind[:, None] + tl.cumsum(number, 1) - 1
        tl.store(listed + place, weight, hit & (place < LISTED))
        between += tl.sum(tl.where(hit, weight, 0.0), 1).to(tl.float64)
        above += tl.sum(tl.where(bits > high, weight, 0.0), 1).to(tl.float64)
        count += tl.sum(of_group, 0)
    tl.debug_barrier()  # what other threads wrote
    return count, tl.sum(between, 0), tl.sum(above, 0)


@triton.jit
def _cut(
    logits, order, listed, size, low, high, total, above, vocab, best, temperature, top_k, top_p,
    LIST: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`least_kept`, known to be in (`low`, `high`] (bits), beyond which weights amount to `above`. `total`: what is
    kept before top-p; 0 if that is to be found out. `LIST`: search `listed[:size]`, else the groups `order[:size]`."""
    for by_mass in range(2):  # one search, whose code is long, for the cut of top-k and then for that of top-p
        if ((by_mass == 0) & (top_k > 0)) | ((by_mass == 1) & (top_p < 1.0)):
            wanted = top_k.to(tl.float64)
            if by_mass == 1:
                if total == 0.0:
                    total = _kept_mass(
                        logits, order, listed, size, low + 1, top_k, vocab, best, temperature, LIST, GROUP, TILE
                    )
                wanted = top_p.to(tl.float64) * total - above
            least = _smallest(
                logits, order, listed, size, low, high, wanted, by_mass == 1, vocab, best, temperature,
                LIST, GROUP, TILE,
            )  # fmt: skip
            low = least - 1
    return low + 1


@triton.jit
def _smallest(
    logits, order, listed, size, low, high, wanted, by_mass, vocab, best, temperature,
    LIST: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The smallest weight in (`low`, `high`] such that the weights above it, summed up `by_mass` or counted, amount to
    less than `wanted`; all as bits.

    Both ends move to weights that are there, so that one is left in the end, after some ten rounds; 31 are always
    enough.
    """
    while low + 1 < high:
        middle = low + (high - low) // 2
        amount, above, below = _measure(
            logits, order, listed, size, low, middle, by_mass, vocab, best, temperature, LIST, GROUP, TILE
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
def _measure(
    logits, order, listed, size, low, middle, by_mass, vocab, best, temperature,
    LIST: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of the weights above `middle`: their sum or number, and the smallest; of those above `low` and not above
    `middle`: the largest, or -1. Bits of weights, but for the sum (float64)."""
    amount = tl.zeros((TILE, GROUP), tl.float64)
    above = tl.full((TILE, GROUP), NEVER, tl.int32)
    below = tl.full((TILE, GROUP), -1, tl.int32)
    for first in range(0, size, TILE * GROUP if LIST else TILE):
        weight, bits = _load(logits, order, listed, first, size, vocab, best, temperature, LIST, GROUP, TILE)
        over = bits > middle
        amount += tl.where(over, tl.where(by_mass, weight, 1.0), 0.0).to(tl.float64)
        above = tl.minimum(above, tl.where(over, bits, NEVER))
        below = tl.maximum(below, tl.where((bits > low) & (bits <= middle), bits, -1))
    return tl.sum(tl.sum(amount, 1), 0), tl.min(tl.min(above, 1), 0), tl.max(tl.max(below, 1), 0)


@triton.jit
def _kept_mass(
    logits, order, listed, size, floor, top_k, vocab, best, temperature,
    LIST: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sum, float64, of the weights of at least `floor` (bits), of at most `top_k` of them where it is not 0."""
    mass = tl.zeros((TILE, GROUP), tl.float64)
    above = tl.zeros((TILE, GROUP), tl.int32)
    ties = tl.zeros((TILE, GROUP), tl.int32)
    for first in range(0, size, TILE * GROUP if LIST else TILE):
        weight, bits = _load(logits, order, listed, first, size, vocab, best, temperature, LIST, GROUP, TILE)
        mass += tl.where(bits > floor, weight, 0.0).to(tl.float64)
        above += (bits > floor).to(tl.int32)
        ties += (bits == floor).to(tl.int32)
    places = tl.sum(tl.sum(ties, 1), 0).to(tl.int64)
    if top_k > 0:
        places = tl.minimum(places, top_k - tl.sum(tl.sum(above, 1), 0))
    return tl.sum(tl.sum(mass, 1), 0) + floor.to(tl.float32, bitcast=True).to(tl.float64) * places.to(tl.float64)


@triton.jit
def _load(
    logits, order, listed, first, size, vocab, best, temperature,
    LIST: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[TILE, GROUP] weights, and their bits, from place `first` of the list on, or of the groups; -1 where none is."""
    if LIST:
        place = first + tl.arange(0, TILE)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        weight = tl.load(listed + place, place < size, -1.0)
    else:
        weight = load_groups(logits, order, first, size, vocab, best, temperature, GROUP, TILE)
    return weight, weight.to(tl.int32, bitcast=True)
