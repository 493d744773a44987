"""Puts one step together: decode first, then prompt chunks and admissions in the order of rank.

Owns the plan of a step; must not know results, clients or sockets. A decode row is never looked at by itself: the
columns say who is ready and who needs a block. Python runs once per growth, chunk, admission or preemption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.config import EngineConfig
from ..protocol.messages import Admit, Step
from .batch import Batch, InFlight, Reuse
from .policy import Policy
from .preemption import Preemptor
from .request import Request, RequestState
from .reuse import blocks_to_start, reusable
from .stats import Totals
from .step_model import UNBOUNDED, StepModel
from .swap import Swap
from .timeline import Kind, Waits
from .waiting import Queue

_NONE = np.empty(0, np.int32)


class Verdict(Enum):
    """What came of an attempt to admit."""

    ADMITTED = 1
    DEFERRED = 2  # a step in the making computes the very prefix that it needs: next step it is a hit
    BLOCKED = 3  # no slot, no blocks, or not yet


@dataclass(slots=True)
class Draft:
    """A step in the making."""

    budget: int
    prompt_tokens: int = UNBOUNDED  # of the budget, how many may go to chunks
    told: bool = False  # whether somebody who was looked at has been told why to wait
    promised: int = 0  # blocks that decode rows must leave to waiting requests
    admit: list[Admit] = field(default_factory=list)
    grow_slots: NDArray[Any] = field(default_factory=lambda: _NONE)
    grow_blocks: list[int] = field(default_factory=list)
    rows: list[tuple[int, int, bool]] = field(default_factory=list)  # (slot, count, samples) of known tokens
    fills: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, first, stop) of full blocks
    filling: set[bytes] = field(default_factory=set)  # their hashes

    @property
    def room(self) -> int:
        """Known tokens that may still be computed in chunks."""
        return min(self.budget, self.prompt_tokens)


class Planner:
    """Plans steps for one batch."""

    def __init__(
        self,
        config: EngineConfig,
        batch: Batch,
        queue: Queue,
        policy: Policy,
        preemptor: Preemptor,
        swap: Swap,
        totals: Totals,
        steps: StepModel,
        waits: Waits,
    ) -> None:
        self._batch = batch
        self._queue = queue
        self._policy = policy
        self._preemptor = preemptor
        self._swap = swap
        self._chunked = config.enable_chunked_prefill
        self._prefix_caching = config.enable_prefix_caching
        self._ones = np.ones(batch.table.slots, np.int32)
        self._totals = totals
        self._steps = steps
        self._step_bound = config.step_bound  # seconds
        self._waits = waits

    def plan(self, now: float) -> Step | None:
        """The next step, or None if nothing can be computed now. What it contains counts as sent."""
        needs = self._preemptor.make_room_for_waiting(now) if self._policy.eager and len(self._queue) else []
        preempted = self._totals.preemptions
        draft = Draft(self._batch.most_tokens)
        table = self._batch.table
        ready = table.planned - table.computed == 1
        ready &= table.planned < table.limit  # what steps in flight will end by length is not run over
        if self._step_bound is not None and (self._batch.prefilling or len(self._queue)):
            draft.prompt_tokens = self._prompt_tokens(self._step_bound, ready)
        if needs:
            self._admit_urgent(draft, needs, int(ready.sum()), now)
        decode = self._decode_rows(draft, ready, now)
        if draft.room and (self._batch.prefilling or len(self._queue)):
            # who was just pushed out for lack of blocks does not come back in the same step
            self._fill_budget(draft, admitting=self._totals.preemptions == preempted, now=now)
        self._note_first(draft, now)
        if not len(decode) and not draft.rows:
            return None
        return self._finish(draft, decode)

    # ---- decode --------------------------------------------------------------------------------------------------

    def _decode_rows(self, draft: Draft, ready: NDArray[np.bool_], now: float) -> NDArray[np.int64]:
        table = self._batch.table
        short = ready & (table.computed >= table.capacity)
        if np.count_nonzero(short):
            self._grow(draft, ready, short, now)
        slots: NDArray[np.int64] = ready.nonzero()[0]
        if len(slots) > draft.budget:
            # more rows than a step may hold: those that have waited longest
            slots = np.sort(slots[np.argsort(table.last_step[slots], kind="stable")[: draft.budget]])
        draft.budget -= len(slots)
        return slots

    def _grow(self, draft: Draft, ready: NDArray[np.bool_], short: NDArray[np.bool_], now: float) -> None:
        """A block for each row that is `short` of one, if need be from victims; what gets none now sits out."""
        batch = self._batch
        slots = np.flatnonzero(short)
        seated = {admit.slot for admit in draft.admit}
        while len(slots) > batch.pool.available + batch.fenced_blocks:
            victim = self._preemptor.victim()
            if victim in seated:  # part of this very step
                break
            others = slots[slots != victim]
            self._preemptor.preempt(victim, now, by=batch.table.living(int(others[0]) if len(others) else victim))
            ready[victim] = False
            slots = others
        # with fenced blocks there are steps in flight, so that all may sit out for one
        room = max(0, batch.pool.available - (draft.promised if batch.fenced_blocks else 0))
        if len(slots) > room:
            # blocks of victims come back with the steps in flight
            order = np.lexsort((batch.table.number[slots], self._policy.standing(slots, batch.table)))
            ready[slots[order[room:]]] = False
            slots = slots[order[:room]]
        if len(slots):
            draft.grow_slots, draft.grow_blocks = slots, batch.allocate(len(slots))
            batch.table.grow(slots, draft.grow_blocks)

    # ---- known tokens: chunks and admissions ---------------------------------------------------------------------

    def _prompt_tokens(self, bound: float, ready: NDArray[np.bool_]) -> int:
        """Known tokens that may join the `ready` rows so that the step takes no longer than `bound` seconds; a block
        of them always, so that every prompt gets on. Unbounded while the step model has not seen enough."""
        table, rows = self._batch.table, int(np.count_nonzero(ready))
        context = int(table.computed[ready].sum()) + rows
        context += sum(int(table.computed[slot]) for slot in self._batch.prefilling)
        largest = self._steps.largest_prefill(bound, rows, context)
        return UNBOUNDED if largest is None else max(largest, self._batch.block_size)

    def _admit_urgent(self, draft: Draft, needs: list[int], rows: int, now: float) -> None:
        """Room was made for the first in the queue, who need `needs` blocks: they start before `rows` decode rows take
        it, and half of the step's tokens are theirs if they need so many. Who can't start yet is promised the
        blocks that come back."""
        held = min(rows, draft.budget // 2)
        draft.budget -= held
        started = 0
        while started < len(needs) and draft.room and (request := self._queue.peek(now)) is not None:
            if self._admit(draft, request, now) is not Verdict.ADMITTED:
                break
            started += 1
        draft.budget += held
        draft.promised = sum(needs[started:])

    def _fill_budget(self, draft: Draft, *, admitting: bool, now: float) -> None:
        table, queue = self._batch.table, self._queue
        begun = {admit.slot for admit in draft.admit}  # the urgent: each slot has work once in a step
        chunks = [table.living(slot) for slot in self._batch.prefilling if slot not in begun]
        chunks.sort(key=lambda request: request.order, reverse=True)
        deferred: list[Request] = []
        while draft.room:
            # as many deferred as there are slots: a long queue is not walked through for one step
            waiting = queue.peek(now) if admitting and len(deferred) < table.slots else None
            if chunks and (waiting is None or chunks[-1].order < waiting.order):
                self._chunk(draft, chunks.pop().slot)
            elif waiting is None:
                break
            else:
                verdict = self._admit(draft, waiting, now)
                if verdict is Verdict.BLOCKED:
                    admitting = False
                elif verdict is Verdict.DEFERRED:
                    deferred.append(queue.pop())
        for request in deferred:
            queue.push(request)

    def _note_first(self, draft: Draft, now: float) -> None:
        """Why the first in the queue is still there, if nobody was told yet in this step."""
        if not len(self._queue):
            self._waits.nobody_held(now)
        elif not draft.told and (request := self._queue.peek(now)) is not None:
            self._waits.held(request, Kind.NO_BLOCKS if draft.room else Kind.BUDGET, now)

    def _blocked(self, draft: Draft, request: Request, kind: Kind, now: float, *, wanted: int = 0) -> Verdict:
        draft.told = True
        self._waits.held(request, kind, now, wanted=wanted, there=self._batch.pool.available)
        return Verdict.BLOCKED

    def _admit(self, draft: Draft, request: Request, now: float) -> Verdict:
        batch = self._batch
        if not batch.free_slots:
            return self._blocked(draft, request, Kind.NO_SLOT, now)
        reuse = reusable(batch, request, fetch=self._swap.fetches(batch, request))
        known, cached = len(request.tokens), reuse.cached
        if not self._chunked and known - cached > draft.room:
            return self._blocked(draft, request, Kind.BUDGET, now)
        may_hit_more = request.takes_prefix_hits and known - 1 >= cached + batch.block_size
        if draft.filling and may_hit_more and request.hashes[cached // batch.block_size] in draft.filling:
            draft.told = True
            self._waits.deferred(request, now)
            return Verdict.DEFERRED
        need = blocks_to_start(batch, request, reuse)
        if need > batch.pool.available:
            return self._blocked(draft, request, Kind.NO_BLOCKS, now, wanted=need)
        if not self._policy.admits(request, need, batch):
            return self._blocked(draft, request, Kind.POLICY, now, wanted=need)
        self._queue.pop()
        slot = batch.seat(request, reuse)
        request.move(RequestState.RUNNING, now)
        self._waits.started(request, now, known - cached, swapped=bool(reuse.host))
        self._policy.admitted(request)
        if not request.preemptions:
            self._first_time(request, reuse, now)
        draft.admit.append(
            Admit(
                slot=slot,
                token_ids=request.tokens,
                num_prompt=request.num_prompt,
                params=request.params,
                seed=request.seed,
                block_ids=batch.table.blocks[slot, : -(-known // batch.block_size)].copy(),
                cached_len=cached,
                stop_token_ids=request.stop_token_ids,
            )
        )
        self._chunk(draft, slot)
        return Verdict.ADMITTED

    def _first_time(self, request: Request, reuse: Reuse, now: float) -> None:
        request.first_scheduled = now
        request.cached_tokens = reuse.cached
        self._totals.prompt_tokens += request.num_prompt
        if self._prefix_caching and request.takes_prefix_hits:
            self._totals.prefix_queries += request.num_prompt
            self._totals.prefix_hits += reuse.cached
            self._totals.host_hits += len(reuse.host) * self._batch.block_size

    def _chunk(self, draft: Draft, slot: int) -> None:
        """Give a slot as many of its known tokens as the budget has room for."""
        table, size = self._batch.table, self._batch.block_size
        start, known = int(table.computed[slot]), int(table.planned[slot])
        count = min(known - start, draft.room)
        draft.budget -= count
        draft.prompt_tokens -= count
        draft.rows.append((slot, count, start + count == known))
        # one that is left with a single token is an ordinary decode row from the next step on
        if known - start - count > 1:
            self._batch.prefilling[slot] = None
        else:
            self._batch.prefilling.pop(slot, None)
        first, stop = start // size, (start + count) // size
        if self._prefix_caching and stop > first:
            draft.fills.append((slot, first, stop))
            draft.filling.update(table.living(slot).hashes[first:stop])

    # ---- the message ---------------------------------------------------------------------------------------------

    def _finish(self, draft: Draft, decode: NDArray[np.int64]) -> Step:
        batch, table = self._batch, self._batch.table
        number = batch.last_sent + 1
        slots, counts, sampled = decode, self._ones[: len(decode)], decode
        # a decode row has computed all but the last of its planned tokens
        planned = table.planned[decode]
        context = int(planned.sum())
        table.computed[decode] = planned
        table.planned[decode] = planned + 1
        if draft.rows:
            rows = sorted(draft.rows, key=lambda row: row[1] > 1)  # stable: rows of one token first
            known, known_counts = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.int32)
            known_sampled = np.array([row[0] for row in rows if row[2]], np.int64)
            computed = table.computed[known] + known_counts
            table.computed[known] = computed
            context += int(computed.sum())
            table.planned[known_sampled] += 1
            slots = np.concatenate((decode, known))
            counts = np.concatenate((counts, known_counts))
            sampled = np.concatenate((decode, known_sampled))
        leases = table.lease[slots]
        record = InFlight(
            number=number,
            slots=slots,
            leases=leases,
            sampled=sampled,
            sampled_leases=leases if sampled is slots else table.lease[sampled],
            prefill_tokens=sum(row[1] for row in draft.rows),
            rows=len(decode),
            context=context,
        )
        if draft.admit:
            seated = [admit.slot for admit in draft.admit]
            record.admitted.extend(zip(seated, table.lease[seated].tolist(), strict=True))
        for slot, first, stop in draft.fills:
            record.registered.extend(batch.register(slot, first, stop))
        swaps = batch.sent(record)
        self._totals.steps += 1
        self._totals.swapped_out_blocks += len(swaps.out_to)
        self._totals.swapped_in_blocks += len(swaps.in_to)
        self._totals.scheduled_tokens += self._batch.most_tokens - draft.budget
        retire, batch.retiring = batch.retiring, []
        return Step(
            number=number,
            retire=_int32(retire),
            swap_out_from=_int32(swaps.out_from),
            swap_out_to=_int32(swaps.out_to),
            swap_in_from=_int32(swaps.in_from),
            swap_in_to=_int32(swaps.in_to),
            admit=tuple(draft.admit),
            grow_slots=draft.grow_slots.astype(np.int32) if draft.grow_blocks else _NONE,
            grow_blocks=_int32(draft.grow_blocks),
            work_slots=slots.astype(np.int32),
            work_counts=counts,
        )


def _int32(ids: list[int]) -> NDArray[np.int32]:
    return np.array(ids, np.int32) if ids else _NONE
