"""`memory-aware`: admission by the peak of memory that is predicted.

Owns the prediction; must not know messages or sockets.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..protocol.config import EngineConfig
from .batch import Batch
from .output_lengths import OutputLengths
from .policy import Policy
from .request import Request
from .step_model import StepModel


class MemoryAware(Policy):
    """Arrival order, but a request is let in only if the peak of memory that is predicted with it fits the pool.

    The peak is computed as in "Past-Future Scheduler for LLM Serving under SLA Guarantees" (Gong et al., 2025): if
    requests are sorted by the tokens they still will generate, most first, then the i-th finishes when the i before
    it and itself have grown by its remainder; the largest sum at those moments is the peak. The remainder is taken
    from the lengths of the outputs that ended lately: one drawn from those longer than what the request has already,
    by its number, so that the draws are spread evenly and a replay draws the same. Where none was so long, it is all
    that the request may generate; as long as few have ended, an even draw up to `FIRST_GUESS` (all that it may
    generate would often be the whole context, and let one request in at a time).
    """

    FIRST_GUESS: ClassVar[int] = 512
    GOLDEN: ClassVar[float] = 0.6180339887498949  # its multiples, modulo 1, fill the unit interval evenly
    RESERVE: ClassVar[float] = 0.03  # of the pool, for what turns out longer than drawn
    LINGER: ClassVar[int] = 2  # steps for which an ended request still holds its blocks, running ahead

    def __init__(self, config: EngineConfig, steps: StepModel) -> None:
        super().__init__(config, steps)
        self._lengths = OutputLengths()

    def admits(self, request: Request, blocks: int, batch: Batch) -> bool:
        table, size = batch.table, batch.block_size
        slots = np.flatnonzero(table.lease)
        if not len(slots):
            return True
        known = len(request.tokens)
        # what it shares with running requests costs nothing: their tokens are counted already
        own = known - (-(-known // size) - blocks) * size
        length = np.append(table.planned[slots], own)
        numbers = np.append(table.number[slots], request.number)
        generated = np.append(table.planned[slots] - table.prompt[slots], known - request.num_prompt)
        allowed = np.append(table.limit[slots] - table.planned[slots], request.limit - known)
        remaining = np.minimum(allowed, self._remaining(numbers, generated, allowed)) + self.LINGER
        order = np.argsort(-remaining, kind="stable")
        # each has its last block half empty on average; blocks in several tables are held once
        peaks = np.cumsum(length[order] + size // 2) + np.arange(1, len(order) + 1) * remaining[order]
        shared = int(table.capacity[slots].sum()) - (batch.pool.used - batch.fenced_blocks) * size
        return int(peaks.max()) - shared <= batch.pool.num_blocks * size * (1 - self.RESERVE)

    def ended(self, request: Request, generated: int) -> None:
        self._lengths.ended(request, generated)

    def _remaining(
        self, numbers: NDArray[np.int64], generated: NDArray[np.int64], allowed: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        draws = numbers * self.GOLDEN % 1.0
        if not self._lengths.enough:
            return np.minimum(allowed, (draws * self.FIRST_GUESS).astype(np.int64) + 1)
        lengths = self._lengths.sorted()
        count = len(lengths)
        first = np.searchsorted(lengths, generated, side="right")
        drawn = first + (draws * (count - first)).astype(np.int64)
        return np.where(first < count, lengths[np.minimum(drawn, count - 1)] - generated, allowed)
