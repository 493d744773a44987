"""How one request wants its tokens chosen: `SamplingParams`, with vLLM's field names and defaults.

Owns the fields and the check of their ranges; must not know tokenizers or tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from .errors import InvalidRequest

MAX_N = 64
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 64
MAX_TOKENS_LIMIT = 2**31 - 1
SEED_LIMIT = 2**63


class RequestOutputKind(IntEnum):
    """What each output of a stream carries: all so far, only what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Raises `InvalidRequest` on construction for a value out of range, naming field, value and range.
    """

    n: int = 1  # sequences to generate for the prompt
    presence_penalty: float = 0.0  # subtracted once from the logit of a token already generated
    frequency_penalty: float = 0.0  # subtracted per occurrence
    repetition_penalty: float = 1.0  # divides a positive, multiplies a negative logit; counts the prompt too
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0  # least probability, as a share of the likeliest token's
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as the context has room for
    min_tokens: int = 0
    logprobs: int | None = None  # how many alternatives per generated token
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None  # keep only the prompt's last tokens; -1: as many as there is room for
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    output_kind: int = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        # People pass a str or a list where a tuple is held, and string keys in logit_bias (OpenAI's JSON).
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if value is None and name != "allowed_token_ids":
                object.__setattr__(self, name, ())
            elif value is not None and not isinstance(value, tuple):
                try:
                    object.__setattr__(self, name, tuple(value))
                except TypeError:
                    raise InvalidRequest(f"{name} must be a list, got {value!r}", param=name) from None
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        _check(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number, got {value!r}", param=name)
    inside = (low < value if low_open else low <= value) and value <= high
    if not inside or not math.isfinite(value):
        left = "(" if low_open else "["
        raise InvalidRequest(f"{name} must be in {left}{low:g}, {high:g}], got {value!r}", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {value!r}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be in [{low}, {high}], got {value}", param=name)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, got {value!r}", param=name)


def _token_ids(name: str, value: tuple[int, ...]) -> None:
    for token in value:
        _integer(f"{name} entry", token, 0, 2**31 - 1)


def _check(p: SamplingParams) -> None:
    _integer("n", p.n, 1, MAX_N)
    _number("presence_penalty", p.presence_penalty, -2, 2)
    _number("frequency_penalty", p.frequency_penalty, -2, 2)
    _number("repetition_penalty", p.repetition_penalty, 0, 100, low_open=True)
    _number("temperature", p.temperature, 0, 100)
    _number("top_p", p.top_p, 0, 1, low_open=True)
    _integer("top_k", p.top_k, -1, 2**31 - 1)
    _number("min_p", p.min_p, 0, 1)
    if p.seed is not None:
        _integer("seed", p.seed, -SEED_LIMIT, SEED_LIMIT - 1)
    if p.max_tokens is not None:
        _integer("max_tokens", p.max_tokens, 1, MAX_TOKENS_LIMIT)
    _integer("min_tokens", p.min_tokens, 0, MAX_TOKENS_LIMIT)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens, got {p.min_tokens} > {p.max_tokens}", param="min_tokens"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(p, name) is not None:
            _integer(name, getattr(p, name), 0, MAX_LOGPROBS)
    if p.truncate_prompt_tokens is not None and p.truncate_prompt_tokens != -1:
        _integer("truncate_prompt_tokens", p.truncate_prompt_tokens, 1, MAX_TOKENS_LIMIT)
    for name in (
        "include_stop_str_in_output",
        "ignore_eos",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    ):
        _flag(name, getattr(p, name))
    _check_stop(p)
    _token_ids("stop_token_ids", p.stop_token_ids)
    if p.allowed_token_ids is not None:
        if not p.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty", param="allowed_token_ids")
        _token_ids("allowed_token_ids", p.allowed_token_ids)
    _check_logit_bias(p)
    _integer("output_kind", p.output_kind, 0, 2)


def _check_stop(p: SamplingParams) -> None:
    if len(p.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop may hold at most {MAX_STOP_STRINGS} strings, got {len(p.stop)}", param="stop")
    for text in p.stop:
        if not isinstance(text, str) or not text or len(text) > MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"stop must hold strings of 1 to {MAX_STOP_LENGTH} characters, got {text!r:.80}", param="stop"
            )
    if p.stop and not p.detokenize:
        raise InvalidRequest("stop strings need detokenize=True", param="stop")


def _check_logit_bias(p: SamplingParams) -> None:
    if not isinstance(p.logit_bias, dict):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, got {p.logit_bias!r:.80}", param="logit_bias")
    clean: dict[int, float] = {}
    for key, bias in p.logit_bias.items():
        try:
            token = int(key) if isinstance(key, str) else key
        except ValueError:
            raise InvalidRequest(f"logit_bias key must be a token id, got {key!r}", param="logit_bias") from None
        _integer("logit_bias key", token, 0, 2**31 - 1)
        _number("logit_bias value", bias, -100, 100)
        clean[token] = float(bias)
    object.__setattr__(p, "logit_bias", clean)
