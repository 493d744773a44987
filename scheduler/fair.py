"""`fair`: each client gets its share of tokens, whatever the others send.

Owns the clients' accounts and the queue that goes by them; must not know messages or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..protocol.config import EngineConfig
from .policy import Policy
from .request import Request
from .step_model import StepModel
from .table import RequestTable
from .waiting import WaitingQueue

MAX_ACCOUNTS = 10_000  # clients remembered while they ask for nothing


@dataclass(slots=True, eq=False)
class Account:
    """One client. `counter`: the service it has had, in weighted tokens, and what it was lifted by."""

    name: str
    index: int
    weight: float
    counter: float = 0.0
    live: int = 0  # requests that have not ended
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    queued: bool = False  # whether it is in the queue's heap


class Accounts:
    """All clients that have live requests, and some that had."""

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self._by_name: dict[str, Account] = {}
        self._by_index: list[Account | None] = []
        self._free: list[int] = []

    def of(self, name: str) -> Account:
        """The account of a client; a new one starts at zero."""
        account = self._by_name.get(name)
        if account is None:
            index = self._free.pop() if self._free else len(self._by_index)
            account = self._by_name[name] = Account(name, index, self._weights.get(name, 1.0))
            if index == len(self._by_index):
                self._by_index.append(account)
            else:
                self._by_index[index] = account
        return account

    def at(self, index: int) -> Account:
        """The account with that number."""
        account = self._by_index[index]
        assert account is not None
        return account

    def forget_some(self) -> None:
        """Forget idle accounts if they are many: those with the least service, who are lifted anyway on return."""
        if len(self._by_name) <= MAX_ACCOUNTS:
            return
        idle = sorted((a for a in self._by_name.values() if not a.live), key=lambda a: (a.counter, a.index))
        for account in idle[: len(self._by_name) - MAX_ACCOUNTS // 2]:
            del self._by_name[account.name]
            self._by_index[account.index] = None
            self._free.append(account.index)


class FairQueue:
    """The first request of the client with the least counter."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        # counters only grow: an entry with an old one is put right when it comes to the top
        self._heap: list[tuple[float, int, Account]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        account = self._accounts.of(request.client)
        account.waiting.push(request)
        self._size += 1
        if not account.queued:
            account.queued = True
            heappush(self._heap, (account.counter, account.index, account))

    def peek(self, now: float) -> Request | None:
        account = self.least()
        return None if account is None else account.waiting.peek(now)

    def pop(self) -> Request:
        self._size -= 1
        return self._heap[0][2].waiting.pop()

    def died(self, request: Request) -> None:
        self._accounts.of(request.client).waiting.died(request)
        self._size -= 1

    def requests(self) -> list[Request]:
        return [request for _, _, account in self._heap for request in account.waiting.requests()]

    def least(self) -> Account | None:
        """Of the clients that have somebody waiting, the one with the least counter."""
        heap = self._heap
        while heap:
            counter, index, account = heap[0]
            if not len(account.waiting):
                heappop(heap)
                account.queued = False
            elif counter < account.counter:
                heapreplace(heap, (account.counter, index, account))
            else:
                return account
        return None


class Fair(Policy):
    """The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024).

    Each client has a counter of the service it has had: `INPUT_WEIGHT` for each prompt token when its request is
    admitted, `OUTPUT_WEIGHT` for each generated one, divided by the client's weight (`--fair-weights`). The next to be
    admitted is the first request of the client with the least counter among those that wait. A client that had nothing
    waiting is lifted to that least counter (to the counter of the client that last left the queue, if nobody waits):
    idle time earns no credit. The paper's theorem 4.4: while two clients of weight 1 have requests waiting, the
    services that they get differ by no more than 2 max(INPUT_WEIGHT * L, OUTPUT_WEIGHT * M), with L the tokens of the
    longest prompt and M the tokens that a batch can hold. When blocks are short, the client with the most service
    gives way.
    """

    INPUT_WEIGHT: ClassVar[float] = 1.0
    OUTPUT_WEIGHT: ClassVar[float] = 2.0

    def __init__(self, config: EngineConfig, steps: StepModel) -> None:
        super().__init__(config, steps)
        self._accounts = Accounts(config.fair_weights)
        self._queue = FairQueue(self._accounts)
        self._last_served: Account | None = None
        self._of_slot = np.zeros(0, np.int64)  # account number by slot

    def queue(self) -> FairQueue:
        return self._queue

    def arrived(self, request: Request) -> None:
        account = self._accounts.of(request.client)
        if not len(account.waiting):
            least = self._queue.least() or self._last_served
            if least is not None:
                account.counter = max(account.counter, least.counter)
        account.live += 1

    def admitted(self, request: Request) -> None:
        account = self._accounts.of(request.client)
        if request.slot >= len(self._of_slot):
            self._of_slot = np.append(self._of_slot, np.zeros(request.slot + 1, np.int64))
        self._of_slot[request.slot] = account.index
        self._last_served = account
        if not request.preemptions:  # what is computed again is our doing, not the client's
            account.counter += self.INPUT_WEIGHT * request.num_prompt / account.weight

    def generated(self, slots: NDArray[np.int64]) -> None:
        counts = np.bincount(self._of_slot[slots])
        for index in np.flatnonzero(counts).tolist():
            account = self._accounts.at(index)
            account.counter += self.OUTPUT_WEIGHT * int(counts[index]) / account.weight

    def ended(self, request: Request, generated: int) -> None:
        self._accounts.of(request.client).live -= 1
        self._accounts.forget_some()

    def standing(self, slots: NDArray[np.int64], table: RequestTable) -> NDArray[np.float64]:
        return np.array([self._accounts.at(index).counter for index in self._of_slot[slots].tolist()], np.float64)

    def counter(self, client: str) -> float:
        """The service that `client` has had, as counted."""
        return self._accounts.of(client).counter
