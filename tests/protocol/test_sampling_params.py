"""`SamplingParams`: a value out of range is refused with field, value and range; what people pass is taken."""

from __future__ import annotations

import dataclasses
import math

import pytest
from fast_inference.protocol.errors import InvalidRequest
from fast_inference.protocol.sampling import MAX_STOP_LENGTH, MAX_STOP_STRINGS, RequestOutputKind, SamplingParams

WRONG = [
    ("n", 0, "[1, 64]"),
    ("n", 65, "[1, 64]"),
    ("n", True, "integer"),
    ("n", 1.5, "integer"),
    ("presence_penalty", 2.1, "[-2, 2]"),
    ("presence_penalty", "1", "number"),
    ("frequency_penalty", -2.1, "[-2, 2]"),
    ("repetition_penalty", 0, "(0, 100]"),
    ("temperature", -0.1, "[0, 100]"),
    ("temperature", math.nan, "[0, 100]"),
    ("temperature", math.inf, "[0, 100]"),
    ("top_p", 0, "(0, 1]"),
    ("top_p", 1.1, "(0, 1]"),
    ("top_k", -2, "[-1, 2147483647]"),
    ("min_p", -0.1, "[0, 1]"),
    ("seed", 2**63, "[-9223372036854775808, 9223372036854775807]"),
    ("seed", "x", "integer"),
    ("stop", [""], "1 to 1024 characters"),
    ("stop", ["x" * (MAX_STOP_LENGTH + 1)], "1 to 1024 characters"),
    ("stop", [3], "1 to 1024 characters"),
    ("stop", ["x"] * (MAX_STOP_STRINGS + 1), "at most 64"),
    ("stop", 3, "list"),
    ("stop_token_ids", [-1], "[0, 2147483647]"),
    ("stop_token_ids", 7, "list"),
    ("include_stop_str_in_output", 1, "true or false"),
    ("ignore_eos", "no", "true or false"),
    ("max_tokens", 0, "[1, 2147483647]"),
    ("min_tokens", -1, "[0, 2147483647]"),
    ("min_tokens", 17, "at most max_tokens"),
    ("logprobs", 65, "[0, 64]"),
    ("prompt_logprobs", -1, "[0, 64]"),
    ("truncate_prompt_tokens", 0, "[1, 2147483647]"),
    ("detokenize", None, "true or false"),
    ("skip_special_tokens", 0, "true or false"),
    ("spaces_between_special_tokens", "", "true or false"),
    ("logit_bias", {"x": 1}, "token id"),
    ("logit_bias", {1: 101}, "[-100, 100]"),
    ("logit_bias", {-1: 1}, "[0, 2147483647]"),
    ("logit_bias", [1], "map"),
    ("allowed_token_ids", [], "not be empty"),
    ("allowed_token_ids", ["a"], "integer"),
    ("output_kind", 3, "[0, 2]"),
    ("output_kind", "delta", "integer"),
    ("output_kind", None, "integer"),
]


@pytest.mark.parametrize(("field", "value", "limit"), WRONG, ids=lambda value: repr(value)[:24])
def test_a_value_out_of_range_is_refused_with_field_and_range(field, value, limit):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    message = caught.value.message
    assert field in message and limit in message
    assert caught.value.param is not None and caught.value.param.startswith(field)


def test_every_field_is_checked():
    assert {field for field, _, _ in WRONG} == {f.name for f in dataclasses.fields(SamplingParams)}


def test_what_people_pass_is_taken():
    params = SamplingParams(stop="END", stop_token_ids=[1], logit_bias={"5": 1}, allowed_token_ids=[3], top_k=-1)
    assert params.stop == ("END",)
    assert params.stop_token_ids == (1,)
    assert params.logit_bias == {5: 1.0}
    assert params.allowed_token_ids == (3,)
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()
    assert SamplingParams(output_kind=RequestOutputKind.DELTA).output_kind == 1


def test_stop_strings_need_text():
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_a_copy_is_checked_again():
    assert SamplingParams(temperature=0).replace(n=2) == SamplingParams(temperature=0, n=2)
    assert SamplingParams(temperature=0).greedy
    with pytest.raises(InvalidRequest):
        SamplingParams().replace(n=0)
