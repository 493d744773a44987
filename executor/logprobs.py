"""Log-probabilities of tokens, the likeliest alternatives, and a token's rank.

Owns their computation on the device and their ragged form on the wire; must not know who asked.
They are taken from the model's own logits, before penalties, biases and temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocol.messages import TopLogprobs
from .step_kernels import StepKernels
from .transfer import Transfer


@dataclass(frozen=True, slots=True)
class TopTensors:
    """Of N tokens: own log-probability and rank [N], the K likeliest alternatives [N, K], best first."""

    own: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor

    def down(self, transfer: Transfer) -> TopTensors:
        """The same on the host (after the transfer's next mark)."""
        return TopTensors(*(transfer.down(t) for t in (self.own, self.ranks, self.ids, self.values)))


def top_logprobs(logits: Tensor, tokens: Tensor, alternatives: int, kernels: StepKernels | None = None) -> TopTensors:
    """`logits` [N, V] float32, `tokens` [N] int64 -> their log-probabilities, with `alternatives` likeliest ones."""
    if kernels is not None:
        own, ranks, normalizer = kernels.chosen_logprobs(logits, tokens)
    else:
        own, ranks, normalizer = _chosen_logprobs(logits, tokens)
    if alternatives:
        values, ids = logits.topk(alternatives)
    else:
        values, ids = logits[:, :0], tokens[:, None][:, :0]
    return TopTensors(own, ranks, ids, values - normalizer[:, None])


def _chosen_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Own log-probability, rank, and what a row's logits lose to become log-probabilities; [N] each."""
    largest = logits.amax(-1, keepdim=True)
    normalizer = largest + (logits - largest).exp_().sum(-1, keepdim=True).log_()
    own = logits.gather(1, tokens[:, None])
    # Counted in floats, which a CPU does faster than in booleans; exact up to 2**24 tokens.
    ranks = torch.gt(logits, own, out=torch.empty_like(logits)).sum(-1) + 1
    return (own - normalizer)[:, 0], ranks, normalizer[:, 0]


def on_wire(
    top: TopTensors, tokens: NDArray[np.int64], rows: NDArray[np.int64], alternatives: NDArray[np.int64]
) -> TopLogprobs:
    """`TopLogprobs` of tensors on the host. Row j is called `rows[j]`, and has `alternatives[j]` likeliest ones."""
    ids = np.concatenate([tokens[:, None], top.ids.numpy()], axis=1)
    values = np.concatenate([top.own.numpy()[:, None], top.values.numpy()], axis=1)
    wanted = np.arange(ids.shape[1]) <= alternatives[:, None]
    return TopLogprobs(
        rows=rows.astype(np.int32),
        counts=(alternatives + 1).astype(np.int32),
        ranks=top.ranks.numpy().astype(np.int32),
        token_ids=ids[wanted].astype(np.int32),
        values=values[wanted].astype(np.float32),
    )
