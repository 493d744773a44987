"""From logits to tokens: the largest of each row, and a draw with temperature, top-k, top-p and min-p.

Owns the kernels that choose as `executor/sampler.py` does, with the same noise; must not know requests or what else
changes logits. Each choice is two launches: a pass over all logits by many programs (`groups.py`), and one program a
row, which looks again only at the groups that matter. Nothing waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...draw_columns import DrawColumns
from .gather import append_one
from .groups import GROUP, first_largest, largest_token, list_groups, load_groups, survey, weigh
from .noise import gumbel, noisy_log, stream_key
from .overlap import await_results, overlapped
from .search import LISTED, SEARCH_TILE, least_kept
from .sizes import power_of_two, tiles_of

AMOUNTS = 512  # groups whose noise is computed together


class _Slots(NamedTuple):
    """Where new tokens go, as `gather.append` has it."""

    number: Tensor
    known: Tensor
    token_ids: Tensor
    lengths: Tensor
    scratch: int


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `logits` [R, V] float32 and its index: ([R] float32, [R] int64); the first of equals.
    A row with a NaN has it as its largest, and the first one's index."""
    best = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _take_best(logits, best, tokens, None)
    return best, tokens


def draw(
    logits: Tensor,
    best: Tensor,
    tokens: Tensor,
    rows: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> None:
    """Put the largest logit into `best` [R] float32, and a token drawn at random into `tokens` [R] int64, for each of
    `rows` [D] int64 of `logits` [R, V] float32.

    `keys` [D] int64: what the noise is a function of, together with the token; the others [D] as `DrawColumns` says.
    """
    _draw(logits, best, tokens, rows, DrawColumns(temperature, top_p, min_p, top_k, keys), None)


def choose(
    logits: Tensor,
    slots: Tensor,
    known: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    scratch: int,
    columns: DrawColumns | None,
) -> Tensor:
    """A token for each row of `logits` [R, V] float32, put behind the `known` [R] int64 ones of its slot in `slots`
    [R] int64, as `gather.append` does. `columns`: of all slots; None where every row is to have its likeliest. Returns
    [2, R] int32: the tokens, and the bits of each row's largest logit."""
    packed = torch.empty((2, len(logits)), dtype=torch.int32, device=logits.device)
    best, target = packed[1].view(torch.float32), _Slots(slots, known, token_ids, lengths, scratch)
    if columns is None:
        _take_best(logits, best, packed[0], target)
    else:
        _draw(logits, best, packed[0], None, columns, target)
    return packed


def _take_best(logits: Tensor, best: Tensor, tokens: Tensor, slots: _Slots | None) -> None:
    rows, vocab = logits.shape
    if rows:
        peaks, _ = survey(logits, None, None, None)
        groups = tiles_of(vocab, GROUP)
        _best_of_row[(rows,)](
            logits, peaks, best, tokens, *_where(slots), vocab, groups, logits.stride(0), peaks.stride(0),
            GROUP=GROUP, PAD=power_of_two(groups), num_warps=4, **overlapped(),
        )  # fmt: skip


def _draw(
    logits: Tensor, best: Tensor, tokens: Tensor, rows: Tensor | None, columns: DrawColumns, slots: _Slots | None
) -> None:
    """For `rows` [D] (None: all). Without `slots` the `columns` are the rows' own, with keys in place of seeds."""
    count, vocab = len(logits) if rows is None else len(rows), logits.shape[1]
    if not count:
        return
    peaks, masses = survey(logits, rows, columns.temperature, None if slots is None else slots.number)
    groups = tiles_of(vocab, GROUP)
    order = torch.empty((count, groups), dtype=torch.int32, device=logits.device)
    listed = torch.empty((count, LISTED), dtype=torch.float32, device=logits.device)
    pad = max(2, power_of_two(groups))
    _draw_of_row[(count,)](
        logits, peaks, masses, best, tokens, rows, *columns, *_where(slots), order, listed,
        vocab, groups, logits.stride(0), peaks.stride(0),
        GROUP=GROUP, PAD=pad, TILE=SEARCH_TILE, AMOUNTS=min(pad, AMOUNTS), LISTED=LISTED, num_warps=16,
        **overlapped(),
    )  # fmt: skip


def _where(slots: _Slots | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int]:
    """What a kernel has to know of `slots`."""
    if slots is None:
        return None, None, None, None, 0, 0
    return slots.number, slots.known, slots.token_ids, slots.lengths, slots.token_ids.stride(0), slots.scratch


# Where the results go is not specialized, since the halves of `packed` are aligned or not as the number of rows wants.
@triton.jit(do_not_specialize=["best", "tokens"])
def _best_of_row(
    logits, peaks, best, tokens, slots, known, token_ids, lengths, row_tokens, scratch,
    vocab, groups, row_stride, width, GROUP: tl.constexpr, PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_results(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, PAD)
    peak = tl.load(peaks + row * width + number, number < groups, 0.0)
    largest, group = first_largest(peak, number, number < groups, groups - 1)
    token = largest_token(logits + row * row_stride, group, vocab, GROUP)
    tl.store(best + row, largest)
    tl.store(tokens + row, token)
    if slots is not None:
        append_one(tl.load(slots + row), tl.load(known + row), token, token_ids, lengths, row_tokens, scratch)


@triton.jit(do_not_specialize=["best", "tokens"])
def _draw_of_row(
    logits, peaks, masses, best, tokens, rows, temperature, top_p, min_p, top_k, seed,
    slots, known, token_ids, lengths, row_tokens, scratch, order, listed, vocab, groups, row_stride, width,
    GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, AMOUNTS: tl.constexpr, LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    await_results(OVERLAP)
    place = tl.program_id(0).to(tl.int64)
    row = place
    if rows is not None:
        row = tl.load(rows + place)
    column = place
    if slots is not None:
        column = tl.load(slots + place)
    key = tl.load(seed + column)
    if slots is not None:
        key = stream_key(key, tl.load(known + place))
    heat = tl.load(temperature + column)
    k, p, least_share = tl.load(top_k + column), tl.load(top_p + column), tl.load(min_p + column)
    logits += row * row_stride
    masses += place * width
    number = tl.arange(0, PAD)
    inside = number < groups
    peak = tl.load(peaks + place * width + number, inside, -float("inf"))
    mass = tl.load(masses + number, inside, 0.0)
    largest, group = first_largest(peak, number, inside, groups - 1)
    if (heat > 0) & (tl.abs(largest) < float("inf")):
        weight = tl.where(inside, weigh(peak, largest, heat), 0.0)
        token = _drawn(
            logits, number, weight, weight * mass, masses, order + place * groups, listed + place * LISTED,
            largest, key, heat, k, p, least_share, vocab, groups, GROUP, PAD, TILE, AMOUNTS, LISTED,
        )  # fmt: skip
    else:
        token = largest_token(logits, group, vocab, GROUP)
    tl.store(best + row, largest)
    tl.store(tokens + row, token)
    if slots is not None:
        append_one(column, tl.load(known + place), token, token_ids, lengths, row_tokens, scratch)


@triton.jit
def _drawn(
    logits, number, weight, amount, amounts, order, listed, best, key, heat, k, p, least_share, vocab, groups,
    GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, AMOUNTS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A token of one row, whose groups `number` [PAD] have largest weights `weight` and sums `amount`; `amounts`,
    `order` and `listed`: room for what is found out about the groups."""
    inside = number < groups
    least = 0.0
    if (k > 0) | (p < 1.0) | (least_share > 0.0):
        bits = tl.where(inside, weight.to(tl.int32, bitcast=True), -1)
        least_bits = least_kept(
            logits, order, listed, bits, amount, vocab, best, heat, k, p, least_share, GROUP, PAD, TILE, LISTED
        )
        least = least_bits.to(tl.float32, bitcast=True)
        active = list_groups(bits, least_bits, order, PAD)
        for first in range(0, active, TILE):
            weights = load_groups(logits, order, first, active, vocab, best, heat, GROUP, TILE)
            rank = first + tl.arange(0, TILE)
            tl.store(amounts + rank, tl.sum(tl.where(weights >= least, weights, 0.0), 1), rank < active)
        tl.debug_barrier()  # what other threads wrote
        highest = tl.full((), -float("inf"), tl.float64)
        chosen = groups - 1
        for first in range(0, active, AMOUNTS):
            rank = first + tl.arange(0, AMOUNTS)
            some = tl.load(order + rank, rank < active, 0)
            noisy, here = _chosen_group(some, tl.load(amounts + rank, rank < active, 0.0), key, groups)
            if noisy > highest:  # groups ascend, so the first of equals stays
                highest = noisy
                chosen = here
    else:
        _, chosen = _chosen_group(number, amount, key, groups)
    token = chosen * GROUP + tl.arange(0, GROUP)
    weights = weigh(tl.load(logits + token, token < vocab, -float("inf")), best, heat)
    weights = tl.where((token < vocab) & (weights >= least), weights, 0.0)
    noisy = noisy_log(weights, gumbel(key, token.to(tl.int64)))
    return tl.minimum(chosen * GROUP + tl.argmax(noisy, 0), vocab - 1)


@triton.jit
def _chosen_group(number, amount, key, groups):
    """Gumbel-max: the largest noisy logarithm of the `amount` of each group `number`, and whose it is."""
    noisy = noisy_log(amount, gumbel(key, -1 - number.to(tl.int64)))
    highest = tl.max(noisy, 0)
    return highest, tl.min(tl.where(noisy == highest, number, groups - 1), 0)
