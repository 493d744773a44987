"""The native decoder: Llama, Mistral, Qwen2 and Qwen3 as one model, told apart by their configuration.

Owns the order of operations of a pre-norm transformer with rotary positions, grouped-query attention and a gated
MLP; must not know config.json (`config.py`), where weights come from (`weights.py`), or how an operation is done
(`backends/`). Norms and softmax are in float32, the residual stream in the model's dtype.

Notable: q, k and v are one matrix, gate and up another; the last layer computes only the rows whose logits are
wanted, after its keys and values are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..backends.base import Backend, KVLayer, Linear, StepBatch
from ..weights import Shape, Weights
from .base import ModelSpec
from .config import DecoderConfig
from .rope import rope_table

# Buffers that older checkpoints carry along.
IGNORED = ("rotary_emb.inv_freq",)


class Layer(NamedTuple):
    """One block, ready to run; a tuple because the hot loop unpacks it in one step."""

    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    next_norm: Tensor  # of the block behind, or of the logits: every norm follows a sum, and is done with it


class Decoder:
    """A `Model`. `positions`: how many rows the table of rotary positions has, at most `config.max_position`."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
    ) -> None:
        self.spec = ModelSpec(
            architecture=config.architecture,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_model_len=config.max_position,
            dtype=dtype,
            recordable=backend.recordable,
        )
        shapes = tensor_shapes(config)
        weights.check(shapes, IGNORED + (("lm_head.weight",) if config.tied else ()))
        self._backend = backend
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._cos_sin = rope_table(config.rope, config.head_dim, positions, device)
        self._embedding = weights.take("model.embed_tokens.weight", shapes=shapes)
        norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(config.num_layers)] + ["model.norm.weight"]
        self._first_norm, *next_norms = (weights.take(name, shapes=shapes) for name in norms)
        self._layers = [
            _load_layer(i, config, weights, backend, shapes, next_norm) for i, next_norm in enumerate(next_norms)
        ]
        head = self._embedding if config.tied else weights.take("lm_head.weight", shapes=shapes)
        self._lm_head = backend.linear(head)

    def forward(self, token_ids: Tensor, batch: StepBatch, kv: list[KVLayer], logits_at: Tensor | None) -> Tensor:
        """As `Model.forward`."""
        backend, eps, scale, cos_sin = self._backend, self._eps, self._scale, self._cos_sin
        rope_and_cache, attention = backend.rope_and_cache, backend.attention
        linear_silu_mul, linear_add_norm = backend.linear_silu_mul, backend.linear_add_norm
        last = len(self._layers) - 1
        x = embedding(token_ids, self._embedding)
        normed = backend.rms_norm(x, self._first_norm, eps)
        for index, (qkv, q_norm, k_norm, window, output, mlp_norm, gate_up, down, next_norm) in enumerate(self._layers):
            pages = kv[index]
            q = rope_and_cache(qkv(normed), cos_sin, pages, batch, q_norm, k_norm, eps)
            some = logits_at if index == last else None
            if some is not None and not some.numel():  # a chunk of a prompt, not its end: keys and values were all
                return x.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
            mixed = attention(q, pages, batch, scale, window)
            if some is not None:
                mixed, x = mixed.index_select(0, some), x.index_select(0, some)
            normed, x = linear_add_norm(output, mixed, x, mlp_norm, eps)
            normed, x = linear_add_norm(down, linear_silu_mul(gate_up, normed), x, next_norm, eps)
        return self._lm_head(normed, None, torch.float32)


def _load_layer(
    index: int,
    config: DecoderConfig,
    weights: Weights,
    backend: Backend,
    shapes: dict[str, Shape],
    next_norm: Tensor,
) -> Layer:
    prefix = f"model.layers.{index}."

    def take(*names: str) -> Tensor:
        return weights.take(*(prefix + name for name in names), shapes=shapes)

    def linear(bias: bool, *names: str) -> Linear:
        weight = take(*(f"{name}.weight" for name in names))
        return backend.linear(weight, take(*(f"{name}.bias" for name in names)) if bias else None)

    return Layer(
        qkv=linear(config.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=take("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=take("self_attn.k_norm.weight") if config.qk_norm else None,
        window=config.windows[index],
        output=linear(config.o_bias, "self_attn.o_proj"),
        mlp_norm=take("post_attention_layernorm.weight"),
        gate_up=linear(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=linear(config.mlp_bias, "mlp.down_proj"),
        next_norm=next_norm,
    )


def tensor_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this configuration holds, with its shape."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config)})
    return shapes


def _layer_shapes(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = (
        ("self_attn.q_proj", query, hidden, config.qkv_bias),
        ("self_attn.k_proj", key, hidden, config.qkv_bias),
        ("self_attn.v_proj", key, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, query, config.o_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for name, rows, columns, bias in matrices:
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
