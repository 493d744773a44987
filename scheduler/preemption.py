"""Who is thrown out when blocks or slots are short.

A victim gives its slot and blocks back and waits again, in its old place; it keeps every token that was said, and
what steps in flight sample for it is thrown away (sampling by (seed, position) gives the same tokens again). Its keys
and values are computed again, or copied to host memory and back: `swap.py`. Owns the choice of victims; must not know
how a step is put together.
"""

from __future__ import annotations

import numpy as np

from .batch import Batch
from .policy import Policy
from .prefix import extend_hashes
from .request import Request, RequestState
from .reuse import blocks_to_start, reusable
from .stats import Totals
from .swap import Swap
from .timeline import Waits
from .waiting import Queue


class Preemptor:
    """Moves running requests back to the queue."""

    def __init__(
        self,
        batch: Batch,
        queue: Queue,
        policy: Policy,
        swap: Swap,
        totals: Totals,
        waits: Waits,
        *,
        prefix_caching: bool,
    ) -> None:
        self._batch = batch
        self._queue = queue
        self._policy = policy
        self._swap = swap
        self._prefix_caching = prefix_caching
        self._totals = totals
        self._waits = waits

    def preempt(self, slot: int, now: float, *, by: Request | None) -> None:
        """Take the slot and the blocks from its request, and put that back into the queue. `by`: for whom; None where
        its keys and values are not there, or not right, so that they are not worth a copy."""
        batch = self._batch
        request = batch.table.requests[slot]
        if request is None:
            return
        request.tokens = batch.table.known_tokens(slot)
        if self._prefix_caching:
            extend_hashes(request.hashes, request.tokens, batch.block_size, request.cache_salt)
        computed = int(batch.table.computed[slot])
        saved = by is not None and self._swap.save(batch, slot)
        if saved:
            self._totals.swap_preemptions += 1
        batch.leave(slot)
        request.preemptions += 1
        request.move(RequestState.PREEMPTED, now)
        self._waits.pushed_out(request, now, by=by, computed=computed, saved=saved)
        self._queue.push(request)
        self._totals.preemptions += 1

    def victim(self) -> int:
        """The slot of the running request that stands last, of equals the one with the least work to lose; one that
        was just resumed only if there is no other. There must be a running request."""
        return self._worst_first()[0]

    def make_room_for_waiting(self, now: float) -> list[int]:
        """With an eager policy: push out running requests for the first in the queue that outrank them, if these
        can't start otherwise and can then. Blocks that steps in flight still name come a step later.

        Returns the blocks that each of those needs to start; they should, before anything else takes their room."""
        queue, batch = self._queue, self._batch
        slots, blocks = len(batch.free_slots), batch.pool.available + batch.fenced_blocks
        standing = self._policy.standing(np.flatnonzero(batch.table.lease), batch.table)
        worst = float(standing.max()) if len(standing) else -np.inf
        seen: list[Request] = []
        needs: list[int] = []
        while (request := queue.peek(now)) is not None and request.rank <= worst:
            outranked = [slot for slot in self._worst_first() if self._outranks(request, slot)]
            reuse = reusable(batch, request, fetch=self._swap.fetches(batch, request))
            need = blocks_to_start(batch, request, reuse)
            chosen, freed = self._enough_of(outranked, need - blocks, 1 - slots)
            if not outranked or chosen is None:
                break
            seen.append(queue.pop())
            needs.append(need)
            for slot in chosen:
                self.preempt(slot, now, by=request)
            slots += len(chosen) - 1
            blocks += freed - need
        for request in seen:
            queue.push(request)
        return needs

    def _outranks(self, request: Request, slot: int) -> bool:
        return self._policy.outranks(request, self._batch.table.living(slot))

    def _enough_of(self, slots: list[int], blocks: int, places: int) -> tuple[list[int] | None, int]:
        """The first of `slots` that together give `blocks` and `places`, with their blocks; None if all don't."""
        batch, freed = self._batch, 0
        for count in range(len(slots) + 1):
            if freed >= blocks and count >= places:
                return slots[:count], freed
            if count < len(slots):
                freed += sum(1 for block in batch.table.blocks_of(slots[count]) if batch.pool.refs[block] == 1)
        return None, 0

    def _worst_first(self) -> list[int]:
        table = self._batch.table
        slots = np.flatnonzero(table.lease)
        # just resumed: nothing new said since
        protected = table.length[slots] <= table.protected_until[slots]
        standing, lost = self._policy.standing(slots, table), table.computed[slots]
        order = np.lexsort((-table.number[slots], lost, -standing, protected))
        worst: list[int] = slots[order].tolist()
        return worst
