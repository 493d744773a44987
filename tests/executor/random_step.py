"""A random step for the backends' tests: rows of any lengths over blocks in any order, the cache full of NaN where no
token is, so that a kernel that looks at a slot it must not see is found out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from fast_inference.executor.backends.base import Backend, KVLayer, StepBatch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A random step: its batch, and a layer whose keys and values of earlier tokens are in place."""

    batch: StepBatch
    kv: KVLayer
    keys: list[Tensor]  # per row [seq_len, Hkv, D], the newest tokens included
    values: list[Tensor]

    def fresh(self, of: list[Tensor]) -> Tensor:
        """[T, Hkv, D]: what this step's tokens have to write."""
        lengths = self.batch.query_start.diff().tolist()
        return torch.cat([row[len(row) - length :] for row, length in zip(of, lengths, strict=True)])

    def copy_of_kv(self) -> KVLayer:
        return KVLayer(self.kv.keys.clone(), self.kv.values.clone())

    def to(self, device: str) -> Step:
        tensors = ("positions", "slot_mapping", "block_tables", "query_start", "seq_lens")
        moved = {name: getattr(self.batch, name).to(device) for name in tensors}
        kv = KVLayer(self.kv.keys.to(device), self.kv.values.to(device))
        rows = [[row.to(device) for row in each] for each in (self.keys, self.values)]
        return Step(replace(self.batch, **moved), kv, *rows)


def make_step(
    lengths: list[tuple[int, int]], kv_heads: int, block_size: int, head_size: int, dtype: torch.dtype
) -> Step:
    """`lengths`: (query tokens, tokens before them) of each row."""
    lengths = sorted(lengths, key=lambda row: row[0] > 1)
    seq_lens = [query + before for query, before in lengths]
    needed = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(needed) + 3
    ids = torch.randperm(num_blocks)[: sum(needed)].split(needed)
    tables = torch.randint(0, num_blocks, (len(lengths), max(needed) + 2), dtype=torch.int32)
    kv = KVLayer(*torch.full((2, num_blocks, kv_heads, block_size, head_size), math.nan, dtype=dtype))
    keys, values, slots, positions = [], [], [], []
    for row, (query, before) in enumerate(lengths):
        tables[row, : needed[row]] = ids[row]
        place = torch.arange(query + before)
        slot = ids[row][place // block_size] * block_size + place % block_size
        key, value = torch.randn(2, query + before, kv_heads, head_size).to(dtype)
        old = slot[:before]
        kv.keys[old // block_size, :, old % block_size] = key[:before]
        kv.values[old // block_size, :, old % block_size] = value[:before]
        keys.append(key)
        values.append(value)
        slots.append(slot[before:])
        positions.append(place[before:])
    batch = StepBatch(
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        query_start=torch.tensor([0, *accumulate(query for query, _ in lengths)], dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_decodes=sum(query == 1 for query, _ in lengths),
        max_query_len=max(query for query, _ in lengths),
        max_seq_len=max(seq_lens),
    )
    return Step(batch, kv, keys, values)


def attend(backend: Backend, q: Tensor, step: Step, scale: float, window: int | None, soft_cap: float | None) -> Tensor:
    kv = step.copy_of_kv()
    backend.write_kv(step.fresh(step.keys), step.fresh(step.values), kv, step.batch)
    return backend.attention(q, kv, step.batch, scale, window, soft_cap)
