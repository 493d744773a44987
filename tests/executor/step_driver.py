"""Drives a `Model` by hand: what scheduler, batch and runner do, in the fewest lines that are right.

`Sequences` keeps one paged cache; each `step` takes some tokens of some requests, as a real step does.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from fast_inference.executor.backends.base import KVLayer, StepBatch
from fast_inference.executor.models.base import Model
from torch import Tensor


class Sequences:
    """Requests by number, each with its tokens so far and its (scattered) blocks."""

    def __init__(self, model: Model, num_blocks: int = 256, block_size: int = 8) -> None:
        self.model, self.block_size = model, block_size
        spec = model.spec
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.kv = [
            KVLayer(
                torch.full(shape, float("nan"), dtype=spec.dtype), torch.full(shape, float("nan"), dtype=spec.dtype)
            )
            for _ in range(spec.num_layers)
        ]
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5))
        self.free: list[int] = order.tolist()
        self.blocks: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}

    def step(self, work: dict[int, list[int]], logits_at: list[int] | None = None) -> Tensor:
        """Append `work[request]` to each request and run them together; the logits of each one's last token, in the
        order of `work`. `logits_at`: token indexes of the step instead."""
        decodes = [r for r in work if len(work[r]) == 1]
        rows = decodes + [r for r in work if len(work[r]) > 1]
        positions, slots, ids, starts, lengths = [], [], [], [0], []
        for request in rows:
            tokens, blocks = self.tokens.setdefault(request, []), self.blocks.setdefault(request, [])
            for token in work[request]:
                position = len(tokens)
                if position % self.block_size == 0:
                    blocks.append(self.free.pop())
                positions.append(position)
                slots.append(blocks[-1] * self.block_size + position % self.block_size)
                ids.append(token)
                tokens.append(token)
            starts.append(len(ids))
            lengths.append(len(tokens))
        if self.model.spec.recompute:
            return self._recompute(rows, list(work))
        width = max(len(self.blocks[r]) for r in rows)
        batch = StepBatch(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor([self.blocks[r] + [0] * (width - len(self.blocks[r])) for r in rows]).int(),
            query_start=torch.tensor(starts).int(),
            seq_lens=torch.tensor(lengths).int(),
            num_decodes=len(decodes),
            max_query_len=max(b - a for a, b in pairwise(starts)),
            max_seq_len=max(lengths),
        )
        last = {r: starts[i + 1] - 1 for i, r in enumerate(rows)}
        wanted = [last[r] for r in work] if logits_at is None else logits_at
        at = None if wanted == list(range(len(ids))) else torch.tensor(wanted, dtype=torch.int64)
        with torch.inference_mode():
            return self.model.forward(torch.tensor(ids), batch, self.kv, at)

    def _recompute(self, rows: list[int], order: list[int]) -> Tensor:
        """Such a model gets every token of each row."""
        ids = [token for r in rows for token in self.tokens[r]]
        lengths = torch.tensor([len(self.tokens[r]) for r in rows])
        ends = lengths.cumsum(0)
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        batch = StepBatch(
            positions=positions,
            slot_mapping=torch.zeros_like(positions),
            block_tables=torch.zeros((len(rows), 1), dtype=torch.int32),
            query_start=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
            seq_lens=lengths.int(),
            num_decodes=0,
            max_query_len=int(lengths.max()),
            max_seq_len=int(lengths.max()),
        )
        last = torch.stack([ends[rows.index(r)] - 1 for r in order])
        with torch.inference_mode():
            return self.model.forward(torch.tensor(ids), batch, self.kv, last)

    def generate(self, prompts: list[list[int]], new: int, chunk: int = 16) -> list[list[int]]:
        """Greedy continuations of `prompts`, prefilled in pieces of `chunk` beside those that already decode."""
        waiting = {r: list(prompt) for r, prompt in enumerate(prompts)}
        out: list[list[int]] = [[] for _ in prompts]
        while any(len(tokens) < new for tokens in out):
            work = {}
            for request, tokens in enumerate(out):
                if waiting[request]:
                    work[request] = waiting[request][:chunk]
                    waiting[request] = waiting[request][chunk:]
                elif len(tokens) < new:
                    work[request] = tokens[-1:]
            logits = self.step(work)
            for request, token in zip(work, logits.argmax(-1).tolist(), strict=True):
                if not waiting[request]:
                    out[request].append(token)
        return out
