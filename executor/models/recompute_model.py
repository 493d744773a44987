"""Any module that maps token ids [B, T] to logits [B, T, V], served without a KV cache.

Correct and slow: each step runs every token of each request again. Owns padding, the shapes of results, and finding
the vocabulary's size; must not know pages.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...protocol.config import EngineConfig
from ...protocol.errors import StartupError
from ..backends.base import KVLayer, StepBatch
from .base import ModelSpec
from .custom_model import module_dtype

log = logging.getLogger(__name__)

LENGTH_NAMES = ("max_model_len", "max_seq_len", "max_position_embeddings", "block_size", "n_positions", "n_ctx")
DEFAULT_LENGTH = 2048
PROBE_TOKENS = 2


class RecomputeModel:
    """A `Model` around a plain causal module; `spec.recompute` asks the runner for all tokens of each row."""

    def __init__(self, module: torch.nn.Module, spec: ModelSpec) -> None:
        self.spec = spec
        self.module = module

    def forward(self, token_ids: Tensor, batch: StepBatch, kv: list[KVLayer], logits_at: Tensor | None) -> Tensor:
        """As `Model.forward`; `token_ids` holds every token of each row, from position 0 on. `kv` is not used."""
        lengths = (batch.query_start[1:] - batch.query_start[:-1]).long()
        numbers = torch.arange(lengths.shape[0], device=token_ids.device)
        rows = torch.repeat_interleave(numbers, lengths, output_size=token_ids.shape[0])
        columns = batch.positions
        padded = token_ids.new_zeros((lengths.shape[0], batch.max_query_len))
        padded[rows, columns] = token_ids  # padding on the right: a causal model's earlier tokens never see it
        logits = as_logits(self.module(padded), self.spec.architecture)
        if logits_at is not None:
            rows, columns = rows[logits_at], columns[logits_at]
        return logits[rows, columns].float()


def wrap_recompute(module: torch.nn.Module, name: str, config: EngineConfig, device: torch.device) -> RecomputeModel:
    """The `Model` around `module`; a probe of two tokens tells the vocabulary's size. Raises `StartupError` if
    `module` does not map token ids to logits."""
    module = module.eval()
    with torch.inference_mode():
        try:
            result = module(torch.zeros((1, PROBE_TOKENS), dtype=torch.int64, device=device))
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            raise StartupError(f"{name} can't be served: its forward(token_ids [1, 2]) raised {error!r}") from error
    logits = as_logits(result, name)
    if logits.shape[:2] != (1, PROBE_TOKENS):
        raise StartupError(
            f"{name} can't be served: for token ids [1, {PROBE_TOKENS}] it must give logits [1, {PROBE_TOKENS}, V], "
            f"one row per token, got {list(logits.shape)}"
        )
    spec = ModelSpec(
        architecture=name,
        num_layers=0,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=logits.shape[2],
        max_model_len=_length(module, name),
        dtype=module_dtype(module),
        recompute=True,
    )
    log.warning("%s keeps no keys and values: every step computes all tokens again, which is slow", name)
    return RecomputeModel(module, spec)


def as_logits(result: object, name: str) -> Tensor:
    """Logits [B, T, V] out of what a module returned: a tensor, a tuple or list that starts with it, a mapping or an
    object with `logits`. Raises `StartupError` for anything else."""
    if isinstance(result, Tensor):
        logits: object = result
    elif isinstance(result, dict) and "logits" in result:
        logits = result["logits"]
    elif hasattr(result, "logits"):
        logits = result.logits
    else:
        logits = result[0] if isinstance(result, list | tuple) and result else result
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StartupError(
            f"{name} must return logits [B, T, V], a tuple that starts with them or .logits; got {shape}"
        )
    return logits


def _length(module: torch.nn.Module, name: str) -> int:
    """How many positions the module says that it can take."""
    for owner in (module, getattr(module, "config", None)):
        for attribute in LENGTH_NAMES:
            value = getattr(owner, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    log.warning("%s names no %s: taking %d", name, " or ".join(LENGTH_NAMES[:4]), DEFAULT_LENGTH)
    return DEFAULT_LENGTH
