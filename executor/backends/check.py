"""Whether a backend computes here what it should: each operation once, on a tiny step, beside the torch reference.

Owns the inputs, the comparison, and the making of the backend for a GPU, whose kernels come from a compiler that may be
missing or wrong for the card; must not know what is done about it (`executor/startup.py` does).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..side_by_side import side_by_side
from .base import Backend, KernelsUnavailable, KVLayer, StepBatch
from .torch import TorchBackend

# Largest difference, relative to results over 1, of sums of some hundred products rounded to that dtype.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 64, 16
HIDDEN = HEADS * HEAD_SIZE
SEQ_LENS, QUERIES = (3, 70, 25), (1, 1, 9)  # two decode rows, the longer one of two tiles; a prompt behind a prefix


def triton_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for a GPU, its kernels compiled and checked on `device` in `dtype`.

    Raises `KernelsUnavailable` where triton is missing, can't compile, or computes something else than torch.
    """
    try:
        from triton.errors import TritonError

        from ..kernels.gpu.linear_table import LinearTable, load_table, table_path
        from .triton import TritonBackend
    except ImportError as error:
        raise KernelsUnavailable(f"triton can't be imported: {error}") from error
    path = table_path(device) if device.type == "cuda" else None
    backend = TritonBackend(load_table(path) if path else LinearTable(), path)
    try:
        check_backend(backend, device, dtype)
    except (TritonError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        if isinstance(error, KernelsUnavailable):
            raise
        raise KernelsUnavailable(f"a Triton kernel can't be run: {type(error).__name__}: {error}") from error
    return backend


def check_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raises `KernelsUnavailable`, naming the operation, where `backend` differs from torch in any.

    What an operation itself raises is passed on.
    """
    inputs = _make_inputs(device, dtype)
    reference, limit = TorchBackend(), TOLERANCE[dtype]
    results = side_by_side([partial(operation, backend, inputs) for operation in OPERATIONS.values()], device)
    for (name, operation), result in zip(OPERATIONS.items(), results, strict=True):
        for actual, expected in zip(result, operation(reference, inputs), strict=True):
            if actual.shape != expected.shape or actual.dtype is not expected.dtype:
                raise KernelsUnavailable(
                    f"{name} gives {list(actual.shape)} of {actual.dtype} where torch gives {list(expected.shape)} of "
                    f"{expected.dtype}"
                )
            difference = relative_difference(actual, expected)
            if not difference <= limit:  # a NaN is no less wrong
                raise KernelsUnavailable(f"{name} differs from torch by {difference:.3g} in {dtype}, over {limit:g}")


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest of |actual - expected| / max(1, |expected|): a large result is rounded to more than a small one."""
    wide = expected.float()
    return float(((actual.float() - wide).abs() / wide.abs().clamp(min=1.0)).max())


@dataclass(frozen=True, slots=True)
class _Inputs:
    hidden: Tensor  # [T, HIDDEN]
    qkv: Tensor  # [T, (HEADS + 2 KV_HEADS) * HEAD_SIZE]
    weight: Tensor  # [2 HIDDEN, HIDDEN]
    norm: Tensor  # [HIDDEN]
    cos_sin: Tensor  # [max(SEQ_LENS), HEAD_SIZE] float32
    kv: KVLayer
    batch: StepBatch

    def fresh_kv(self) -> KVLayer:
        return KVLayer(self.kv.keys.clone(), self.kv.values.clone())


def _make_inputs(device: torch.device, dtype: torch.dtype) -> _Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths, queries = torch.tensor(SEQ_LENS), torch.tensor(QUERIES)
    tokens, width = int(queries.sum()), -(-max(SEQ_LENS) // BLOCK_SIZE)
    tables = torch.randperm(len(SEQ_LENS) * width, generator=generator).view(len(SEQ_LENS), width)
    pairs = list(zip(SEQ_LENS, QUERIES, strict=True))
    positions = torch.cat([torch.arange(length - query, length) for length, query in pairs])
    rows = torch.repeat_interleave(torch.arange(len(SEQ_LENS)), queries)
    batch = StepBatch(
        positions=positions.to(device),
        slot_mapping=(tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).to(device),
        block_tables=tables.to(device, torch.int32),
        query_start=torch.cat((queries.new_zeros(1), queries.cumsum(0))).to(device, torch.int32),
        seq_lens=lengths.to(device, torch.int32),
        num_decodes=QUERIES.count(1),
        max_query_len=max(QUERIES),
        max_seq_len=max(SEQ_LENS),
    )
    pages = (tables.numel(), KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    return _Inputs(
        hidden=random(tokens, HIDDEN),
        qkv=random(tokens, (HEADS + 2 * KV_HEADS) * HEAD_SIZE),
        weight=random(2 * HIDDEN, HIDDEN) * HIDDEN**-0.5,
        norm=random(HIDDEN),
        cos_sin=random(max(SEQ_LENS), HEAD_SIZE).float(),
        kv=KVLayer(random(*pages), random(*pages)),
        batch=batch,
    )


def _add_norm(backend: Backend, given: _Inputs) -> tuple[Tensor, ...]:
    linear = backend.linear(given.weight[:HIDDEN].contiguous())
    return backend.linear_add_norm(linear, given.hidden, given.hidden.flip(0), given.norm, 1e-5)


def _rotate(backend: Backend, given: _Inputs) -> tuple[Tensor, ...]:
    kv, head_norm = given.fresh_kv(), given.norm[:HEAD_SIZE].clone()
    q = backend.rope_and_cache(given.qkv, given.cos_sin, kv, given.batch, head_norm, head_norm)
    return q, kv.keys, kv.values


def _write(backend: Backend, given: _Inputs) -> tuple[Tensor, ...]:
    kv = given.fresh_kv()
    k, v = given.qkv.view(len(given.qkv), -1, HEAD_SIZE)[:, HEADS:].split((KV_HEADS, KV_HEADS), 1)
    backend.write_kv(k.contiguous(), v.contiguous(), kv, given.batch)
    return kv.keys, kv.values


def _attend(backend: Backend, given: _Inputs) -> tuple[Tensor, ...]:
    q = given.hidden.view(len(given.hidden), HEADS, HEAD_SIZE)
    return (backend.attention(q, given.kv, given.batch, HEAD_SIZE**-0.5),)


# What an operation may be built of comes before it, so that the culprit is named.
OPERATIONS: dict[str, Callable[[Backend, _Inputs], tuple[Tensor, ...]]] = {
    "linear": lambda backend, given: (backend.linear(given.weight)(given.hidden),),
    "rms_norm": lambda backend, given: (backend.rms_norm(given.hidden, given.norm, 1e-5),),
    "silu_mul": lambda backend, given: (backend.silu_mul(given.hidden),),
    "linear_silu_mul": lambda backend, given: (backend.linear_silu_mul(backend.linear(given.weight), given.hidden),),
    "linear_add_norm": _add_norm,
    "write_kv": _write,
    "rope_and_cache": _rotate,
    "attention": _attend,
}
