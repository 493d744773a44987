"""A running engine as its HTTP clients and its operator see it."""

import asyncio
import json
import random

import httpx
import openai
import pytest

from .engine_process import EngineProcess, run_command

CHAT = [{"role": "user", "content": "hello"}]


def test_the_models_endpoint_names_what_is_served(engine: EngineProcess) -> None:
    models = httpx.get(f"{engine.url}/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_a_completion_over_plain_http(engine: EngineProcess) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 7, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{engine.url}/v1/completions", json=body, timeout=30).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7


def test_the_openai_client_gets_the_same_text_streamed_and_whole(engine: EngineProcess) -> None:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none") as client:
        asked = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        with client.chat.completions.create(**asked, stream=True) as chunks:  # type: ignore[call-overload]
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == streamed
    assert whole.usage.completion_tokens <= 12


def test_each_actor_is_a_process_with_its_name(engine: EngineProcess) -> None:
    assert set(engine.actors()) == {"scheduler", "executor", "detokenizer", "frontend-0"}


def test_status_shows_the_engine_and_its_processes(engine: EngineProcess) -> None:
    lines = run_command("status", "--json").stdout.splitlines()
    mine = next(entry for entry in map(json.loads, lines) if entry["pid"] == engine.process.pid)
    assert mine["model"] == "tiny" and mine["url"] == engine.url and mine["stats"]["num_blocks"] == 512
    assert any("executor" in process["title"] for process in mine["processes"])
    assert "KV cache" in run_command("status").stdout


def test_generate_and_chat_use_a_running_engine(engine: EngineProcess) -> None:
    done = run_command("generate", "hello", "--endpoint", engine.endpoint, "--max-tokens", "4", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr


def test_a_client_that_goes_away_mid_stream_frees_its_blocks(engine: EngineProcess) -> None:
    engine.wait_idle()
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{engine.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
        assert engine.metric("kv_blocks_used") > 0
    engine.wait_idle(3)


@pytest.mark.slow
async def test_a_thousand_requests_with_aborts_and_bad_bodies_leave_every_block_free(engine: EngineProcess) -> None:
    before = engine.actors()
    draw = random.Random(7)
    room = asyncio.Semaphore(64)
    outcomes = {"done": 0, "left": 0, "refused": 0}

    async def one(client: httpx.AsyncClient) -> None:
        kind = draw.random()
        length, tokens = draw.randrange(1, 200), draw.randrange(1, 24)
        async with room:
            if kind < 0.2:
                response = await client.post("/v1/completions", content=bad_body(draw))
                assert 400 <= response.status_code < 500, response.text
                outcomes["refused"] += 1
            elif kind < 0.4:
                body = {"prompt": "x" * length, "max_tokens": 400, "ignore_eos": True, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    async for _ in response.aiter_lines():
                        if draw.random() < 0.5:
                            break
                outcomes["left"] += 1
            else:
                body = {"prompt": "x" * length, "max_tokens": tokens, "ignore_eos": True, "n": draw.choice((1, 1, 2))}
                response = await client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                assert response.json()["usage"]["completion_tokens"] == tokens * body["n"]
                outcomes["done"] += 1

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=engine.url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(1000)))
    assert min(outcomes.values()) > 100
    engine.wait_idle(20)
    assert {role: p.pid for role, p in engine.actors().items()} == {role: p.pid for role, p in before.items()}


def bad_body(draw: random.Random) -> bytes:
    """Something that is no completion request."""
    return draw.choice(
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b'{"prompt": 7.5}',
            b'{"prompt": "x", "max_tokens": -1}',
            b'{"prompt": "x", "temperature": "hot"}',
            b'{"prompt": "x", "top_p": 3}',
            b'{"prompt": [99999999]}',
            b'{"prompt": "x", "model": "another"}',
            b'{"prompt": "x", "n": 100000}',
            b'{"prompt": "x", "logit_bias": {"a": "b"}}',
            json.dumps({"prompt": "x" * 100_000}).encode(),
            json.dumps({"prompt": "x", "stop": ["y"] * 1000}).encode(),
        ]
    )
