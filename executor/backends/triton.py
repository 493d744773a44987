"""The decoder's operations on a GPU, by this project's Triton kernels (`executor/kernels/gpu`).

Owns which kernel an operation goes to; must not know any model. What has no kernel is done as `torch` does it.
Importing this needs triton.
"""

from __future__ import annotations

import logging

from torch import Tensor

from ..kernels.gpu.attention_decode import decode_attention
from ..kernels.gpu.attention_prefill import prefill_attention
from ..kernels.gpu.attention_tiles import unsupported
from .base import KVLayer, StepBatch
from .torch import TorchBackend

log = logging.getLogger(__name__)


class TritonBackend(TorchBackend):
    """`Backend` by Triton kernels, for tensors on a CUDA device (or in Triton's interpreter, on any)."""

    name = "triton"

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()  # why something went to torch, each reason logged once

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        if (reason := unsupported(q, kv)) is not None:
            if reason not in self._told:
                self._told.add(reason)
                log.warning("attention is done by torch, which is slower: %s", reason)
            return super().attention(q, kv, batch, scale, window, soft_cap)
        q = q.contiguous()
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        if batch.num_decodes:
            decode_attention(q, kv, batch, scale, out, window, soft_cap)
        if batch.num_decodes < batch.seq_lens.shape[0]:
            prefill_attention(q, kv, batch, scale, out, window, soft_cap)
        return out
