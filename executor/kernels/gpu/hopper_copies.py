"""What a Hopper card's engine for copies can copy of a step, and what it has to be told for that.

Owns the descriptors of tensors; must not know who attends or what is done with the copies.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...backends.base import KVLayer

HEAD_SIZE = 128
CHUNK = gl.constexpr(16)  # keys of one copy; a page holds a whole number of them


def can_copy(q: Tensor, kv: KVLayer, window: int | None, soft_cap: float | None) -> bool:
    """Whether attention with `q` [T, Hq, D] over `kv` can be done by kernels that are fed by the engine: they know
    these shapes only."""
    _, _, block_size, head_size = kv.keys.shape
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and head_size == HEAD_SIZE
        and block_size % CHUNK.value == 0
        and not window
        and not soft_cap
    )


def copied(tensor: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> TensorDescriptor:
    """What the engine has to know of `tensor`, contiguous, seen as `shape`, to copy a `block` of it."""
    return _descriptor(tensor.data_ptr(), tensor.dtype, shape, block)


def copied_pages(kv: KVLayer) -> tuple[TensorDescriptor, TensorDescriptor, int]:
    """Keys and values, seen as lines of one token and head, CHUNK of which are copied at a time; how many lines."""
    num_blocks, kv_heads, block_size, head_size = kv.keys.shape
    lines = num_blocks * kv_heads * block_size
    shape, block = (lines, head_size), (CHUNK.value, head_size)
    return copied(kv.keys, shape, block), copied(kv.values, shape, block), lines


@dataclass(frozen=True, slots=True)
class _Memory:
    """As much of a tensor as a descriptor asks for: one that is kept must not keep the memory."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=1024)  # keys and values of all layers, and queries, whose memory is mostly the same
def _descriptor(address: int, dtype: torch.dtype, shape: tuple[int, ...], block: tuple[int, ...]) -> TensorDescriptor:
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    layout = gl.NVMMASharedLayout(128, 8 * dtype.itemsize, rank=len(shape))
    return TensorDescriptor(_Memory(address, dtype), list(shape), strides, list(block), layout)
