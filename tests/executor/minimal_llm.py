"""A custom model for tests, as a user would write one: two layers, learned positions, grouped queries."""

from __future__ import annotations

import torch
from fast_inference.executor.attention import paged_attention
from torch import Tensor, nn

WIDTH, HEADS, KV_HEADS, SIZE = 32, 4, 2, 8


class MinimalLLM(nn.Module):
    """Takes [T] tokens in the engine, [B, T] in training."""

    num_kv_heads, head_dim = KV_HEADS, SIZE

    def __init__(self, vocab_size: int = 50, max_model_len: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.vocab_size, self.max_model_len, self.num_layers = vocab_size, max_model_len, num_layers
        self.embed, self.places = nn.Embedding(vocab_size, WIDTH), nn.Embedding(max_model_len, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * SIZE) for _ in range(num_layers))
        self.out = nn.ModuleList(nn.Linear(HEADS * SIZE, WIDTH) for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, vocab_size)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(token_ids) + self.places(positions)
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(x).unflatten(-1, (-1, SIZE)).split((HEADS, KV_HEADS, KV_HEADS), -2)
            x = x + out(paged_attention(q, k, v, layer).flatten(-2))
        logits: Tensor = self.head(x)
        return logits


class TwoStage(MinimalLLM):
    """Returns hidden states from forward, logits from `compute_logits`."""

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self.embed(token_ids) + self.places(positions)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits


class Leaky(MinimalLLM):
    """Breaks the contract: sums over all tokens of the step."""

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return super().forward(token_ids, positions) + self.head(self.embed(token_ids).sum(0))


class Plain(nn.Module):
    """No paged attention: [B, T] token ids to [B, T, V] logits, by a running mean."""

    block_size = 48

    def __init__(self, wrap: str = "tensor", last_only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head, self.wrap, self.last_only = nn.Embedding(50, 16), nn.Linear(16, 50), wrap, last_only

    def forward(self, token_ids: Tensor) -> object:
        counts = torch.arange(1, token_ids.shape[1] + 1)[:, None]
        logits = self.head(self.embed(token_ids).cumsum(1) / counts)
        logits = logits[:, -1:] if self.last_only else logits
        return {"tensor": logits, "tuple": (logits, None), "dict": {"logits": logits}}[self.wrap]
