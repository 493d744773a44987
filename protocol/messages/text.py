"""The `tokens` and `text` links: from the scheduler to the detokenizer, from there to frontends and clients."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..sampling import SamplingParams
from .arrays import Int32, Int64, TopLogprobs, no_int32, no_int64


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    """A sequence was accepted; its tokens will come under `number`. `context_token_ids`: the prompt's last few.

    `prompt_tokens` and `arrival` are for the `StreamEnd` of a stop string, which the detokenizer makes by itself.
    """

    number: int
    frontend: str
    key: int
    params: SamplingParams
    context_token_ids: Int32
    prompt_tokens: int = 0
    arrival: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEnd:
    """The one terminal message of a sequence.

    `reason`: `stop`, `length`, `abort`, `rejected` or `error`. `code`, `message`, `param` say what was wrong in the
    last two. `stop_reason` is the stop string or stop token id, None for EOS. Times are `time.time()` seconds,
    0 where that point was never reached.
    """

    key: int  # the scheduler's number towards the detokenizer, the frontend's key from there on, then the client's
    index: int = 0  # which of a request's n sequences
    reason: str
    stop_reason: str | int | None = None
    code: str = ""
    message: str = ""
    param: str | None = None
    retry_after: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    arrival: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPromptLogprobs:
    """Prompt log-probabilities of one stream; `top.rows` are positions. A prompt's may come in several parts.

    `texts` are the decoded entries of `top.token_ids`, in parallel: empty until the detokenizer fills them in.
    """

    key: int
    top: TopLogprobs
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """New streams, new tokens, ended streams: in that order, one message a step.

    `tokens[i]` belongs to stream `numbers[i]`; a stream may have several, in order. An end that the detokenizer
    has already made itself (a stop string) is passed over.
    """

    opened: tuple[OpenStream, ...] = ()
    numbers: Int64 = field(default_factory=no_int64)
    tokens: Int32 = field(default_factory=no_int32)
    logprobs: TopLogprobs | None = None  # rows index `numbers`
    prompt_logprobs: tuple[StreamPromptLogprobs, ...] = ()
    ended: tuple[StreamEnd, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """New text of many streams; row i: `texts[i]` and `counts[i]` of `token_ids` for (`keys[i]`, `indexes[i]`).

    A row's text may lag behind its tokens (an unfinished character, a possible stop string) and catch up later.
    `logprobs.rows` index `token_ids`; `logprob_texts` are the decoded entries of `logprobs.token_ids`, in parallel.
    `ended` comes after the rows: a stream's last text precedes its end.
    """

    keys: Int64 = field(default_factory=no_int64)
    indexes: Int32 = field(default_factory=no_int32)
    texts: list[str] = field(default_factory=list)
    counts: Int32 = field(default_factory=no_int32)
    token_ids: Int32 = field(default_factory=no_int32)
    logprobs: TopLogprobs | None = None
    logprob_texts: list[str] = field(default_factory=list)
    prompt_logprobs: tuple[StreamPromptLogprobs, ...] = ()
    ended: tuple[StreamEnd, ...] = ()
