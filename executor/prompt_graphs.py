"""Steps of a few short prompts, recorded for some numbers of tokens: what a small model's first token waits for is the
launching of its kernels, not their work.

Owns the sizes, the buffers of the layout, and its padding. Unlike a decode step such a step is told where each token
stands, in one copy. Must not know CUDA (`graph_recorder.py`) or messages.
"""

from __future__ import annotations

from functools import partial

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


def rows_of(size: int) -> int:
    """How many rows the recording for `size` tokens has."""
    return max(FEWEST_ROWS, min(MOST_ROWS, size // TOKENS_PER_ROW))


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
        most = SIZES[-1]
        self._tokens = torch.zeros((3, most), dtype=torch.int64, device=device)  # positions, flat_tokens, slot_mapping
        self._starts = torch.zeros(MOST_ROWS + 1, dtype=torch.int64, device=device)
        # slots, seq_lens, logits_at; where the new token goes: slot, known tokens
        self._rows = torch.zeros((5, MOST_ROWS), dtype=torch.int64, device=device)

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
        """Make the buffers those of a step of padding."""
        none = np.empty(0, np.int64)
        self._fill(size, Pass(none, none, none, none, np.empty(0, np.bool_), none), none)

    def _fill(self, size: int, part: Pass, lengths: Int) -> None:
        """Put `part`, filled up with padding to `size` tokens, into the buffers: the last row gets what is left of
        them, and those before it that are left over have no tokens."""
        batch, rows, most_rows = self._batch, len(part.slots), rows_of(size)
        scratch = batch.tensors.scratch
        tokens = np.zeros((3, size), np.int64)
        tokens[1] = scratch * batch.row_tokens
        tokens[2] = batch.num_blocks * batch.block_size
        counts = np.zeros(most_rows, np.int64)
        counts[:rows] = part.counts
        counts[-1] = size - int(counts.sum())
        table = np.ones((5, most_rows), np.int64)
        table[0], table[3] = scratch, scratch
        table[1] = counts
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
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        table[2] = np.maximum(starts[1:], 1) - 1
        new_tokens, new_starts, new_rows = self._transfer.up(tokens, starts, table)
        self._tokens[:, :size].copy_(new_tokens)
        self._starts[: most_rows + 1].copy_(new_starts)
        self._rows[:, :most_rows].copy_(new_rows)

    def _compute(self, choice: Choice, size: int) -> Tensor:
        """The work that is recorded."""
        tensors = self._batch.tensors
        positions, flat_tokens, slot_mapping = self._tokens[:, :size]
        rows = rows_of(size)
        slots, seq_lens, logits_at, to_slots, lengths = self._rows[:, :rows]
        batch = StepBatch(
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=tensors.block_tables.index_select(0, slots),
            query_start=self._starts[: rows + 1].to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            num_decodes=0,
            max_query_len=size,
            max_seq_len=self._longest,
        )
        token_ids = tensors.token_ids.view(-1).index_select(0, flat_tokens).to(torch.int64)
        logits = self._model.forward(token_ids, batch, self._kv.layers, logits_at)
        return choose(choice, logits, to_slots, lengths, tensors)
