"""Custom modules that attend through `paged_attention`, and what they must have.

The contract, for a class given to `register_model` and for a live module:

- its constructor takes the engine's `model_config` as keyword arguments (a registered class);
- attributes `num_layers`, `num_kv_heads`, `head_dim`, `vocab_size`, `max_model_len`, all integers;
- `forward(token_ids, positions)`: both [T] int64, T tokens of all requests side by side, `positions` the index of
  each in its own request; attention only by `paged_attention(q, k, v, layer)`; nothing else may mix tokens. Returns
  logits [T, vocab_size], or hidden states [T, ...] if there is
- `compute_logits(hidden)`, optional: hidden states of the tokens whose logits are wanted -> [M, vocab_size].

`model_config["weights"]`, a safetensors file or a state_dict saved by torch, is loaded into the module and not handed
to the constructor. A module without those attributes that maps [B, T] tokens to [B, T, V] logits is
`recompute_model.py`'s.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...protocol.config import EngineConfig
from ...protocol.errors import StartupError
from ..attention import EngineStep, engine_step
from ..backends.base import Backend, KVLayer, StepBatch
from ..registry import find_class
from .base import ModelSpec
from .probe import probe_batch, probe_pages

PROBE_TOKENS = 6
TOLERANCE = {torch.bfloat16: 0.3, torch.float16: 0.1}  # difference of the logits as a share of their spread
ATTRIBUTES = ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "max_model_len")


class CustomModel:
    """A `Model` around a module that follows the contract above."""

    def __init__(self, module: torch.nn.Module, spec: ModelSpec, backend: Backend) -> None:
        self.spec = spec
        self.module = module
        self._backend = backend
        self._head: Callable[[Tensor], Tensor] | None = getattr(module, "compute_logits", None)

    def forward(self, token_ids: Tensor, batch: StepBatch, kv: list[KVLayer], logits_at: Tensor | None) -> Tensor:
        """As `Model.forward`."""
        with engine_step(EngineStep(self._backend, batch, kv)):
            rows = self.module(token_ids, batch.positions)
        if logits_at is not None:
            rows = rows.index_select(0, logits_at)
        return (rows if self._head is None else self._head(rows)).float()


def is_paged(module: torch.nn.Module) -> bool:
    """Whether `module` has the attributes of the contract."""
    return all(hasattr(module, name) for name in ATTRIBUTES)


def wrap_custom(
    module: torch.nn.Module, name: str, config: EngineConfig, device: torch.device, backend: Backend
) -> CustomModel:
    """The `Model` around `module`. Raises `StartupError` for an attribute that is no positive integer."""
    values: dict[str, int] = {}
    for attribute in ATTRIBUTES:
        value = getattr(module, attribute)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise StartupError(f"{name}.{attribute} must be a positive integer, got {value!r}")
        values[attribute] = value
    spec = ModelSpec(
        architecture=name,
        num_layers=values["num_layers"],
        num_kv_heads=values["num_kv_heads"],
        head_dim=values["head_dim"],
        vocab_size=values["vocab_size"],
        max_model_len=values["max_model_len"],
        dtype=module_dtype(module),
    )
    model = CustomModel(module.eval(), spec, backend)
    _verify(model, device)
    return model


def _verify(model: CustomModel, device: torch.device) -> None:
    """Raise `StartupError` unless the module gives logits of the promised shape, the same whether a request is alone,
    beside another or cut in two."""
    name, vocab = model.spec.architecture, model.spec.vocab_size
    count = min(PROBE_TOKENS, model.spec.max_model_len)
    ids = torch.arange(2 * count, device=device) % vocab
    rows = torch.arange(count, device=device)
    try:
        with torch.no_grad():
            alone = model.forward(
                ids[:count], probe_batch([(0, 0, count)], device), probe_pages(model.spec, 1, device), rows
            )
            kv = probe_pages(model.spec, 2, device)
            beside = model.forward(ids, probe_batch([(0, 0, count), (1, 0, count)], device), kv, rows)
            last = model.forward(ids[count - 1 : count], probe_batch([(0, count - 1, 1)], device), kv, rows[:1])
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise StartupError(f"{name} can't be served: forward(token_ids [T], positions [T]) raised {error!r}") from error
    if alone.shape != (count, vocab):
        raise StartupError(
            f"{name} can't be served: {count} tokens must give logits [{count}, {vocab}] (its vocab_size), "
            f"got {list(alone.shape)}"
        )
    spread = float(alone.std()) or 1.0
    worst = max(float((beside - alone).abs().max()), float((last[0] - alone[-1]).abs().max())) / spread
    if not worst <= TOLERANCE.get(model.spec.dtype, 1e-2):
        raise StartupError(
            f"{name} can't be served: the logits of a request change with its neighbours or with how it is cut "
            f"(by {worst:.2g} of their spread): tokens may be mixed only by paged_attention, each layer with its own "
            "number, and told apart only by `positions`"
        )


def module_dtype(module: torch.nn.Module) -> torch.dtype:
    """The type of the module's first floating-point parameter or buffer; float32 where it has none."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def build_registered(name: str, config: EngineConfig, device: torch.device) -> torch.nn.Module:
    """An instance of the registered class `name`, with its weights, on `device`, in `config.dtype` ("auto": as it
    is). Without a weights file its random initialisation follows `config.seed`. Raises `StartupError`."""
    spec = config.model_classes.get(name)
    if spec is None:
        known = ", ".join(sorted(config.model_classes)) or "none"
        raise StartupError(f"no model class is registered as {name!r} (registered: {known}): call register_model first")
    cls = find_class(name, spec)
    arguments = dict(config.model_config)
    weights = arguments.pop("weights", None)
    torch.manual_seed(config.seed)
    try:
        module = cls(**arguments)
    except TypeError as error:
        raise StartupError(f"{name}(**model_config) failed: {error}; model_config is {arguments!r}") from error
    if not isinstance(module, torch.nn.Module):
        raise StartupError(f"model class {name!r} ({spec}) must be a torch.nn.Module class")
    if weights is not None:
        load_weights(module, Path(weights), name)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    return module.to(device=device, dtype=dtype).eval()


def load_weights(module: torch.nn.Module, path: Path, name: str) -> None:
    """Load a safetensors file or a torch state_dict into `module`. Raises `StartupError` if it does not fit."""
    if not path.is_file():
        raise StartupError(f"model_config['weights']: there is no file {path}")
    try:
        state: dict[str, Any]
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except (RuntimeError, OSError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise StartupError(f"{path} can't be loaded into {name}: {error}") from error
