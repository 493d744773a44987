"""The device's own memory of each slot, which a decode step reads and moves on without being told anything.

Owns known tokens, how many they are, block tables and the sampling columns that a recorded step needs, slot by slot;
and the two operations at the ends of a decode step: `gather`, what its rows are, and `append`, what they have become.
Must not know which requests own the slots, models or graphs.

One slot more than there are requests is nobody's: `scratch`. A recorded step of a fixed number of rows points those
that it has no use for at it; it holds one token, always, and its table names a block that is nobody's either.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .draw_columns import DrawColumns
from .step_kernels import step_kernels
from .transfer import Transfer

Int = NDArray[np.int64]
Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The B rows of a decode step, as `StepBatch` wants them."""

    lengths: Tensor  # [B] int64: known tokens, the index of the next one
    token_ids: Tensor  # [B] int64: the last known tokens
    positions: Tensor  # [B] int64: where they stand
    slot_mapping: Tensor  # [B] int64
    block_tables: Tensor  # [B, max_blocks] int32
    seq_lens: Tensor  # [B] int32
    order: Tensor | None = None  # [B] int32: the rows, the longest first, where somebody asks for it


class SlotTensors:
    """`slots` slots of `row_tokens` tokens, and the scratch one. `tables` [slots + 1, max_blocks] int32: the host's
    block tables, which on a CPU the device's share their memory with."""

    def __init__(
        self, slots: int, row_tokens: int, tables: NDArray[np.int32], block_size: int, transfer: Transfer
    ) -> None:
        device = transfer.device
        self.scratch = slots
        self.row_tokens = row_tokens
        self._block_size = block_size
        self._row_blocks = tables.shape[1]
        self._transfer = transfer
        self.kernels = step_kernels(device)
        self.token_ids = torch.empty((slots + 1, row_tokens), dtype=torch.int32, device=device)
        self.token_ids[self.scratch, 0] = 0
        self.lengths = torch.ones(slots + 1, dtype=torch.int64, device=device)
        host = torch.from_numpy(tables)
        self.block_tables = host if transfer.shared else host.to(device)
        self._draw_floats = torch.zeros((3, slots + 1), dtype=torch.float32, device=device)
        self._draw_floats[1] = 1.0  # top_p, for the scratch slot too
        self._draw_integers = torch.zeros((2, slots + 1), dtype=torch.int64, device=device)
        self.all_draws = DrawColumns(*self._draw_floats, *self._draw_integers)

    def admit(
        self,
        slots: Int,
        token_rows: list[NDArray[np.int32]],
        block_rows: list[NDArray[np.int32]],
        floats: Float,
        integers: Int,
    ) -> None:
        """The known tokens and the blocks of newly taken `slots` [A], and how they draw: `floats` [3, A] temperature,
        top_p, min_p; `integers` [2, A] top_k, seed."""
        known, held = [len(row) for row in token_rows], [len(row) for row in block_rows]
        if self.kernels is not None:
            # One copy and one launch: after a pause the processor's caches are cold, and each call counts.
            places = [0, *itertools.accumulate(known + held)]
            numbers = np.array((slots, places[: len(slots)], known, places[len(slots) : -1], held, *integers), np.int64)
            words = [part.reshape(-1).view(np.int32) for part in (numbers, floats)]
            (packed,) = self._transfer.up(np.concatenate((*words, *token_rows, *block_rows)))
            kept = (self.token_ids, self.lengths, self.block_tables, self._draw_floats, self._draw_integers)
            self.kernels.admit(packed, len(slots), max(known + held), *kept)
            return
        where, new_lengths, new_floats, new_integers, new_tokens, new_blocks = self._transfer.up(
            slots, np.array(known), floats, integers, np.concatenate(token_rows), np.concatenate(block_rows)
        )
        self.lengths.index_copy_(0, where, new_lengths)
        self._draw_floats.index_copy_(1, where, new_floats)
        self._draw_integers.index_copy_(1, where, new_integers)
        for slot, row in zip(slots.tolist(), torch.split(new_tokens, known), strict=True):
            self.token_ids[slot, : len(row)] = row
        if not self._transfer.shared:
            for slot, row in zip(slots.tolist(), torch.split(new_blocks, held), strict=True):
                self.block_tables[slot, : len(row)] = row

    def grow(self, slots: Int, columns: Int, blocks: NDArray[np.int32]) -> None:
        """Blocks at (`slots`[i], `columns`[i]) of the tables. On a CPU the host's table has them already."""
        if self._transfer.shared:
            return
        index, values = self._transfer.up(slots * self._row_blocks + columns, blocks)
        self.block_tables.view(-1).index_copy_(0, index, values)

    def gather(self, slots: Tensor) -> DecodeRows:
        """The rows of a decode step of `slots` [B] int64. Asks the host nothing: it may be recorded."""
        if self.kernels is not None:
            known = (self.token_ids, self.lengths, self.block_tables)
            return DecodeRows(*self.kernels.gather(slots, *known, self._block_size, self.scratch))
        lengths = self.lengths.index_select(0, slots)
        positions = lengths - 1
        tables = self.block_tables.index_select(0, slots)
        column = torch.div(positions, self._block_size, rounding_mode="floor")
        block = tables.gather(1, column[:, None])[:, 0].to(torch.int64)
        return DecodeRows(
            lengths=lengths,
            token_ids=self.token_ids.view(-1).index_select(0, slots * self.row_tokens + positions).to(torch.int64),
            positions=positions,
            slot_mapping=block * self._block_size + positions - column * self._block_size,
            block_tables=tables,
            seq_lens=lengths.to(torch.int32),
        )

    def draws(self, slots: Tensor) -> DrawColumns:
        """The sampling columns of `slots` [B] int64."""
        return DrawColumns(*self._draw_floats.index_select(1, slots), *self._draw_integers.index_select(1, slots))

    def append(self, slots: Tensor, lengths: Tensor, tokens: Tensor) -> None:
        """Make `tokens` [R] int64 the next ones of `slots` [R], which know `lengths` [R] tokens. May be recorded."""
        if self.kernels is not None:
            self.kernels.append(slots, lengths, tokens, self.token_ids, self.lengths, self.scratch)
            return
        self.token_ids.view(-1).index_copy_(0, slots * self.row_tokens + lengths, tokens.to(torch.int32))
        self.lengths.index_copy_(0, slots, lengths + 1)
        self.lengths[self.scratch :].fill_(1)
