"""Cases of matrix products, at the shapes of llama-8b and qwen3-0.6b: as the card's table has them done.

Owns shapes, inputs and the count of what is read and multiplied; must not know how time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from device_timing import Case, copies_beyond_l2
from fast_inference.executor.backends.base import Backend, Linear
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.backends.triton import TritonBackend
from fast_inference.executor.kernels.gpu.linear_table import LinearTable, Operation, bucket, load_table, table_path
from torch import Tensor

ROWS = (1, 8, 32, 128, 256)


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight of a model, and the operation that its product is part of."""

    operation: Operation
    outs: int
    ins: int
    out_dtype: torch.dtype | None = None


MODELS = {
    "llama-8b": {
        "qkv": Layer("linear", 6144, 4096),
        "output": Layer("linear_add_norm", 4096, 4096),
        "gate, up": Layer("linear_silu_mul", 28672, 4096),
        "down": Layer("linear_add_norm", 4096, 14336),
        "logits": Layer("linear", 128_256, 4096, torch.float32),
    },
    "qwen3-0.6b": {
        "qkv": Layer("linear", 4096, 1024),
        "output": Layer("linear_add_norm", 1024, 2048),
        "gate, up": Layer("linear_silu_mul", 6144, 1024),
        "down": Layer("linear_add_norm", 1024, 3072),
        "logits": Layer("linear", 151_936, 1024, torch.float32),
    },
}


def linear_cases(device: torch.device, dtype: torch.dtype, tune: bool) -> Iterator[Case]:
    """All products of all models, by cuBLAS and, where that is something else, as the card's table says: what an engine
    that served such a model on this card has measured."""
    tables = {"cuBLAS": LinearTable(), "table": load_table(table_path(device))}
    for model, layers in MODELS.items():
        for name, layer in layers.items():
            for rows in ROWS:
                for source, table in tables.items():
                    choices = table.choices_of(layer.outs, layer.ins, dtype)
                    if source == "cuBLAS" or (layer.operation, bucket(rows) or 0) in choices:
                        yield make_case(f"{model} {name}, {rows} rows, {source}", layer, rows, table, device, dtype)


def make_case(name: str, layer: Layer, rows: int, table: LinearTable, device: torch.device, dtype: torch.dtype) -> Case:
    """The operation of `layer` on `rows` rows, each launch with a weight of its own."""
    size = layer.outs * layer.ins * dtype.itemsize
    weights = [_random(layer.outs, layer.ins, device, dtype) * layer.ins**-0.5 for _ in range(copies_beyond_l2(size))]
    call = call_of(layer, rows, device, dtype)
    backend, reference = TritonBackend(table), TorchBackend()
    return Case(
        name,
        [partial(call, backend, backend.linear(weight)) for weight in weights],
        partial(call, reference, reference.linear(weights[0])),
        size + rows * (layer.outs + layer.ins) * dtype.itemsize,
        2 * rows * layer.outs * layer.ins,
    )


def call_of(layer: Layer, rows: int, device: torch.device, dtype: torch.dtype) -> Callable[[Backend, Linear], Tensor]:
    """The operation of `layer` on random rows, as a function of the backend and the linear layer. A residual is a copy,
    made in the same time: the sum may be put in its place."""
    x, residual = _random(rows, layer.ins, device, dtype), _random(rows, layer.outs, device, dtype)
    norm = torch.ones(layer.outs, device=device, dtype=dtype)

    def call(backend: Backend, linear: Linear) -> Tensor:
        if layer.operation == "linear_silu_mul":
            return backend.linear_silu_mul(linear, x)
        if layer.operation == "linear_add_norm":
            return backend.linear_add_norm(linear, x, residual.clone(), norm, 1e-5)[0]
        return linear(x, None, layer.out_dtype)

    return call


def _random(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=dtype)
