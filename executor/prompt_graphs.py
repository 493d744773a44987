"""Steps of a few short prompts, recorded for some numbers of tokens: what a small model's first token waits for is the
launching of its kernels, not their work.

Owns the sizes, the buffer of the layout, and its padding. Unlike a decode step such a step is told where each token
stands, in one copy. Must not know CUDA (`graph_recorder.py`) or messages.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .backends.base import StepBatch
from .batch import PersistentBatch, Work
from .kv_cache import KVCache
from .layout import Int, Pass, lay_out
from .models.base import Model
from .recorded_sampling import choose
from .recordings import Key, Recordings
from .sampling_columns import Choice
from .transfer import Transfer

KIND = "prompt"
# Tokens of a step: with more, the device is busy for longer than launching takes.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 576, 640, 768, 1024, 1152)
FEWEST_ROWS, MOST_ROWS = 8, 64  # prompts and decodes in a step, of which the last is padding
TOKENS_PER_ROW = 8  # so many rows are recorded between the two: attention is cut by how many there may be
LONGEST = 1024  # tokens of a row with its cached prefix: a longer one is cut along its keys otherwise


Numbers = TypeVar("Numbers", Int, Tensor)


def rows_of(size: int) -> int:
    """How many rows the recording for `size` tokens has."""
    return max(FEWEST_ROWS, min(MOST_ROWS, size // TOKENS_PER_ROW))


def _numbers_of(size: int) -> int:
    """How many numbers tell a step of `size` tokens where they stand."""
    return 3 * size + 6 * rows_of(size) + 1


def _parts_of(told: Numbers, size: int) -> tuple[Numbers, Numbers, Numbers]:
    """What they tell, as views: of each token [3, size] its position, where its id is and where its keys go; of each
    row [5, rows] slot, length and where its logits are made, and, for rows that get a token, where it goes: slot and
    place; where each row begins [rows + 1]. That, of an odd length, is last: kernels are made for aligned columns."""
    rows = rows_of(size)
    table, starts = 3 * size, 3 * size + 5 * rows
    return told[:table].reshape(3, size), told[table:starts].reshape(5, rows), told[starts:]


class PromptGraphs:
    """Recorded prompt steps over `batch`."""

    def __init__(
        self, model: Model, kv: KVCache, batch: PersistentBatch, recordings: Recordings, transfer: Transfer
    ) -> None:
        device = transfer.device
        self._model, self._kv, self._batch = model, kv, batch
        self._recordings, self._transfer = recordings, transfer
        self._longest = min(LONGEST, batch.max_model_len)
        self.sizes = [size for size in SIZES if size <= batch.max_model_len]
        self._told = torch.zeros(_numbers_of(SIZES[-1]), dtype=torch.int64, device=device)  # see `_parts_of`

    def plan(self, choice: Choice) -> None:
        """Have a recording made for each size. Steps that end with their logits are not recorded."""
        if choice is not Choice.LOGITS:
            for size in reversed(self.sizes):
                work = partial(self._compute, choice, size)
                self._recordings.plan(Key(KIND, choice, size), work, partial(self._clear, size))

    def replay(self, work: Work, choice: Choice) -> tuple[Int, Tensor] | None:
        """One step, or None where no recording is there for it or can be.

        Returns the slots [R] that got a token, and what `pack` makes of the tokens: [2, R or more], the rest is
        padding's. The next replay overwrites it.
        """
        rows, total = len(work.slots), int(work.counts.sum())
        if rows >= MOST_ROWS or choice is Choice.LOGITS or not work.samples.any():
            return None
        if int((work.starts + work.counts).max()) > self._longest:
            return None
        least = total if rows < FEWEST_ROWS else max(total, TOKENS_PER_ROW * (rows + 1))
        found = self._recordings.smallest(KIND, choice, self.sizes, least)
        if found is None:
            return None
        size, recorded = found
        order = np.argsort(~work.samples, kind="stable")  # rows that get a token come first, as they were
        part = Pass(
            order, work.slots[order], work.starts[order], work.counts[order], work.samples[order], np.zeros(rows, int)
        )
        self._fill(size, part, work.lengths[order])
        return part.slots[part.samples], recorded()

    def _clear(self, size: int) -> None:
        """Make the buffer that of a step of padding."""
        none = np.empty(0, np.int64)
        self._fill(size, Pass(none, none, none, none, np.empty(0, np.bool_), none), none)

    def _fill(self, size: int, part: Pass, lengths: Int) -> None:
        """Put `part`, filled up with padding to `size` tokens, into the buffer: the last row gets what is left of
        them, and those before it that are left over have no tokens."""
        batch, rows = self._batch, len(part.slots)
        scratch = batch.tensors.scratch
        told = np.zeros(_numbers_of(size), np.int64)
        tokens, table, starts = _parts_of(told, size)
        tokens[1] = scratch * batch.row_tokens
        tokens[2] = batch.num_blocks * batch.block_size
        table[0], table[3], table[4] = scratch, scratch, 1
        counts = table[1]
        counts[:rows] = part.counts
        counts[-1] = size - int(counts.sum())
        starts[1:] = counts.cumsum()
        table[2] = np.maximum(starts[1:], 1) - 1
        if rows:
            layout = lay_out(part, batch.tables, batch.block_size, batch.row_tokens)
            used = len(layout.positions)
            tokens[0, :used], tokens[1, :used], tokens[2, :used] = (
                layout.positions,
                layout.flat_tokens,
                layout.slot_mapping,
            )
            sampled = int(part.samples.sum())
            table[0, :rows], table[1, :rows] = part.slots, layout.seq_lens
            table[3, :sampled], table[4, :sampled] = part.slots[:sampled], lengths[:sampled]
        self._transfer.write(told, self._told[: len(told)])

    def _compute(self, choice: Choice, size: int) -> Tensor:
        """The work that is recorded."""
        tensors = self._batch.tensors
        (positions, flat_tokens, slot_mapping), table, starts = _parts_of(self._told[: _numbers_of(size)], size)
        slots, seq_lens, logits_at, to_slots, lengths = table
        batch = StepBatch(
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=tensors.block_tables.index_select(0, slots),
            query_start=starts.to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            num_decodes=0,
            max_query_len=size,
            max_seq_len=self._longest,
        )
        token_ids = tensors.token_ids.view(-1).index_select(0, flat_tokens).to(torch.int64)
        logits = self._model.forward(token_ids, batch, self._kv.layers, logits_at)
        return choose(choice, logits, to_slots, lengths, tensors)
