"""The check of prompt and output against the context."""

from __future__ import annotations

import pytest
from fast_inference.protocol.lengths import too_long


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "words"),
    [
        (0, 1, "prompt", "at least one token, got none"),
        (10, None, "prompt", "prompt has 10 tokens, but the context length is 10"),
        (11, 1, "prompt", "prompt has 11 tokens"),
        (7, 4, "their_name", "their_name must be at most 3, got 4: the prompt has 7 tokens.* context length is 10"),
    ],
)
def test_what_has_no_room_is_told_with_field_value_and_limit(
    prompt: int, max_tokens: int | None, param: str, words: str
) -> None:
    error = too_long(prompt, max_tokens, 10, "their_name")
    assert error is not None and error.param == param
    with pytest.raises(type(error), match=words):
        raise error


@pytest.mark.parametrize(("prompt", "max_tokens"), [(1, 9), (9, 1), (9, None)])
def test_what_fills_the_context_to_its_last_token_has_room(prompt: int, max_tokens: int | None) -> None:
    assert too_long(prompt, max_tokens, 10) is None
