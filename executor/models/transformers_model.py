"""Any `AutoModelForCausalLM` that attends through transformers' attention interface, run on our pages.

Owns the attention and mask functions registered with transformers under `IMPLEMENTATION`, the loading of such a model
and its adapter. What such a model must not do, and the proof that it computes what its own attention computes, are in
`transformers_check.py`. The tokens of a step go in as one row [1, T] with their positions; outside a step the
registered functions are plain attention, so that a live model stays usable.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

from ...protocol.config import EngineConfig
from ...protocol.errors import StartupError
from ..attention import EngineStep, current_step, dense_attention, engine_step
from ..backends.base import Backend, KVLayer, StepBatch
from ..checkpoint import Progress, safetensors_files
from .base import ModelSpec
from .transformers_check import Recorder, checked_spec, refuse_unsupported, run_module, verify

log = logging.getLogger(__name__)

IMPLEMENTATION = "fast_inference_paged"


class TransformersModel:
    """A `Model` around a transformers model whose attention implementation is `IMPLEMENTATION`."""

    def __init__(self, module: PreTrainedModel, spec: ModelSpec, backend: Backend) -> None:
        self.spec = spec
        self.module = module
        self._backend = backend
        self._keeps_rows = "logits_to_keep" in inspect.signature(module.forward).parameters

    def forward(self, token_ids: Tensor, batch: StepBatch, kv: list[KVLayer], logits_at: Tensor | None) -> Tensor:
        """As `Model.forward`."""
        with engine_step(EngineStep(self._backend, batch, kv)):
            return run_module(
                self.module, token_ids, batch.positions, logits_at if self._keeps_rows else None, logits_at
            )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, T, D] in, [1, T, Hq, Dv] out. Values narrower than keys (latent
    attention) are stored as wide as those."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or None  # some configurations say 0 for none
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    step = current_step()
    if step is None:
        return dense_attention(q, k, v, scale, window, softcap, attention_mask), None
    if isinstance(step, Recorder):
        step.note_extras(module, attention_mask, extras)
    width = v.shape[-1]
    if width < k.shape[-1]:
        v = torch.nn.functional.pad(v, (0, k.shape[-1] - width))
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = step.attend(q[0], k[0], v[0], layer, scale, window, softcap)
    return out.view(q.shape)[..., :width], None


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask function: none in a step, where the pages say who sees whom; a dense one outside."""
    if (step := current_step()) is not None:
        if isinstance(step, Recorder):
            step.mask_windows.add(kwargs.get("local_size") or None)
        return None
    # is_causal would be lost on the way to `attend`, so the mask is always made.
    dense: Tensor | None = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return dense


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, mask)


def load_transformers_model(
    folder: Path,
    dtype: torch.dtype,
    config: EngineConfig,
    device: torch.device,
    backend: Backend,
    progress: Progress,
) -> TransformersModel:
    """The model in `folder`, checked. Raises `StartupError` with the reason why it can't be run."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress("loading weights with transformers", 0, 0)
    remote = config.trust_remote_code
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
        if config.load_format == "dummy":
            torch.manual_seed(config.seed)
            with device:
                module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    described, dtype=dtype, attn_implementation="eager", trust_remote_code=remote
                )
        else:
            safetensors_files(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=described,
                dtype=dtype,
                attn_implementation="eager",
                trust_remote_code=remote,
                use_safetensors=True,
                output_loading_info=True,
            )
            module, info = loaded
            _check_loading(folder, info)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise StartupError(f"transformers can't load {folder} as a causal language model: {error}") from error
    progress("checking the model", 0, 0)
    return wrap_transformers(module.to(device), backend)


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise StartupError(f"{folder} does not fit its config.json: it lacks {', '.join(missing[:5])}")
    if info["unexpected_keys"]:
        log.warning("%s has tensors that its model does not use: %s", folder, sorted(info["unexpected_keys"])[:5])


def wrap_transformers(module: PreTrainedModel, backend: Backend) -> TransformersModel:
    """The `Model` around `module`, whose attention implementation becomes `IMPLEMENTATION`; its weights stay where
    they are. Raises `StartupError` if it computes anything else than with its own attention."""
    module.eval()  # type: ignore[no-untyped-call]
    refuse_unsupported(module)
    before = module.config._attn_implementation
    module.set_attn_implementation(IMPLEMENTATION)
    try:
        model = TransformersModel(module, checked_spec(module), backend)
        verify(model, module, IMPLEMENTATION)
    except StartupError:
        module.set_attn_implementation(before)
        raise
    return model
