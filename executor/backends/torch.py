"""The decoder's operations in plain torch: the reference, on any device and in any float dtype.

Owns the meaning of each operation; must not know any model or kernel. Written to be right and readable first, but
decode has no Python loop over requests. Norms, rotation and softmax are computed in float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .base import Backend, KVLayer, Linear, StepBatch

MAX_SCORES = 1 << 25  # float32 scores held at a time while a prompt is attended: 128 MB


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


class TorchLinear:
    """`torch.nn.functional.linear` with the weight as it came."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias
        self._wide_weight: Tensor | None = None  # made at the first call that wants a wider result on a CPU

    def __call__(self, x: Tensor, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        if out_dtype is None or out_dtype is x.dtype:
            out = functional.linear(x, self._weight, self._bias)
            return out if residual is None else out + residual
        out = self._multiply_wide(x, out_dtype)
        if self._bias is not None:
            out = out + self._bias
        if residual is not None:
            out = out + residual
        return out.to(out_dtype)

    def _multiply_wide(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The product with its sums not rounded to x's dtype."""
        if x.is_cuda and out_dtype is torch.float32:
            return torch.mm(x, self._weight.t(), out_dtype=out_dtype)
        if self._wide_weight is None:
            self._wide_weight = self._weight.to(out_dtype)
        return functional.linear(x.to(out_dtype), self._wide_weight)


class TorchBackend(Backend):
    """`Backend` in plain torch."""

    name = "torch"
    recordable = False  # gathers keys and values of `max_seq_len` tokens

    def __init__(self) -> None:
        self._batch: StepBatch | None = None
        self._bounds: list[tuple[int, int, int]] = []

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return TorchLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = _wide(gate_up).chunk(2, -1)
        return (functional.silu(gate) * up).to(gate_up.dtype)

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
        _, kv_heads, _, head_size = kv.keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv_heads
        q, k, v = qkv.view(qkv.shape[0], -1, head_size).split((heads, kv_heads, kv_heads), 1)
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, -1)  # [T, 1, D / 2] each
        q, k = self._rotate(q, cos, sin, q_norm, eps), self._rotate(k, cos, sin, k_norm, eps)
        self.write_kv(k, v, kv, batch)
        return q

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        wide = _wide(x)
        if norm is not None:
            wide = self.rms_norm(wide, norm, eps)
        a, b = wide.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, batch: StepBatch) -> None:
        block_size = kv.keys.shape[2]
        block = torch.div(batch.slot_mapping, block_size, rounding_mode="floor")
        offset = batch.slot_mapping % block_size
        kv.keys[block, :, offset] = k
        kv.values[block, :, offset] = v

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        parts = []
        if batch.num_decodes:
            parts.append(self._attend_decodes(q, kv, batch, scale, window, soft_cap))
        if batch.num_decodes < batch.seq_lens.shape[0]:
            for row, (start, end, seq_len) in enumerate(self._prompt_bounds(batch), batch.num_decodes):
                if start < end:
                    parts.append(self._attend_prompt(q[start:end], kv, batch, row, seq_len, scale, window, soft_cap))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.to(q.dtype).flatten(1)

    def _prompt_bounds(self, batch: StepBatch) -> list[tuple[int, int, int]]:
        """(first token, end, seq_len) of the rows that are no decodes; read from the device once per step."""
        if batch is not self._batch:
            starts = batch.query_start[batch.num_decodes :].tolist()
            lengths = batch.seq_lens[batch.num_decodes :].tolist()
            self._bounds = list(zip(starts[:-1], starts[1:], lengths, strict=True))
            self._batch = batch
        return self._bounds

    def _attend_decodes(
        self, q: Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        count = batch.num_decodes
        keys, values = _gather(kv, batch.block_tables[:count], batch.max_seq_len)
        last = batch.seq_lens[:count, None, None].long() - 1
        return _attend(q[:count].unsqueeze(1), keys, values, last, scale, window, soft_cap).squeeze(1)

    def _attend_prompt(
        self,
        q: Tensor,
        kv: KVLayer,
        batch: StepBatch,
        row: int,
        seq_len: int,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        keys, values = _gather(kv, batch.block_tables[row : row + 1], seq_len)
        positions = torch.arange(seq_len - q.shape[0], seq_len, device=q.device).view(1, -1, 1)
        step = max(1, MAX_SCORES // (q.shape[1] * seq_len))
        pieces = [
            _attend(part.unsqueeze(0), keys, values, place, scale, window, soft_cap).squeeze(0)
            for part, place in zip(q.split(step), positions.split(step, 1), strict=True)
        ]
        return torch.cat(pieces)


def _gather(kv: KVLayer, tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `length` tokens of each row of `tables` [B, blocks], as [B, Hkv, L, D] float32.

    Where a row is shorter the rest is any block's content: the caller masks it.
    """
    num_blocks, heads, block_size, head_size = kv.keys.shape
    rows = tables.shape[0]
    used = tables[:, : -(-length // block_size)].clamp(0, num_blocks - 1)
    index = used.reshape(-1).long()

    def lay_out(cache: Tensor) -> Tensor:
        blocks = _wide(cache.index_select(0, index)).view(rows, used.shape[1], heads, block_size, head_size)
        return blocks.transpose(1, 2).reshape(rows, heads, -1, head_size)

    return lay_out(kv.keys), lay_out(kv.values)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """`q` [B, Tq, Hq, D] over `keys`, `values` [B, Hkv, L, D]; `positions` [B, Tq, 1]. Returns [B, Tq, Hq, D]."""
    rows, tokens, heads, head_size = q.shape
    kv_heads, length = keys.shape[1:3]
    grouped = _wide(q).view(rows, tokens, kv_heads, heads // kv_heads, head_size).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(grouped * scale, keys.unsqueeze(2).transpose(-1, -2))  # [B, Hkv, G, Tq, L]
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    places = torch.arange(length, device=q.device)
    visible = places <= positions
    if window:
        visible &= places > positions - window
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    # Blocks that hold no token yet may hold anything, a NaN too, and 0 * NaN is a NaN.
    seen = visible.any(1)[:, None, :, None]
    mixed = torch.matmul(torch.softmax(scores, -1), values.masked_fill(~seen, 0.0).unsqueeze(2))
    return mixed.permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads, head_size)
