"""Decode steps recorded once for each padded number of rows, and replayed.

Owns which sizes are recorded and in what order, the buffer that says which slots a step is for, and the padding. A
step whose slots are those of the step before needs nothing from the host at all: what its rows are is read from
`SlotTensors`, which the step itself moves on. Must not know CUDA (`graph_recorder.py`) or messages.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from .backends.base import StepBatch
from .kv_cache import KVCache
from .layout import Int
from .models.base import Model
from .recorded_sampling import choose
from .recordings import Key, Recordings
from .sampling_columns import Choice
from .slot_tensors import SlotTensors
from .transfer import Transfer

KIND = "decode"
LARGEST = 512  # rows of the largest recording: beyond that, launching one by one is no longer what a step waits for


def sizes_up_to(rows: int) -> list[int]:
    """The numbers of rows to record for batches of up to `rows`: close together, since a padded row costs work; but
    none between 64 and 128, since products take 128 rows then, and are slower where some are missing."""
    most = min(rows, LARGEST)
    steps = [1, 2, 4, *range(8, 65, 8), *range(128, 257, 8), *range(288, LARGEST + 1, 32)]
    return [*(size for size in steps if size < most), most]


def recording_order(sizes: list[int]) -> list[int]:
    """One request alone first, since it waits the least; then the largest, which serves all others until theirs is
    there, and whose memory the smaller ones share."""
    return [sizes[0], *reversed(sizes[1:])]


class DecodeGraphs:
    """Recorded decode steps over the slots of `tensors`."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        tensors: SlotTensors,
        recordings: Recordings,
        transfer: Transfer,
    ) -> None:
        rows = tensors.scratch
        device = transfer.device
        self._model, self._kv, self._tensors = model, kv, tensors
        self._recordings, self._transfer = recordings, transfer
        self.sizes = sizes_up_to(rows)
        most = self.sizes[-1]
        self._slots = torch.full((most,), tensors.scratch, dtype=torch.int64, device=device)
        self._told = np.full(most, tensors.scratch, np.int64)  # what `_slots` holds
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._logits = torch.empty((most, model.spec.vocab_size), dtype=torch.float32, device=device)

    def plan(self, choice: Choice) -> None:
        """Have a recording made for each size."""
        for size in recording_order(self.sizes):
            padding = np.full(size, self._tensors.scratch, np.int64)
            work = partial(self._decode, choice, size)
            self._recordings.plan(Key(KIND, choice, size), work, partial(self._tell, padding))

    def replay(self, slots: Int, choice: Choice) -> Tensor | None:
        """One decode step of `slots` [R], or None where no recording is there for it.

        For `Choice.LOGITS` the logits [R, V] float32, which the caller may overwrite, and the slots are as they
        were; else what `pack` makes of the new tokens, which the slots now have: [2, R or more], the rest is
        padding's. The next replay overwrites the result.
        """
        found = self._recordings.smallest(KIND, choice, self.sizes, len(slots))
        if found is None:
            return None
        size, recorded = found
        padded = np.full(size, self._tensors.scratch, np.int64)
        padded[: len(slots)] = slots
        self._tell(padded)
        result = recorded()
        return result[: len(slots)] if choice is Choice.LOGITS else result

    def _tell(self, padded: Int) -> None:
        """Have the slots buffer begin with `padded`."""
        if not np.array_equal(self._told[: len(padded)], padded):
            self._transfer.write(padded, self._slots[: len(padded)])
            self._told[: len(padded)] = padded

    def _decode(self, choice: Choice, size: int) -> Tensor:
        """The work that is recorded."""
        slots = self._slots[:size]
        rows = self._tensors.gather(slots)
        batch = StepBatch(
            positions=rows.positions,
            slot_mapping=rows.slot_mapping,
            block_tables=rows.block_tables,
            query_start=self._starts[: size + 1],
            seq_lens=rows.seq_lens,
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self._tensors.row_tokens - 1,
            order=rows.order,
        )
        logits = self._model.forward(rows.token_ids, batch, self._kv.layers, None)
        if choice is Choice.LOGITS:
            return self._logits[:size].copy_(logits)
        return choose(choice, logits, slots, rows.lengths, self._tensors)
