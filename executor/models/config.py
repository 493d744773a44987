"""What a checkpoint's config.json says about a decoder, checked once and turned into plain fields.

Owns the reading of Llama, Mistral, Qwen2 and Qwen3 configurations, old spellings (`rope_scaling`) and new ones
(`rope_parameters`) alike; must not know tensors, backends or transformers, whose import would cost seconds. What it
does not know and what would change the result is refused as `NotNative`, never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...protocol.errors import StartupError

LLAMA, MISTRAL, QWEN2, QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
NATIVE = (LLAMA, MISTRAL, QWEN2, QWEN3)

# What the configuration classes of these families assume where the file is silent.
_DEFAULT_KV_HEADS = {MISTRAL: 8, QWEN2: 32, QWEN3: 32}
_DEFAULT_MAX_POSITION = {LLAMA: 2048, MISTRAL: 131072, QWEN2: 32768, QWEN3: 32768}
_DEFAULT_WINDOW = 4096
_DEFAULT_HEAD_DIM = {QWEN3: 128}


class NotNative(StartupError):
    """The native decoder does not do what this configuration asks for."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: base frequency, and how it is stretched for a longer context."""

    kind: str  # "default", "linear", "llama3" or "yarn"
    theta: float
    original_max_position: int
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder of one of the native families."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int  # positions that the model can take, stretching included
    rope: Rope
    tied: bool  # the output projection is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # per layer


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder`/config.json. Raises `StartupError` where there is none or it is no JSON object."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StartupError(f"{folder} has no config.json: it is not a Hugging Face model folder") from None
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return content


def architecture_of(raw: Mapping[str, Any], folder: Path) -> str:
    """The first of config.json's `architectures`."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise StartupError(f"{folder / 'config.json'} names no architecture: its field 'architectures' is {names!r}")
    return names[0]


def decoder_config(raw: Mapping[str, Any], architecture: str) -> DecoderConfig:
    """Read the config.json `raw` of a native `architecture`. Raises `NotNative` for what the decoder can't do."""
    _refuse_unknown(raw, architecture)
    hidden, heads = _integer(raw, "hidden_size"), _integer(raw, "num_attention_heads")
    kv_heads = _integer(raw, "num_key_value_heads", _DEFAULT_KV_HEADS.get(architecture, heads))
    if heads % kv_heads:
        raise NotNative(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    head_dim = _integer(raw, "head_dim", _DEFAULT_HEAD_DIM.get(architecture, hidden // heads))
    if head_dim % 2:
        raise NotNative(f"head_dim must be even for rotary positions, got {head_dim}")
    num_layers = _integer(raw, "num_hidden_layers")
    max_position = _integer(raw, "max_position_embeddings", _DEFAULT_MAX_POSITION[architecture])
    rope = _rope(raw, max_position)
    if rope.kind in ("linear", "yarn"):  # these stretch the context that the model was trained on
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    attention_bias = bool(raw.get("attention_bias", False)) and architecture in (LLAMA, QWEN3)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position=max_position,
        rope=rope,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or architecture == QWEN2,
        o_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == LLAMA,
        qk_norm=architecture == QWEN3,
        windows=_windows(raw, architecture, num_layers),
    )


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StartupError(f"config.json: {name} must be a positive integer, got {raw.get(name)!r}")
    return value


def _refuse_unknown(raw: Mapping[str, Any], architecture: str) -> None:
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise NotNative(f"hidden_act {act!r} of {architecture} is not built natively (silu is)")
    if (raw.get("pretraining_tp") or 1) != 1:
        raise NotNative(f"pretraining_tp {raw['pretraining_tp']} is not built natively (1 is)")
    partial = raw.get("partial_rotary_factor") or (raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise NotNative(f"partial_rotary_factor {partial} of {architecture} is not built natively (1 is)")


def _rope(raw: Mapping[str, Any], max_position: int) -> Rope:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in scaling.values()):
        raise NotNative("rope_parameters per layer type are not built natively")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    rope = Rope(kind=kind, theta=theta, original_max_position=int(original or max_position))
    if kind == "default":
        return rope
    if kind not in ("linear", "llama3", "yarn"):
        raise NotNative(f"rope_type {kind!r} is not built natively (default, linear, llama3 and yarn are)")
    factor = scaling.get("factor")
    if factor is None and kind == "yarn":
        factor = max_position / rope.original_max_position
    if not isinstance(factor, int | float) or factor < 1:
        raise StartupError(f"config.json: rope factor must be a number of at least 1, got {factor!r}")
    known = {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor"}
    known |= {"mscale", "mscale_all_dim"}
    given = {name: scaling[name] for name in known if scaling.get(name) is not None}
    if kind == "llama3" and not {"low_freq_factor", "high_freq_factor"} <= given.keys():
        raise StartupError("config.json: rope_type 'llama3' needs low_freq_factor and high_freq_factor")
    return Rope(kind=kind, theta=theta, original_max_position=rope.original_max_position, factor=float(factor), **given)


def _windows(raw: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, or None for full attention."""
    layer_types = raw.get("layer_types")
    if architecture == LLAMA:
        _refuse_layer_types(layer_types, {"full_attention"}, architecture)
        return (None,) * num_layers
    window = raw.get("sliding_window", _DEFAULT_WINDOW)
    if architecture == MISTRAL:  # one window for all layers, or none
        _refuse_layer_types(layer_types, {"sliding_attention"} if window else {"full_attention"}, architecture)
        return (window,) * num_layers
    _refuse_layer_types(layer_types, {"full_attention", "sliding_attention"}, architecture)
    if not raw.get("use_sliding_window", False) or not window:
        return (None,) * num_layers
    if layer_types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(layer_types) < num_layers:
        raise StartupError(f"config.json: layer_types names {len(layer_types)} layers, the model has {num_layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types[:num_layers])


def _refuse_layer_types(layer_types: Any, allowed: set[str], architecture: str) -> None:
    others = set(layer_types or ()) - allowed
    if others:
        raise NotNative(f"layer_types {sorted(others)} of {architecture} are not built natively")
