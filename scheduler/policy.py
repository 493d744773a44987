"""The interface of a scheduling policy: who goes first, who is let in, who may be thrown out for whom.

Public: a custom policy is a subclass of `Policy` behind an entry point of the group `fast_inference.policies`
(`docs/policies.md` shows one). A policy sees requests, the table and the pool, and answers questions; it must not
change any of them, read a clock, or draw a random number: the scheduler is deterministic. All times are
`time.time()` seconds that were handed in.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..protocol.config import EngineConfig
from ..protocol.errors import EngineError
from .batch import Batch
from .request import Request
from .step_model import StepModel
from .table import RequestTable
from .waiting import Queue, WaitingQueue


class Policy:
    """Answers every question as "first come, first served" would; a policy overrides what it sees otherwise.

    Args:
        config: the engine's settings.
        steps: what steps cost; it learns while the engine runs.
    """

    eager: ClassVar[bool] = False  # whether a waiting request may ever push out a running one

    def __init__(self, config: EngineConfig, steps: StepModel) -> None:
        self.config = config
        self.steps = steps

    # ---- the queue -----------------------------------------------------------------------------------------------

    def queue(self) -> Queue:
        """The queue in which requests wait; asked for once. Override it where the order of two waiting requests may
        change; else `rank` is enough."""
        return WaitingQueue()

    def refuses(self, request: Request, now: float, batch: Batch) -> EngineError | None:
        """Why a new request should be turned away at once; None to take it. Asked once, before `rank`."""
        return None

    def rank(self, request: Request) -> float:
        """Where `request` stands, lowest first, ties by number. Asked once, when it arrives."""
        return request.arrival

    def admits(self, request: Request, blocks: int, batch: Batch) -> bool:
        """Whether the first in the queue may start now, given that the `blocks` it takes from the pool are there. If
        not, nobody starts in this step. With nothing running the answer must be yes."""
        return True

    # ---- preemption ----------------------------------------------------------------------------------------------

    def standing(self, slots: NDArray[np.int64], table: RequestTable) -> NDArray[np.float64]:
        """Where the running requests in `slots` [n] stand now; the highest are the first to be preempted, of equals
        the one that has computed least, since that much would be lost."""
        standing: NDArray[np.float64] = table.rank[slots]
        return standing

    def outranks(self, waiting: Request, running: Request) -> bool:
        """Whether `running` should be preempted if `waiting` can't start otherwise. Asked of an eager policy only, and
        only where the rank of `waiting` is no higher than where some running request stands."""
        return False

    # ---- what has happened ---------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A new request has its rank and is about to join the queue."""

    def admitted(self, request: Request) -> None:
        """`request` has taken the slot `request.slot`, for the first time or again (`request.preemptions`)."""

    def generated(self, slots: NDArray[np.int64]) -> None:
        """Each of `slots` [n] has said one more token."""

    def ended(self, request: Request, generated: int) -> None:
        """A request that had arrived is in a final state (`request.state`) after `generated` tokens."""
