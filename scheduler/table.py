"""The running requests as numpy columns indexed by slot, so that a decode step is array arithmetic.

An empty slot holds zeros, which no comparison of a step ever picks. Owns the columns and how a row is filled, grown
and cleared; must not know the block pool, policies or messages.

    tokens[slot]    |<------ computed ------>|            KV written, or to be written by a step in flight
                    |<---------- length -------->|        known here
                    |<---------- planned ----------->|    known, or sampled by a step in flight
                    |<---------------- limit ------------------->|  the request ends here
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blocks import BrokenInvariant
from .request import Request

MAX_STOP_COLUMNS = 8  # requests with more stop ids are looked at one by one
FIRST_WIDTH = 256  # tokens; the rows grow by doubling as requests need it


class RequestTable:
    """Columns of `slots` rows. int64 throughout, but for token and block ids (int32)."""

    def __init__(self, slots: int, block_size: int) -> None:
        self.slots = slots
        self.block_size = block_size
        self.length = np.zeros(slots, np.int64)
        self.planned = np.zeros(slots, np.int64)
        self.computed = np.zeros(slots, np.int64)
        self.limit = np.zeros(slots, np.int64)
        self.capacity = np.zeros(slots, np.int64)  # tokens that its blocks can hold
        self.prompt = np.zeros(slots, np.int64)
        self.stop_from = np.zeros(slots, np.int64)  # stop ids end it only beyond this length
        self.lease = np.zeros(slots, np.int64)  # which stay in the slot this is: 0 empty, never used twice
        self.number = np.zeros(slots, np.int64)
        self.rank = np.zeros(slots, np.float64)
        self.last_step = np.zeros(slots, np.int64)  # the last step that named it
        self.protected_until = np.zeros(slots, np.int64)  # resumed: no victim before it is longer than this
        self.stops = np.full((1, slots), -1, np.int32)  # one row for the first stop id of each, one for the second, ..
        self.has_stops = False  # whether any row so far had stop ids
        self.many_stops: dict[int, frozenset[int]] = {}
        self.tokens = np.zeros((slots, FIRST_WIDTH), np.int32)
        self.blocks = np.zeros((slots, FIRST_WIDTH // block_size + 1), np.int32)
        self.requests: list[Request | None] = [None] * slots
        self._leases = 0

    def fill(self, slot: int, request: Request, computed: int, blocks: list[int]) -> None:
        """Seat `request` in an empty slot. The first `computed` of its tokens are in `blocks` already."""
        known = len(request.tokens)
        self._make_room(len(blocks))
        self._leases += 1
        self.requests[slot] = request
        self.lease[slot] = self._leases
        self.number[slot] = request.number
        self.rank[slot] = request.rank
        self.length[slot] = self.planned[slot] = known
        self.computed[slot] = computed
        self.limit[slot] = request.limit
        self.capacity[slot] = len(blocks) * self.block_size
        self.prompt[slot] = request.num_prompt
        self.stop_from[slot] = request.num_prompt + request.params.min_tokens
        self.protected_until[slot] = known if request.preemptions else 0
        self.tokens[slot, :known] = request.tokens
        self.blocks[slot, : len(blocks)] = blocks
        if request.stop_token_ids:
            self._set_stops(slot, request.stop_token_ids)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        for column in (self.length, self.planned, self.computed, self.limit, self.capacity, self.lease):
            column[slot] = 0
        if self.has_stops:
            self.stops[:, slot] = -1
            self.many_stops.pop(slot, None)
        self.requests[slot] = None

    def running(self) -> list[Request]:
        """The requests that hold a slot."""
        return [request for request in self.requests if request is not None]

    def living(self, slot: int) -> Request:
        """The request of a slot that is taken. Raises `BrokenInvariant` if it is not."""
        request = self.requests[slot]
        if request is None:
            raise BrokenInvariant(f"slot {slot} is empty")
        return request

    def blocks_of(self, slot: int) -> list[int]:
        """The block ids of a slot, in the order of its tokens."""
        held: list[int] = self.blocks[slot, : int(self.capacity[slot]) // self.block_size].tolist()
        return held

    def known_tokens(self, slot: int) -> NDArray[np.int32]:
        """A copy of the known tokens of a slot."""
        return self.tokens[slot, : int(self.length[slot])].copy()

    def grow(self, slots: NDArray[Any], blocks: list[int]) -> None:
        """Give each of `slots` one more block."""
        at = self.capacity[slots] // self.block_size
        self._make_room(int(at.max()) + 1)
        self.blocks[slots, at] = blocks
        self.capacity[slots] += self.block_size

    def append(self, slots: NDArray[Any], tokens: NDArray[np.int32]) -> NDArray[np.int64]:
        """Write one more known token for each of `slots`; returns the lengths before."""
        at: NDArray[np.int64] = self.length[slots]
        self.tokens[slots, at] = tokens
        self.length[slots] = at + 1
        return at

    def stop_hits(
        self, slots: NDArray[Any], tokens: NDArray[np.int32], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """For each row: is `tokens[i]`, which made it `lengths[i]` long, one that ends it?"""
        # a column at a time: reducing short rows would cost more than comparing them
        hits: NDArray[np.bool_] = self.stops[0, slots] == tokens
        for column in self.stops[1:]:
            hits |= column[slots] == tokens
        if self.many_stops:
            for row, slot in enumerate(slots.tolist()):
                ids = self.many_stops.get(slot)
                if ids is not None and int(tokens[row]) in ids:
                    hits[row] = True
        if np.count_nonzero(hits):
            hits &= lengths > self.stop_from[slots]
        return hits

    def _set_stops(self, slot: int, ids: tuple[int, ...]) -> None:
        self.has_stops = True
        if len(ids) > MAX_STOP_COLUMNS:
            self.many_stops[slot] = frozenset(ids)
            return
        if len(ids) > len(self.stops):
            more = np.full((len(ids) - len(self.stops), self.slots), -1, np.int32)
            self.stops = np.concatenate((self.stops, more))
        self.stops[: len(ids), slot] = ids

    def _make_room(self, blocks: int) -> None:
        """For a row of so many blocks, and the tokens that go with them: the last one known is not in a block yet."""
        tokens = blocks * self.block_size + 1
        if tokens > self.tokens.shape[1]:
            self.tokens = _widened(self.tokens, tokens)
        if blocks > self.blocks.shape[1]:
            self.blocks = _widened(self.blocks, blocks)


def _widened(matrix: NDArray[np.int32], columns: int) -> NDArray[np.int32]:
    # np.zeros maps pages only as they are touched: a wide row costs memory for what it holds
    wider = np.zeros((matrix.shape[0], max(columns, 2 * matrix.shape[1])), np.int32)
    wider[:, : matrix.shape[1]] = matrix
    return wider
