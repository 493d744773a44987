"""Which kind of model a configuration names, and how it is brought to the device.

Owns the choice (native decoder, transformers' attention interface, registered class, live module) and the dtype; must
not know how any of them computes. transformers is imported only where a model needs it: a native one starts without.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from ...protocol.config import EngineConfig
from ...protocol.errors import StartupError
from ..backends.base import Backend
from ..checkpoint import Progress
from ..weights import DummyWeights, SafetensorsWeights, Weights, stored_dtype
from .base import Model
from .config import NATIVE, NotNative, architecture_of, decoder_config, read_config
from .decoder import Decoder

log = logging.getLogger(__name__)

CLASS_PREFIX = "class:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    config: EngineConfig,
    device: torch.device,
    backend: Backend,
    progress: Progress,
    live: torch.nn.Module | None = None,
) -> Model:
    """The model that `config` names, on `device`, computing through `backend`.

    `progress(phase, done, total)` tells how far the loading is. `live`: a module of the caller's own, served as it
    is. Raises `StartupError` with what is wrong and what to do.
    """
    if live is not None:
        return _load_live(live, config, device, backend)
    if config.model.startswith(CLASS_PREFIX):
        return _load_class(config, device, backend)
    folder = Path(config.model)
    if not folder.is_dir():
        raise StartupError(f"there is no model folder {config.model!r}")
    raw = read_config(folder)
    architecture = architecture_of(raw, folder)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise StartupError(f"{folder} is quantized ({method}), which is not served: use the unquantized model")
    dtype = choose_dtype(config, raw, folder, device)
    if architecture in NATIVE:
        try:
            return _load_native(raw, architecture, folder, dtype, config, device, backend, progress)
        except NotNative as reason:
            log.warning("%s: running it through transformers instead, which is slower", reason)
    from .transformers_model import load_transformers_model

    return load_transformers_model(folder, dtype, config, device, backend, progress)


def choose_dtype(config: EngineConfig, raw: dict[str, Any], folder: Path, device: torch.device) -> torch.dtype:
    """`config.dtype`, or for "auto" the checkpoint's own: what config.json says, else what the weights are in."""
    if config.dtype != "auto":
        if config.dtype == "float16" and device.type == "cpu":
            raise StartupError("dtype float16 is not computed on a CPU: use bfloat16 or float32")
        return DTYPES[config.dtype]
    named = raw.get("dtype") or raw.get("torch_dtype")
    dtype = DTYPES.get(named) if isinstance(named, str) else None
    if dtype is None:
        stored = stored_dtype(folder) if config.load_format != "dummy" else None
        dtype = stored if stored in DTYPES.values() and stored is not None else torch.float32
    if dtype is torch.float16 and device.type == "cpu":
        log.info(
            "the checkpoint is in float16, which is not computed on a CPU: using bfloat16 (--dtype float32 is exact)"
        )
        dtype = torch.bfloat16
    return dtype


def _load_native(
    raw: dict[str, Any],
    architecture: str,
    folder: Path,
    dtype: torch.dtype,
    config: EngineConfig,
    device: torch.device,
    backend: Backend,
    progress: Progress,
) -> Decoder:
    shape = decoder_config(raw, architecture)
    weights: Weights
    if config.load_format == "dummy":
        weights = DummyWeights(config.seed, dtype, device, progress)
    else:
        weights = SafetensorsWeights(folder, dtype, device, progress)
    positions = min(shape.max_position, config.max_model_len or shape.max_position)
    return Decoder(shape, weights, backend, dtype, device, positions)


def _load_class(config: EngineConfig, device: torch.device, backend: Backend) -> Model:
    from .custom_model import build_registered, is_paged, wrap_custom
    from .recompute_model import wrap_recompute

    name = config.model.removeprefix(CLASS_PREFIX)
    module = build_registered(name, config, device)
    if is_paged(module):
        return wrap_custom(module, name, config, device, backend)
    return wrap_recompute(module, name, config, device)


def _load_live(live: torch.nn.Module, config: EngineConfig, device: torch.device, backend: Backend) -> Model:
    from .custom_model import is_paged, wrap_custom
    from .recompute_model import wrap_recompute

    name = type(live).__name__
    check_live(live, name, config, device)
    if is_paged(live):
        return wrap_custom(live, name, config, device, backend)
    if "transformers" in sys.modules:  # else it can't be one of its models, and the import takes seconds
        from transformers import PreTrainedModel

        if isinstance(live, PreTrainedModel):
            from .transformers_model import wrap_transformers

            return wrap_transformers(live, backend)
    return wrap_recompute(live, name, config, device)


def check_live(live: torch.nn.Module, name: str, config: EngineConfig, device: torch.device) -> None:
    """A live module is served where and as it is: refuse settings that would need a copy of it."""
    first = next(live.parameters(), None)
    if first is None:
        return
    if first.device.type != device.type or (device.index is not None and first.device.index != device.index):
        raise StartupError(f"the live model {name} is on {first.device}, the engine on {device}: move one of them")
    if config.dtype != "auto" and DTYPES[config.dtype] != first.dtype:
        raise StartupError(
            f"the live model {name} is in {first.dtype}, dtype says {config.dtype}: cast the model yourself, or leave "
            "dtype at 'auto'"
        )
