"""The `requests` link: what frontends and detokenizers ask of the scheduler, and what it answers about the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..sampling import SamplingParams
from .arrays import Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """A frontend says that it is there (first message on its link); answered by `EngineInfo` once known."""

    frontend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One sequence to generate. `params.n` is 1: a frontend splits n sequences into n submits.

    `seed` is drawn by the frontend where the request has none, so that a token depends on (seed, position) alone.
    `eos_token_ids` end the sequence unless `params.ignore_eos`. `client` names the one who asks, for fairness.
    """

    key: int
    request_id: str
    prompt_token_ids: Int32
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    client: str = ""
    cache_salt: str = ""
    deadline_ms: int | None = None  # from its arrival to its first token; None: no matter when


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The frontend's client went away, or cancelled: end these sequences and free what they hold."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStats:
    """Ask for `Stats`; `token` comes back in the answer."""

    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GetTimeline:
    """Ask what sequences have done with their time: those called by one of `request_ids`, or by one and "-0", "-1" and
    so on (the sequences of a request with n > 1). `token` comes back in the answer, a `Timeline`."""

    token: int
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopFound:
    """The detokenizer has ended these streams; free what they hold. `reason`: `stop`, a stop string was seen, or
    `abort`, nobody reads them any more."""

    numbers: tuple[int, ...]
    reason: str = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine turned out to be, once the executor is ready."""

    model: str
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    dtype: str
    device: str
    num_host_blocks: int = 0  # room in host memory for blocks that are swapped out
    block_bytes: int = 0  # keys and values of one block in all layers
    max_num_batched_tokens: int = 2048  # tokens of a step, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The scheduler's gauges and running totals at one moment."""

    token: int = 0
    running: int = 0
    waiting: int = 0
    num_blocks: int = 0
    free_blocks: int = 0  # neither referenced nor cached
    cached_blocks: int = 0  # unreferenced, kept for a prefix hit
    used_blocks: int = 0  # referenced by a running request
    utilization: float = 0.0  # used / num
    fragmentation: float = 0.0  # share of the slots in used blocks that hold no token
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    preemptions: int = 0
    swap_preemptions: int = 0  # those of `preemptions` that copied to host memory what would have been lost
    host_blocks: int = 0  # blocks of host memory
    host_used_blocks: int = 0  # held by a preempted request, or by a copy under way
    host_cached_blocks: int = 0  # kept for a prefix hit
    host_hits: int = 0  # tokens of `prefix_hits` that were found in host memory
    swapped_out_blocks: int = 0  # copied from the device to the host
    swapped_in_blocks: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    scheduled_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by reason
    step_seconds: float = 0.0  # device-side time of the last step, as the executor measured it
    gaps: int = 0  # decode steps that followed a decode step
    gap_seconds: float = 0.0  # the device's idle time between those, all together
    steps_to_record: int = 0  # recordings that the executor has still to make, as its last result told


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSpan:
    """What a sequence did from `start` to `end` (`time.time()` seconds). `kind` as in `scheduler/timeline.py`.

    `other`: the request id that it waited behind or was preempted by. `tokens`: to be computed (prefill, recompute,
    swap in), or computed until then (preempted, swapped, lost). `wanted` blocks when `there` were free. `passed`:
    requests that started while it waited. `causes`: seconds of it by what the first in the queue waited for meanwhile.
    """

    kind: str
    start: float
    end: float
    other: str = ""
    tokens: int = 0
    wanted: int = 0
    there: int = 0
    passed: int = 0
    causes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTimeline:
    """The story of one sequence. Its spans lie end to end from `arrival` to `finished`, which is the time of the
    question for one that has not ended; its `reason` (as in `StreamEnd`) is "" then."""

    number: int
    request_id: str
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    arrival: float = 0.0
    first_token: float = 0.0  # 0: none yet
    finished: float = 0.0
    spans: tuple[TimelineSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The answer to `GetTimeline`; no sequences if none of that name lives or has ended lately."""

    token: int
    sequences: tuple[SequenceTimeline, ...] = ()
