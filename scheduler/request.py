"""One sequence as the scheduler sees it, and the table of its allowed moves.

Owns `Request`, `RequestState` and the transition table; must not know slots' columns, block counts or messages'
ways. A move that is not in the table raises `InvalidTransition` with the request's story.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import EngineError
from ..protocol.messages import Submit
from ..protocol.sampling import SamplingParams
from .timeline import Entry, Mark

Tokens = NDArray[np.int32]


class RequestState(IntEnum):
    """Where a request is in its life. Every state from `STOPPED` on is an end, so that one comparison tells."""

    NEW = 0  # received; not checked yet where the executor is not ready
    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3  # waits as well, with tokens of its own
    STOPPED = 4
    LENGTH = 5
    ABORTED = 6
    REJECTED = 7
    FAILED = 8


REASONS = {
    RequestState.STOPPED: "stop",
    RequestState.LENGTH: "length",
    RequestState.ABORTED: "abort",
    RequestState.REJECTED: "rejected",
    RequestState.FAILED: "error",
}

TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.NEW: frozenset({RequestState.WAITING, RequestState.REJECTED, RequestState.ABORTED}),
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.ABORTED, RequestState.FAILED}),
    RequestState.RUNNING: frozenset(
        {
            RequestState.PREEMPTED,
            RequestState.STOPPED,
            RequestState.LENGTH,
            RequestState.ABORTED,
            RequestState.FAILED,
        }
    ),
    RequestState.PREEMPTED: frozenset(
        # a stop string may be found in text whose tokens were sent before the preemption
        {RequestState.RUNNING, RequestState.STOPPED, RequestState.ABORTED, RequestState.FAILED}
    ),
}


class InvalidTransition(EngineError):
    """A request was moved in a way that no life goes: a defect of the scheduler, never of its input."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A sequence and what is known of it outside the running table.

    `tokens` are the known tokens (prompt, then generated) as of the last time it entered the queue; while it runs
    the table holds the growing row. `hashes[i]` is the chained hash of its i-th full block. `rank` orders it among
    others, lowest first, ties by `number`; the policy sets it.
    """

    number: int
    frontend: str
    key: int
    request_id: str
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]  # all that end it, EOS among them unless ignored
    priority: int
    client: str  # who asks, for fairness
    deadline: float  # when its first token should be there at the latest; infinity: no matter when
    cache_salt: str
    tokens: Tokens
    num_prompt: int
    arrival: float
    limit: int = 0  # known tokens at which it ends by length
    rank: float = 0.0
    state: RequestState = RequestState.NEW
    slot: int = -1
    hashes: list[bytes] = field(default_factory=list)
    first_scheduled: float = 0.0
    first_token: float = 0.0
    cached_tokens: int = 0
    preemptions: int = 0
    prompt_logprobs_sent: int = 0  # highest prompt position whose log-probabilities were passed on
    story: list[tuple[float, RequestState]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)  # what it does with its time (`timeline.py`)
    entry: Entry | None = None  # how things stood when it joined the queue, until its wait is explained

    @property
    def finished(self) -> bool:
        return self.state >= RequestState.STOPPED

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state is RequestState.WAITING or self.state is RequestState.PREEMPTED

    @property
    def order(self) -> tuple[float, int]:
        """Sort key among requests: lower goes first."""
        return (self.rank, self.number)

    @property
    def takes_prefix_hits(self) -> bool:
        """Log-probabilities of a prompt exist only for what is computed."""
        return self.params.prompt_logprobs is None

    def move(self, state: RequestState, now: float) -> None:
        """Change state. Raises `InvalidTransition` for a move that is not in the table."""
        if state not in TRANSITIONS.get(self.state, ()):
            story = ", ".join(f"{s.name} at {t:.6f}" for t, s in self.story) or "none"
            raise InvalidTransition(
                f"request {self.number} ({self.request_id!r}) can't go from {self.state.name} to {state.name}; "
                f"its story: {story}"
            )
        self.state = state
        self.story.append((now, state))


def request_of(submit: Submit, number: int, now: float, frontend: str) -> Request:
    """What `frontend` has submitted, as the request `number` that arrived at `now`."""
    eos = () if submit.params.ignore_eos else submit.eos_token_ids
    return Request(
        number=number,
        frontend=frontend,
        key=submit.key,
        request_id=submit.request_id,
        params=submit.params,
        seed=submit.seed,
        eos_token_ids=eos,
        stop_token_ids=tuple(dict.fromkeys(eos + submit.params.stop_token_ids)),
        priority=submit.priority,
        client=submit.client,
        deadline=math.inf if submit.deadline_ms is None else now + submit.deadline_ms / 1000.0,
        cache_salt=submit.cache_salt,
        tokens=submit.prompt_token_ids,
        num_prompt=len(submit.prompt_token_ids),
        arrival=now,
    )
