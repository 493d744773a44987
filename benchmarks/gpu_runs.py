"""Runs the cells of `gpu_cells.py` on an engine, and makes figures of their times.

Owns what is timed and the statistics, which are those of `shared/gpu/peer_vllm.py`; must not know floors or tables.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fast_inference import LLM, AsyncClient, Client, SamplingParams
from fast_inference.protocol.sampling import RequestOutputKind
from gpu_cells import Cell
from workloads import Request

SHORT_REPEATS = 9  # of a cell that takes milliseconds


@dataclass(slots=True)
class Stream:
    """One request of an online cell, in seconds."""

    first: float = 0.0  # from when it was due to its first token
    gaps: list[float] = field(default_factory=list)  # one for each later token; tokens that come together share theirs
    last: float = 0.0
    tokens: int = 0

    def arrived(self, count: int, now: float, due: float) -> None:
        """`count` tokens have come."""
        if not self.tokens:
            self.first = now - due
        else:
            self.gaps += [(now - self.last) / count] * count
        self.last = now
        self.tokens += count


def seconds_of(llm: LLM, cell: Cell) -> float:
    """One run through the engine, until the caller has every token. Raises `RuntimeError` where tokens are missing."""
    prompts = [{"prompt_token_ids": request.prompt_token_ids} for request in cell.requests]
    params = [_params(request, **cell.sampling) for request in cell.requests]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    if tokens != cell.output_tokens:
        raise RuntimeError(f"{cell.name}: {tokens} of {cell.output_tokens} tokens came")
    return seconds


def settle(endpoint: str, patience: float = 60.0) -> float:
    """Wait until an idle engine has recorded all its steps, which it does after it is ready, if it does; how many
    seconds that took. Raises `RuntimeError` where it takes more than `patience`."""
    began = time.perf_counter()
    one_token = _params(Request([0], 1))
    with Client(endpoint) as client:
        while True:
            client.generate({"prompt_token_ids": [0]}, one_token)  # its step's result tells how many are missing
            taken = time.perf_counter() - began
            if not (missing := client.get_stats().steps_to_record):
                return taken
            if taken > patience:
                raise RuntimeError(f"{missing} steps are still not recorded after {taken:.0f} s")
            time.sleep(0.5)


def run_offline(llm: LLM, cell: Cell, repeats: int) -> dict[str, Any]:
    """The figures of a cell, after a warm-up on its own prompts, and the device's mean gap between its decode steps."""
    seconds_of(llm, cell.warm_up())
    before = llm.get_stats()
    found = _measured(llm, cell, repeats)
    after = llm.get_stats()
    gaps = after.gaps - before.gaps
    return found | {"gap_seconds": (after.gap_seconds - before.gap_seconds) / gaps if gaps else None}


def _measured(llm: LLM, cell: Cell, repeats: int) -> dict[str, Any]:
    if cell.name == "single":
        return _run_single(llm, cell, repeats)
    if cell.name == "prefill1":
        times = [seconds_of(llm, cell) for _ in range(SHORT_REPEATS)]
        return {"seconds": times, "figures": {cell.name: statistics.median(times) * 1e3}}
    times = [seconds_of(llm, cell) for _ in range(repeats)]
    tokens = cell.prompt_tokens if cell.name == "prefill" else cell.output_tokens
    return {"seconds": times, "figures": {cell.name: tokens / statistics.median(times)}}


def _run_single(llm: LLM, cell: Cell, repeats: int) -> dict[str, Any]:
    """One request alone: the time of its first token, and of each further one."""
    (request,) = cell.requests
    one = Cell(cell.name, [Request(request.prompt_token_ids, 1)])
    seconds_of(llm, cell)
    firsts = [seconds_of(llm, one) for _ in range(SHORT_REPEATS)]
    wholes = [seconds_of(llm, cell) for _ in range(repeats)]
    first, whole = statistics.median(firsts), statistics.median(wholes)
    token = (whole - first) / (request.max_tokens - 1)
    return {
        "seconds": wholes,
        "first_seconds": firsts,
        "figures": {cell.name: token * 1e3, f"{cell.name} ttft": first * 1e3},
    }


async def run_online(endpoint: str, requests: Sequence[Request]) -> dict[str, Any]:
    """Send each request when it is due; times count from then. The figures are `summary`'s."""
    async with AsyncClient(endpoint) as client:
        start = time.perf_counter() + 0.05
        streams = await asyncio.gather(*(_stream(client, request, start + request.arrival) for request in requests))
    return summary(streams, max(stream.last for stream in streams) - start)


async def _stream(client: AsyncClient, request: Request, due: float) -> Stream:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    stream = Stream()
    params = _params(request, output_kind=RequestOutputKind.DELTA)
    async for output in client.generate({"prompt_token_ids": request.prompt_token_ids}, params):
        if count := len(output.outputs[0].token_ids):
            stream.arrived(count, time.perf_counter(), due)
    if stream.tokens != request.max_tokens:
        raise RuntimeError(f"{stream.tokens} of {request.max_tokens} tokens came")
    return stream


def summary(streams: Sequence[Stream], seconds: float) -> dict[str, Any]:
    """Mean, median and p99 of an online cell's times in ms, and its rate."""
    return {
        "requests": len(streams),
        "seconds": seconds,
        "output_tokens_per_second": sum(stream.tokens for stream in streams) / seconds,
        "ttft_ms": quantiles([stream.first * 1e3 for stream in streams]),
        "itl_ms": quantiles([gap * 1e3 for stream in streams for gap in stream.gaps]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50 and p99, a quantile being the value nearest to its place."""
    ordered = sorted(values)
    return {
        "mean": sum(ordered) / len(ordered),
        "p50": ordered[round(0.5 * (len(ordered) - 1))],
        "p99": ordered[round(0.99 * (len(ordered) - 1))],
    }


def _params(request: Request, **sampling: Any) -> SamplingParams:
    """Exactly `max_tokens` tokens, greedy unless `sampling` says otherwise, ids without text."""
    fields = {"temperature": 0.0, **sampling}
    return SamplingParams(max_tokens=request.max_tokens, ignore_eos=True, detokenize=False, **fields)
