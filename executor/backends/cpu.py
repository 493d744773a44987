"""The decoder's operations on a CPU, by this project's C kernels (`executor/kernels/cpu`).

Owns the call path from tensors to C: checks that keep a wrong shape from becoming a wrong address, packing of weights,
pointers. Must not know any model. Small steps are paid by the call, so each method does as little as it can: outputs
come from `torch.empty`, and the pointers of a step's batch are taken once per step.

bfloat16 and float32; all tensors contiguous. Everything is computed in float32 and rounded once, but for the softmax
weights of bfloat16 attention, which are rounded before they meet the values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p
from typing import cast

import torch
from torch import Tensor

from ..kernels.cpu.build import load
from ..kernels.cpu.pack import pack_bias, pack_weight
from .base import Backend, KVLayer, Linear, StepBatch

STEP_DTYPES = (torch.int64, torch.int64, torch.int32, torch.int32, torch.int32)  # in the order of _StepBatch
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
ARGUMENTS = {
    "linear": [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_long],
    "rms_norm": [c_void_p, c_void_p, c_void_p, c_long, c_long, c_float],
    "silu_mul": [c_void_p, c_void_p, c_long, c_long],
    "rope_and_cache": [c_void_p] * 8 + [c_long] * 4 + [c_float],
    "write_kv": [c_void_p] * 5 + [c_long] * 3,
    "attention": [c_void_p] * 5 + [c_long] * 5 + [c_float] * 2,
}


class _PackedLinear(ctypes.Structure):
    """`packed_linear` of linear.c."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("in_units", c_long), ("out_features", c_long)]


class _StepBatch(ctypes.Structure):
    """`step_batch` of step.h."""

    _fields_ = [
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("block_tables", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("tokens", c_long),
        ("rows", c_long),
        ("decodes", c_long),
        ("table_width", c_long),
    ]


class _Kernels:
    """The C functions of one element type."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        def find(name: str, result: type[c_int] | None = None) -> Callable[..., int]:
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = ARGUMENTS[name], result
            return cast(Callable[..., int], function)

        self.linear = find("linear")
        self.rms_norm = find("rms_norm")
        self.silu_mul = find("silu_mul")
        self.rope_and_cache = find("rope_and_cache")
        self.write_kv = find("write_kv")
        self.attention = find("attention", c_int)


class CpuLinear:
    """A weight packed into panels of 32 output features, streamed from memory in the order in which it lies there."""

    def __init__(self, kernels: _Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._weight = pack_weight(weight)
        self._bias = None if bias is None else pack_bias(bias, weight.dtype)
        self._unit = 4 // weight.element_size()
        bias_pointer = None if self._bias is None else self._bias.data_ptr()
        self._layer = _PackedLinear(
            self._weight.data_ptr(), bias_pointer, -(-self.in_features // self._unit), self.out_features
        )
        self._pointer = ctypes.addressof(self._layer)
        self._kernel = kernels.linear

    def __call__(self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        rows, width = x.shape
        if width != self.in_features or x.dtype is not self.dtype:
            raise ValueError(f"expected [T, {self.in_features}] of {self.dtype}, got {list(x.shape)} of {x.dtype}")
        if width % self._unit:
            x = torch.nn.functional.pad(x, (0, 1))
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty((rows, self.out_features), dtype=out_dtype or self.dtype)
        if out.dtype is not torch.float32 and out.dtype is not self.dtype:
            raise ValueError(f"out_dtype is {self.dtype} or float32, not {out.dtype}")
        if residual is not None:
            if residual.shape != out.shape or residual.dtype is not self.dtype:
                raise ValueError(f"residual {list(residual.shape)} of {residual.dtype} does not fit {list(out.shape)}")
            residual = residual.contiguous()
        self._kernel(
            self._pointer,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            out.dtype is torch.float32,
            rows,
        )
        return out


class CpuBackend(Backend):
    """`Backend` by C kernels. Raises `KernelsUnavailable` where they cannot be built."""

    name = "cpu"
    recordable = False

    def __init__(self) -> None:
        library = load()
        self._kernels = {dtype: _Kernels(library, suffix) for dtype, suffix in SUFFIXES.items()}
        self._batch: StepBatch | None = None
        self._batch_struct = _StepBatch()

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return CpuLinear(self._of(weight), weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1]
        if weight.dtype is not x.dtype or weight.shape != (size,) or not weight.is_contiguous():
            raise ValueError(f"norm weight {list(weight.shape)} of {weight.dtype} does not fit {x.dtype} [..., {size}]")
        out = torch.empty_like(x)
        self._of(x).rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape
        out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
        self._of(gate_up).silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
        return out

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
        keys, values = kv.keys, kv.values
        _, kv_heads, block_size, head_size = keys.shape
        tokens, width = qkv.shape
        heads = width // head_size - 2 * kv_heads
        _check_cache(kv, qkv.dtype)
        if (heads + 2 * kv_heads) * head_size != width or heads <= 0 or head_size % 2:
            raise ValueError(f"qkv of width {width} does not hold heads of {head_size} beside {kv_heads} kv heads")
        if cos_sin.dtype is not torch.float32 or cos_sin.shape[1] != head_size or not cos_sin.is_contiguous():
            raise ValueError(f"cos_sin must be contiguous float32 [max_position, {head_size}]")
        qkv = qkv.contiguous()
        q = torch.empty((tokens, heads, head_size), dtype=qkv.dtype)
        self._of(qkv).rope_and_cache(
            self._point_at(batch),
            qkv.data_ptr(),
            q.data_ptr(),
            cos_sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            _head_norm(q_norm, qkv.dtype, head_size),
            _head_norm(k_norm, qkv.dtype, head_size),
            heads,
            kv_heads,
            block_size,
            head_size,
            eps,
        )
        return q

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, batch: StepBatch) -> None:
        keys, values = kv.keys, kv.values
        _, kv_heads, block_size, head_size = keys.shape
        _check_cache(kv, k.dtype)
        if k.shape[1:] != (kv_heads, head_size) or v.shape != k.shape or v.dtype is not k.dtype:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} do not fit the cache {list(keys.shape)}")
        k, v = k.contiguous(), v.contiguous()
        self._of(k).write_kv(
            self._point_at(batch),
            k.data_ptr(),
            v.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            kv_heads,
            block_size,
            head_size,
        )

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        keys, values = kv.keys, kv.values
        _, kv_heads, block_size, head_size = keys.shape
        tokens, heads, _ = q.shape
        _check_cache(kv, q.dtype)
        if q.shape[2] != head_size or heads % kv_heads or head_size * q.element_size() % 4:
            raise ValueError(f"q {list(q.shape)} does not fit the cache {list(keys.shape)}")
        q = q.contiguous()
        out = torch.empty((tokens, heads * head_size), dtype=q.dtype)
        failed = self._of(q).attention(
            self._point_at(batch),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            heads,
            kv_heads,
            block_size,
            head_size,
            window or 0,
            scale,
            soft_cap or 0.0,
        )
        if failed:
            raise MemoryError("no memory for the plan of an attention step")
        return out

    def _of(self, x: Tensor) -> _Kernels:
        try:
            return self._kernels[x.dtype]
        except KeyError:
            raise ValueError(f"the cpu backend computes in bfloat16 or float32, not {x.dtype}") from None

    def _point_at(self, batch: StepBatch) -> int:
        """The address of the C side of `batch`, which is kept until the next step's: its pointers stay good."""
        if batch is not self._batch:
            tensors = (batch.positions, batch.slot_mapping, batch.block_tables, batch.query_start, batch.seq_lens)
            for tensor, dtype in zip(tensors, STEP_DTYPES, strict=True):
                if tensor.dtype is not dtype or not tensor.is_contiguous():
                    raise ValueError("the tensors of a StepBatch must be contiguous, of the dtypes that it documents")
            self._batch_struct = _StepBatch(
                *(tensor.data_ptr() for tensor in tensors),
                batch.positions.shape[0],
                batch.seq_lens.shape[0],
                batch.num_decodes,
                batch.block_tables.shape[1],
            )
            self._batch = batch
        return ctypes.addressof(self._batch_struct)


def _head_norm(weight: Tensor | None, dtype: torch.dtype, head_size: int) -> int | None:
    """The address of a norm weight of q or k, if there is one."""
    if weight is None:
        return None
    if weight.dtype is not dtype or weight.shape != (head_size,) or not weight.is_contiguous():
        raise ValueError(f"head norm {list(weight.shape)} of {weight.dtype} does not fit {dtype} heads of {head_size}")
    return weight.data_ptr()


def _check_cache(kv: KVLayer, dtype: torch.dtype) -> None:
    if kv.keys.dtype is not dtype or not (kv.keys.is_contiguous() and kv.values.is_contiguous()):
        raise ValueError(f"keys and values must be contiguous {dtype} [num_blocks, kv_heads, block_size, head_size]")
