"""Cases of norm, activation and rotary kernels, at the shapes of llama-8b and qwen3-0.6b.

Owns shapes, inputs and the count of bytes; must not know how time is taken. What is computed is nothing beside what is
read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from device_timing import Case, copies_beyond_l2
from fast_inference.executor.backends.base import KVLayer, StepBatch
from fast_inference.executor.backends.torch import TorchBackend
from fast_inference.executor.kernels.gpu.norm import add_rms_norm
from fast_inference.executor.kernels.gpu.rope import rope_and_cache
from fast_inference.executor.kernels.gpu.silu import silu_mul
from torch import Tensor

BLOCK_SIZE = 16  # the engine's default
POSITIONS = 4096
TOKENS = (1, 256, 8192)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one model."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    normed: bool  # queries and keys are


MODELS = {
    "llama-8b": Sizes(4096, 14336, 32, 8, 128, False),
    "qwen3-0.6b": Sizes(1024, 3072, 16, 8, 128, True),
}


def pointwise_cases(device: torch.device, dtype: torch.dtype, tune: bool) -> Iterator[Case]:
    """All kernels of all models. There is nothing to tune."""
    for model, sizes in MODELS.items():
        for tokens in TOKENS:
            yield from make_cases(f"{model} {tokens} tokens", sizes, tokens, device, dtype)


def make_cases(name: str, sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The three kernels on so many tokens."""
    torch_backend = TorchBackend()
    norm = torch.randn(sizes.hidden, device=device, dtype=dtype)

    def random(width: int, touched: int) -> list[Tensor]:
        """Enough inputs [tokens, `width`] that what launches touch, `touched` bytes each, outgrows the cache."""
        return list(torch.randn(copies_beyond_l2(touched), tokens, width, device=device, dtype=dtype))

    size = 4 * tokens * sizes.hidden * dtype.itemsize
    hidden = random(sizes.hidden, size)
    residual = torch.randn_like(hidden[0])
    launches: list[Callable[[], Tensor]] = [partial(_norm, x, residual, norm) for x in hidden]
    yield Case(
        f"{name}: add, norm", launches, lambda: torch_backend.rms_norm(hidden[0] + residual, norm, 1e-5), size, 0
    )
    size = 3 * tokens * sizes.inner * dtype.itemsize
    gates = random(2 * sizes.inner, size)
    yield Case(
        f"{name}: silu, mul", [partial(silu_mul, x) for x in gates], lambda: torch_backend.silu_mul(gates[0]), size, 0
    )
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_size
    size = 2 * tokens * width * dtype.itemsize
    joint = random(width, size)
    kv, batch = _empty_cache(sizes, tokens, device, dtype)
    table = torch.rand(POSITIONS, sizes.head_size, device=device)
    head_norm = torch.randn(sizes.head_size, device=device, dtype=dtype) if sizes.normed else None
    yield Case(
        f"{name}: rope, cache",
        [
            partial(
                rope_and_cache,
                qkv, table, kv.keys, kv.values, batch.positions, batch.slot_mapping, head_norm, head_norm, 1e-6,
            )
            for qkv in joint
        ],
        lambda: torch_backend.rope_and_cache(joint[0], table, kv, batch, head_norm, head_norm, 1e-6),
        size,
        0,
    )  # fmt: skip


def _norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return add_rms_norm(x, residual, weight, 1e-5)[0]


def _empty_cache(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[KVLayer, StepBatch]:
    """Room for the tokens, which go to scattered slots; of the batch only what rope looks at is meant."""
    blocks = -(-tokens // BLOCK_SIZE)
    kv = KVLayer(*torch.zeros(2, blocks, sizes.kv_heads, BLOCK_SIZE, sizes.head_size, device=device, dtype=dtype))
    none = torch.zeros(1, dtype=torch.int32, device=device)
    places = torch.randperm(blocks * BLOCK_SIZE, device=device)[:tokens]
    return kv, StepBatch(places % POSITIONS, places, none, none, none, 0, 1, 1)
