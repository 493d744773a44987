"""Small random checkpoints of every family, saved as Hugging Face folders.

Owns their shapes; must not know engines. Weights are drawn wide, so that logits are far apart and a wrong number
somewhere becomes a wrong token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 307
SPREAD = 0.2  # standard deviation of the weights
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": SPREAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_config(name: str) -> PreTrainedConfig:
    """The configuration of one of `NATIVE` or `THROUGH_TRANSFORMERS`."""
    if name == "llama-untied-llama3-rope":
        return LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False)
    if name == "llama-tied":  # every query head with a key head of its own
        return LlamaConfig(**{**SMALL, "num_key_value_heads": 4}, tie_word_embeddings=True)
    if name == "mistral-window":
        return MistralConfig(**SMALL, sliding_window=48)
    if name == "qwen2-tied":
        return Qwen2Config(**SMALL, tie_word_embeddings=True)
    if name == "qwen2-window":  # the first layer sees everything, the others the window
        return Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=40, max_window_layers=1)
    if name == "qwen3-wide-heads":
        return Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=False)
    if name == "gpt2":
        return GPT2Config(**GPT2)
    if name == "gemma2":  # soft caps low enough to bite, and a window in every second layer
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
        # Untied: its large embeddings would answer every token with itself.
        return Gemma2Config(**SMALL, **caps, head_dim=16, sliding_window=48, tie_word_embeddings=False)
    if name == "phi3":
        return Phi3Config(**SMALL)
    raise ValueError(f"no small checkpoint is called {name!r}")


NATIVE = (
    "llama-untied-llama3-rope",
    "llama-tied",
    "mistral-window",
    "qwen2-tied",
    "qwen2-window",
    "qwen3-wide-heads",
)
THROUGH_TRANSFORMERS = ("gpt2", "gemma2", "phi3")


def save_checkpoint(name: str, folder: Path) -> PreTrainedModel:
    """Draw the weights of `name`, save them under `folder`, and return the model in float32."""
    torch.manual_seed(11)
    # eager: transformers' sdpa of some versions passes over Gemma 2's soft cap
    model = AutoModelForCausalLM.from_config(small_config(name), dtype=torch.float32, attn_implementation="eager")
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide a mix-up
            parameter.data += torch.randn_like(parameter) * (0.1 if "norm" in key or "ln_" in key else SPREAD)
    model.save_pretrained(folder)
    return model.eval()
