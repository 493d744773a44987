"""The decoder's operations on a GPU, by this project's Triton kernels (`executor/kernels/gpu`).

Owns which kernel an operation goes to; must not know any model. What has no kernel is done as `torch` does it.
Importing this needs triton.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from ..kernels.gpu.attention_decode import decode_attention
from ..kernels.gpu.attention_prefill import prefill_attention
from ..kernels.gpu.attention_tiles import unsupported
from ..kernels.gpu.card import is_hopper
from ..kernels.gpu.linear_table import LinearTable
from ..kernels.gpu.norm import add_rms_norm, rms_norm
from ..kernels.gpu.rope import rope_and_cache, write_kv
from ..kernels.gpu.silu import silu_mul
from .base import KVLayer, Linear, Piece, StepBatch
from .hopper_attention import DECODES, PROMPTS, HopperAttention, HopperKernel
from .torch import TorchBackend
from .triton_linear import TritonLinear
from .triton_tuning import FAILURES, tune

log = logging.getLogger(__name__)


class TritonBackend(TorchBackend):
    """`Backend` by Triton kernels, for tensors on a CUDA device (or in Triton's interpreter, on any)."""

    name = "triton"
    recordable = True

    def __init__(self, table: LinearTable | None = None, path: Path | None = None) -> None:
        """`table`: how products are done; by default as torch does them. `path`: where it is kept."""
        super().__init__()
        self._table = LinearTable() if table is None else table
        self._path = path
        self._linears: WeakSet[TritonLinear] = WeakSet()
        self._told: set[str] = set()  # why something went to torch, each reason logged once
        self._compiled: set[object] = set()  # attention kernels, each with what it is compiled for
        self._hopper = HopperAttention()

    def tune(self, most_rows: int, most_tokens: int) -> Iterator[Piece]:
        """Choose among product kernels and cuBLAS's algorithms where that has not been done on this card yet."""
        linears, began = list(self._linears), time.perf_counter()
        try:
            if found := (yield from tune(linears, self._table, most_rows, most_tokens)):
                log.info("%d kinds of products measured in %.1f s", found, time.perf_counter() - began)
                if self._path is not None:
                    self._table.save(self._path)
        except FAILURES as error:
            log.warning("products that are not measured are cuBLAS's: %s: %s", type(error).__name__, error)
        for linear in linears:
            linear.consult(self._table)

    def compile_calls(self, heads: int, kv: KVLayer) -> list[Callable[[], object]]:
        """Those of a decode row and of a prompt, whole and cut along their keys."""
        q = kv.keys.new_zeros((2, heads, kv.keys.shape[3]))
        if unsupported(q, kv) is not None:
            return []
        out = q.new_empty((2, heads * q.shape[2]))

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=q.device)

        tables, places = torch.zeros((2, 1), dtype=torch.int32, device=q.device), ints(0, 1).long()
        eager = StepBatch(places, places, tables, ints(0, 1, 2), ints(1, 2), 2, 1, 2)
        recorded = replace(eager, order=ints(0, 1))
        prompt = StepBatch(places, places, tables[:1], ints(0, 2), ints(2), 0, 2, 2)
        calls: list[Callable[[], object]] = []
        for splits in (1, 2):
            calls += (
                partial(decode_attention, q, kv, eager, 1.0, out, splits=splits),
                partial(decode_attention, q, kv, recorded, 1.0, out, splits=splits),
                partial(prefill_attention, q, kv, prompt, 1.0, out, splits=splits),
            )
        if is_hopper(q.device):
            for kernel, step in ((DECODES, eager), (PROMPTS, prompt)):
                if kernel.fits(q, kv, None, None):
                    calls.append(partial(kernel.attend, q, kv, step, 1.0, out))
        return calls

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        linear = TritonLinear(weight, bias, self._table)
        self._linears.add(linear)
        return linear

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def linear_silu_mul(self, linear: Linear, x: Tensor) -> Tensor:
        return linear.silu_mul(x) if isinstance(linear, TritonLinear) else silu_mul(linear(x))

    def linear_add_norm(
        self, linear: Linear, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if isinstance(linear, TritonLinear):
            return linear.add_norm(x, residual, weight, eps)
        return add_rms_norm(linear(x), residual, weight, eps)

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        return rope_and_cache(
            qkv, cos_sin, kv.keys, kv.values, batch.positions, batch.slot_mapping, q_norm, k_norm, eps
        )

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, batch: StepBatch) -> None:
        write_kv(k, v, kv.keys, kv.values, batch.slot_mapping)

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        if (reason := unsupported(q, kv)) is not None:
            if reason not in self._told:
                self._told.add(reason)
                log.warning("attention is done by torch, which is slower: %s", reason)
            return super().attention(q, kv, batch, scale, window, soft_cap)
        q = q.contiguous()
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        if batch.num_decodes:
            self._attend(DECODES, q, kv, batch, scale, out, window, soft_cap)
        if batch.num_decodes < batch.seq_lens.shape[0]:
            self._attend(PROMPTS, q, kv, batch, scale, out, window, soft_cap)
        return out

    def _attend(
        self,
        kernel: HopperKernel,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        out: Tensor,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        """The rows that are `kernel`'s, by it or by the one whose place it takes."""
        kind = (q.dtype, q.shape[1:], kv.keys.shape[1:], bool(window), bool(soft_cap))
        *to_compile, usual = self._splits(kernel.rows, kind, q.is_cuda)
        for splits in to_compile:
            kernel.usual(q, kv, batch, scale, out, window, soft_cap, splits)
        if self._hopper.takes(kernel, q, kv, batch, scale, window, soft_cap):
            kernel.attend(q, kv, batch, scale, out)
        else:
            kernel.usual(q, kv, batch, scale, out, window, soft_cap, usual)

    def _splits(self, rows: str, kind: object, compiles: bool) -> tuple[int | None, ...]:
        """How the kernel of such rows is to cut them: as it likes, but the first time also in one part and in two,
        which are compiled apart: no later step waits for the compiler."""
        if not compiles or (rows, kind) in self._compiled:
            return (None,)
        self._compiled.add((rows, kind))
        return (1, 2, None)
