"""How many tokens a context has room for: one check of prompt and output, and its words, for frontend and scheduler.

Pure; must not know where a prompt came from.
"""

from __future__ import annotations

from .errors import InvalidRequest


def too_long(prompt: int, max_tokens: int | None, longest: int, param: str = "max_tokens") -> InvalidRequest | None:
    """Why a prompt of so many tokens, with up to `max_tokens` to follow, has no room in a context of `longest`; None if
    it has. `param`: what the caller calls `max_tokens`."""
    if prompt == 0:
        return InvalidRequest("prompt must hold at least one token, got none", param="prompt")
    if prompt >= longest:
        return InvalidRequest(
            f"prompt has {prompt} tokens, but the context length is {longest} tokens and at least one must be left to "
            "generate",
            param="prompt",
        )
    if max_tokens is not None and prompt + max_tokens > longest:
        return InvalidRequest(
            f"{param} must be at most {longest - prompt}, got {max_tokens}: the prompt has {prompt} tokens, and the "
            f"context length is {longest} tokens",
            param=param,
        )
    return None
