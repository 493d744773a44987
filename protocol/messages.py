"""Every message on the wire, grouped by receiver. No other file defines a struct that crosses a process.

Frozen, slotted dataclasses; `codec.py` turns them into frames and back, strictly. Arrays are numpy, little-endian,
read-only after decoding. `WIRE.md` says which link carries what, in which order.

Names of things: a *key* is a frontend's (or client's) own number for a sequence, unique within that sender;
a *number* is the scheduler's own number for it, unique within an engine; a *slot* is a row of the executor's
persistent batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from .sampling import SamplingParams

# (major, minor): a different major is refused at the hello; a newer minor may add fields, which are ignored.
PROTOCOL_VERSION = (1, 0)

Int32 = Annotated[NDArray[np.int32], "<i4"]
Int64 = Annotated[NDArray[np.int64], "<i8"]
Float32 = Annotated[NDArray[np.float32], "<f4"]

_NO_INT32: NDArray[np.int32] = np.empty(0, np.int32)
_NO_INT64: NDArray[np.int64] = np.empty(0, np.int64)
_NO_FLOAT32: NDArray[np.float32] = np.empty(0, np.float32)
for _empty in (_NO_INT32, _NO_INT64, _NO_FLOAT32):
    _empty.flags.writeable = False


def _i32() -> NDArray[np.int32]:
    return _NO_INT32


def _i64() -> NDArray[np.int64]:
    return _NO_INT64


def _f32() -> NDArray[np.float32]:
    return _NO_FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """Log-probabilities of some rows, as ragged columns.

    Row j belongs to `rows[j]` (what that indexes is said where this is used) and holds `counts[j]` entries of
    `token_ids` and `values`: first the token itself, then the likeliest ones, best first. `ranks[j]` is the
    token's own rank in the vocabulary, 1 the likeliest.
    """

    rows: Int32 = field(default_factory=_i32)
    counts: Int32 = field(default_factory=_i32)
    ranks: Int32 = field(default_factory=_i32)
    token_ids: Int32 = field(default_factory=_i32)
    values: Float32 = field(default_factory=_f32)


# ---- to the scheduler, from frontends ----------------------------------------------------------------------------


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


# ---- to the scheduler, from the detokenizer ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StopFound:
    """The detokenizer has ended these streams; free what they hold. `reason`: `stop`, a stop string was seen, or
    `abort`, nobody reads them any more."""

    numbers: tuple[int, ...]
    reason: str = "stop"


# ---- to frontends, from the scheduler ----------------------------------------------------------------------------


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


# ---- to the executor, from the scheduler -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """A request takes a slot: everything the executor will ever be told about it, but for later blocks.

    `token_ids` are all its known tokens: the prompt, and after a preemption also what was generated;
    `num_prompt` of them are the prompt's. The keys of the first `cached_len` tokens are already in `block_ids`.
    `stop_token_ids` (EOS among them) can't be sampled before `params.min_tokens` tokens.
    """

    slot: int
    token_ids: Int32
    num_prompt: int
    params: SamplingParams
    seed: int
    block_ids: Int32
    cached_len: int
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the device; only what changed. Applied in the order retire, swap out, copies, swap in, admit, grow,
    work: what is copied out of the device is what it held before this step. Copies of one kind have no order.

    Work (slot, count): compute the next `count` known tokens of the slot. Where that reaches the last known token
    a new one is sampled, becomes known on the device, and is reported; otherwise (a prefill chunk) nothing is.
    """

    number: int
    retire: Int32 = field(default_factory=_i32)  # slots
    swap_out_from: Int32 = field(default_factory=_i32)  # block ids of the device
    swap_out_to: Int32 = field(default_factory=_i32)  # block ids of host memory
    copy_from: Int32 = field(default_factory=_i32)  # block ids
    copy_to: Int32 = field(default_factory=_i32)
    swap_in_from: Int32 = field(default_factory=_i32)  # block ids of host memory
    swap_in_to: Int32 = field(default_factory=_i32)  # block ids of the device
    admit: tuple[Admit, ...] = ()
    grow_slots: Int32 = field(default_factory=_i32)  # parallel to grow_blocks; several for one slot come in order
    grow_blocks: Int32 = field(default_factory=_i32)
    work_slots: Int32 = field(default_factory=_i32)  # each slot at most once; decode rows (count 1) first
    work_counts: Int32 = field(default_factory=_i32)


# ---- to the scheduler, from the executor -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorReady:
    """The first message of each life of an executor. All its slots are empty; no block holds anything."""

    info: EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens: `top.rows[j]` is the position in the prompt (1 or more)."""

    slot: int
    top: TopLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFailed:
    """This slot's work failed (a custom model raised, logits were not finite); the others went on."""

    slot: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What step `number` sampled: `tokens[i]` for `slots[i]`, in the order of the step's work."""

    number: int
    slots: Int32
    tokens: Int32
    logprobs: TopLogprobs | None = None  # rows index `slots`
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    failed: tuple[RowFailed, ...] = ()
    seconds: float = 0.0  # from the start of the step's work on the device to its end, without the swaps
    gap_seconds: float | None = None  # the device's idle time since the step before, where both only decode
    copy_seconds: float = 0.0  # on the device, for the blocks swapped out and in


# ---- to the detokenizer, from the scheduler ----------------------------------------------------------------------


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
    numbers: Int64 = field(default_factory=_i64)
    tokens: Int32 = field(default_factory=_i32)
    logprobs: TopLogprobs | None = None  # rows index `numbers`
    prompt_logprobs: tuple[StreamPromptLogprobs, ...] = ()
    ended: tuple[StreamEnd, ...] = ()


# ---- to frontends from the detokenizer, and to clients from a frontend -------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """New text of many streams; row i: `texts[i]` and `counts[i]` of `token_ids` for (`keys[i]`, `indexes[i]`).

    A row's text may lag behind its tokens (an unfinished character, a possible stop string) and catch up later.
    `logprobs.rows` index `token_ids`; `logprob_texts` are the decoded entries of `logprobs.token_ids`, in parallel.
    `ended` comes after the rows: a stream's last text precedes its end.
    """

    keys: Int64 = field(default_factory=_i64)
    indexes: Int32 = field(default_factory=_i32)
    texts: list[str] = field(default_factory=list)
    counts: Int32 = field(default_factory=_i32)
    token_ids: Int32 = field(default_factory=_i32)
    logprobs: TopLogprobs | None = None
    logprob_texts: list[str] = field(default_factory=list)
    prompt_logprobs: tuple[StreamPromptLogprobs, ...] = ()
    ended: tuple[StreamEnd, ...] = ()


# ---- between native clients and a frontend -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientHello:
    """First message of a client; answered by `ServerHello`, or by `Refused` when the major versions differ."""

    version_major: int = PROTOCOL_VERSION[0]
    version_minor: int = PROTOCOL_VERSION[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHello:
    """The frontend's answer: what it serves."""

    version_major: int = PROTOCOL_VERSION[0]
    version_minor: int = PROTOCOL_VERSION[1]
    info: EngineInfo
    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """A request of a native client: exactly one of `prompt`, `prompt_token_ids` and `chat` is given.

    `chat`: messages as in OpenAI's API (`[{"role": ..., "content": ...}, ...]`), put through the chat template.
    """

    key: int
    request_id: str
    params: SamplingParams
    prompt: str | None = None
    prompt_token_ids: Int32 | None = None
    chat: list[dict[str, Any]] | None = None
    priority: int = 0
    cache_salt: str = ""
    client: str = ""  # who asks, for fairness; "": this connection
    deadline_ms: int | None = None  # from its arrival to its first token; None: no matter when


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The client no longer wants these requests (its own keys)."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The frontend took a request: these are its prompt's tokens. Text follows in `TextBatch`es."""

    key: int
    prompt_token_ids: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request (or, with key -1, a frame) was not taken. Nothing further comes for that key."""

    key: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


# ---- between the frontends of one port -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GetFigures:
    """A frontend asks another, over that one's `client` link, for what it has counted; `token` comes back."""

    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One histogram: how many values fell into each of its buckets (the last has no upper bound), and their sum."""

    counts: Int64
    sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendFigures:
    """What one frontend has counted since its start: its share of what /metrics shows of the whole engine."""

    token: int = 0
    live: int = 0  # sequences that have not ended
    finished: dict[str, int] = field(default_factory=dict)  # sequences by reason
    histograms: dict[str, Distribution] = field(default_factory=dict)  # by metric name, without the prefix


# ---- the control link: between every actor and the supervisor ----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of each actor's life."""

    actor: str
    pid: int
    version_major: int = PROTOCOL_VERSION[0]
    version_minor: int = PROTOCOL_VERSION[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an actor is doing while it starts: `done` of `total` (0: unknown) in `phase`."""

    actor: str
    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """An actor can take work. `facts`: a few words for the log (seconds by phase, blocks, port)."""

    actor: str
    facts: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sent about once a second. `tick` counts turns of the actor's loop: alive without progress is visible."""

    actor: str
    tick: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fatal:
    """An actor's last words before it exits. `code` as in `errors.py`; `detail` may hold a traceback."""

    actor: str
    code: str
    message: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """The supervisor's order to stop: first finish what is under way for `drain_seconds`, then leave."""

    drain_seconds: float = 0.0


Message = (
    Attach
    | Submit
    | Abort
    | GetStats
    | GetTimeline
    | StopFound
    | EngineInfo
    | Stats
    | Timeline
    | Step
    | ExecutorReady
    | StepResult
    | Deliver
    | TextBatch
    | ClientHello
    | ServerHello
    | Generate
    | Cancel
    | Accepted
    | Refused
    | GetFigures
    | FrontendFigures
    | Hello
    | Progress
    | Ready
    | Heartbeat
    | Fatal
    | Shutdown
)
