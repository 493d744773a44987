"""KV blocks in host memory: the tensor, and the copies between it and the device's blocks.

Owns how much memory that is and how blocks travel; must not know which request a block belongs to, or why it moves:
the scheduler keeps those books. A block lies in one piece here (all layers, keys and values), so that it crosses the
bus in one copy, and neighbours in one together. Where the device is the CPU, this is a second pool beside the first.
"""

from __future__ import annotations

import logging
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocol.config import EngineConfig
from ..protocol.errors import EngineError, StartupError
from .kv_cache import KVCache, KVPlan, machine_memory, untouched_zeros
from .transfer import Transfer

log = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20  # on the device, for blocks that are put together for the bus, or taken apart

Int = NDArray[np.int64]


def host_blocks(config: EngineConfig, plan: KVPlan) -> int:
    """How many blocks `config.kv_offloading_size` has room for. Raises `StartupError` where that is none, or more than
    this process may ever hold."""
    if not config.kv_offloading_size:
        return 0
    if not plan.block_bytes:
        log.warning("kv_offloading_size is of no use: this model is computed anew for every token, without a KV cache")
        return 0
    size, total = int(config.kv_offloading_size * 2**30), machine_memory()
    if size > total or size < plan.block_bytes:
        raise StartupError(
            f"kv_offloading_size is {config.kv_offloading_size:g} GiB ({size} bytes): it must be between one block of "
            f"{plan.block_bytes} bytes and the {total} bytes of memory here",
            param="kv_offloading_size",
        )
    return size // plan.block_bytes


def staging_bytes(config: EngineConfig) -> int:
    """Device memory that the copies take for a moment: once gathered, once in the order of the bus."""
    return 2 * STAGING_BYTES if config.kv_offloading_size else 0


class HostPool:
    """`num_blocks` blocks beside those of `kv`. Copies are enqueued on the current stream and not waited for."""

    def __init__(self, kv: KVCache, num_blocks: int, transfer: Transfer) -> None:
        """Raises `StartupError` where the memory can't be had, or not pinned."""
        self.num_blocks = num_blocks
        self._device = kv.blocks  # [layers, 2, blocks + 1, heads, block_size, head_dim]
        self._transfer = transfer
        layers, two, device_blocks, *block = self._device.shape
        self._device_blocks = device_blocks - 1  # the last is nobody's
        shape = (num_blocks, layers, two, *block)
        block_bytes = self._device[:, :, 0].numel() * self._device.element_size()
        self._portion = max(1, STAGING_BYTES // block_bytes)
        try:
            memory = untouched_zeros(num_blocks * block_bytes)
        except (OSError, OverflowError) as error:
            raise StartupError(
                f"can't get {num_blocks * block_bytes / 2**20:.0f} MiB of host memory for KV blocks ({error}): "
                "lower kv_offloading_size",
                param="kv_offloading_size",
            ) from None
        if not transfer.shared:
            _pin(memory)
            weakref.finalize(self, _unpin, memory)
        self._host = memory.view(self._device.dtype).view(shape)

    def swap_out(self, source: Int, target: Int) -> None:
        """Copy device blocks `source` [N] to host blocks `target` [N], each at most once in it. Raises `EngineError`
        for ids out of range."""
        self._check(source, target)
        if self._transfer.shared:
            moved = self._device.index_select(2, torch.from_numpy(source)).movedim(2, 0)
            self._host.index_copy_(0, torch.from_numpy(target), moved)
            return
        for first in range(0, len(source), self._portion):
            part = slice(first, first + self._portion)
            (index,) = self._transfer.up(source[part])
            staged = self._device.index_select(2, index).movedim(2, 0).contiguous()
            for at, block, count in _runs(target[part]):
                self._host[block : block + count].copy_(staged[at : at + count], non_blocking=True)

    def swap_in(self, source: Int, target: Int) -> None:
        """Copy host blocks `source` [N] to device blocks `target` [N], each at most once; raises as `swap_out` does."""
        self._check(target, source)
        if self._transfer.shared:
            moved = self._host.index_select(0, torch.from_numpy(source)).movedim(0, 2)
            self._device.index_copy_(2, torch.from_numpy(target), moved)
            return
        for first in range(0, len(source), self._portion):
            part = slice(first, first + self._portion)
            (index,) = self._transfer.up(target[part])
            staged = self._device.new_empty((len(target[part]), *self._host.shape[1:]))
            for at, block, count in _runs(source[part]):
                staged[at : at + count].copy_(self._host[block : block + count], non_blocking=True)
            self._device.index_copy_(2, index, staged.movedim(0, 2))

    def _check(self, on_device: Int, on_host: Int) -> None:
        if len(on_device) != len(on_host):
            raise EngineError(f"a swap names {len(on_device)} blocks of the device and {len(on_host)} of the host")
        for name, blocks, limit in (
            ("device", on_device, self._device_blocks),
            ("host", on_host, self.num_blocks),
        ):
            if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < limit:
                raise EngineError(f"{name} block ids must be in [0, {limit}), got {blocks.min()}..{blocks.max()}")


def _runs(blocks: Int) -> list[tuple[int, int, int]]:
    """(place in `blocks`, first block, how many) of each piece of consecutive ids."""
    starts = np.flatnonzero(np.diff(blocks, prepend=blocks[0] - 2) != 1)
    counts = np.diff(starts, append=len(blocks))
    return list(zip(starts.tolist(), blocks[starts].tolist(), counts.tolist(), strict=True))


def _pin(memory: Tensor) -> None:
    # not torch's pinned memory: its allocator rounds up to a power of two
    failure = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failure:
        raise StartupError(
            f"can't pin {memory.nbytes / 2**20:.0f} MiB of host memory for KV blocks (CUDA error {failure}): "
            "lower kv_offloading_size",
            param="kv_offloading_size",
        )


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
