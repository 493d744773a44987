"""The checks at the door: a request that is malformed or can never fit is refused, with the numbers.

Pure functions of a `Submit` and the engine's limits; must not know who runs or waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..protocol.errors import InvalidRequest
from ..protocol.lengths import too_long
from ..protocol.messages import EngineInfo
from .request import Request


@dataclass(slots=True, frozen=True, kw_only=True)
class Limits:
    """What one request may ask of this engine."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int

    @property
    def room(self) -> int:
        """Tokens that a request may have if it has the whole pool: the last one is never computed."""
        return self.num_blocks * self.block_size + 1


def limits_of(info: EngineInfo, max_prefill: int | None) -> Limits:
    """Limits of the engine that `info` describes; `max_prefill`: tokens of one step, where prompts are not cut."""
    longest = info.max_model_len if max_prefill is None else min(info.max_model_len, max_prefill)
    return Limits(
        max_model_len=longest,
        vocab_size=info.vocab_size,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
    )


def refusal(request: Request, limits: Limits) -> InvalidRequest | None:
    """Why `request` can't be served here; None if it can."""
    params, prompt, longest = request.params, request.num_prompt, limits.max_model_len
    if params.n != 1:
        return InvalidRequest(f"n must be 1 for the scheduler, got {params.n}", param="n")
    if (error := too_long(prompt, params.max_tokens, longest)) is not None:
        return error
    if params.min_tokens > longest - prompt:
        return InvalidRequest(
            f"min_tokens must be at most {longest - prompt} after a prompt of {prompt} tokens, got {params.min_tokens}",
            param="min_tokens",
        )
    return _beyond_vocabulary(request, limits) or _beyond_pool(request, limits)


def token_limit(request: Request, limits: Limits) -> int:
    """Tokens, prompt included, at which the request ends by length."""
    wanted = request.params.max_tokens
    if wanted is not None:
        return request.num_prompt + wanted
    return min(limits.max_model_len, max(limits.room, request.num_prompt + 1))


def _beyond_vocabulary(request: Request, limits: Limits) -> InvalidRequest | None:
    size, params = limits.vocab_size, request.params
    # seen as unsigned, a negative id is a very large one: one pass instead of two
    if int(request.tokens.view(np.uint32).max()) >= size:
        at = int(np.flatnonzero(request.tokens.view(np.uint32) >= size)[0])
        return InvalidRequest(
            f"prompt token {at} must be in [0, {size - 1}], got {int(request.tokens[at])}", param="prompt"
        )
    for name, ids in (("logit_bias", params.logit_bias), ("allowed_token_ids", params.allowed_token_ids or ())):
        for token in ids:
            if token >= size:
                return InvalidRequest(f"{name} must hold token ids in [0, {size - 1}], got {token}", param=name)
    return None


def _beyond_pool(request: Request, limits: Limits) -> InvalidRequest | None:
    longest = token_limit(request, limits)
    if longest <= limits.room:
        return None
    needed = -(-(longest - 1) // limits.block_size)
    return InvalidRequest(
        f"{request.num_prompt} prompt tokens and {longest - request.num_prompt} to generate need {needed} blocks of "
        f"{limits.block_size} tokens; the KV cache has {limits.num_blocks}, room for {limits.room} tokens",
        param="max_tokens" if request.num_prompt < limits.room else "prompt",
    )
