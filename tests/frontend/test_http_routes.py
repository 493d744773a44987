"""Every HTTP route on top of an engine double: shapes, streams, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fast_inference.frontend import http_app
from fast_inference.frontend.tokenizer import Tokenizer, load_tokenizer
from fast_inference.protocol.config import EngineConfig
from fast_inference.protocol.messages import StreamEnd

from .engine_double import EngineDouble
from .http_double import Server, serving
from .made_models import make_model_folder

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("model")
    loaded = load_tokenizer(EngineConfig(model=make_model_folder(folder)))
    assert loaded is not None
    yield loaded
    loaded.close()


def text_of(events: list[Any], index: int = 0) -> str:
    """The text that a stream's events add up to for one choice."""
    out = ""
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                out += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return out


# ---- completions -------------------------------------------------------------------------------------------------


async def test_a_completion_has_openais_shape(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        response = await server.post(TEXT, model="double", prompt="hello world", max_tokens=3)
        assert response.status_code == 200
        body = response.json()
        assert body["id"] == "cmpl-" + response.headers["x-request-id"]
        assert body["object"] == "text_completion" and body["model"] == "double"
        assert body["choices"] == [
            {"index": 0, "text": " w7 w8 w9", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ]
        assert body["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 3},
        }


async def test_max_tokens_is_16_unless_given_and_the_rest_of_the_context_when_null(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        body = (await server.post(TEXT, prompt="hello")).json()
        assert body["usage"]["completion_tokens"] == 16
        body = (await server.post(TEXT, prompt="hello", max_tokens=None)).json()
        assert body["usage"]["completion_tokens"] == 127
        body = (await server.post(CHAT, messages=HELLO)).json()
        assert body["usage"]["total_tokens"] == 128


async def test_a_prompt_is_shortened_from_its_beginning_on_request(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        ids = list(range(5, 205))  # the context has room for 128
        answer = await server.post(TEXT, prompt=ids, max_tokens=2, truncate_prompt_tokens=3, return_token_ids=True)
        assert answer.json()["choices"][0]["prompt_token_ids"] == ids[-3:]
        assert answer.json()["usage"]["prompt_tokens"] == 3
        answer = await server.post(TEXT, prompt=ids, max_tokens=28, truncate_prompt_tokens=-1)
        assert answer.json()["usage"] | {"prompt_tokens_details": None} == {
            "prompt_tokens": 100, "completion_tokens": 28, "total_tokens": 128, "prompt_tokens_details": None
        }  # fmt: skip
        text = "hello world " * 1000
        whole = tokenizer.encode(text)
        answer = await server.post(TEXT, prompt=text, max_tokens=1, truncate_prompt_tokens=4, echo=True)
        assert answer.json()["choices"][0]["text"] == tokenizer.decode(whole[-4:]) + " w7"
        messages = [{"role": "user", "content": text}]
        answer = await server.post(CHAT, messages=messages, max_tokens=1, truncate_prompt_tokens=5)
        assert answer.json()["usage"]["prompt_tokens"] == 5
        assert [len(submit.prompt_token_ids) for submit in server.engine.submits] == [3, 100, 4, 5]
        answer = await server.post(TEXT, prompt=ids, truncate_prompt_tokens=150)
        assert answer.status_code == 400 and "prompt has 150 tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [["hello", "world hello"], [[4, 5, 6], [7]], ["hello", [7]]])
async def test_several_prompts_times_n_are_numbered_through(tokenizer: Tokenizer, prompt: list[Any]) -> None:
    async with serving(tokenizer) as server:
        body = (await server.post(TEXT, prompt=prompt, n=2, max_tokens=1, seed=40)).json()
        assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
        first, second, third, _ = server.engine.submits
        assert first.prompt_token_ids.tolist() == second.prompt_token_ids.tolist()
        assert first.prompt_token_ids.tolist() != third.prompt_token_ids.tolist()
        assert [s.seed for s in server.engine.submits] == [40, 41, 40, 41]
        assert {s.params.n for s in server.engine.submits} == {1}


async def test_seeds_are_drawn_where_none_is_given(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        await server.post(TEXT, prompt=[5], n=3, max_tokens=1)
        seeds = {s.seed for s in server.engine.submits}
        assert len(seeds) == 3 and all(0 <= seed < 2**63 for seed in seeds)


async def test_a_streamed_completion_adds_up_to_the_whole_one(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        events = await server.events(TEXT, prompt="hello", max_tokens=5, n=2)
        assert text_of(events, 0) == text_of(events, 1) == " w7 w8 w9 w10 w11"
        reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
        assert reasons == ["length", "length"]
        assert len({e["id"] for e in events}) == 1
        assert all(e["object"] == "text_completion" for e in events)


async def test_the_usage_chunk_comes_last_with_no_choices(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        for path, prompt in ((TEXT, {"prompt": "hello"}), (CHAT, {"messages": HELLO})):
            events = await server.events(path, max_tokens=4, stream_options={"include_usage": True}, **prompt)
            assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 4
            assert all("usage" not in e for e in events[:-1])
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = await server.events(path, max_tokens=4, stream_options=options, **prompt)
            counts = [e["usage"]["completion_tokens"] for e in events if "usage" in e]
            assert counts == sorted(counts) and counts[-1] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_the_completion(tokenizer: Tokenizer, stream: bool) -> None:
    async with serving(tokenizer) as server:
        for prompt in ("hello world", tokenizer.encode("hello world")):
            if stream:
                text = text_of(await server.events(TEXT, prompt=prompt, echo=True, max_tokens=2))
            else:
                text = (await server.post(TEXT, prompt=prompt, echo=True, max_tokens=2)).json()["choices"][0]["text"]
            assert text == "hello world w7 w8"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_the_prompt(tokenizer: Tokenizer, stream: bool) -> None:
    async with serving(tokenizer) as server:
        asked: dict[str, Any] = {"prompt": "hello world", "echo": True, "logprobs": 1, "max_tokens": 2}
        if stream:
            parts = [c["logprobs"] for e in await server.events(TEXT, **asked) for c in e["choices"]]
            logprobs = {name: [x for part in parts for x in part[name]] for name in parts[0]}
        else:
            logprobs = (await server.post(TEXT, **asked)).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["hello", " world", " w7", " w8"]
        assert logprobs["token_logprobs"] == [None, -1.5, -0.5, -0.5]
        assert logprobs["text_offset"] == [0, 5, 11, 14]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][2] == {" w7": -0.5, " w1": -1.0}


async def test_echo_with_no_new_tokens_scores_the_prompt(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        body = (await server.post(TEXT, prompt="hello world", echo=True, logprobs=0, max_tokens=0)).json()
        [choice] = body["choices"]
        assert choice["text"] == "hello world" and choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"] == [None, -1.5]
        assert body["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_and_token_ids_come_on_request(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        asked: dict[str, Any] = {"prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 2}
        [choice] = (await server.post(TEXT, prompt=[268, 267], **asked)).json()["choices"]
        assert choice["token_ids"] == [7, 8] and choice["prompt_token_ids"] == [268, 267]
        assert choice["prompt_logprobs"][0] is None
        assert choice["prompt_logprobs"][1]["267"] == {"logprob": -1.5, "rank": 1, "decoded_token": " world"}
        body = (await server.post(CHAT, messages=HELLO, **asked)).json()
        assert body["choices"][0]["token_ids"] == [7, 8]
        assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
        events = await server.events(TEXT, prompt=[268, 267], **asked)
        assert [t for e in events for c in e["choices"] for t in c["token_ids"]] == [7, 8]
        assert events[0]["choices"][0]["prompt_token_ids"] == [268, 267]


async def test_only_the_first_of_n_sequences_scores_the_prompt(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        asked: dict[str, Any] = {"prompt": [5, 6], "n": 2, "prompt_logprobs": 1, "max_tokens": 1}
        choices = (await server.post(TEXT, **asked)).json()["choices"]
        assert [s.params.prompt_logprobs for s in server.engine.submits] == [1, None]
        assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]
        assert choices[0]["prompt_logprobs"][1] is not None
        events = await server.events(TEXT, **asked)
        shown = [c["prompt_logprobs"] for e in events for c in e["choices"] if "prompt_logprobs" in c]
        assert shown == [choices[0]["prompt_logprobs"]] * 2


async def test_a_sibling_waits_for_the_prompts_score(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        server.engine.silent = True
        asking = asyncio.ensure_future(server.events(TEXT, prompt=[268, 267], n=2, echo=True, logprobs=0, max_tokens=1))
        while len(server.engine.running) < 2:
            await asyncio.sleep(0.001)
        server.engine.silent = False
        later = server.engine.running.pop(server.engine.submits[0].key)
        server.turn()  # the sibling alone has its token
        await asyncio.sleep(0.01)
        server.engine.running[later.submit.key] = later
        server.engine._new.append(later.submit.key)
        events = await asking
        for index in (0, 1):
            [choice] = [c for e in events for c in e["choices"] if c["index"] == index]
            assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -0.5]
            assert choice["text"] == " hello world w7"


async def test_a_stop_string_and_the_end_token_end_a_completion(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        [choice] = (await server.post(TEXT, prompt="hello", stop=[" w9"])).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" w7 w8", "stop", " w9")
    async with serving(tokenizer, engine=EngineDouble(first_token=0)) as server:
        [choice] = (await server.post(TEXT, prompt="hello")).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" w0", "stop", None)


async def test_every_sampling_field_reaches_the_scheduler(tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "stop": ["x"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 1,
        "max_tokens": 2,
        "logprobs": 2,
        "skip_special_tokens": False,
        "logit_bias": {"5": -1},
        "allowed_token_ids": [7, 8, 9],
    }
    async with serving(tokenizer) as server:
        more = {"priority": 3, "user": "u", "cache_salt": "s", "request_id": "mine", "seed": -1, "deadline_ms": 250}
        response = await server.post(TEXT, prompt=[5], **fields, **more)
        assert response.status_code == 200, response.text
        assert response.headers["x-request-id"] == "mine"
        [submit] = server.engine.submits
        expected = {**fields, "stop": ("x",), "stop_token_ids": (9,), "logit_bias": {5: -1.0}}
        expected["allowed_token_ids"] = (7, 8, 9)
        assert {name: getattr(submit.params, name) for name in fields} == expected
        assert (submit.priority, submit.client, submit.cache_salt, submit.request_id) == (3, "u", "s", "cmpl-mine")
        assert submit.seed == 2**63 - 1 and submit.eos_token_ids == (1,) and submit.deadline_ms == 250


async def test_the_models_own_sampling_values_fill_what_is_left_open(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, defaults={"temperature": 0.6, "top_k": 20}) as server:
        await server.post(TEXT, prompt=[5], max_tokens=1, top_k=3)
        params = server.engine.submits[0].params
        assert (params.temperature, params.top_k) == (0.6, 3)


# ---- chat --------------------------------------------------------------------------------------------------------


async def test_a_chat_completion_has_openais_shape(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        response = await server.post(CHAT, model="double", messages=HELLO, max_completion_tokens=2)
        body = response.json()
        assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
        [choice] = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": " w7 w8", "refusal": None}
        assert choice["finish_reason"] == "length"
        prompt = server.engine.submits[0].prompt_token_ids.tolist()
        assert tokenizer.decode(prompt) == "<|im|>user: hello\n<|im|>assistant: "


async def test_chat_logprobs_name_token_bytes_and_alternatives(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
        [choice] = (await server.post(CHAT, **asked)).json()["choices"]
        [content] = choice["logprobs"]["content"]
        assert content["token"] == " w7" and content["bytes"] == list(b" w7") and content["logprob"] == -0.5
        assert [t["token"] for t in content["top_logprobs"]] == [" w1", " w2"]
        events = await server.events(CHAT, **asked)
        [streamed] = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
        assert streamed == choice["logprobs"]


async def test_a_streamed_chat_opens_each_choice_with_its_role(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        events = await server.events(CHAT, messages=HELLO, max_tokens=3, n=2)
        for index in (0, 1):
            deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == index]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert text_of(events, index) == " w7 w8 w9"
        assert all(e["object"] == "chat.completion.chunk" for e in events)


async def test_content_parts_of_text_are_joined_and_others_refused(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
        assert (await server.post(CHAT, messages=[{"role": "user", "content": parts}], max_tokens=1)).status_code == 200
        assert "hello\nworld" in tokenizer.decode(server.engine.submits[0].prompt_token_ids.tolist())
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        response = await server.post(CHAT, messages=image)
        assert response.status_code == 400
        assert "messages[0].content[0].type" in response.json()["error"]["message"]


async def test_a_final_message_can_be_continued(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        messages = [*HELLO, {"role": "assistant", "content": "world"}]
        asked: dict[str, Any] = {"messages": messages, "continue_final_message": True, "max_tokens": 1}
        assert (await server.post(CHAT, **asked)).status_code == 200
        assert tokenizer.decode(server.engine.submits[0].prompt_token_ids.tolist()).endswith("assistant: world")
        response = await server.post(CHAT, **asked, add_generation_prompt=True)
        assert response.status_code == 400


async def test_tools_are_refused_unless_none_may_be_chosen(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        tools = [{"type": "function", "function": {"name": "f"}}]
        response = await server.post(CHAT, messages=HELLO, tools=tools)
        assert response.status_code == 400 and response.json()["error"]["param"] == "tools"
        response = await server.post(CHAT, messages=HELLO, tools=tools, tool_choice="none", max_tokens=1)
        assert response.status_code == 200


# ---- errors ------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str | None]] = [
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, "prompt"),
    (TEXT, {"prompt": [1, "x", True]}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [300]}, "prompt"),
    (TEXT, {"prompt": [10**30]}, "prompt"),
    (TEXT, {"prompt": [5] * 128}, "prompt"),
    (TEXT, {"prompt": [[5]] * 5000}, "prompt"),
    (TEXT, {"prompt": "x" * 1_000_000}, "prompt"),
    (TEXT, {"prompt": "x", "cache_salt": "s" * 2000}, "cache_salt"),
    (TEXT, {"prompt": "x", "user": "s" * 2000}, "user"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 1_000_000}]}, "prompt"),
    (TEXT, {"prompt": [5] * 100, "max_tokens": 29}, "max_tokens"),
    (TEXT, {"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (TEXT, {"prompt": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
    (TEXT, {"prompt": "x", "temperature": -1}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (TEXT, {"prompt": "x", "top_p": 0}, "top_p"),
    (TEXT, {"prompt": "x", "n": 0}, "n"),
    (TEXT, {"prompt": "x", "n": 65}, "n"),
    (TEXT, {"prompt": "x", "stop": [""]}, "stop"),
    (TEXT, {"prompt": "x", "stop": [1]}, "stop"),
    (TEXT, {"prompt": "x", "seed": 2**64}, "seed"),
    (TEXT, {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "stop_token_ids": [300]}, "stop_token_ids"),
    (TEXT, {"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    (TEXT, {"prompt": "x", "stream": "yes"}, "stream"),
    (TEXT, {"prompt": "x", "stream_options": 3}, "stream_options"),
    (TEXT, {"prompt": "x", "priority": 2**40}, "priority"),
    (TEXT, {"prompt": "x", "deadline_ms": 0}, "deadline_ms"),
    (TEXT, {"prompt": "x", "deadline_ms": 1.5}, "deadline_ms"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
    (TEXT, {"prompt": "x", "best_of": 4}, "best_of"),
    (TEXT, {"prompt": "x", "request_id": "a\nb"}, "request_id"),
    (TEXT, {"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "forbidden", "content": "x"}]}, "messages"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 65}, "logprobs"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 10_000}, "max_completion_tokens"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
    ("/detokenize", {"tokens": [300]}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
async def test_a_bad_value_is_a_400_that_names_its_field(
    tokenizer: Tokenizer, path: str, body: dict[str, Any], param: str | None
) -> None:
    async with serving(tokenizer) as server:
        response = await server.post(path, **body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["type"] == "BadRequestError" and error["code"] == 400
        assert error["param"] == param, error
        assert len(error["message"]) < 1000
        assert not server.engine.submits and len(server.link.table) == 0


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
     b'{"prompt": "\\ud800"}', b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}'],
)  # fmt: skip
async def test_a_body_that_is_no_request_is_a_400(tokenizer: Tokenizer, raw: bytes) -> None:
    async with serving(tokenizer) as server:
        for path in (TEXT, CHAT):
            assert (await server.http.post(path, content=raw)).status_code == 400


async def test_nested_values_deep_inside_messages_do_no_harm(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        bomb: Any = "x"
        for _ in range(150):
            bomb = [bomb]
        response = await server.post(CHAT, messages=[{"role": "user", "content": "x", "name": bomb}], max_tokens=1)
        assert response.status_code in (200, 400)
        response = await server.post(CHAT, messages=[{"role": "user", "content": bomb}])
        assert response.status_code == 400


async def test_a_body_over_the_limit_is_a_413(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_app, "MAX_BODY_BYTES", 1000)

    async def pieces() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async with serving(tokenizer) as server:
        for content in (b"x" * 1001, pieces()):
            response = await server.http.post(TEXT, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["type"] == "PayloadTooLargeError"


async def test_an_unknown_model_and_an_unknown_route_are_404(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        response = await server.post(TEXT, model="other", prompt="x")
        assert response.status_code == 404
        assert response.json()["error"]["message"] == "The model `other` does not exist."
        assert response.json()["error"]["type"] == "NotFoundError"
        assert (await server.http.get("/v1/models/other")).status_code == 404
        assert (await server.http.get("/nothing")).json()["error"]["code"] == 404
        assert (await server.http.get(TEXT)).json()["error"]["type"] == "MethodNotAllowedError"


async def test_unknown_fields_are_let_through_and_named_once(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tokenizer) as server:
        for _ in range(2):
            assert (await server.post(TEXT, prompt="x", max_tokens=1, sparkle=1)).status_code == 200
        assert caplog.text.count("sparkle") == 1


async def test_no_prompt_is_ever_logged(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="fast_inference")
    async with serving(tokenizer) as server:
        response = await server.post(TEXT, prompt="hello secret", max_tokens=1)
        assert response.headers["x-request-id"] in caplog.text
        assert "secret" not in caplog.text


async def test_a_full_queue_is_a_503_with_a_retry_hint(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        server.engine.full = True
        response = await server.post(TEXT, prompt="x", n=3)
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "ServiceUnavailableError"
        assert len(server.link.table) == 0


async def test_a_deadline_that_can_not_be_met_is_a_429_with_the_seconds_that_are_missing(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        server.engine.rejecting = StreamEnd(
            key=0, reason="rejected", code="deadline_unreachable", message="late", param="deadline_ms", retry_after=2.3
        )
        response = await server.post(TEXT, prompt="x", deadline_ms=10)
        assert response.status_code == 429 and response.headers["retry-after"] == "3"
        assert response.json()["error"] == {
            "message": "late", "type": "TooManyRequestsError", "param": "deadline_ms", "code": 429
        }  # fmt: skip


@pytest.mark.parametrize(
    ("api_key", "headers", "body", "client"),
    [
        (None, {"x-client-id": "team"}, {"user": "alice"}, "alice"),
        (None, {"x-client-id": "team", "authorization": "Bearer mine"}, {}, "team"),
        ("ours", {"x-client-id": "team", "authorization": "Bearer ours"}, {}, "team"),
        ("ours", {"authorization": "Bearer ours"}, {}, "127.0.0.1"),
        (None, {}, {}, "127.0.0.1"),
    ],
)
async def test_who_asks_is_the_user_the_header_or_the_address(
    tokenizer: Tokenizer, api_key: str | None, headers: dict[str, str], body: dict[str, str], client: str
) -> None:
    async with serving(tokenizer, config=EngineConfig(model="double", api_key=api_key)) as server:
        response = await server.http.post(TEXT, json={"prompt": "x", "max_tokens": 1, **body}, headers=headers)
        assert response.status_code == 200, response.text
        assert server.engine.submits[0].client == client


async def test_keys_that_the_server_does_not_check_tell_clients_apart_by_their_hash(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        for key in ("one", "two", "one"):
            await server.http.post(
                TEXT, json={"prompt": "x", "max_tokens": 1}, headers={"authorization": f"Bearer {key}"}
            )
        first, second, third = (submit.client for submit in server.engine.submits)
        assert first == third != second and first.startswith("key-") and "one" not in first


async def test_before_the_engine_is_known_requests_are_put_off(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, attached=False) as server:
        assert (await server.post(TEXT, prompt="x")).status_code == 503
        assert (await server.http.get("/health")).status_code == 503
        assert (await server.http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [("rejected", "invalid_request", 400), ("rejected", "overloaded", 503), ("error", "engine_dead", 500),
     ("error", "something_new", 500)],
)  # fmt: skip
async def test_what_the_scheduler_refuses_becomes_the_http_status(
    tokenizer: Tokenizer, stream: bool, reason: str, code: str, status: int
) -> None:
    async with serving(tokenizer) as server:
        server.engine.rejecting = StreamEnd(key=0, reason=reason, code=code, message="needs 99 blocks", param="prompt")
        response = await server.post(TEXT, prompt="x", stream=stream, n=2)
        assert response.status_code == status
        assert response.json()["error"]["message"] == "needs 99 blocks"


async def test_an_error_in_mid_stream_is_an_event_before_done(tokenizer: Tokenizer) -> None:
    engine = EngineDouble()
    async with serving(tokenizer, engine=engine) as server:
        asking = asyncio.ensure_future(server.events(TEXT, prompt="x", max_tokens=100))
        while not any(s.made for s in engine.running.values()):
            await asyncio.sleep(0.001)
        engine.silent = True
        await server.link.drain(0.0)
        events = await asking
        assert events[-1]["error"]["type"] == "InternalServerError"
        assert text_of(events[:-1]).startswith(" w7")
        assert engine.aborted and (await server.post(TEXT, prompt="x")).status_code == 503


async def test_an_internal_error_tells_no_paths(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        message = "file '/root/secret/model.bin' at 0x7f00deadbeef failed"
        server.engine.rejecting = StreamEnd(key=0, reason="error", code="internal_error", message=message)
        told = (await server.post(TEXT, prompt="x")).json()["error"]["message"]
        assert "/root" not in told and "0x7f" not in told and told.startswith("file '")


# ---- leaving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_aborts_its_sequences(tokenizer: Tokenizer, stream: bool) -> None:
    async with serving(tokenizer) as server:
        gone = asyncio.Event()
        raw = json.dumps({"prompt": "x", "max_tokens": 120, "n": 2, "stream": stream}).encode()
        server.engine.silent = not stream  # nothing comes: the disconnect alone must be seen
        serving_it = asyncio.ensure_future(_ask(server, TEXT, raw, gone))
        while not server.engine.running:
            await asyncio.sleep(0.001)
        gone.set()
        await asyncio.wait_for(serving_it, 5)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(server.engine.aborted) == 2
        server.engine.silent = False
        server.turn()
        assert not server.engine.running and len(server.link.table) == 0


async def _ask(server: Server, path: str, raw: bytes, gone: asyncio.Event) -> list[Any]:
    """One request over plain ASGI; the client leaves when `gone` is set."""
    given = False
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "root_path": "",
    }
    await server.app(scope, receive, send)
    return sent


async def test_an_abort_that_does_not_fit_is_sent_again(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        real, server.link._send = server.link._send, lambda message: False
        server.link.abort([5])
        await asyncio.sleep(0.001)
        assert not server.engine.aborted
        server.link._send = real
        server.link.tick()
        assert server.engine.aborted == [5]


# ---- the other routes --------------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize_are_inverse(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        body = (await server.post("/tokenize", prompt="hello world", return_token_strs=True)).json()
        assert body["count"] == 2 and body["max_model_len"] == 128 and body["token_strs"] == ["hello", "Ġworld"]
        assert (await server.post("/detokenize", tokens=body["tokens"])).json() == {"prompt": "hello world"}
        chat = (await server.post("/tokenize", messages=HELLO, add_generation_prompt=False)).json()
        assert tokenizer.decode(chat["tokens"]) == "<|im|>user: hello\n"


async def test_models_version_load_and_health_answer(tokenizer: Tokenizer) -> None:
    config = EngineConfig(model="/somewhere/double", served_model_name="nice")
    async with serving(tokenizer, config=config) as server:
        body = (await server.http.get("/v1/models")).json()
        [card] = body["data"]
        assert body["object"] == "list" and card["id"] == "nice" and card["max_model_len"] == 128
        assert (await server.http.get("/v1/models/nice")).json()["id"] == "nice"
        assert "version" in (await server.http.get("/version")).json()
        assert (await server.http.get("/load")).json() == {"server_load": 0}
        for path in ("/health", "/ping"):
            response = await server.http.get(path)
            assert response.status_code == 200 and response.content == b""


async def test_health_fails_when_the_scheduler_is_silent_or_nothing_moves(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tokenizer) as server:
        pulse = server.link.pulse
        pulse.answered -= 100
        response = await server.http.get("/health")
        assert response.status_code == 503 and "scheduler" in response.text
        pulse.answered += 100
        pulse.stepped -= 1000
        response = await server.http.get("/health")
        assert response.status_code == 503 and "no step" in response.text


async def test_metrics_show_the_schedulers_figures_and_this_frontends_times(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        await server.post(TEXT, prompt="hello", max_tokens=4)
        response = await server.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        labels = '{engine="0",model_name="double"}'
        page = response.text
        assert f"fast_inference:num_requests_running{labels} 0.0" in page
        assert f"fast_inference:request_prompt_tokens_count{labels} 1.0" in page
        assert f"fast_inference:request_generation_tokens_sum{labels} 4.0" in page
        assert f"fast_inference:time_to_first_token_seconds_count{labels} 1.0" in page
        assert f"fast_inference:inter_token_latency_seconds_count{labels} 3.0" in page
        assert f"fast_inference:e2e_request_latency_seconds_sum{labels} 2.0" in page
        success = 'fast_inference:request_success_total{engine="0",finished_reason="length",model_name="double"} 1.0'
        assert success in page
        for name in (
            "kv_cache_usage_perc",
            "num_preemptions_total",
            "num_swap_preemptions_total",
            "swapped_out_blocks_total",
            "swapped_in_blocks_total",
            "host_kv_blocks",
            "host_kv_blocks_used",
            "host_kv_blocks_cached",
            "cache_config_info",
            "prefix_cache_hits_total",
            "host_cache_hits_total",
        ):
            assert f"fast_inference:{name}{{" in page


async def test_a_key_guards_all_but_health(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer, config=EngineConfig(model="double", api_key="sesame")) as server:
        for path in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nothing"):
            response = await server.http.get(path)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "AuthenticationError"
            response = await server.http.get(path, headers={"authorization": "Bearer wrong"})
            assert response.status_code == 401
        assert (await server.http.get("/health")).status_code == 200
        response = await server.http.get("/v1/models", headers={"authorization": "Bearer sesame"})
        assert response.status_code == 200


async def test_a_request_id_goes_in_and_out(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        headers = {"x-request-id": "abc-1"}
        response = await server.http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers=headers)
        assert response.headers["x-request-id"] == "abc-1" and response.json()["id"] == "cmpl-abc-1"
        response = await server.http.get("/version", headers={"x-request-id": "x" * 1000})
        assert len(response.headers["x-request-id"]) == 32


async def test_the_routes_are_described(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as server:
        paths = (await server.http.get("/openapi.json")).json()["paths"]
        assert {TEXT, CHAT, "/tokenize", "/detokenize", "/health", "/metrics", "/v1/models"} <= set(paths)


async def test_without_a_tokenizer_token_ids_work_and_text_is_refused() -> None:
    async with serving(None) as server:
        response = await server.post(TEXT, prompt=[5, 6], max_tokens=2, return_token_ids=True, logprobs=0)
        assert response.json()["choices"][0]["token_ids"] == [7, 8]
        for path, body in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": HELLO}), ("/tokenize", {"prompt": "x"})):
            assert (await server.post(path, **body)).status_code == 400
