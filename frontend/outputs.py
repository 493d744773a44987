"""What a request gives back to a Python caller, in vLLM's shapes.

Owns `RequestOutput` and its parts; must not know sockets, keys or how text is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Natural-log probability of one token at one position. `rank`: 1 is the likeliest of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When a request passed its stations: `time.time()` seconds, None where it has not been yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n sequences: all of it so far, or what is new, as the request's `output_kind` says.

    `logprobs[i]` maps token ids to `Logprob` at the position of `token_ids[i]`: the chosen token first.
    `finish_reason`: None while it runs, then `stop`, `length` or `abort`. `stop_reason`: the stop string or stop
    token id that ended it, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request. `prompt_logprobs[i]` belongs to prompt token i; the first is None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)
