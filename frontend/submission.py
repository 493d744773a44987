"""From a request to its sequences: checks against the engine's limits, and the split into one `Submit` each.

Pure: randomness is handed in. Must not know HTTP, sockets or the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..protocol.errors import InvalidRequest
from ..protocol.lengths import too_long
from ..protocol.messages import EngineInfo, Submit
from ..protocol.sampling import SEED_LIMIT, SamplingParams

MAX_SEQUENCES_PER_REQUEST = 4096
MAX_NAME = 1024  # characters of a cache salt, a client's name
MAX_DEADLINE_MS = 86_400_000  # a day


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request ready to run: every prompt is generated for `params.n` times; sequence p * n + i is the i-th of
    prompt p."""

    request_id: str
    prompts: Sequence[Sequence[int]]  # token ids; an int32 array does for a list
    params: SamplingParams
    priority: int = 0
    client: str = ""
    cache_salt: str = ""
    deadline_ms: int | None = None  # from the scheduler's receipt to the first token

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.params.n


def check_request(request: Request, info: EngineInfo) -> None:
    """Raises `InvalidRequest` for what this engine can't do, naming field, value and limit."""
    if request.sequences > MAX_SEQUENCES_PER_REQUEST:
        raise InvalidRequest(
            f"prompts x n must be at most {MAX_SEQUENCES_PER_REQUEST}, got {request.sequences}", param="prompt"
        )
    for ids in request.prompts:
        check_prompt(ids, info)
    params = request.params
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if token >= info.vocab_size:
                raise InvalidRequest(f"{name} holds token id {token}; the vocabulary has {info.vocab_size}", param=name)
    for name, value in (("cache_salt", request.cache_salt), ("user", request.client)):
        if len(value) > MAX_NAME:
            raise InvalidRequest(f"{name} may have {MAX_NAME} characters, got {len(value)}", param=name)
    if not -(2**31) <= request.priority < 2**31:
        raise InvalidRequest(f"priority must be in [-2^31, 2^31), got {request.priority}", param="priority")
    if request.deadline_ms is not None and not 1 <= request.deadline_ms <= MAX_DEADLINE_MS:
        raise InvalidRequest(
            f"deadline_ms must be in [1, {MAX_DEADLINE_MS}], got {request.deadline_ms}", param="deadline_ms"
        )


def shortened(ids: Sequence[int], params: SamplingParams, info: EngineInfo) -> Sequence[int]:
    """The end of a prompt that `truncate_prompt_tokens` leaves; -1 leaves as much as `max_tokens` has room beside."""
    keep = params.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep < 0:
        keep = max(1, info.max_model_len - (params.max_tokens or 1))
    return ids[-keep:]


def check_prompt(ids: Sequence[int], info: EngineInfo) -> None:
    """A prompt must hold at least one token, fit the context with room for one more, and be in the vocabulary."""
    if (error := too_long(len(ids), None, info.max_model_len)) is not None:
        raise error
    low, high = (int(ids.min()), int(ids.max())) if isinstance(ids, np.ndarray) else (min(ids), max(ids))
    if low < 0 or high >= info.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"prompt token id must be in [0, {info.vocab_size}), got {wrong}", param="prompt")


def submits(
    request: Request, keys: Sequence[int], eos_token_ids: tuple[int, ...], draw: Callable[[], int]
) -> list[Submit]:
    """One `Submit` for each key. Seeds are the request's seed plus i for the i-th of n, or come from `draw`
    (63 random bits). Prompt log-probabilities are asked for once a prompt."""
    params, n = request.params, request.params.n
    first = params if n == 1 else params.replace(n=1)
    others = first if first.prompt_logprobs is None else first.replace(prompt_logprobs=None)
    out: list[Submit] = []
    for number, key in enumerate(keys):
        which, copy = divmod(number, n)
        out.append(
            Submit(
                key=key,
                request_id=request.request_id if len(keys) == 1 else f"{request.request_id}-{number}",
                prompt_token_ids=np.asarray(request.prompts[which], np.int32),
                params=first if copy == 0 else others,
                seed=draw() if params.seed is None else (params.seed + copy) % SEED_LIMIT,
                eos_token_ids=eos_token_ids,
                priority=request.priority,
                client=request.client,
                cache_salt=request.cache_salt,
                deadline_ms=request.deadline_ms,
            )
        )
    return out
