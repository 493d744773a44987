"""The waiting queue: what a queue must be able to do, and the one for ranks that do not change.

Where a request's rank stays as it is while it waits (ageing is part of it, see `policies.py`), a heap will do; a
policy whose order changes brings a queue of its own. Owns the order; must not know why a request waits. Requests that
ended while they waited are skipped, and swept out when they become many.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Protocol

from .request import Request

SWEEP_OVER = 64


class Queue(Protocol):
    """Waiting and preempted requests, in the order of a policy.

    The planner may take several out and put some of them back within a step, so `pop` and `push` say nothing about
    who was served: that is what a policy's hooks are for.
    """

    def __len__(self) -> int:
        """How many still wait."""

    def push(self, request: Request) -> None:
        """`request` waits: new, preempted, or put back."""

    def peek(self, now: float) -> Request | None:
        """Who goes first at `now` (seconds); None if nobody waits. Never one that has ended."""

    def pop(self) -> Request:
        """Take out what the last `peek` returned."""

    def died(self, request: Request) -> None:
        """`request` has just ended while it waited here."""

    def requests(self) -> list[Request]:
        """All that still wait, in no order."""


class WaitingQueue:
    """Lowest `Request.order` first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, request: Request) -> None:
        heappush(self._heap, (request.rank, request.number, request))

    def peek(self, now: float) -> Request | None:
        """The first that still waits."""
        heap = self._heap
        while heap and heap[0][2].finished:
            heappop(heap)
            self._dead -= 1
        return heap[0][2] if heap else None

    def pop(self) -> Request:
        """Take out what `peek` returned."""
        return heappop(self._heap)[2]

    def died(self, request: Request) -> None:
        """One of the waiting requests has just ended."""
        self._dead += 1
        if self._dead > SWEEP_OVER and 2 * self._dead > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapify(self._heap)
            self._dead = 0

    def requests(self) -> list[Request]:
        """All that still wait, in no order."""
        return [request for _, _, request in self._heap if not request.finished]
