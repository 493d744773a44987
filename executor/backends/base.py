"""What a model asks of the hardware: the one interface between model code and kernels.

Owns the vocabulary (`StepBatch`, `KVLayer`, `Backend`); must not know any model, message or socket. A model
is written once against `Backend`; each file beside this one implements it for some hardware:
`torch` is the reference that runs everywhere, `cpu` holds this project's C kernels, `triton` those for a GPU.

Shapes: T tokens in the step (all requests side by side), B requests in the step, Hq query heads, Hkv key/value
heads, D head size, BS block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Piece(NamedTuple):
    """What has been done of some long work."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Where the tokens of one step stand. All tensors live on the model's device.

    Rows with one query token (decode) come before rows with more; `num_decodes` says how many there are. A row of
    padding, which a recorded step may have, has none.
    """

    positions: Tensor  # [T] int64: index of each token in its request
    slot_mapping: Tensor  # [T] int64: block id * BS + offset, where each token's key and value go
    block_tables: Tensor  # [B, max_blocks] int32: row i, column j is the block that holds tokens j*BS .. j*BS+BS-1
    query_start: Tensor  # [B + 1] int32: tokens query_start[i] .. query_start[i+1]-1 belong to row i
    seq_lens: Tensor  # [B] int32: tokens of row i that have keys once this step has written its own
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    # [num_decodes] int32: the decode rows, those of most tokens first. Who begins with them does not end with one.
    order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Keys and values of one layer, in blocks. Two requests may name the same block (shared prefix)."""

    keys: Tensor  # [num_blocks, Hkv, BS, D]
    values: Tensor  # [num_blocks, Hkv, BS, D]


class KernelsUnavailable(RuntimeError):
    """A backend's kernels cannot be used on this machine; the message says why."""


class Linear(Protocol):
    """A weight as the backend likes it: packed once at load time."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """`x` [T, in] @ weight.T (+ bias) (+ residual [T, out]) -> [T, out] in `out_dtype` (default: x's)."""


class Backend(Protocol):
    """The operations of a decoder step. No call synchronises the device or loops in Python over requests.

    What has a body is how a backend does it that has nothing better; so backends name this as their base.
    """

    name: str
    # No operation asks the device anything, and attention's cost follows `seq_lens`, however large `max_seq_len` is: a
    # step may be recorded as a CUDA graph and replayed for longer rows.
    recordable: bool

    def tune(self, most_rows: int, most_tokens: int) -> Iterator[Piece]:
        """Measure what is to be measured here for steps of up to `most_rows` decode rows, or `most_tokens` tokens, once
        a first step has been run. That is done piece by piece, with steps in between, and may change how an operation
        is done, not its meaning."""
        return iter(())

    def compile_calls(self, heads: int, kv: KVLayer) -> list[Callable[[], object]]:
        """Calls that have the kernels compiled with which `heads` query heads attend over pages like `kv`. They may be
        made side by side; what is in the pages does not matter, and is not changed."""
        return []

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Pack `weight` [out, in] (and `bias` [out]); the caller drops its own reference afterwards."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension (Zhang & Sennrich, 2019), computed in float32."""

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
        """Split `qkv` [T, (Hq + 2 Hkv) * D], norm q and k per head where weights [D] are given (Qwen3), rotate both
        by `cos_sin` [max_position, D] float32 (the first D/2 columns cosines, the rest sines; halves rotated as
        in GPT-NeoX and the Hugging Face Llama), write k and v at `batch.slot_mapping`. Returns q [T, Hq, D]."""

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, batch: StepBatch) -> None:
        """Write `k` and `v` [T, Hkv, D] at `batch.slot_mapping`, as they are."""

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """Causal attention of `q` [T, Hq, D] over the paged keys and values of each token's own request, grouped
        queries allowed (Hq a multiple of Hkv). `window`: a token sees itself and the window - 1 before it.
        Returns [T, Hq * D]."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`gate_up` [T, 2I] -> silu(first half) * second half, [T, I]."""

    def linear_silu_mul(self, linear: Linear, x: Tensor) -> Tensor:
        """`silu_mul(linear(x))`: one operation, so that a backend may do both at once."""
        return self.silu_mul(linear(x))

    def linear_add_norm(
        self, linear: Linear, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`linear(x, residual)` in the residual's dtype, and its `rms_norm`: (norm, sum), both [T, out]. The sum may be
        put where the residual was, which is not `x`."""
        total = linear(x, residual)
        return self.rms_norm(total, weight, eps), total
