"""`paged_attention`: the one call by which a module that is not ours attends through the engine.

Owns the current step of the thread, set around a module's forward, and the dense attention that stands in when there
is none, so that one module serves and trains. Must not know messages, slots or any model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .backends.base import Backend, KVLayer, StepBatch


@dataclass(frozen=True, slots=True)
class EngineStep:
    """What attention needs besides q, k and v."""

    backend: Backend
    batch: StepBatch
    kv: list[KVLayer]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int | None, soft_cap: float | None
    ) -> Tensor:
        """Write `k`, `v` [T, Hkv, D] to the pages of `layer`, then attend with `q` [T, Hq, D] -> [T, Hq * D]."""
        pages = self.kv[layer]
        self.backend.write_kv(k.contiguous(), v.contiguous(), pages, self.batch)
        return self.backend.attention(q.contiguous(), pages, self.batch, scale, window, soft_cap)


class _Thread(threading.local):
    step: EngineStep | None = None


_thread = _Thread()


@contextmanager
def engine_step(step: EngineStep) -> Iterator[None]:
    """Within it, `paged_attention` on this thread reads and writes the pages of `step`."""
    outer, _thread.step = _thread.step, step
    try:
        yield
    finally:
        _thread.step = outer


def current_step() -> EngineStep | None:
    """The step that this thread is in, if any."""
    return _thread.step


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention for a custom model, over pages inside the engine and dense outside it.

    `q` [T, Hq, D], `k` and `v` [T, Hkv, D], Hq a multiple of Hkv, in the engine: T tokens of all requests of the step
    side by side, each seeing only its own request. Outside the engine (training, a plain call) also [B, T, H, D], B
    sequences from their first token on. `layer`: which layer's pages, 0 to num_layers - 1. `scale`: factor on the
    scores, default D ** -0.5. `window`: a token sees itself and the window - 1 before it. `soft_cap`: scores become
    soft_cap * tanh(score / soft_cap).

    Returns the shape of `q`. Raises `ValueError` for shapes or a layer that do not fit.
    """
    if k.shape != v.shape or q.dim() not in (3, 4) or q.dim() != k.dim() or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q must be [T, Hq, D], k and v [T, Hkv, D] (or all with a leading batch); got {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"query heads ({q.shape[-2]}) must be a multiple of key/value heads ({k.shape[-2]})")
    if scale is None:
        scale = float(q.shape[-1] ** -0.5)
    step = _thread.step
    if step is None:
        return dense_attention(q, k, v, scale, window, soft_cap)
    if not 0 <= layer < len(step.kv):
        raise ValueError(f"layer must be in [0, {len(step.kv) - 1}] (num_layers is {len(step.kv)}), got {layer}")
    if q.dim() == 4:
        if q.shape[0] != 1:
            raise ValueError(f"in the engine a step is one row of tokens: the batch size must be 1, got {q.shape[0]}")
        q, k, v = q[0], k[0], v[0]
        return step.attend(q, k, v, layer, scale, window, soft_cap).view(1, *q.shape)
    return step.attend(q, k, v, layer, scale, window, soft_cap).view(q.shape)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of whole sequences: `q` [..., T, Hq, D], `k` and `v` [..., L, Hkv, D] -> the shape of `q`.

    Causal (query i stands at position L - T + i), within `window` where given; or as `mask` says, broadcastable to
    [..., Hq, T, L]: bool (True is seen) or added to the scores.
    """
    q, k, v = q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)
    if mask is None and (window is not None or soft_cap is not None or q.shape[-2] != k.shape[-2]):
        tokens, length = q.shape[-2], k.shape[-2]
        query, key = (
            torch.arange(length - tokens, length, device=q.device)[:, None],
            torch.arange(length, device=q.device),
        )
        mask = key <= query
        if window is not None:
            mask = mask & (key > query - window)
    if soft_cap is None:
        causal = mask is None
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
        return out.transpose(-2, -3)
    groups = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    scores = soft_cap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / soft_cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(-2, -3)
