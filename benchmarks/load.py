"""Load on a running engine: requests sent when they are due, each stream's events timed.

Owns the arrival loop and the two ways in, HTTP and the native client. Must not know the workload or the figures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx
from fast_inference import AsyncClient, AsyncEngine, SamplingParams
from fast_inference.protocol.errors import EngineError
from fast_inference.protocol.sampling import RequestOutputKind
from records import Record
from workloads import Request


class Sender(Protocol):
    """One way into an engine."""

    async def send(self, request: Request, on_event: Callable[[], None]) -> int:
        """Send `request` and wait for its end; `on_event()` is called as each event with new tokens arrives.

        Returns the number of tokens that came. Raises `httpx.HTTPError` or `EngineError`.
        """


async def drive(
    sender: Sender, requests: Sequence[Request], max_concurrency: int | None, done: Callable[[], None]
) -> list[Record]:
    """Send every request when it is due and wait for all of them; `done()` is called as each one ends.

    Latencies count from the time at which a request is due. With `max_concurrency` a request that finds every place
    taken is due when it gets one, as if its client had waited for an earlier answer.
    """
    places = asyncio.Semaphore(max_concurrency or len(requests))
    start = time.perf_counter()

    async def one(request: Request) -> Record:
        await asyncio.sleep(request.arrival - (time.perf_counter() - start))
        waits = places.locked()
        async with places:
            due = time.perf_counter() - start if waits else request.arrival
            record = Record(prompt_tokens=len(request.prompt_token_ids), arrival=due)
            try:
                record.output_tokens = await sender.send(
                    request, lambda: record.events.append(time.perf_counter() - start)
                )
            except (EngineError, httpx.HTTPError) as error:
                record.error = f"{type(error).__name__}: {error}"
        if not record.error and (record.output_tokens != request.max_tokens or not record.events):
            record.error = f"{record.output_tokens} of {request.max_tokens} tokens in {len(record.events)} events"
        record.end = record.events[-1] if record.events else 0.0
        done()
        return record

    return list(await asyncio.gather(*(one(request) for request in requests)))


class NativeSender:
    """Through an `AsyncEngine` or an `AsyncClient`, which have the same `generate`."""

    def __init__(self, client: AsyncEngine | AsyncClient) -> None:
        self._client = client

    async def send(self, request: Request, on_event: Callable[[], None]) -> int:
        tokens = 0
        params = greedy_params(request, output_kind=RequestOutputKind.DELTA)
        async for output in self._client.generate({"prompt_token_ids": request.prompt_token_ids}, params):
            if new := len(output.outputs[0].token_ids):
                tokens += new
                on_event()
        return tokens


class HttpSender:
    """Through `/v1/completions` as server-sent events. `model`: the name that the server knows it by."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def send(self, request: Request, on_event: Callable[[], None]) -> int:
        body = {
            "model": self._model,
            "prompt": request.prompt_token_ids,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        tokens = 0
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode()
                raise httpx.HTTPStatusError(
                    f"{response.status_code}: {text}", request=response.request, response=response
                )
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if chunk.get("choices"):
                    on_event()
                if usage := chunk.get("usage"):
                    tokens = usage["completion_tokens"]
        return tokens


def greedy_params(request: Request, **more: Any) -> SamplingParams:
    """Greedy, exactly `max_tokens` tokens, ids without text."""
    return SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False, **more)
