"""Runs a workload through replicas of the engine on a virtual clock.

One program of (workload, settings, calibration): the same input gives the same figures, to the last bit. Owns the
order of events and the routing between replicas; must not know how a step is planned or what it costs.

What comes first: of all steps under way the one that is done first, unless a request arrives earlier; at the same
moment results go before requests, as in the scheduler's process, and lower replicas before higher ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocol.config import EngineConfig
from ..protocol.errors import InvalidRequest
from .costs import Calibration
from .figures import Ledger, figures
from .replica import DONE, Replica, delivered
from .workload import Workload

START = 1.0  # the clock's first moment: the core takes a time of 0 for "never"
ROUTERS = ("least-loaded", "round-robin")
PROGRESS_EVERY = 4096  # events


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated."""

    config: EngineConfig
    calibration: Calibration
    replicas: int = 1
    router: str = "least-loaded"
    max_tokens: int | None = 2048  # what each request allows; None: just its answer's length, as `ignore_eos` runs do

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= 4096:
            raise InvalidRequest(f"replicas must be in [1, 4096], got {self.replicas}", param="replicas")
        if self.router not in ROUTERS:
            raise InvalidRequest(f"router must be one of {', '.join(ROUTERS)}; got {self.router!r}", param="router")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")


@dataclass(slots=True)
class Result:
    """The figures of a run and, for a plot, what they were made of."""

    figures: dict[str, Any]
    ledger: Ledger


def simulate(setup: Setup, workload: Workload, progress: Callable[[int], None] = lambda ended: None) -> Result:
    """Run all of `workload`; `progress(requests ended)` is called now and then."""
    longest = int(workload.output.max())
    if setup.max_tokens is not None and longest > setup.max_tokens:
        raise InvalidRequest(
            f"max_tokens must be at least the longest answer, {longest} tokens, got {setup.max_tokens}",
            param="max_tokens",
        )
    run = _Run(setup, workload)
    events = 0
    while run.step():
        events += 1
        if events % PROGRESS_EVERY == 0:
            progress(run.ledger.ended)
    progress(run.ledger.ended)
    return Result(run.figures(), run.ledger)


class _Run:
    """The state of a simulation between two events."""

    def __init__(self, setup: Setup, workload: Workload) -> None:
        calibration = setup.calibration
        self.replicas = [Replica(setup.config, calibration, workload, setup.max_tokens) for _ in range(setup.replicas)]
        self.ledger = Ledger(workload, START, calibration.request)
        self._router = setup.router
        self._arrivals: list[float] = (workload.arrival + START + calibration.request / 2).tolist()
        self._next = 0
        # each replica numbers its requests from 1; where they stand in the workload
        self._places = [np.zeros(1024, np.int64) for _ in self.replicas]
        self._sampled = [START] * setup.replicas
        self._kv_seconds = 0.0

    def step(self) -> bool:
        """Let the next thing happen; False if nothing is left to happen."""
        first = min(self.replicas, key=lambda replica: replica.next_end) if len(self.replicas) > 1 else self.replicas[0]
        arrival = self._arrivals[self._next] if self._next < len(self._arrivals) else DONE
        if first.next_end <= arrival:
            if first.next_end == DONE:
                return False
            self._finish_step(self.replicas.index(first) if len(self.replicas) > 1 else 0)
        else:
            self._arrive(self._next, arrival)
            self._next += 1
        return True

    def _arrive(self, index: int, now: float) -> None:
        at = self._route(index)
        replica = self.replicas[at]
        places, number = self._places[at], replica.submitted + 1
        if number >= len(places):
            places = self._places[at] = np.concatenate((places, np.zeros(len(places), np.int64)))
        places[number] = index
        self.ledger.arrived(index)
        for message in delivered(replica.submit(index, now)):
            self.ledger.book(message, places, now)

    def _finish_step(self, at: int) -> None:
        replica = self.replicas[at]
        now = replica.next_end
        pool = replica.core.batch.pool if replica.core.batch is not None else None
        if pool is not None:
            self._kv_seconds += pool.used / pool.num_blocks * (now - self._sampled[at])
        self._sampled[at] = now
        for message in delivered(replica.advance()):
            self.ledger.book(message, self._places[at], now)

    def _route(self, index: int) -> int:
        if self._router == "round-robin":
            return index % len(self.replicas)
        if len(self.replicas) == 1:
            return 0
        loads = [replica.unfinished for replica in self.replicas]
        return loads.index(min(loads))

    def figures(self) -> dict[str, Any]:
        seconds = self.ledger.last_end - START
        shared = max(seconds, 1e-9) * len(self.replicas)
        return figures(
            self.ledger,
            seconds=seconds,
            preemptions=sum(replica.core.totals.preemptions for replica in self.replicas),
            device_busy=sum(replica.busy_seconds for replica in self.replicas) / shared,
            kv_used=self._kv_seconds / shared,
        )
