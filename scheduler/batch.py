"""What is on the device: slots, the blocks they hold, and the steps in flight that still name them.

Joins the table, the block pool, the prefix index and the host's blocks, and keeps the two rules of reuse: a slot is
given to another request only by a step that retires it first; a block goes back to the pool only when the last step
that named it has been acknowledged. Must not know policies or who is waiting.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ..protocol.messages import EngineInfo
from .blocks import BlockPool, BrokenInvariant
from .host_blocks import HostBlocks, Swaps
from .prefix import PrefixIndex
from .request import Request
from .table import RequestTable

FETCHED = -1  # in `Reuse.blocks`: a fresh block, to which the next of `Reuse.host` is copied


@dataclass(slots=True, frozen=True)
class Reuse:
    """The start of a request that need not be computed: its first `cached` tokens, never all of them."""

    blocks: list[int]  # device blocks to share, or `FETCHED`
    shared: list[int]  # those of `blocks` that are shared
    host: list[int]  # host blocks, one for each `FETCHED`
    cached: int


@dataclass(slots=True)
class InFlight:
    """A step that was sent and has not been answered. `leases` tell whether a slot is still the same request's."""

    number: int
    slots: NDArray[np.int64]  # all rows of its work
    leases: NDArray[np.int64]
    sampled: NDArray[np.int64]  # the slots that sample, in the order of the work
    sampled_leases: NDArray[np.int64]
    registered: list[int] = field(default_factory=list)  # blocks that it fills and that serve hits from then on
    admitted: list[tuple[int, int]] = field(default_factory=list)  # (slot, lease)
    prefill_tokens: int = 0  # known tokens in chunks, for the step model
    rows: int = 0  # rows of one token
    context: int = 0  # tokens whose keys its rows read, their own among them
    swapped_blocks: int = 0  # copied between device and host


class Batch:
    """The scheduler's half of the executor's persistent batch. `most_tokens`: of a step."""

    def __init__(self, info: EngineInfo, slots: int, first_step: int, most_tokens: int) -> None:
        self.block_size = info.block_size
        self.most_tokens = most_tokens
        self.prefix = PrefixIndex()
        self.host = HostBlocks(info.num_host_blocks)
        self.pool = BlockPool(info.num_blocks, self.prefix)
        self.table = RequestTable(slots, info.block_size)
        self.free_slots = list(range(slots - 1, -1, -1))
        self.retiring: list[int] = []  # slots that the next step must empty
        self.prefilling: dict[int, None] = {}  # slots with two or more tokens to compute
        self.silent: set[int] = set()  # slots whose request has not said a token since it took the slot
        self.fetched: list[int] = []  # blocks that the next step fills from the host and that serve hits from then on
        self.in_flight: deque[InFlight] = deque()
        self.last_sent = self.acknowledged = first_step - 1
        self._fenced: list[tuple[int, list[int]]] = []  # (step, blocks): to be released once it is acknowledged
        self.fenced_blocks = 0

    @property
    def num_running(self) -> int:
        return self.table.slots - len(self.free_slots)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, as `BlockPool.allocate` gives them; what the prefix cache had in them goes to the host."""
        blocks = self.pool.allocate(count)
        if self.host.num_blocks:
            for block, digest in self.pool.evicted:
                self.host.keep(block, digest)
        return blocks

    def seat(self, request: Request, reuse: Reuse) -> int:
        """Give `request` a slot and blocks for all its known tokens; `reuse`: what holds the first of them."""
        count = -(-len(request.tokens) // self.block_size) - len(reuse.shared)
        self.pool.reference(reuse.shared)
        self.host.pool.reference(reuse.host)
        fresh = self.allocate(count)
        blocks = self._fetch(request, reuse, fresh) if reuse.host else reuse.shared + fresh
        self.host.drop(request.number)
        slot = self.free_slots.pop()
        self.table.fill(slot, request, reuse.cached, blocks)
        request.slot = slot
        self.silent.add(slot)
        return slot

    def _fetch(self, request: Request, reuse: Reuse, fresh: list[int]) -> list[int]:
        """Have the next step copy the host's blocks to the first of `fresh`. Returns the whole table."""
        targets = fresh[: len(reuse.host)]
        self.host.fetch(reuse.host, targets)
        left = iter(targets)
        start = [next(left) if block == FETCHED else block for block in reuse.blocks]
        brought = set(targets)
        full = reuse.cached // self.block_size  # the last may be brought half filled
        for digest, block in zip(request.hashes[:full], start, strict=False):
            if block in brought:
                self.prefix.register([digest], [block])
                self.fetched.append(block)
        return start + fresh[len(targets) :]

    def leave(self, slot: int) -> None:
        """Empty a slot; its blocks go back now, or when the last step that named them is acknowledged."""
        request = self.table.living(slot)
        blocks = self.table.blocks_of(slot)
        fence = int(self.table.last_step[slot])
        if fence > self.acknowledged:
            self._fenced.append((fence, blocks))
            self.fenced_blocks += len(blocks)
        else:
            self.pool.release(blocks)
        self.table.clear(slot)
        self.prefilling.pop(slot, None)
        self.silent.discard(slot)
        self.free_slots.append(slot)
        self.retiring.append(slot)
        request.slot = -1

    def sent(self, record: InFlight) -> Swaps:
        """A step is under way. Returns the copies between device and host that it carries."""
        self.table.last_step[record.slots] = record.number
        self.last_sent = record.number
        swaps = self.host.sent(record.number)
        record.swapped_blocks = len(swaps.out_to) + len(swaps.in_to)
        record.registered.extend(self.fetched)
        self.fetched.clear()
        self.in_flight.append(record)
        return swaps

    def acknowledge(self, number: int) -> None:
        """Steps up to `number` are done: what they alone still named goes back to the pools."""
        self.acknowledged = number
        self.host.acknowledge(number)
        if not self._fenced:
            return
        waiting = []
        for fence, blocks in self._fenced:
            if fence <= number:
                self.pool.release(blocks)
                self.fenced_blocks -= len(blocks)
            else:
                waiting.append((fence, blocks))
        self._fenced = waiting

    def register(self, slot: int, first: int, stop: int) -> list[int]:
        """Let blocks `first` to `stop` - 1 of a slot serve prefix hits; their hashes are known. Returns them."""
        request = self.table.living(slot)
        blocks: list[int] = self.table.blocks[slot, first:stop].tolist()
        self.prefix.register(request.hashes[first:stop], blocks)
        return blocks

    def distrust(self, failed: InFlight) -> list[int]:
        """A row of `failed` did not get its keys and values written. Drops what it and the steps behind it have
        added to the prefix index or copied to the host, and returns the slots whose request may have read from there
        since."""
        self.host.distrust(failed.number)
        for block in failed.registered:
            self.pool.forget(block)
        readers = []
        for record in self.in_flight:
            for block in record.registered:
                self.pool.forget(block)
            readers += [slot for slot, lease in record.admitted if self.table.lease[slot] == lease]
        return readers

    def check(self) -> None:
        """Raise `BrokenInvariant` unless slots, tables, pool and index agree."""
        table = self.table
        seated = [slot for slot, request in enumerate(table.requests) if request is not None]
        if sorted(seated + self.free_slots) != list(range(table.slots)):
            raise BrokenInvariant("a slot is neither free nor taken, or both")
        for slot in seated:
            request = table.requests[slot]
            if request is None or request.slot != slot or request.finished or not table.lease[slot]:
                raise BrokenInvariant(f"slot {slot} and its request contradict each other")
            row = [int(c[slot]) for c in (table.computed, table.planned, table.length, table.limit, table.capacity)]
            computed, planned, length, limit, capacity = row
            if not (0 <= computed < planned <= limit and length <= planned and computed <= capacity):
                raise BrokenInvariant(f"slot {slot}: computed, planned, length, limit, capacity are {row}")
        for slot in self.free_slots:
            if table.lease[slot] or table.planned[slot] or table.capacity[slot]:
                raise BrokenInvariant(f"free slot {slot} is not empty")
        if self.fenced_blocks != sum(len(blocks) for _, blocks in self._fenced):
            raise BrokenInvariant("fenced blocks are miscounted")
        self.pool.check(chain((table.blocks_of(s) for s in seated), (blocks for _, blocks in self._fenced)))
        self.host.check()
