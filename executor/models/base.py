"""What the runner asks of a model, and what a model tells about itself.

Owns `ModelSpec` and the `Model` interface; every file beside this one makes one. Must not know messages, slots or
scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..backends.base import KVLayer, StepBatch


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model, as far as memory and batching depend on it."""

    architecture: str
    num_layers: int  # layers that keep keys and values
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int  # positions that the model itself can take
    dtype: torch.dtype
    # A model that only maps token ids to logits: the runner hands it every token of a row, each step.
    recompute: bool = False
    # `forward` asks the device nothing and does the same for every step of the same shapes, so that it may be recorded.
    recordable: bool = False
    num_heads: int = 0  # of queries, where that is known


class Model(Protocol):
    """A causal language model that reads and writes paged keys and values."""

    spec: ModelSpec

    def forward(self, token_ids: Tensor, batch: StepBatch, kv: list[KVLayer], logits_at: Tensor | None) -> Tensor:
        """One step.

        `token_ids` [T] int64, laid out as `batch` says; `kv`: one `KVLayer` per layer; `logits_at` [M] int64:
        indexes into the T tokens whose next-token logits are wanted; None: all T of them.
        Returns [M, vocab_size] float32.
        """
