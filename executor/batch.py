"""The persistent batch: what the executor remembers of each slot between steps.

Owns, slot by slot, the block table, how far the work has come, and the sampling columns, on the host; the device's
side is `slot_tensors.py`'s. A step only says what changed; Python looks at a request when it is admitted, and all else
is array arithmetic. Must not know models, logits or sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import EngineError, StartupError
from ..protocol.messages import Admit, Step
from .sampling_columns import SamplingColumns
from .slot_tensors import SlotTensors
from .step_kernels import step_kernels
from .transfer import Transfer

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of one step, in the order of its work. All arrays [B]."""

    slots: Int
    starts: Int  # index of the first token to compute
    counts: Int
    samples: NDArray[np.bool_]  # the row reaches its last known token
    lengths: Int  # known tokens; where the row samples, also the index of the new token

    @property
    def decode(self) -> bool:
        """Whether every row computes its last known token and nothing else."""
        return 0 < len(self.slots) == int(self.counts.sum()) and bool(self.samples.all())


class PersistentBatch:
    """`max_num_seqs` slots. `tensors` live on the device, the rest on the host."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
        transfer: Transfer,
    ) -> None:
        """Raises `StartupError` where the memory for the rows can't be had."""
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.row_tokens = max_model_len + 1  # the token sampled at full length is written, if never read
        self.row_blocks = -(-max_model_len // block_size)
        self.num_blocks = num_blocks
        self.occupied = np.zeros(max_num_seqs, np.bool_)
        self.length = np.zeros(max_num_seqs, np.int64)
        self.computed = np.zeros(max_num_seqs, np.int64)
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.blocks_held = np.zeros(max_num_seqs, np.int64)
        self.failed: dict[int, str] = {}  # slots that can't go on, with the reason, until they are retired
        self.sampling = SamplingColumns(max_num_seqs, vocab_size, step_kernels(transfer.device) is not None)
        try:
            # Zeros, since an entry that was never set must still name a block; not touched before it is used.
            self.tables = np.zeros((max_num_seqs + 1, self.row_blocks), np.int32)
            self.tables[max_num_seqs, 0] = num_blocks  # the block behind the last, for the slot behind the last
            self.tensors = SlotTensors(max_num_seqs, self.row_tokens, self.tables, block_size, transfer)
        except (RuntimeError, MemoryError) as error:
            raise StartupError(
                f"can't get the memory for {max_num_seqs} slots of {max_model_len} tokens "
                f"({str(error).splitlines()[0]}): lower max_num_seqs or max_model_len"
            ) from None

    def apply(self, step: Step) -> None:
        """Retire, admit and grow as `step` says. Raises `EngineError` where it contradicts what is held."""
        if len(step.retire):
            self._retire(step.retire)
        if step.admit:
            self._admit(step.admit)
        if len(step.grow_slots):
            self._grow(step.grow_slots, step.grow_blocks)

    def take_work(self, step: Step) -> Work:
        """The rows that `step` works on, without those that have failed; counts them as computed, and those that
        reach their end as one token longer."""
        slots, counts = step.work_slots.astype(np.int64), step.work_counts.astype(np.int64)
        if self.failed:
            alive = ~np.isin(slots, list(self.failed))
            slots, counts = slots[alive], counts[alive]
        starts, lengths = self.computed[slots], self.length[slots]
        ends = starts + counts
        if not self.occupied[slots].all() or (counts < 1).any() or (ends > lengths).any():
            raise EngineError(f"step {step.number} asks for work that its slots don't have")
        if (ends > self.blocks_held[slots] * self.block_size).any():
            raise EngineError(f"step {step.number} asks for work on tokens without a block")
        samples = ends == lengths
        self.computed[slots] = ends
        self.length[slots] += samples
        return Work(slots, starts, counts, samples, lengths)

    def clear(self) -> None:
        """Forget every request."""
        self._retire(np.flatnonzero(self.occupied).astype(np.int32))

    def _retire(self, slots: NDArray[np.int32]) -> None:
        self.occupied[slots] = False
        self.blocks_held[slots] = 0
        self.sampling.clear(slots)
        if self.failed:
            for slot in slots.tolist():
                self.failed.pop(slot, None)

    def _admit(self, admits: Sequence[Admit]) -> None:
        for admit in admits:
            self._set_row(admit)
        slots = np.array([admit.slot for admit in admits], np.int64)
        token_rows, block_rows = [a.token_ids for a in admits], [a.block_ids for a in admits]
        self.tensors.admit(slots, token_rows, block_rows, *self.sampling.draws(slots))

    def _set_row(self, admit: Admit) -> None:
        slot, known, blocks = admit.slot, len(admit.token_ids), len(admit.block_ids)
        if not 0 <= slot < len(self.occupied) or self.occupied[slot]:
            raise EngineError(f"slot {slot} can't be admitted to: it is taken or out of range")
        if not 0 < known <= self.max_model_len or not 0 <= admit.cached_len < known or blocks > self.row_blocks:
            raise EngineError(
                f"slot {slot} can't hold {known} tokens ({admit.cached_len} cached) in {blocks} blocks: "
                f"the limits are {self.max_model_len} tokens and {self.row_blocks} blocks"
            )
        self._check_blocks(admit.block_ids)
        self.occupied[slot] = True
        self.length[slot] = known
        self.computed[slot] = admit.cached_len
        self.num_prompt[slot] = admit.num_prompt
        self.blocks_held[slot] = blocks
        self.tables[slot, :blocks] = admit.block_ids
        if (problem := self.sampling.set(admit)) is not None:
            self.failed[slot] = problem

    def _grow(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        self._check_blocks(blocks)
        rows = slots.astype(np.int64)
        # A slot's n-th new block in this step goes n places behind those it holds.
        order = np.argsort(rows, kind="stable")
        in_order = rows[order]
        first = np.searchsorted(in_order, in_order)
        place = np.empty_like(rows)
        place[order] = np.arange(len(rows)) - first
        columns = self.blocks_held[rows] + place
        if not self.occupied[rows].all() or (columns >= self.row_blocks).any():
            raise EngineError(f"blocks for slots {sorted(set(rows.tolist()))}: one is empty, or over {self.row_blocks}")
        self.tables[rows, columns] = blocks
        np.add.at(self.blocks_held, rows, 1)
        self.tensors.grow(rows, columns, blocks)

    def _check_blocks(self, blocks: NDArray[np.int32]) -> None:
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < self.num_blocks:
            raise EngineError(f"block ids must be in [0, {self.num_blocks}), got {blocks.min()}..{blocks.max()}")
