"""A few tokens through a model before it serves: hand-made steps over a small cache.

Owns the making of such steps; must not know how requests are batched in earnest (`batch.py`, `runner.py`).
"""

from __future__ import annotations

import torch

from ..backends.base import KVLayer, StepBatch
from .base import ModelSpec

BLOCK_SIZE = 16
BLOCKS_PER_ROW = 2


def probe_pages(spec: ModelSpec, rows: int, device: torch.device) -> list[KVLayer]:
    """An empty cache for `rows` requests of up to `BLOCKS_PER_ROW * BLOCK_SIZE` tokens."""
    shape = (rows * BLOCKS_PER_ROW, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    return [
        KVLayer(
            torch.zeros(shape, dtype=spec.dtype, device=device),
            torch.zeros(shape, dtype=spec.dtype, device=device),
        )
        for _ in range(spec.num_layers)
    ]


def probe_batch(rows: list[tuple[int, int, int]], device: torch.device) -> StepBatch:
    """A step of (row, tokens it already has, tokens of this step) each; rows of one token must come first.

    Row r owns the blocks `r * BLOCKS_PER_ROW` and following, the last of them first.
    """
    positions: list[int] = []
    slots: list[int] = []
    starts, tables = [0], []
    for row, past, new in rows:
        blocks = [row * BLOCKS_PER_ROW + i for i in reversed(range(BLOCKS_PER_ROW))]
        for position in range(past, past + new):
            positions.append(position)
            slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        starts.append(len(positions))
        tables.append(blocks)
    lengths = [past + new for _, past, new in rows]
    return StepBatch(
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        num_decodes=sum(new == 1 for _, _, new in rows),
        max_query_len=max(new for _, _, new in rows),
        max_seq_len=max(lengths),
    )
