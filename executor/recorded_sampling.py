"""Choosing tokens in a recorded step: the same work whatever the rows want, parameters read from the device.

Owns the two ways of choosing that a recorded step has (`sampling_columns.Choice`); the tokens are those that
`sampler.py` chooses for the same rows. Must not know blocks or graphs. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import logits as edits
from .pending import pack
from .random import stream_keys_tensor
from .sampler import GROUP, best_tokens, draw
from .sampling_columns import Choice
from .slot_tensors import DrawColumns, SlotTensors
from .step_kernels import StepKernels


def choose(choice: Choice, logits: Tensor, slots: Tensor, lengths: Tensor, tensors: SlotTensors) -> Tensor:
    """A token for each row of `logits` [B, V] float32, made the next one of its slot: `slots` [B] int64 know `lengths`
    [B] int64 tokens. Returns what `pack` makes of the tokens."""
    if choice is Choice.GREEDY:
        tokens, best = greedy(logits, tensors.kernels)
    else:
        tokens, best = drawn(logits, lengths, tensors.draws(slots), tensors.kernels)
    tensors.append(slots, lengths, tokens)
    return pack(tokens, best)


def greedy(logits: Tensor, kernels: StepKernels | None) -> tuple[Tensor, Tensor]:
    """`logits` [B, V] float32 -> tokens [B] int64 and the largest logits [B] float32."""
    best, tokens = best_tokens(logits) if kernels is None else kernels.best_tokens(logits)
    return tokens, best


def drawn(logits: Tensor, lengths: Tensor, columns: DrawColumns, kernels: StepKernels | None) -> tuple[Tensor, Tensor]:
    """As `greedy`, with a draw where `columns` have a temperature. `lengths` [B] int64: where the new tokens will
    stand, which the draws are a function of. Without `kernels`, no row may have a top_p below 1 without a top_k of at
    most `logits.FEW`."""
    if kernels is not None:
        best, tokens = kernels.best_tokens(logits)
        keys = kernels.stream_keys(columns.seed, lengths)
        kernels.draw(logits, best, tokens, None, keys, columns.temperature, columns.top_k, columns.top_p, columns.min_p)
        return tokens, best
    best, likeliest = best_tokens(logits)
    random = columns.temperature > 0
    temperature = torch.where(random, columns.temperature, 1.0)
    weights = (logits - best[:, None]).div_(temperature[:, None]).exp_()
    size = min(edits.FEW, logits.shape[1])
    least = edits.least_kept(weights, columns.top_k, columns.top_p, columns.min_p, [size])
    weights.mul_(edits.at_least(weights, least))
    if short := -logits.shape[1] % GROUP:
        weights = functional.pad(weights, (0, short))
    tokens = draw(weights, stream_keys_tensor(columns.seed, lengths)).clamp_(max=logits.shape[1] - 1)
    return torch.where(random, tokens, likeliest), best
