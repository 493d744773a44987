"""What changes the logits of a row before a token is chosen: penalties, biases, masks, and the cut of the unlikely.

Owns those operations, each on the rows that want it and on no other, in place; must not know slots' owners or how a
token is drawn. Shapes: R sampled rows, V vocabulary, P rows with penalties, D rows drawn at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64  # candidates looked at first for top-k and top-p
MANY = 1024  # then; a full sort is the last resort
NEIGHBOURS = 64


def allow_only(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Put -inf everywhere in the listed rows of `logits` [R, V] but at (`rows[i]`, `tokens[i]`)."""
    kept = logits[rows, tokens]
    logits[rows] = -torch.inf
    logits[rows, tokens] = kept


def forbid(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Put -inf at (`rows[i]`, `tokens[i]`) of `logits` [R, V]."""
    logits[rows, tokens] = -torch.inf


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add `values[i]` at (`rows[i]`, `tokens[i]`) of `logits` [R, V]; a pair comes at most once."""
    logits[rows, tokens] += values


def penalize(
    logits: Tensor,
    rows: Tensor,
    history: Tensor,
    lengths: Tensor,
    num_prompt: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """Make tokens less likely that were there before.

    `history` [P, L] int64: the tokens of each row, of which `lengths` [P] count and the first `num_prompt` [P] are
    the prompt. Prompt and output: a positive logit is divided by `repetition`, a negative one multiplied. Output
    only: minus `frequency` times the number of occurrences, minus `presence` once. All parameters are [P] float32.
    """
    place = torch.arange(history.shape[1], device=history.device)
    known = place < lengths[:, None]
    tokens = torch.where(known, history, history[:, :1])  # a stand-in for what is not known: changed once, as itself
    generated = (known & (place >= num_prompt[:, None])).to(logits.dtype)
    counts = logits.new_zeros((len(rows), logits.shape[1])).scatter_add_(1, tokens, generated).gather(1, tokens)
    values = logits[rows[:, None], tokens]
    values = torch.where(values > 0, values / repetition[:, None], values * repetition[:, None])
    values -= frequency[:, None] * counts + presence[:, None] * (counts > 0)
    logits[rows[:, None], tokens] = values  # a token that comes twice is written twice, with one value


def least_kept(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, sizes: list[int]) -> Tensor:
    """The smallest weight of each row that survives min-p, then top-k, then top-p.

    `weights` [D, V]: probabilities up to a factor, the largest of each row 1. `top_k` [D] int64 (0: all), `top_p` and
    `min_p` [D] float32. Tokens that tie with the last one kept are kept too. `sizes`: how many of the likeliest
    tokens to look at, growing, until that settles every row; at the last size every row must be settled; none where
    no row has a top_k or a top_p. Returns [D].
    """
    least = min_p.clone()
    rows = torch.arange(len(weights), device=weights.device)
    for size in sizes:
        part = weights if len(rows) == len(weights) else weights[rows]
        cut, settled = _cut(part, largest(part, size), top_k[rows], top_p[rows], min_p[rows])
        if size == sizes[-1]:
            least[rows] = torch.maximum(least[rows], cut)
            break
        done = rows[settled]
        least[done] = torch.maximum(least[done], cut[settled])
        rows = rows[~settled]
        if not len(rows):
            break
    return least


def _cut(part: Tensor, values: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Where top-k and top-p cut, looking only at the likeliest `values` [d, K] (descending) of `part` [d, V]; and
    which rows that settles. A row with neither is cut at 0."""
    size = values.shape[1]
    place = torch.arange(size, device=values.device)
    within_k = (top_k[:, None] == 0) | (place < top_k[:, None])
    mass = torch.where(within_k & (values >= min_p[:, None]), values, 0).double()
    above = mass.cumsum(-1)
    covered = (top_k > 0) & (top_k <= size)
    if size >= part.shape[1]:
        covered = torch.ones_like(covered)
    total = above[:, -1]
    # Only a CPU looks at fewer tokens than a row may need, so only there may the host ask the device.
    if part.device.type == "cpu" and not bool(covered.all()):
        whole = part * at_least(part, min_p) if bool(min_p.any()) else part
        total = torch.where(covered, total, whole.sum(-1).double())
    wanted = top_p * total
    open_p = top_p >= 1
    # The token that brings the sum to top_p is kept, so: those before which the sum is still short of it.
    kept = within_k & (open_p[:, None] | (above - mass < wanted[:, None]))
    cut = values.gather(1, (kept.sum(-1) - 1).clamp(min=0)[:, None])[:, 0]
    untouched = open_p & (top_k == 0)
    settled = covered | untouched | ((top_k == 0) & (above[:, -1] >= wanted))
    return torch.where(untouched, 0, cut), settled


def at_least(values: Tensor, least: Tensor) -> Tensor:
    """1.0 where `values` [N, V] reach their row's `least` [N], else 0.0: as floats, since a comparison written as
    such is several times faster on a CPU than one that makes booleans."""
    return torch.ge(values, least[:, None], out=torch.empty_like(values))


def largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row of `values` [N, V], descending."""
    size = values.shape[1]
    if count >= size:
        return values.sort(dim=-1, descending=True).values
    if count > FEW or size % NEIGHBOURS or size < 8 * FEW * NEIGHBOURS:
        return values.topk(count).values
    # They are all in the `count` groups of neighbours with the largest maxima, which are much faster to find.
    groups = values.view(len(values), -1, NEIGHBOURS)
    best = groups.amax(-1).topk(count, sorted=False).indices
    some = groups.gather(1, best[:, :, None].expand(-1, -1, NEIGHBOURS))
    return some.flatten(1).topk(count).values
