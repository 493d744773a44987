"""Choosing tokens in a recorded step: the same work whatever the rows want, parameters read from the device.

Owns the two ways of choosing that a recorded step has (`sampling_columns.Choice`); the tokens are those that
`sampler.py` chooses for the same rows. Must not know blocks or graphs. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import logits as edits
from .draw_columns import DrawColumns
from .pending import pack
from .random import stream_keys_tensor
from .sampler import GROUP, best_tokens, draw
from .sampling_columns import Choice
from .slot_tensors import SlotTensors


def choose(choice: Choice, logits: Tensor, slots: Tensor, lengths: Tensor, tensors: SlotTensors) -> Tensor:
    """A token for each row of `logits` [B, V] float32, made the next one of its slot: `slots` [B] int64 know `lengths`
    [B] int64 tokens. Returns what `pack` makes of the tokens. Without kernels, no row may have a top_p below 1 without
    a top_k of at most `logits.FEW`."""
    if tensors.kernels is not None:
        columns = None if choice is Choice.GREEDY else tensors.all_draws
        return tensors.kernels.choose(
            logits, slots, lengths, tensors.token_ids, tensors.lengths, tensors.scratch, columns
        )
    best, tokens = best_tokens(logits)
    if choice is not Choice.GREEDY:
        tokens = drawn(logits, best, tokens, lengths, tensors.draws(slots))
    tensors.append(slots, lengths, tokens)
    return pack(tokens, best)


def drawn(logits: Tensor, best: Tensor, likeliest: Tensor, lengths: Tensor, columns: DrawColumns) -> Tensor:
    """`likeliest` [B] int64, whose logits are `best` [B], with other tokens where `columns` have a temperature.
    `lengths` [B] int64: where the new tokens will stand, which the draws are a function of."""
    random = columns.temperature > 0
    temperature = torch.where(random, columns.temperature, 1.0)
    weights = (logits - best[:, None]).div_(temperature[:, None]).exp_()
    size = min(edits.FEW, logits.shape[1])
    least = edits.least_kept(weights, columns.top_k, columns.top_p, columns.min_p, [size])
    weights.mul_(edits.at_least(weights, least))
    if short := -logits.shape[1] % GROUP:
        weights = functional.pad(weights, (0, short))
    tokens = draw(weights, stream_keys_tensor(columns.seed, lengths)).clamp_(max=logits.shape[1] - 1)
    return torch.where(random, tokens, likeliest)
