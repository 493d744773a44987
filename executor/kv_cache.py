"""The keys and values of all requests: how much memory they get, and the tensors.

Owns the budget arithmetic (pure) and the block tensors; must not know requests, messages or who holds which block.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass

import psutil
import torch

from ..protocol.config import EngineConfig
from ..protocol.errors import StartupError
from .backends.base import KVLayer
from .cgroup import memory_left, memory_limit
from .models.base import ModelSpec

log = logging.getLogger(__name__)

CPU_SHARE = 0.25  # of what is free, without kv_cache_memory


@dataclass(frozen=True, slots=True)
class KVPlan:
    """What fits: `num_blocks` blocks of `block_bytes` (all layers, keys and values), requests up to `max_model_len`."""

    num_blocks: int
    max_model_len: int
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def bytes_per_block(spec: ModelSpec, block_size: int) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in every layer."""
    if spec.recompute:
        return 0
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * block_size * spec.dtype.itemsize


def allowed_length(config: EngineConfig, spec: ModelSpec) -> int:
    """Tokens that a request may have as far as model and settings go.

    Raises `StartupError` where `config.max_model_len` is more than the model can take.
    """
    if config.max_model_len is not None and config.max_model_len > spec.max_model_len:
        raise StartupError(
            f"max_model_len is {config.max_model_len}, but this model takes at most {spec.max_model_len} tokens: "
            f"set max_model_len to {spec.max_model_len} or less",
            param="max_model_len",
        )
    return config.max_model_len or spec.max_model_len


def plan_kv(config: EngineConfig, spec: ModelSpec, budget: int, setting: str) -> KVPlan:
    """Split `budget` bytes into blocks; `setting` names the option that would give more, for the error.

    Never more blocks than `max_num_seqs` requests of full length need. Without an explicit `max_model_len` the
    length is lowered to what the blocks hold. Raises `StartupError` where an explicit one does not fit.
    """
    length = allowed_length(config, spec)
    size = config.block_size
    block_bytes = bytes_per_block(spec, size)
    useful = config.max_num_seqs * -(-length // size)
    if config.num_blocks is not None:
        num_blocks, setting = config.num_blocks, "num_blocks"
    else:
        num_blocks = min(useful, budget // block_bytes) if block_bytes else useful
    if num_blocks * size < length:
        held = f"{num_blocks} blocks of {size} tokens ({num_blocks * block_bytes / 2**20:.1f} MiB)"
        wanted = f"{-(-length // size)} blocks ({-(-length // size) * block_bytes / 2**20:.1f} MiB)"
        if config.max_model_len is not None or num_blocks < 1:
            raise StartupError(
                f"the KV cache has room for {held}, but one request of max_model_len {length} needs {wanted}: "
                f"raise {setting} or lower max_model_len to {num_blocks * size}",
                param=setting,
            )
        log.warning("max_model_len lowered from %d to %d: the KV cache holds %s", length, num_blocks * size, held)
        length = num_blocks * size
    return KVPlan(num_blocks, length, block_bytes)


def cpu_budget(config: EngineConfig) -> int:
    """Bytes of main memory for the KV cache: `kv_cache_memory`, or a quarter of what is free for this process.

    Raises `StartupError` where `kv_cache_memory` is more than this process may ever hold.
    """
    total = machine_memory()
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory > total:
            raise StartupError(
                f"kv_cache_memory is {config.kv_cache_memory} bytes, but there are {total}: lower it",
                param="kv_cache_memory",
            )
        return config.kv_cache_memory
    left = memory_left()
    free = psutil.virtual_memory().available
    return int(CPU_SHARE * (free if left is None else min(free, left)))


def machine_memory() -> int:
    """Bytes of main memory that this process may hold at most: the machine's, or its control group's."""
    group = memory_limit()
    return min(psutil.virtual_memory().total, group) if group else psutil.virtual_memory().total


class KVCache:
    """The block tensors of every layer. All zero at first, so that a masked read of a fresh block is finite.

    One block more than `plan` has, the last, is nobody's: rows that only fill up a recorded step write there.
    """

    def __init__(self, spec: ModelSpec, plan: KVPlan, block_size: int, device: torch.device) -> None:
        """Raises `StartupError` where the memory can't be had."""
        self.layers: list[KVLayer] = []
        if plan.block_bytes == 0:
            return
        size = plan.total_bytes + plan.block_bytes
        shape = (spec.num_layers, 2, plan.num_blocks + 1, spec.num_kv_heads, block_size, spec.head_dim)
        try:
            pool = untouched_zeros(size) if device.type == "cpu" else None
            if pool is None:
                pool = torch.zeros(size, dtype=torch.uint8, device=device)
        except (OSError, OverflowError, torch.OutOfMemoryError) as error:
            raise StartupError(
                f"can't get {size / 2**20:.0f} MiB for {plan.num_blocks} KV blocks "
                f"({str(error).splitlines()[0]}): lower num_blocks or kv_cache_memory"
            ) from None
        self.blocks = pool.view(spec.dtype).view(shape)
        self.layers = [KVLayer(layer[0], layer[1]) for layer in self.blocks]

    def copy_blocks(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy blocks `source` [N] int64 over blocks `target` [N] int64, in every layer."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


def untouched_zeros(size: int) -> torch.Tensor:
    """`size` zero bytes, page-aligned, of which each page takes memory only when first written.

    Huge pages spare the address translation that reading many scattered blocks would cost.
    """
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # a kernel built without them
            log.info("no huge pages for the KV cache: %s", error)
    return torch.frombuffer(pages, dtype=torch.uint8)
