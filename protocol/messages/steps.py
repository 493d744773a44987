"""The `steps` and `results` links: the scheduler's steps for the executor, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..sampling import SamplingParams
from .arrays import Int32, TopLogprobs, no_int32
from .requests import EngineInfo


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
    retire: Int32 = field(default_factory=no_int32)  # slots
    swap_out_from: Int32 = field(default_factory=no_int32)  # block ids of the device
    swap_out_to: Int32 = field(default_factory=no_int32)  # block ids of host memory
    copy_from: Int32 = field(default_factory=no_int32)  # block ids
    copy_to: Int32 = field(default_factory=no_int32)
    swap_in_from: Int32 = field(default_factory=no_int32)  # block ids of host memory
    swap_in_to: Int32 = field(default_factory=no_int32)  # block ids of the device
    admit: tuple[Admit, ...] = ()
    grow_slots: Int32 = field(default_factory=no_int32)  # parallel to grow_blocks; several for one slot come in order
    grow_blocks: Int32 = field(default_factory=no_int32)
    work_slots: Int32 = field(default_factory=no_int32)  # each slot at most once; decode rows (count 1) first
    work_counts: Int32 = field(default_factory=no_int32)


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
    steps_to_record: int = 0  # that are launched operation by operation until they are
