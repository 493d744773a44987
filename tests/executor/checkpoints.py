"""Small random checkpoints on disk, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fast_inference.executor.backends.base import Backend
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.models import load_model
from fast_inference.executor.models.base import Model
from fast_inference.protocol.config import EngineConfig
from transformers import AutoModelForCausalLM, PreTrainedConfig

SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_checkpoint(config: PreTrainedConfig, folder: Path, **save: Any) -> Any:
    """A random model of that configuration, saved in `folder`; norms and biases random too.

    It attends eagerly: some releases' sdpa leaves soft caps out.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
    model.save_pretrained(folder, **save)
    return model


def load(folder: Path, backend: Backend | None = None, **options: Any) -> Model:
    """The model in `folder` on a CPU, with the torch backend where none is given."""
    config = EngineConfig(model=str(folder), **options)
    return load_model(config, torch.device("cpu"), backend or TorchBackend(), lambda *_: None)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_tokens(model: Any, ids: list[int], new: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones((1, len(ids))), max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()
