"""The waiting queue: requests in the order of their rank.

A request's rank does not change while it waits (ageing is part of it, see `policies.py`), so a heap will do. Owns
the order; must not know why a request waits. Requests that ended while they waited are skipped, and swept out when
they become many.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from .request import Request

SWEEP_OVER = 64


class WaitingQueue:
    """Waiting and preempted requests, lowest `Request.order` first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, request: Request) -> None:
        heappush(self._heap, (request.rank, request.number, request))

    def peek(self) -> Request | None:
        """The first that still waits."""
        heap = self._heap
        while heap and heap[0][2].finished:
            heappop(heap)
            self._dead -= 1
        return heap[0][2] if heap else None

    def pop(self) -> Request:
        """Take out what `peek` returned."""
        return heappop(self._heap)[2]

    def died(self) -> None:
        """One of the waiting requests has just ended."""
        self._dead += 1
        if self._dead > SWEEP_OVER and 2 * self._dead > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapify(self._heap)
            self._dead = 0

    def requests(self) -> list[Request]:
        """All that still wait, in no order."""
        return [request for _, _, request in self._heap if not request.finished]
