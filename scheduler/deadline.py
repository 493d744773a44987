"""`deadline`: earliest deadline of the first token first, and no for an answer at once where it can't be met.

Owns who is late and what can still be met; must not know messages or sockets.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import ClassVar

import numpy as np

from ..protocol.config import EngineConfig
from ..protocol.errors import DeadlineUnreachable, EngineError
from .batch import Batch
from .output_lengths import OutputLengths
from .policy import Policy
from .request import Request
from .step_model import StepModel
from .waiting import WaitingQueue


class DeadlineQueue(WaitingQueue):
    """By rank, but a request whose deadline is past help when its turn comes goes back by `LATE_SECONDS`, once."""

    def __init__(self, policy: Deadline) -> None:
        super().__init__()
        self._policy = policy

    def peek(self, now: float) -> Request | None:
        while (request := super().peek(now)) is not None and self._policy.hopeless(request, now):
            heappop(self._heap)
            request.rank += self._policy.LATE_SECONDS
            heappush(self._heap, (request.rank, request.number, request))
        return request


class Deadline(Policy):
    """Earliest deadline of the first token first (Liu and Layland, "Scheduling Algorithms for Multiprogramming in a
    Hard-Real-Time Environment", 1973).

    Over saturation that order alone is the worst of all: each request is served just too late. So what can't be met
    any more does not hold up what can (Haritsa, Livny and Carey, "Earliest Deadline Scheduling for Real-Time Database
    Systems", 1991): a request that would miss its deadline even if it were served now goes behind, by `LATE_SECONDS`;
    and a new one that the step model says can't be served in time, behind what goes before it, is refused.
    Rank is the deadline, or the arrival and `PATIENCE_SECONDS` for a request without one; both are ages, so that a
    stream of urgent requests holds nobody back for ever.
    """

    PATIENCE_SECONDS: ClassVar[float] = 30.0
    LATE_SECONDS: ClassVar[float] = 30.0

    def __init__(self, config: EngineConfig, steps: StepModel) -> None:
        super().__init__(config, steps)
        self._queue = DeadlineQueue(self)
        self._need: dict[int, int] = {}  # request number -> tokens to compute before its first one
        self._late: set[int] = set()
        self._lengths = OutputLengths()

    def queue(self) -> DeadlineQueue:
        return self._queue

    def rank(self, request: Request) -> float:
        return min(request.deadline, request.arrival + self.PATIENCE_SECONDS)

    def hopeless(self, request: Request, now: float) -> bool:
        """Whether `request`, which goes next, misses its deadline whatever is done; says so once."""
        if request.deadline == math.inf or request.first_token or request.number in self._late:
            return False
        need = self._need.get(request.number, len(request.tokens))
        if now + (self.steps.seconds(need, 0, need) or 0.0) <= request.deadline:
            return False
        self._late.add(request.number)
        return True

    def refuses(self, request: Request, now: float, batch: Batch) -> EngineError | None:
        """By the time that its prompt and what goes before it take, as the step model has it."""
        cached = len(batch.prefix.lookup(request.hashes)) * batch.block_size if request.takes_prefix_hits else 0
        need = self._need[request.number] = max(1, request.num_prompt - cached)
        if request.deadline == math.inf:
            return None
        seconds = self._first_token(request, need, batch)
        late = 0.0 if seconds is None else now + seconds - request.deadline
        if late <= 0.0:
            return None
        del self._need[request.number]
        return DeadlineUnreachable(
            f"deadline_ms must be at least {math.ceil(1000 * (request.deadline - request.arrival + late))} for this "
            f"prompt at this load, got {round(1000 * (request.deadline - request.arrival))}: the first token "
            f"would come {late:.3g} s late",
            param="deadline_ms",
            retry_after=late,
        )

    def ended(self, request: Request, generated: int) -> None:
        self._lengths.ended(request, generated)
        self._need.pop(request.number, None)
        self._late.discard(request.number)

    # ---- what can be met -----------------------------------------------------------------------------------------

    def _first_token(self, request: Request, need: int, batch: Batch) -> float | None:
        """Seconds until the first token of a request that has just come and has `need` tokens to compute, if those
        go first that stand before it; None while nothing is known."""
        rank = self.rank(request)
        ahead = [other for other in self._queue.requests() if other.rank <= rank]
        running = np.fromiter(batch.prefilling, np.int64, len(batch.prefilling))
        chunks = int((batch.table.planned[running] - batch.table.computed[running]).sum())
        waiting = sum(self._need.get(other.number, len(other.tokens)) for other in ahead)
        computing = self._seconds(chunks + waiting + need, batch)
        alone = self._seconds(need, batch)
        if computing is None or alone is None:
            return None
        blocks = sum(-(-len(other.tokens) // batch.block_size) for other in (*ahead, request))
        room = self._until_room(blocks, len(ahead) + 1, batch)
        # decode steps until there is room, made longer by the prompts that are computed beside them
        rate = self.steps.prefill_rate
        beside = 0.0 if rate is None else (chunks + waiting) / rate
        return max(computing, room + beside + alone)

    def _until_room(self, blocks: int, slots: int, batch: Batch) -> float:
        """Seconds until running requests have given back what is missing to `blocks` and `slots`, if their outputs
        are as long as those that ended lately."""
        table = batch.table
        blocks -= batch.pool.available + batch.fenced_blocks
        slots -= len(batch.free_slots)
        taken = np.flatnonzero(table.lease)
        if (blocks <= 0 and slots <= 0) or not len(taken) or not self._lengths.enough:
            return 0.0
        generated = table.planned[taken] - table.prompt[taken]
        steps = np.minimum(self._lengths.expected(generated), table.limit[taken] - table.planned[taken])
        order = np.argsort(steps, kind="stable")
        held = np.cumsum(table.capacity[taken[order]]) // batch.block_size
        last = max(int(np.searchsorted(held, blocks)), slots - 1)
        # what is missing to more than all of them comes with others like them
        rounds = max(1.0, blocks / max(1, int(held[-1])), slots / len(taken))
        wait = float(steps[order[min(last, len(taken) - 1)]]) * rounds
        return wait * (self.steps.seconds(0, len(taken), int(table.computed.sum())) or 0.0)

    def _seconds(self, tokens: int, batch: Batch) -> float | None:
        """The least time in which `tokens` of prompts can be computed beside what runs."""
        table = batch.table
        rows = batch.num_running - len(batch.prefilling)
        steps = -(-tokens // max(1, batch.most_tokens - rows))
        context = int(table.computed.sum())
        first = self.steps.seconds(tokens, rows, context + tokens)
        further = self.steps.seconds(0, rows, context)
        return None if first is None or further is None else first + (steps - 1) * further
