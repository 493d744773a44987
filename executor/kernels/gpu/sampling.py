"""From logits to tokens: the largest of each row, and a draw with temperature, top-k, top-p and min-p.

Owns the kernels that choose as `executor/sampler.py` does, with the same noise; must not know requests or what else
changes logits. Several programs share a row for what looks at the whole vocabulary (`_tile_best`, `_group_weights`),
so that one row keeps the device busy too; what is left is done by one program a row. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import gumbel, noisy_log
from .search import least_kept, list_groups, load_groups, weigh

GROUP = 256  # as in executor/sampler.py: part of what a seed means
BEST_TILE = 4096  # logits of one program
GROUP_TILE = 8  # groups of one program that weighs
SEARCH_TILE = 32  # groups that a search looks at together


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `logits` [R, V] float32 and its index: ([R] float32, [R] int64); the first of equals.
    A row with a NaN has it as its largest, and the first one's index."""
    rows, vocab = logits.shape
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return best, tokens
    tiles = triton.cdiv(vocab, BEST_TILE)
    tile_best = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    tile_token = torch.empty((rows, tiles), dtype=torch.int64, device=logits.device)
    _tile_best[(rows, tiles)](logits, tile_best, tile_token, vocab, logits.stride(0), TILE=BEST_TILE, num_warps=8)
    _merge_best[(rows,)](
        tile_best, tile_token, best, tokens, tiles, vocab, PAD=triton.next_power_of_2(tiles), num_warps=1
    )
    return best, tokens


def draw(
    logits: Tensor,
    best: Tensor,
    tokens: Tensor,
    rows: Tensor | None,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> None:
    """Put a token drawn at random into `tokens` [R] int64 for each of `rows` [D] int64 (None: all, D is R) whose
    temperature is not 0.

    `logits` [R, V] float32, `best` [R] as `best_tokens` found it; `keys` [D] int64: what the noise is a function of,
    together with the token; `temperature`, `top_p`, `min_p` [D] float32, `top_k` [D] int64 (0: all).
    """
    count, vocab = len(keys), logits.shape[1]
    if not count:
        return
    groups = triton.cdiv(vocab, GROUP)
    maxima, sums = torch.empty((2, count, groups), dtype=torch.float32, device=logits.device)
    order = torch.empty((count, groups), dtype=torch.int32, device=logits.device)
    _group_weights[(count, triton.cdiv(groups, GROUP_TILE))](
        logits, best, rows, temperature, maxima, sums, vocab, groups, logits.stride(0),
        ALL=rows is None, GROUP=GROUP, TILE=GROUP_TILE, num_warps=4,
    )  # fmt: skip
    pad = max(2, triton.next_power_of_2(groups))
    _draw[(count,)](
        logits, best, tokens, rows, keys, temperature, top_k, top_p, min_p, maxima, sums, order,
        vocab, groups, logits.stride(0),
        ALL=rows is None, GROUP=GROUP, PAD=pad, TILE=min(pad, SEARCH_TILE), num_warps=32,
    )  # fmt: skip


@triton.jit
def _first_best(value, index, inside, end):
    """The largest of `value` and its `index`, the smallest of equals; a NaN is larger than all."""
    broken = (value != value) & inside
    any_broken = tl.max(broken.to(tl.int32), 0) > 0
    largest = tl.max(tl.where(broken | ~inside, -float("inf"), value), 0)
    hit = tl.where(any_broken, broken, (value == largest) & inside)
    return tl.where(any_broken, float("nan"), largest), tl.min(tl.where(hit, index, end), 0)


@triton.jit
def _tile_best(logits, tile_best, tile_token, vocab, row_stride, TILE: tl.constexpr):
    row, tile = tl.program_id(0), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab
    value = tl.load(logits + row.to(tl.int64) * row_stride + token, inside, -float("inf"))
    best, where = _first_best(value, token, inside, vocab)
    place = row * tl.num_programs(1) + tile
    tl.store(tile_best + place, best)
    tl.store(tile_token + place, where.to(tl.int64))


@triton.jit
def _merge_best(tile_best, tile_token, best, tokens, tiles, vocab, PAD: tl.constexpr):
    row = tl.program_id(0)
    tile = tl.arange(0, PAD)
    inside = tile < tiles
    value = tl.load(tile_best + row * tiles + tile, inside, -float("inf"))
    token = tl.load(tile_token + row * tiles + tile, inside, 0)
    largest, where = _first_best(value, token, inside, vocab)
    tl.store(best + row, largest)
    tl.store(tokens + row, where)


@triton.jit
def _group_weights(
    logits, best, rows, temperature, maxima, sums, vocab, groups, row_stride,
    ALL: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest weight and the sum of each group of neighbours."""
    place = tl.program_id(0)
    heat = tl.load(temperature + place)
    if heat > 0:
        row = place.to(tl.int64) if ALL else tl.load(rows + place)
        group = tl.program_id(1) * TILE + tl.arange(0, TILE)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = token < vocab
        value = tl.load(logits + row * row_stride + token, inside, 0.0)
        weight = tl.where(inside, weigh(value, tl.load(best + row), heat), 0.0)
        target = place * groups + group
        tl.store(maxima + target, tl.max(weight, 1), group < groups)
        tl.store(sums + target, tl.sum(weight, 1), group < groups)


@triton.jit
def _draw(
    logits, best, tokens, rows, keys, temperature, top_k, top_p, min_p, maxima, sums, order, vocab, groups, row_stride,
    ALL: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    heat = tl.load(temperature + place)
    if heat > 0:
        row = place.to(tl.int64) if ALL else tl.load(rows + place)
        key = tl.load(keys + place)
        k, p, least_share = tl.load(top_k + place), tl.load(top_p + place), tl.load(min_p + place)
        largest = tl.load(best + row)
        logits += row * row_stride
        sums += place * groups
        order += place * groups
        rank = tl.arange(0, PAD)
        number, active = rank, groups
        least = 0.0
        if (k > 0) | (p < 1.0) | (least_share > 0.0):
            bits = tl.load(maxima + place * groups + rank, rank < groups, -1.0).to(tl.int32, bitcast=True)
            bits = tl.where(rank < groups, bits, -1)
            least_bits = least_kept(logits, order, bits, vocab, largest, heat, k, p, least_share, GROUP, PAD, TILE)
            least = least_bits.to(tl.float32, bitcast=True)
            active = list_groups(bits, least_bits, order, PAD)
            for first in range(0, active, TILE):
                some, weight = load_groups(logits, order, first, active, vocab, largest, heat, GROUP, TILE)
                kept = tl.sum(tl.where(weight >= least, weight, 0.0), 1)
                inside = first + tl.arange(0, TILE)[:, None] < active
                tl.store(sums + some, kept[:, None], inside)
            number = tl.load(order + rank, rank < active, 0)
            tl.debug_barrier()  # the sums were written by other threads
        chosen = _chosen_group(sums, number, rank < active, key, groups)
        token = chosen * GROUP + tl.arange(0, GROUP)
        weight = weigh(tl.load(logits + token, token < vocab, -float("inf")), largest, heat)
        weight = tl.where((token < vocab) & (weight >= least), weight, 0.0)
        noisy = noisy_log(weight, gumbel(key, token.to(tl.int64)))
        drawn = chosen * GROUP + tl.argmax(noisy, 0)
        tl.store(tokens + row, tl.minimum(drawn, vocab - 1).to(tl.int64))


@triton.jit
def _chosen_group(sums, number, inside, key, groups):
    """The group drawn by the `sums` of the groups `number`, of which `inside` are there: Gumbel-max."""
    amount = tl.load(sums + number, inside, 0.0)
    noisy = noisy_log(amount, gumbel(key, -1 - number.to(tl.int64)))
    hit = inside & (noisy == tl.max(noisy, 0))
    return tl.minimum(tl.min(tl.where(hit, number, groups), 0), groups - 1)
