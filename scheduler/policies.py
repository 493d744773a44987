"""Scheduling policies: who goes first, who is let in, who may be thrown out for whom. One small class each.

A policy sees requests, the table and the pool, and answers questions; it must not change any of them. `make_policy`
is the list of names.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..protocol.config import SchedulerPolicy
from .batch import Batch
from .request import Request


class Policy:
    """First come, first served; also the answers that other policies inherit."""

    eager: ClassVar[bool] = False  # whether a waiting request may ever push out a running one

    def rank(self, request: Request) -> float:
        """Where `request` stands, lowest first, ties by arrival. Asked once, when it arrives; the victim of a
        preemption is the running request that stands last."""
        return 0.0

    def admits(self, request: Request, blocks: int, batch: Batch) -> bool:
        """Whether the first in the queue may start now, given that the `blocks` it takes from the pool are there."""
        return True

    def outranks(self, waiting: Request, running: Request) -> bool:
        """Whether `running` should be preempted if `waiting` can't start otherwise. Asked of an eager policy only."""
        return False

    def finished(self, request: Request, generated: int) -> None:
        """`request` came to its own end (stop or length) after `generated` tokens."""


class FirstComeFirstServed(Policy):
    """vLLM's default: arrival order, admission as soon as the known tokens find blocks."""


class Priority(Policy):
    """Higher `priority` first, ties by arrival; a waiting request preempts running ones of lower priority.

    Ageing: each `AGEING_SECONDS` of waiting count as one level. Since all requests age alike, the order of two
    never changes, and rank is a constant: arrival - priority * AGEING_SECONDS. So a stream of requests of level p
    can hold one of level q back for (p - q) * AGEING_SECONDS at most. The same order decides preemption: what got
    in by age is not pushed out again by what it had overtaken.
    """

    AGEING_SECONDS: ClassVar[float] = 30.0
    eager = True

    def rank(self, request: Request) -> float:
        return request.arrival - request.priority * self.AGEING_SECONDS

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.priority > running.priority and waiting.order < running.order


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

    HISTORY: ClassVar[int] = 512
    LEAST_HISTORY: ClassVar[int] = 32  # short outputs end first: a small sample would promise too much
    FIRST_GUESS: ClassVar[int] = 512
    GOLDEN: ClassVar[float] = 0.6180339887498949  # its multiples, modulo 1, fill the unit interval evenly
    RESERVE: ClassVar[float] = 0.03  # of the pool, for what turns out longer than drawn
    LINGER: ClassVar[int] = 2  # steps for which an ended request still holds its blocks, running ahead

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=self.HISTORY)
        self._sorted: NDArray[np.int64] | None = None

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

    def finished(self, request: Request, generated: int) -> None:
        self._lengths.append(generated)
        self._sorted = None

    def _remaining(
        self, numbers: NDArray[np.int64], generated: NDArray[np.int64], allowed: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        draws = numbers * self.GOLDEN % 1.0
        if len(self._lengths) < self.LEAST_HISTORY:
            return np.minimum(allowed, (draws * self.FIRST_GUESS).astype(np.int64) + 1)
        if self._sorted is None:
            self._sorted = np.sort(np.array(self._lengths, np.int64))
        count = len(self._sorted)
        first = np.searchsorted(self._sorted, generated, side="right")
        drawn = first + (draws * (count - first)).astype(np.int64)
        return np.where(first < count, self._sorted[np.minimum(drawn, count - 1)] - generated, allowed)


_POLICIES: dict[SchedulerPolicy, type[Policy]] = {
    SchedulerPolicy.FCFS: FirstComeFirstServed,
    SchedulerPolicy.PRIORITY: Priority,
    SchedulerPolicy.MEMORY_AWARE: MemoryAware,
}


def make_policy(name: str) -> Policy:
    """The policy called `name`, as `EngineConfig` has checked it."""
    return _POLICIES[SchedulerPolicy(name)]()
