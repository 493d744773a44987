"""Refusals at the door: each names the field, the value and the limit."""

from __future__ import annotations

import pytest

from .fake_executor import make_info
from .harness import Harness


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "words"),
    [
        ([], {}, "prompt", "at least one token, got none"),
        ([1] * 128, {"max_tokens": 1}, "prompt", "128 tokens.*context length is 128"),
        ([1] * 100, {"max_tokens": 29}, "max_tokens", "at most 28, got 29.*100 tokens.*128"),
        ([1] * 100, {"max_tokens": None, "min_tokens": 29}, "min_tokens", "at most 28 .*got 29"),
        ([1, 2, 100, 3], {}, "prompt", r"prompt token 2 must be in \[0, 99\], got 100"),
        ([1, -5], {}, "prompt", r"prompt token 1 must be in \[0, 99\], got -5"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias", r"\[0, 99\], got 100"),
        ([1], {"allowed_token_ids": (7, 100)}, "allowed_token_ids", r"\[0, 99\], got 100"),
        ([1], {"n": 2}, "n", "must be 1 .* got 2"),
        ([1] * 20, {"max_tokens": 40}, "max_tokens", "20 prompt tokens and 40 .* need 15 blocks of 4 .* has 10.* 41"),
        ([1] * 50, {"max_tokens": 1}, "prompt", "need 13 blocks"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(
    prompt: list[int], fields: dict[str, object], param: str, words: str
) -> None:
    few = "blocks" in words
    harness = Harness(make_info(num_blocks=10 if few else 64))
    harness.submit(1, prompt, **fields)
    end = harness.ends[1]
    assert (end.reason, end.code, end.param) == ("rejected", "invalid_request", param)
    import re

    assert re.search(words, end.message), end.message
    assert harness.core.idle


def test_what_fills_the_pool_to_its_last_place_is_served() -> None:
    harness = Harness(make_info(num_blocks=10))
    harness.submit(1, [1] * 20, max_tokens=21)
    harness.submit(2, [1] * 40, max_tokens=1)
    harness.drain()
    assert {end.reason for end in harness.ends.values()} == {"length"}


def test_without_max_tokens_a_request_has_what_context_and_pool_have_room_for() -> None:
    harness = Harness(make_info(num_blocks=10, max_model_len=30))
    harness.submit(1, [1] * 20, max_tokens=None)
    harness.drain()
    assert len(harness.tokens[1]) == 10
    harness = Harness(make_info(num_blocks=10, max_model_len=128))
    harness.submit(1, [1] * 20, max_tokens=None)
    harness.drain()
    assert len(harness.tokens[1]) == 21


def test_a_full_queue_refuses_a_request_with_a_retry_hint() -> None:
    harness = Harness(max_num_queued_reqs=2)
    for key in range(3):
        harness.submit(key, [1, 2], max_tokens=3)
    end = harness.ends[2]
    assert (end.reason, end.code) == ("rejected", "overloaded")
    assert end.retry_after is not None and end.retry_after > 0
    assert "2 requests are waiting" in end.message
    harness.drain()
    assert harness.ends[0].reason == harness.ends[1].reason == "length"


def test_a_stop_id_beyond_the_vocabulary_is_not_passed_to_the_executor() -> None:
    harness = Harness()
    harness.submit(1, [1, 2], max_tokens=3, stop_token_ids=(5, 500))
    harness.schedule()
    assert harness.steps[0].admit[0].stop_token_ids == (5,)
