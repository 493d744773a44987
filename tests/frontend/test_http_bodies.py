"""Random and mutated bodies: every answer is an answer, never a 500, and nothing is left running."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fast_inference.frontend.errors_http import TYPE_OF_STATUS, error_headers, error_object
from fast_inference.frontend.schemas import ChatBody, CompletionBody, parse_body
from fast_inference.frontend.tokenizer import Tokenizer, load_tokenizer
from fast_inference.protocol import errors
from fast_inference.protocol.config import EngineConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .http_double import serving
from .made_models import make_model_folder

FIELDS = sorted(set(CompletionBody.model_fields) | set(ChatBody.model_fields) | {"best_of", "tools", "unheard_of"})

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
GOOD: dict[str, Any] = {"prompt": "hello", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = load_tokenizer(EngineConfig(model=make_model_folder(tmp_path_factory.mktemp("model"))))
    assert loaded is not None
    return loaded


async def post_raw(tokenizer: Tokenizer, path: str, raw: bytes) -> tuple[int, str]:
    async with serving(tokenizer) as server:
        response = await asyncio.wait_for(server.http.post(path, content=raw), 20)
        for _ in range(50):
            if len(server.link.table) == 0:
                break
            await asyncio.sleep(0.002)
        assert len(server.link.table) == 0
        return response.status_code, response.text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
)
def test_random_values_in_known_fields_are_never_a_500(tokenizer: Tokenizer, path: str, wrong: dict[str, Any]) -> None:
    status, text = asyncio.run(post_raw(tokenizer, path, json.dumps({**GOOD, **wrong}).encode()))
    assert status in (200, 400, 404), text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3)), max_size=4))
def test_mutated_bytes_are_never_a_500(tokenizer: Tokenizer, cuts: list[tuple[int, bytes]]) -> None:
    raw = bytearray(json.dumps({**GOOD, "stop": ["x"], "logit_bias": {"5": 1}, "stream": False}).encode())
    for at, new in cuts:
        raw[at % len(raw) : at % len(raw) + len(new)] = new
    status, text = asyncio.run(post_raw(tokenizer, "/v1/completions", bytes(raw)))
    assert status in (200, 400, 404), text


def every_error(base: type[errors.EngineError]) -> list[type[errors.EngineError]]:
    return [base] + [found for sub in base.__subclasses__() for found in every_error(sub)]


@pytest.mark.parametrize("kind", every_error(errors.EngineError))
def test_every_error_has_an_http_shape(kind: type[errors.EngineError]) -> None:
    error = kind("what happened", param="field")
    shape = error_object(error)["error"]
    assert shape["type"] == TYPE_OF_STATUS[kind.status]
    assert shape["code"] == kind.status and shape["param"] == "field" and shape["message"] == "what happened"
    assert ("retry-after" in error_headers(error)) == (kind.status in (429, 503))


def test_a_null_field_is_a_field_not_given() -> None:
    nothing = dict.fromkeys(CompletionBody.model_fields)
    body = parse_body(CompletionBody, json.dumps(nothing).encode())
    assert body.temperature is None and body.max_tokens is None
